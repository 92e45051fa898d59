"""What `compile` promises whatever happens: a floor, no side effects, resume, and a program in the end."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
import torch
from any_event import bits
from hypothesis import given
from hypothesis import settings as quickly
from hypothesis import strategies as st
from scripted_engine import (
    GOLD,
    SEED,
    Checked,
    PlantedModel,
    ScriptedEngine,
    chat_answer,
    checked_engine,
    checked_rows,
    exact_match,
    instruction_in,
    instruction_of,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
    shared_tokenizer,
    value_in,
    word_tokenizer,
    worth_of,
)

from dspy_greater import local_lm
from dspy_greater.errors import RunDirectoryError
from dspy_greater.model.engine import Engine
from dspy_greater.prompt.chat_template import render_chat
from dspy_greater.prompt.layout import Layout
from dspy_greater.run import lines
from dspy_greater.run.events import SearchStarted, StepTaken, Validated
from dspy_greater.run.serialise import from_json, to_json

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]
BOTH = pytest.mark.parametrize("variant", ["default", "paper"])
ROOT = Path(__file__).resolve().parent.parent


def compiled(engine: Any = None, *, program: Any = None, **settings: Any) -> Any:
    program = program or program_on(engine or planted_engine())
    return optimizer(**settings).compile(program, TRAIN, valset=VALIDATION)


def validated(program: Any) -> dict[str, float]:
    return program.detailed_results.predictors[0].validation


# ---- 1. never worse than the seed


@pytest.mark.slow
@BOTH
def test_the_seed_is_returned_when_every_candidate_is_worse_on_the_validation_rows(variant: str) -> None:
    def overfitted(prompt: str) -> str:
        """A worthy instruction helps on the training rows and harms on the others."""
        question, worthy = value_in(prompt), worth_of(instruction_in(prompt)) > 0
        right = GOLD["apples" if "apples" in question else "pears"][0]
        trained = question in {row.question for row in TRAIN}
        return chat_answer(reasoning="I look.", answer=right if worthy == trained else "never")

    engine = ScriptedEngine(overfitted, model=planted_engine().model)
    better = compiled(engine, selections=30, variant=variant)
    details = better.detailed_results
    assert max(step.chosen.score for step in details.steps) == 1.0  # it looked like a success
    assert min(validated(better).values()) == 0.0
    assert instruction_of(better) == SEED
    assert better.score == details.seed_score == 1.0


@pytest.mark.slow
def test_a_tie_on_the_validation_rows_keeps_the_seed() -> None:
    engine = ScriptedEngine(lambda prompt: chat_answer(reasoning="I look.", answer="yes"), model=planted_engine().model)
    better = compiled(engine, selections=30)
    assert len(validated(better)) > 1 and len(set(validated(better).values())) == 1
    assert instruction_of(better) == SEED


def test_no_steps_return_the_seed() -> None:
    better = compiled(steps=0)
    assert instruction_of(better) == SEED and validated(better) == {SEED: 0.0}


@pytest.mark.slow
@given(st.integers(0, 2**20))
@quickly(max_examples=5, deadline=None, derandomize=True)
def test_whatever_the_model_answers_the_result_is_not_worse_than_the_seed(salt: int) -> None:
    def fickle(prompt: str) -> str:
        answer = random.Random(f"{salt}{instruction_in(prompt)}{value_in(prompt)}").choice(["yes", "no"])
        return chat_answer(reasoning="I look.", answer=answer)

    better = compiled(ScriptedEngine(fickle), steps=1)
    evaluate = dspy.Evaluate(devset=VALIDATION, metric=exact_match, num_threads=1, display_progress=False)
    student = program_on(ScriptedEngine(fickle))
    assert evaluate(better).score >= evaluate(student).score


# ---- 2. what is scored is what is deployed


@BOTH
def test_the_deployed_instruction_has_the_token_ids_that_were_scored(variant: str) -> None:
    engine = planted_engine()
    better = compiled(engine, steps=4, variant=variant)
    [scored] = [
        each for each in better.detailed_results.predictors[0].finalists if each.instruction == instruction_of(better)
    ]
    signature = better.predictors()[0].signature
    messages = dspy.ChatAdapter().format(signature, [], {"question": TRAIN[0].question})
    text = render_chat(engine.tokenizer, messages)
    encoded = engine.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = text.index(scored.instruction)
    stop = start + len(scored.instruction)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    assert tuple(token for token, (a, b) in pairs if a < stop and b > start) == scored.token_ids


class Listening(ScriptedEngine):
    """Remembers the token ids it was asked to continue."""

    def generate(self, requests: Any) -> Any:
        self.asked = {*getattr(self, "asked", ()), *(request.prompt for request in requests)}
        return super().generate(requests)


@pytest.mark.filterwarnings("ignore:The program failed on all:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The data contains the special tokens")
@pytest.mark.parametrize("suffix", ["", " é – 漢\n\tx", " <|end|> x"])
@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter])
def test_the_loss_is_taken_behind_exactly_the_tokens_that_the_model_was_given(adapter: Any, suffix: str) -> None:
    engine = Listening(obedient_script, model=planted_engine().model)
    rows = [dspy.Example(question=row.question + suffix, answer=row.answer).with_inputs("question") for row in TRAIN]
    with dspy.context(adapter=adapter()):
        better = optimizer(steps=1, train_rows=2).compile(program_on(engine), rows[:2], valset=rows[2:])
        layout = Layout(engine.tokenizer, adapter(), better.predictors()[0].signature)
    scored = [step.chosen for step in better.detailed_results.steps] + [better.detailed_results.predictors[0].seed]
    assert all(each.rows for each in scored)
    for each in scored:
        for row in each.rows:
            supervised = layout.supervised(each.instruction, row.inputs, row.written, "answer", "yes")
            prompt = layout.prompt(each.instruction, row.inputs).token_ids
            assert supervised.token_ids[: len(prompt)] == prompt
            assert prompt in engine.asked


@pytest.mark.slow
def test_the_prompts_that_were_generated_from_are_those_that_dspy_sends_afterwards() -> None:
    engine = ScriptedEngine(obedient_script, model=planted_engine().model)
    better = compiled(engine, selections=30)
    searched = set(engine.prompts)
    engine.prompts.clear()
    for row in [*TRAIN, *VALIDATION]:
        better(question=row.question)
    assert set(engine.prompts) <= searched


# ---- 3. nothing of the caller's is changed


def random_states() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


def test_the_random_states_are_left_alone() -> None:
    program = program_on(planted_engine())  # DSPy draws a number when a module is made
    before = random_states()
    compiled(program=program)
    assert random_states() == before


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_global_random_states() -> None:
    first = compiled()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert bits(compiled().detailed_results.steps) == bits(first.detailed_results.steps)


def test_the_model_keeps_its_weights_mode_gradients_and_hooks() -> None:
    model = PlantedModel(shared_tokenizer()).train()
    model.embedding.eval()
    model.prior.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled(Engine(model, shared_tokenizer(), name="handed in"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == {
        "embedding.weight": True,
        "prior": False,
    }
    assert all(value.grad is None for value in model.parameters())
    assert (model.training, model.embedding.training) == (True, False)
    hooks = [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()]
    assert hooks == [(), ()]


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"

    def state() -> Any:
        return (
            tokenizer.padding_side,
            tokenizer.truncation_side,
            tokenizer.pad_token,
            tokenizer.chat_template,
            tokenizer.backend_tokenizer.to_str(),
            len(tokenizer),
        )

    before = state()
    compiled(Engine(PlantedModel(tokenizer), tokenizer, name="handed in"))
    assert state() == before


@pytest.mark.filterwarnings("ignore:The program failed on all:RuntimeWarning")
def test_the_student_the_rows_and_the_signature_are_left_alone() -> None:
    program = program_on(planted_engine())
    predictor = program.predictors()[0]
    predictor.demos = [dspy.Example(question="one of apples", reasoning="r", answer="yes")]
    signature, lm, state = predictor.signature, predictor.lm, copy.deepcopy(program.dump_state())
    rows = copy.deepcopy(TRAIN)
    better = compiled(program=program)
    assert program.dump_state() == state
    assert (predictor.signature, predictor.lm) == (signature, lm)
    assert signature.instructions == SEED
    assert TRAIN == rows
    assert lm.cache is False and lm.kwargs == better.predictors()[0].lm.kwargs
    assert not program._compiled


def test_dspys_settings_are_left_alone() -> None:
    before = {name: dspy.settings.get(name) for name in ("lm", "adapter", "trace", "callbacks", "max_errors")}
    compiled()
    assert {name: dspy.settings.get(name) for name in before} == before


def test_no_thread_is_left_running() -> None:
    before = threading.active_count()
    compiled()
    assert threading.active_count() == before


# ---- 4. a kill loses at most one step


class Killed(BaseException):
    """Stands for a process that dies."""


def killed_after(step: int) -> Any:
    def listener(event: Any) -> None:
        if isinstance(event, StepTaken) and event.step == step:
            raise Killed

    return listener


def record(program: Any) -> Any:
    """Everything a run decided, as text that shows every bit; not what it took in seconds."""
    results = program.detailed_results
    events = [json.dumps(to_json(replace(step, seconds=0.0))) for step in results.steps]
    rest = [
        [getattr(each, field.name) for field in fields(each) if field.name != "steps"] for each in results.predictors
    ]
    return events, repr(rest), instruction_of(program)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "step"), [("default", 0), ("default", 1), ("default", 3), ("paper", 1)])
def test_a_run_that_was_killed_goes_on_to_the_bit_identical_result(tmp_path: Path, variant: str, step: int) -> None:
    whole = compiled(steps=4, variant=variant)
    with pytest.raises(Killed):
        compiled(steps=4, variant=variant, log_dir=tmp_path, listeners=[killed_after(step)])
    heard: list[Any] = []
    resumed = compiled(steps=4, variant=variant, log_dir=tmp_path, listeners=[heard.append])
    assert record(resumed) == record(whole)
    assert [event.step for event in heard if isinstance(event, StepTaken)] == [0, 1, 2, 3]


def test_a_metric_that_scores_no_candidate_ends_a_resumed_run_no_more_than_one_left_alone(tmp_path: Path) -> None:
    def script(prompt: str) -> str:
        return chat_answer(reasoning="read it", answer="yes" if instruction_in(prompt) == SEED else "maybe")

    def metric(example: Any, prediction: Any, trace: object = None) -> Any:
        no_score = prediction.answer == "maybe" and example in TRAIN
        return None if no_score else prediction.answer == example.answer

    engine = ScriptedEngine(script)
    whole = compiled(engine, steps=3, metric=metric)
    with pytest.raises(Killed):
        compiled(engine, steps=3, metric=metric, log_dir=tmp_path, listeners=[killed_after(0)])
    resumed = compiled(engine, steps=3, metric=metric, log_dir=tmp_path)
    assert record(resumed) == record(whole) and len(whole.detailed_results.steps) == 3


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_step_goes_on_too(tmp_path: Path) -> None:
    def listener(event: Any) -> None:
        if isinstance(event, SearchStarted):
            raise Killed

    with pytest.raises(Killed):
        compiled(log_dir=tmp_path, listeners=[listener])
    assert record(compiled(log_dir=tmp_path)) == record(compiled())


@pytest.mark.slow
def test_recorded_steps_are_not_computed_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        compiled(steps=4, log_dir=tmp_path, listeners=[killed_after(2)])
    engine = planted_engine()
    resumed = compiled(engine, steps=4, log_dir=tmp_path).detailed_results
    assert resumed.spent["backward_tokens"] == resumed.steps[3].spent["backward_tokens"]
    finished = compiled(planted_engine(), steps=4, log_dir=tmp_path).detailed_results
    assert finished.spent["backward_tokens"] == 0
    assert bits(finished.steps) == bits(resumed.steps)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 40, 1000])
def test_a_torn_last_line_costs_that_step_only(tmp_path: Path, cut: int) -> None:
    whole = compiled(steps=2, log_dir=tmp_path / "whole")
    journal = tmp_path / "whole" / "journal.jsonl"
    content = journal.read_bytes()
    assert len(lines.read(content).payloads) == 5  # header, seed, two steps, validation
    journal.write_bytes(content[:-cut])
    assert record(compiled(steps=2, log_dir=tmp_path / "whole")) == record(whole)
    events = [
        bits([from_json(json.loads(each)) for each in lines.read(data).payloads[1:]])
        for data in (content, journal.read_bytes())
    ]
    assert events[0] == events[1]  # all but the seconds


@pytest.mark.slow
def test_a_program_of_several_predictors_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    model = planted_engine().model

    def run(**options: Any) -> Any:
        rows = checked_rows([*TRAIN, *VALIDATION])
        return optimizer(selections=30, **options).compile(Checked(checked_engine(model)), rows)

    def die_in_the_second(event: Any) -> None:
        if isinstance(event, StepTaken) and event.predictor == "second.predict" and event.step == 0:
            raise Killed

    whole = run()
    with pytest.raises(Killed):
        run(log_dir=tmp_path, listeners=[die_in_the_second])
    assert record(run(log_dir=tmp_path)) == record(whole)


KILLED_RUN = """
import os, signal, sys
from test_promises import compiled
from dspy_greater.run.events import StepTaken

def listener(event):
    if isinstance(event, StepTaken) and event.step == 1:
        os.kill(os.getpid(), signal.SIGKILL)

compiled(steps=3, log_dir=sys.argv[1], listeners=[listener])
"""


@pytest.mark.slow
def test_a_process_that_was_killed_is_continued_by_another_one(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(lines.read((tmp_path / "journal.jsonl").read_bytes()).payloads) == 4  # header, seed, two steps
    assert record(compiled(steps=3, log_dir=tmp_path)) == record(compiled(steps=3))


def budget_after(whole: Any, steps: int) -> int:
    """A budget that is reached in this step of a run, and not before it."""
    details = whole.detailed_results
    spent = [details.predictors[0].seed_spent, *(step.spent for step in details.steps[:steps])]
    return sum(each["generated_tokens"] for each in spent[:-1]) + 1


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1])
def test_a_run_with_a_budget_that_was_killed_stops_at_the_same_step(tmp_path: Path, step: int) -> None:
    budget = budget_after(compiled(steps=5), 3)
    whole = compiled(steps=5, max_generated_tokens=budget)
    assert len(whole.detailed_results.steps) == 3
    with pytest.raises(Killed):
        compiled(steps=5, max_generated_tokens=budget, log_dir=tmp_path, listeners=[killed_after(step)])
    resumed = compiled(steps=5, max_generated_tokens=budget, log_dir=tmp_path)
    assert record(resumed) == record(whole)
    assert resumed.detailed_results.out_of_budget == whole.detailed_results.out_of_budget
    assert resumed.detailed_results.spent_by_phase == whole.detailed_results.spent_by_phase
    again = compiled(planted_engine(), steps=5, max_generated_tokens=budget, log_dir=tmp_path)
    assert record(again) == record(whole)


# ---- changed inputs


def test_changed_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, steps=1)
    with pytest.raises(RunDirectoryError, match=r"belongs to a run that began otherwise.*\n  settings.steps: 1 -> 2\n"):
        compiled(log_dir=tmp_path, steps=2)
    with pytest.raises(RunDirectoryError, match=r"\n  settings.top_k: 10 -> 11\nGo on with what it began with, use an"):
        compiled(log_dir=tmp_path, steps=1, top_k=11)
    with pytest.raises(RunDirectoryError, match=r"\n  seed: 0 -> 7\n"):
        compiled(log_dir=tmp_path, steps=1, seed=7)


def test_a_journal_of_a_version_with_fewer_settings_is_refused_with_those_it_lacks(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, steps=1)
    journal = tmp_path / "journal.jsonl"
    header = json.loads(lines.read(journal.read_bytes()).payloads[0])
    for name in ("max_generated_tokens", "baseline_scale"):
        del header["identity"]["settings"][name]
    journal.unlink()
    file = lines.LineFile(journal)
    file.append(json.dumps(header).encode("ascii"))
    file.close()
    with pytest.raises(RunDirectoryError, match=r"\n  settings.baseline_scale: absent -> 0.5\n"):
        compiled(log_dir=tmp_path, steps=1)


def test_changed_rows_are_refused(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, steps=1)
    with pytest.raises(RunDirectoryError, match=r'\n  train: "\w{16}" -> "\w{16}"\n'):
        optimizer(steps=1, log_dir=tmp_path).compile(
            program_on(planted_engine()), planted_rows(24)[4:8], valset=VALIDATION
        )


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, steps=1)
    with pytest.raises(RunDirectoryError, match=r'\n  predictors.predict.weights: "planted@\w+:float32" -> "planted@'):
        compiled(planted_engine(seed=1), log_dir=tmp_path, steps=1)


def test_a_changed_program_is_refused(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, steps=1)
    program = program_on(planted_engine(), instruction="Count them.")
    with pytest.raises(RunDirectoryError, match=r'\n  predictors.predict.instruction: "Please say it now." -> "Count'):
        compiled(program=program, log_dir=tmp_path, steps=1)


def test_a_changed_metric_is_refused(tmp_path: Path) -> None:
    def lenient(example: Any, prediction: Any, trace: Any = None) -> bool:
        return bool(prediction.answer)

    compiled(log_dir=tmp_path, steps=1)
    with pytest.raises(RunDirectoryError, match=r'\n  metric: "exact_match" -> ".*lenient"\n'):
        compiled(log_dir=tmp_path, steps=1, metric=lenient)


# ---- 6. Ctrl-C


def interrupting(*moments: Any) -> Any:
    """A listener that presses Ctrl-C at these events."""
    left = list(moments)

    def listener(event: Any) -> None:
        if left and isinstance(event, left[0][0]) and getattr(event, "step", 0) == left[0][1]:
            left.pop(0)
            raise KeyboardInterrupt

    return listener


@BOTH
def test_an_interrupt_returns_the_best_so_far(variant: str) -> None:
    better = compiled(steps=50, variant=variant, listeners=[interrupting((StepTaken, 1))])
    details = better.detailed_results
    assert details.interrupted and len(details.steps) == 2
    assert worth_of(instruction_of(better)) > 0 and better.score == 1.0


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself this signal")
def test_the_signal_of_ctrl_c_returns_the_best_so_far() -> None:
    # A process that a shell started in the background ignores the signal until somebody says otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = threading.Event()
    program = program_on(planted_engine())

    def press() -> None:
        started.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken) and event.step == 2:
            started.set()

    try:
        better = compiled(program=program, steps=100_000, listeners=[listener])
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert better.detailed_results.interrupted
    assert 3 <= len(better.detailed_results.steps) < 100_000
    assert better.score == 1.0


@pytest.mark.slow
def test_an_interrupt_in_the_middle_of_generation_returns_the_best_so_far() -> None:
    engine = ScriptedEngine(obedient_script, model=planted_engine().model)
    asked: list[Any] = []

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken):
            asked[:] = ["a step was taken"]

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if asked:
            asked.append(example)
        if len(asked) == 3:  # in the second step
            raise KeyboardInterrupt
        return exact_match(example, prediction)

    better = compiled(engine, steps=50, selections=30, metric=metric, listeners=[listener])
    assert better.detailed_results.interrupted
    assert len(better.detailed_results.steps) == 1
    assert worth_of(instruction_of(better)) > 0


def test_a_second_interrupt_raises() -> None:
    with pytest.raises(KeyboardInterrupt):
        compiled(steps=50, listeners=[interrupting((StepTaken, 1), (Validated, 0))])


def test_an_interrupt_before_anything_was_found_raises() -> None:
    with pytest.raises(KeyboardInterrupt):
        compiled(steps=50, listeners=[interrupting((SearchStarted, 0))])


@pytest.mark.slow
def test_an_interrupted_run_can_be_continued(tmp_path: Path) -> None:
    compiled(steps=3, log_dir=tmp_path, listeners=[interrupting((StepTaken, 0))])
    assert record(compiled(steps=3, log_dir=tmp_path)) == record(compiled(steps=3))


@pytest.mark.slow
def test_an_interrupt_in_the_second_predictor_keeps_what_the_first_one_gained() -> None:
    model = planted_engine().model
    engine = ScriptedEngine(
        lambda prompt: obedient_script(prompt).replace(
            "## answer ##", "## verdict ##" if "`verdict`" in prompt else "## answer ##"
        ),
        model=model,
    )

    class Checked(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = program_on(engine)
            self.second = program_on(engine, signature="question -> verdict")

        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer=self.first(question=question).answer, verdict=self.second(question=question))

    rows = [dspy.Example(**row.toDict(), verdict=row.answer).with_inputs("question") for row in planted_rows(8)]

    def listener(event: Any) -> None:
        if isinstance(event, SearchStarted) and event.predictor == "second.predict":
            raise KeyboardInterrupt

    better = optimizer(selections=30, listeners=[listener]).compile(Checked(), rows)
    assert better.detailed_results.interrupted
    assert worth_of(instruction_of(better.first)) > 0
    assert instruction_of(better.second) == SEED


def test_a_first_interrupt_in_the_validation_returns_the_seed_and_a_second_one_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("dspy_greater.search.predictor_search.validation_scores", interrupted)
    program = compiled(steps=2)
    assert program.detailed_results.interrupted
    assert instruction_of(program) == SEED
    assert len(program.detailed_results.steps) == 2
    with pytest.raises(KeyboardInterrupt):
        compiled(steps=2, listeners=[interrupting((StepTaken, 0))])


def test_a_finished_run_is_returned_from_its_journal_without_a_token_generated(tmp_path: Path) -> None:
    first = compiled(steps=2, log_dir=tmp_path)
    engine = planted_engine()
    again = compiled(engine, steps=2, log_dir=tmp_path)
    assert engine.counters.generated_tokens == 0
    assert record(again) == record(first)


# ---- faults


def test_a_log_dir_that_cannot_be_one_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    engine = ScriptedEngine(obedient_script)
    with pytest.raises(RunDirectoryError, match=r"file.* cannot be created or written: .*Give log_dir a directory"):
        compiled(engine, log_dir=tmp_path / "file")
    assert engine.batches == []


def test_a_second_run_in_the_same_directory_fails_at_once_and_names_the_first(tmp_path: Path) -> None:
    tried: list[str] = []

    def listener(event: Any) -> None:
        if isinstance(event, SearchStarted):
            with pytest.raises(
                RunDirectoryError, match=f"in use by another run: process {os.getpid()} on host"
            ) as found:
                compiled(log_dir=tmp_path)
            tried.append(str(found.value))

    better = compiled(log_dir=tmp_path, listeners=[listener])
    assert len(tried) == 1 and better.score == 1.0


@pytest.mark.slow
def test_a_full_disk_costs_the_journal_and_not_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled(steps=3)
    original, written = lines.LineFile.append, []

    def full(self: Any, payload: bytes) -> None:
        written.append(payload)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        original(self, payload)

    monkeypatch.setattr(lines.LineFile, "append", full)
    with pytest.warns(RuntimeWarning, match="can no longer be written: No space left on device. The search goes on"):
        better = compiled(steps=3, log_dir=tmp_path)
    assert record(better) == record(whole)
    assert len(written) == 4  # one loud warning, then in memory
    monkeypatch.undo()
    assert record(compiled(steps=3, log_dir=tmp_path)) == record(whole)


def test_a_listener_that_raises_is_reported_and_does_not_end_the_search() -> None:
    def listener(event: Any) -> None:
        raise ValueError("my plot is broken")

    with pytest.warns(RuntimeWarning, match="listener raised ValueError: my plot is broken .at SearchStarted."):
        better = compiled(listeners=[listener])
    assert better.score == 1.0


@pytest.mark.filterwarnings("ignore:The program failed on all:RuntimeWarning")
def test_reasoning_that_never_ends_is_bounded_and_still_scored() -> None:
    program = program_on(planted_engine(), max_tokens=8)
    details = compiled(program=program, steps=1).detailed_results
    seed = details.predictors[0].seed
    assert all(row.error and "AdapterParseError" in row.error for row in seed.rows)
    assert all(row.written["reasoning"] for row in seed.rows)
    assert seed.objective[1] < float("inf")
    assert details.steps[0].candidates


@pytest.mark.slow
def test_special_tokens_inside_the_rows_are_searched_as_plain_text() -> None:
    rows = [
        dspy.Example(question=f"{row.question} <|end|>", answer=row.answer).with_inputs("question") for row in TRAIN
    ]
    engine = ScriptedEngine(obedient_script, model=planted_engine().model)
    with pytest.warns(UserWarning, match="The data contains the special tokens <.end.>"):
        better = optimizer(selections=30).compile(program_on(engine), rows, valset=VALIDATION)
    assert better.score == 1.0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_steps_and_another_seed_other_rows() -> None:
    first, again, other = compiled(), compiled(), compiled(seed=1)
    assert record(first) == record(again)
    assert first.detailed_results.spent == again.detailed_results.spent
    assert record(first) != record(other)


def test_a_cached_answer_never_stands_in_for_a_generation_of_the_search() -> None:
    def run() -> int:
        engine = ScriptedEngine(obedient_script, name="cached")
        program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
        program.set_lm(local_lm(engine, cache=True))
        compiled(program=program, steps=1)
        return len(engine.prompts)

    assert run() == run() > 0
