"""Rollouts: every program on every row, in batches that do not depend on the timing of threads."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from dspy.utils.dummies import DummyLM
from scripted_engine import (
    SEED,
    ScriptedEngine,
    chat_answer,
    exact_match,
    instruction_in,
    obedient_script,
    planted_engine,
    planted_rows,
    program_on,
    value_in,
)
from scripted_text import text_lm

from dspy_greater import local_lm, served_lm
from dspy_greater.errors import MetricError, ProgramError
from dspy_greater.lm.served import with_settings
from dspy_greater.metric import RowMetric
from dspy_greater.program.asked_lm import for_search
from dspy_greater.program.rollout import Running, pin_lms, roll_out, searching_copy, uncached
from dspy_greater.program.traced_run import carrying
from dspy_greater.program.validation import validation_scores

ROWS = planted_rows(6)
MATCH = RowMetric(exact_match)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")


class Chain(dspy.Module):
    """Calls its predictor as often as the question has words, and waits now and then."""

    def __init__(self, engine: Any, *, pause: float = 0.0) -> None:
        super().__init__()
        self.step = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
        self.step.set_lm(local_lm(engine, cache=False, max_tokens=64))
        self.pause = pause

    def forward(self, question: str) -> Any:
        found = None
        for _ in question.split():
            time.sleep(random.random() * self.pause)
            found = self.step(question=question)
        return found


class InThreads(Chain):
    """Asks its language model from threads of its own."""

    def forward(self, question: str) -> Any:
        with ThreadPoolExecutor(2) as pool:
            asked = carrying(lambda text: self.step(question=text))
            return list(pool.map(asked, [question, question]))[-1]


class Fragile(Chain):
    """Fails on some rows, before or after it has asked."""

    def forward(self, question: str) -> Any:
        if "two" in question:
            raise ValueError("two is too many")
        found = self.step(question=question)
        if "three" in question:
            raise OSError("disk")
        return found


def quickly(work: Any, *, seconds: float = 20.0) -> Any:
    """The result of `work`, or a failure when it hangs."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(carrying(work))
    try:
        return future.result(timeout=seconds)
    finally:
        pool.shutdown(wait=False)


def test_there_is_one_rollout_per_program_and_row_in_their_order() -> None:
    engine = ScriptedEngine(obedient_script)
    programs = [program_on(engine, instruction=text) for text in ("Say it.", "Please count.")]
    found = roll_out(programs, ROWS, MATCH, Running(2))
    assert [[each.score for each in group] for group in found] == [[0.0] * 6, [1.0] * 6]
    for group in found:
        assert [each.calls["predict"].inputs["question"] for each in group] == [row.question for row in ROWS]
        assert all(each.calls["predict"].outputs["reasoning"] == "I look." for each in group)


def test_all_programs_and_rows_share_one_batch() -> None:
    engine = ScriptedEngine(obedient_script)
    programs = [program_on(engine, instruction=text) for text in ("Say it.", "Please count.")]
    roll_out(programs, ROWS, MATCH, Running(1))
    assert engine.batches == [12]


def test_the_predictors_of_a_program_are_looked_up_once_and_not_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = dspy.Module.named_predictors

    def counted(program: Any) -> Any:
        asked.append(id(program))
        return original(program)

    program = program_on(planted_engine())
    monkeypatch.setattr(dspy.Module, "named_predictors", counted)
    counts = []
    for rows in (ROWS[:1], ROWS):
        asked.clear()
        roll_out([program], rows, MATCH, Running(2))
        counts.append(len(asked))
    assert counts[0] == counts[1]


def test_no_rows_give_no_rollouts() -> None:
    engine = ScriptedEngine(obedient_script)
    assert roll_out([program_on(engine), program_on(engine)], [], MATCH, Running(1)) == [[], []]
    assert roll_out([], ROWS, MATCH, Running(1)) == []


def test_batches_counters_and_texts_are_the_same_whatever_the_timing() -> None:
    def run(pause: float) -> Any:
        engine = planted_engine()
        chain = Chain(engine, pause=pause)
        found = roll_out([chain], ROWS + planted_rows(14)[10:], MATCH, Running(4))
        sizes = chain.step.predict.lm.engine.batcher.batch_sizes
        return (
            sizes,
            engine.counters,
            [each.calls["step.predict"].outputs for group in found for each in group],
        )

    calm = run(0.0)
    assert calm[0] == (10, 10, 10, 4)
    assert run(0.01) == run(0.003) == calm


def test_a_row_on_which_the_program_fails_says_why_and_holds_nobody_up() -> None:
    engine = ScriptedEngine(obedient_script)
    [found] = quickly(lambda: roll_out([Fragile(engine)], planted_rows(8), MATCH, Running(4)))
    errors = [each.error for each in found]
    assert errors == [None, None, *["ValueError: two is too many"] * 2, *["OSError: disk"] * 2, None, None]
    assert [each.score for each in found] == [0.0] * 8
    assert [sorted(each.calls) for each in found[2:5]] == [[], [], ["step.predict"]]


def test_what_could_not_be_parsed_is_kept_as_text() -> None:
    engine = ScriptedEngine(lambda prompt: "I would rather not.")
    [[found]] = roll_out([program_on(engine)], ROWS[:1], MATCH, Running(4))
    call = found.calls["predict"]
    assert call.completion == "I would rather not." and call.error is not None
    assert found.error is not None and found.error.startswith("AdapterParseError")
    assert engine.batches == [1]  # not tried again through another adapter


def test_a_program_that_asks_from_threads_of_its_own_does_not_hang() -> None:
    engine = ScriptedEngine(obedient_script)
    [found] = quickly(lambda: roll_out([InThreads(engine)], ROWS, MATCH, Running(4)))
    assert [each.error for each in found] == [None] * 6
    assert sum(engine.batches) == 12


def test_a_metric_may_ask_the_same_model() -> None:
    engine = ScriptedEngine(lambda prompt: chat_answer(reasoning="I look.", answer="yes"))
    judge = program_on(engine, instruction="Judge it.")

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        return judge(question=prediction.answer).answer == "yes"

    [found] = quickly(lambda: roll_out([program_on(engine)], ROWS, RowMetric(metric), Running(4)))
    assert [each.score for each in found] == [1.0] * 6
    assert engine.batches == [6, 6]


def test_a_metric_that_fails_on_a_row_scores_zero_there_and_says_why() -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if "two" in example.question:
            raise KeyError("gold")
        return True

    [found] = roll_out([program_on(ScriptedEngine(obedient_script))], ROWS, RowMetric(metric), Running(4))
    assert [each.score for each in found] == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert found[2].error == "the metric raised KeyError: 'gold'"


def test_a_metric_that_returns_no_score_ends_the_rollouts_at_once() -> None:
    program = program_on(ScriptedEngine(obedient_script))
    with pytest.raises(MetricError, match="returned 'good' of type str"):
        quickly(lambda: roll_out([program], ROWS, RowMetric(lambda example, prediction: "good"), Running(4)))


def test_an_interrupt_ends_the_rollouts_and_the_next_ones_work() -> None:
    engine = ScriptedEngine(obedient_script)

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out([program_on(engine)], ROWS, RowMetric(metric), Running(4))
    [found] = quickly(lambda: roll_out([program_on(engine)], ROWS, MATCH, Running(4)))
    assert len(found) == 6


def test_when_no_call_of_a_language_model_succeeds_the_reason_is_an_error() -> None:
    engine = ScriptedEngine(obedient_script)
    long = [dspy.Example(question="maybe " * 2000, answer="yes").with_inputs("question")] * 2
    with pytest.raises(ProgramError, match="could not be called on any of the 2 rows.*leaves no room for an answer"):
        roll_out([program_on(engine)], long, MATCH, Running(2))
    [found] = roll_out([program_on(engine)], [*long, *ROWS], MATCH, Running(2))
    assert [each.error is None for each in found] == [False, False, *[True] * 6]


def test_the_settings_of_the_calling_thread_hold_in_all_threads() -> None:
    lm = local_lm(ScriptedEngine(obedient_script), cache=False)
    program = dspy.ChainOfThought("question -> answer")
    with dspy.context(lm=lm):
        [found] = roll_out([program], ROWS, MATCH, Running(4))
    assert [each.error for each in found] == [None] * 6


def test_programs_on_two_models_run_on_both() -> None:
    first, second = ScriptedEngine(obedient_script), ScriptedEngine(obedient_script, name="other")

    class Two(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = program_on(first), program_on(second)

        def forward(self, question: str) -> Any:
            self.first(question=question)
            return self.second(question=question)

    [found] = quickly(lambda: roll_out([Two()], ROWS, MATCH, Running(4)))
    assert [each.error for each in found] == [None] * 6
    assert sum(first.batches) == sum(second.batches) == 6


def test_a_server_is_asked_by_as_many_threads_as_the_settings_say() -> None:
    at_once, most, lock = [0], [0], threading.Lock()

    class Slow(DummyLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            with lock:
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
            time.sleep(0.03)
            with lock:
                at_once[0] -= 1
            return super().forward(*args, **options)

    program = dspy.Predict("question -> answer")
    program.set_lm(Slow([{"answer": "yes"}] * 20))
    roll_out([program], ROWS, MATCH, Running(3))
    assert most[0] == 3


# ---- copies


def test_a_searching_copy_shares_weights_and_asks_them_instead_of_a_cache() -> None:
    engine = ScriptedEngine(obedient_script)
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    lm = local_lm(engine)
    program.set_lm(lm)
    copied = searching_copy(program, {"predict": "Please count."})
    predictor = copied.predictors()[0]
    assert predictor.signature.instructions == "Please count."
    assert predictor.lm.cache is False and predictor.lm.engine is lm.engine
    assert program.predictors()[0].lm is lm and lm.cache is True
    assert program.predictors()[0].signature.instructions == SEED


def test_a_searching_copy_leaves_the_cache_of_a_server_on() -> None:
    program = dspy.Predict("question -> answer")
    program.set_lm(dspy.LM("openai/gpt-4o", api_key="none"))
    assert searching_copy(program, {}).predictors()[0].lm is program.predictors()[0].lm


def sampled(search_seed: int, **own: Any) -> list[str]:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    program.set_lm(local_lm(planted_engine(sharpness=0.5), temperature=1.0, max_tokens=64, **own))
    program = searching_copy(program, {}, search_seed)
    [rollouts] = roll_out([program], ROWS * 4, MATCH, Running(4))
    return [str(rollout.calls["predict"].completion) for rollout in rollouts]


def test_a_searching_copy_at_a_temperature_draws_the_same_again() -> None:
    first = sampled(0)
    assert sampled(0) == first
    assert sampled(1) != first


def test_a_searching_copy_keeps_a_seed_that_the_lm_has() -> None:
    assert sampled(0, seed=7) == sampled(1, seed=7)


def test_the_predictors_of_a_searching_copy_do_not_share_their_draws() -> None:
    class Jury(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.jurors = [dspy.Predict("question -> answer") for _ in range(3)]
            self.set_lm(local_lm(ScriptedEngine(obedient_script), temperature=1.0))

    program = Jury()
    assert [juror.lm.kwargs["seed"] for juror in searching_copy(program, {}, 5).jurors] == [5, 6, 7]
    again = searching_copy(searching_copy(program, {}, 5), {}, 9)
    assert [juror.lm.kwargs["seed"] for juror in again.jurors] == [5, 6, 7]
    assert "seed" not in program.jurors[0].lm.kwargs


class Attempts(dspy.Module):
    """The best of three attempts of a module with two predictors, and another predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.best = dspy.BestOfN(module=TwoSteps(), N=3, reward_fn=lambda *_: 0.0, threshold=1.0)
        self.last = dspy.Predict(dspy.Signature("question -> answer", SEED))

    def forward(self, question: str) -> Any:
        self.best(question=question)
        return self.last(question=question)


class TwoSteps(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.draft = dspy.Predict(dspy.Signature("question -> answer", "Please draft it."))
        self.final = dspy.Predict(dspy.Signature("question -> answer", "Please end it."))

    def forward(self, question: str) -> Any:
        self.draft(question=question)
        return self.final(question=question)


def test_attempts_of_one_run_draw_anew_in_a_searching_copy_as_they_do_deployed() -> None:
    drawn: dict[str, list[int]] = {}

    class Seen(ScriptedEngine):
        def _write(self, request: Any) -> Any:
            text = self.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
            drawn.setdefault(instruction_in(text), []).append(request.seed)
            return super()._write(request)

    with dspy.context(lm=local_lm(Seen(obedient_script))):
        program = searching_copy(pin_lms(Attempts()), {})
        [[rollout]] = roll_out([program], ROWS[:1], MATCH, Running(4))
    assert rollout.error is None
    assert {text: len(set(seeds)) for text, seeds in drawn.items()} == {
        "Please draft it.": 3,
        "Please end it.": 3,
        SEED: 1,
    }


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
def test_attempts_over_a_server_run_in_a_search_and_when_a_row_is_asked_again(kind: Any) -> None:
    asked: list[str] = []

    def answer(request: Any) -> str:
        asked.append(request.instruction)
        return chat_answer(answer="yes")

    module = kind(module=TwoSteps(), N=2, reward_fn=lambda *_: 1.0, threshold=1.0)
    with dspy.context(lm=text_lm(answer)):
        program = pin_lms(module)
    for each in (program, searching_copy(program, {}), uncached(program)):
        assert each(question="one").answer == "yes"
    assert asked


def test_a_cached_lm_on_a_server_is_told_from_others_by_a_number_that_attempts_count_on_from() -> None:
    lm = for_search(dspy.LM("openai/model", api_base="http://127.0.0.1:1/v1"))
    several = with_settings(served_lm("openai/model", ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]), {"top_k": 1})
    assert type(lm.kwargs["rollout_id"]) is int and type(several.kwargs["rollout_id"]) is int


def test_two_threads_roll_out_on_one_model_at_once() -> None:
    engine = ScriptedEngine(obedient_script)
    programs = [Chain(engine, pause=0.002) for _ in range(2)]
    alone = [[each.score for each in roll_out([program], ROWS, MATCH, Running(4))[0]] for program in programs]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(roll_out, [program], ROWS, MATCH, Running(4)) for program in programs]
        assert [[each.score for each in run.result(20)[0]] for run in runs] == alone


def test_a_metric_that_fails_on_all_validation_rows_of_all_finalists_is_refused() -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        return prediction.answer == example.label

    program = program_on(ScriptedEngine(obedient_script))
    finalists = [{}, {"predict": "Please count."}]
    with pytest.raises(
        MetricError, match="The metric failed on all 6 validation rows; on the first, the metric raised AttributeError"
    ):
        validation_scores(program, finalists, ROWS, RowMetric(metric), running=Running(threads=1))


def test_a_pinned_program_carries_the_lm_it_would_use_now() -> None:
    now, own = DummyLM([{"answer": "a"}]), DummyLM([{"answer": "b"}])

    class Two(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")
            self.second.set_lm(own)

    program = Two()
    with dspy.context(lm=now):
        pinned = pin_lms(program)
    assert (pinned.first.lm, pinned.second.lm) == (now, own)
    assert program.first.lm is None


def test_what_the_script_reads_is_what_the_row_asks() -> None:
    engine = ScriptedEngine(obedient_script)
    roll_out([program_on(engine)], ROWS, MATCH, Running(4))
    assert sorted(value_in(prompt) for prompt in engine.prompts) == sorted(row.question for row in ROWS)


def test_validation_runs_programs_as_they_are_deployed_and_the_search_does_not() -> None:
    seen: list[bool] = []

    class Watching(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = dspy.Predict("question -> answer")

        def forward(self, question: str) -> dspy.Prediction:
            adapter = dspy.settings.adapter
            seen.append(True if adapter is None else adapter.use_json_adapter_fallback)
            return dspy.Prediction(answer="yes")

    program = Watching()
    program.set_lm(dspy.utils.DummyLM([{"answer": "yes"}]))
    row = dspy.Example(question="?", answer="yes").with_inputs("question")
    metric = RowMetric(lambda example, prediction, trace=None: True)
    roll_out([program], [row], metric, Running(1))
    roll_out([program], [row], metric, Running(1), deployed=True)
    validation_scores(program, [{}], [row], metric, running=Running(threads=1))
    assert seen == [False, True, True]
