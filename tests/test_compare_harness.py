"""The harness of the comparison: budgets, the run directory, the stand-in proposer, and a cell from end to end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import litellm
import numpy
import pytest
from dspy import lm15
from dspy.utils.exceptions import AdapterParseError
from dspy.utils.parallelizer import ParallelExecutor

from benchmarks.__main__ import main
from benchmarks.harness import bench, candidates, config, judging, models, phrasebook_formats, provider, run
from benchmarks.harness.adapter import SearchAdapter
from benchmarks.harness.budget import Budget, BudgetSpent, Usage
from benchmarks.harness.candidates import Candidate, Notebook
from benchmarks.harness.cells import Accuracy, Cell, CellKey, Cells, read, wilson
from benchmarks.harness.patience import rows_run_once
from benchmarks.harness.phrasebook import PhrasebookEngine, topics_of
from benchmarks.optimizers import OPTIMIZERS, Context, make
from benchmarks.optimizers import optimizer as registry
from benchmarks.pocket import grammar
from benchmarks.tasks import registry as tasks
from dspy_greater import local_lm
from dspy_greater.errors import DataError, ProgramError, RunDirectoryError, SettingsError
from dspy_greater.lm.asynchronous import AsyncEngine
from dspy_greater.model.counters import Counters
from dspy_greater.pocket.tasks import TASKS, generate

FITTING = "Keep the position and heading after every step."
# LiteLLM's types, as pydantic sees them when the first answer is made.
pytestmark = pytest.mark.filterwarnings("ignore:Item 'summary' on TypedDict class:UserWarning")

KEY = CellKey("pocket:navigate", "seed", 0, "pocket", "", "phrasebook", 500_000, 4)
Student = dspy.Module
Rows = Sequence[dspy.Example]


@pytest.fixture(scope="module")
def pocket() -> models.TaskModel:
    return models.task_model("pocket", {"max_tokens": 200})


class Stub:
    """An optimizer made of one function, entered in the registry under a name of its own."""

    about = "a stub"

    def __init__(self, name: str, act: Callable[..., Any]) -> None:
        self.name, self._act = name, act

    def optimise(self, student: Student, train: Rows, dev: Rows, context: Context) -> Any:
        return self._act(student, train, dev, context)


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    made: dict[str, Stub] = {}

    def enter(name: str, act: Callable[..., Any]) -> None:
        made[name] = Stub(name, act)
        monkeypatch.setitem(OPTIMIZERS, name, "unused:Unused")

    monkeypatch.setattr(bench, "make", lambda name: made[name] if name in made else make(name))
    return enter


def with_text(program: Student, text: str) -> Student:
    return Candidate((("predict", text),)).written_to(program)


def a_run(tmp_path: Path, *optimizers: str, **settings: Any) -> tuple[list[Cell], list[str], int]:
    lines: list[str] = []
    asked = {"tasks": ("pocket:navigate",), "optimizers": optimizers, "limit": 6, "out": tmp_path / "out", **settings}
    failed = run.run_all(config.RunConfig(**asked), lines.append)
    return read(tmp_path / "out" / "cells.jsonl"), lines, failed


# --- budget ---


def test_backward_tokens_count_twice_on_top_of_their_forward_pass() -> None:
    now = [Counters(prefilled_tokens=1000, generated_tokens=7)]
    budget = Budget(10_000, counters=lambda: now[0])
    now[0] = Counters(prefilled_tokens=1500, generated_tokens=27, backward_tokens=300)
    assert budget.spent.as_json() == {"charged": 500 + 20 + 600, "generated": 20, "prefilled": 500, "backward": 300}
    assert budget.remaining == 10_000 - 1120


def test_a_call_beyond_the_budget_is_refused_and_every_later_one_too() -> None:
    budget = Budget(100)
    budget.check()
    budget.add_served(Usage(1, 90, 10))
    for _ in range(2):
        with pytest.raises(BudgetSpent, match=r"The budget of 100 tokens is spent \(100\)"):
            budget.check()
    assert budget.stopped == "tokens"


def test_what_the_proposer_reads_and_writes_is_counted_and_not_charged() -> None:
    budget = Budget(100)
    budget.add_proposer(Usage(1, 5000, 50))
    budget.check()
    assert (budget.spent.charged, budget.proposer) == (0, Usage(1, 5000, 50))


def test_the_account_is_final_once_the_turn_is_over() -> None:
    now = [Counters()]
    budget = Budget(100, counters=lambda: now[0])
    now[0] = Counters(generated_tokens=10)
    assert budget.close().charged == 10
    now[0] = Counters(generated_tokens=90)
    budget.record({"predict": "Late."}, 1.0, 5)
    assert budget.spent.charged == 10 and len(budget.notebook) == 0
    with pytest.raises(BudgetSpent, match="turn is over"):
        budget.check()
    assert budget.stopped is None


def test_time_is_a_budget_as_well() -> None:
    budget = Budget(100, seconds=0.0)
    with pytest.raises(BudgetSpent, match="The time limit of 0 s is reached"):
        budget.check()
    assert budget.stopped == "seconds"


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="A budget of 0 tokens buys nothing"):
        Budget(0)


def test_running_out_is_not_an_exception_that_optimizers_swallow() -> None:
    assert not issubclass(BudgetSpent, Exception)


def test_running_out_ends_an_evaluation_in_many_threads(pocket: models.TaskModel) -> None:
    budget = Budget(1, counters=pocket.counters)
    budget.add_served(Usage(1, 1, 0))
    task = tasks.load("pocket:navigate", data_dir=None, seed=0, limit=8)
    with dspy.context(lm=pocket.metered(budget)), pytest.raises(BudgetSpent):
        dspy.Evaluate(devset=list(task.dev), metric=task.metric, num_threads=4)(task.make_program())


# --- candidates ---


def test_few_rows_are_no_match_for_many() -> None:
    notebook = Notebook()
    notebook.record({"predict": "lucky"}, 1.0, 3)
    notebook.record({"predict": "good"}, 0.95, 100)
    assert [dict(each.candidate.instructions)["predict"] for each in notebook.best(2)] == ["good", "lucky"]


def test_scores_of_one_candidate_are_taken_together() -> None:
    notebook, program = Notebook(), dspy.Predict("question -> answer")
    notebook.record(program, 1.0, 10)
    notebook.record(program.deepcopy(), 0.5, 30)
    (best,) = notebook.best(3)
    assert (best.score, best.rows) == (0.625, 40)


@pytest.mark.parametrize(("score", "rows"), [(80.0, 10), (float("nan"), 10), (0.5, 0), (-0.1, 3)])
def test_a_score_that_is_none_is_refused(score: float, rows: int) -> None:
    with pytest.raises(DataError, match="give a mean from 0 to 1 and at least one row"):
        Notebook().record({"predict": "x"}, score, rows)


def test_demonstrations_make_another_candidate_and_come_back() -> None:
    program = dspy.Predict("question -> answer")
    program.demos = [dspy.Example(question="1 + 1", answer="2")]
    candidate = Candidate.of(program)
    assert candidate != Candidate.of(dspy.Predict("question -> answer"))
    (demo,) = candidate.written_to(dspy.Predict("question -> answer")).predictors()[0].demos
    assert (demo.question, demo.answer) == ("1 + 1", "2")


def test_what_dspy_evaluates_is_recorded_as_it_was_when_it_began() -> None:
    notebook, program = Notebook(), dspy.Predict(dspy.Signature("question -> answer", "First."))

    def metric(example: Any, prediction: Any, trace: object = None) -> float:
        program.signature = program.signature.with_instructions("Changed meanwhile.")
        return 1.0

    rows = [dspy.Example(question=str(i), answer="a").with_inputs("question") for i in range(4)]
    lm = dspy.utils.DummyLM([{"answer": "a"}] * 4)
    with dspy.context(lm=lm, callbacks=[candidates.EvaluationWatch(notebook, program)]):
        dspy.Evaluate(devset=rows, metric=metric, num_threads=1)(program)
    (best,) = notebook.best(3)
    assert (best.candidate.instructions, best.score, best.rows) == ((("self", "First."),), 1.0, 4)


# --- cells ---


def test_a_cell_is_read_as_it_was_written(tmp_path: Path) -> None:
    cell = Cell(
        KEY,
        test=Accuracy.of([1, 0, 1]),
        seed_test=Accuracy.of([0, 0, 1], failed=1),
        instructions={"predict": "Think.\n„so“"},
        contenders=(judging.Contender("seed", {"predict": "A."}, {}, 0.5, 0.4, 10),),
    )
    Cells(tmp_path).append(cell)
    assert read(tmp_path / "cells.jsonl") == [cell]
    line = json.loads((tmp_path / "cells.jsonl").read_text())
    assert (line["task"], line["optimizer"], line["test"]["correct"]) == ("pocket:navigate", "seed", [1, 0, 1])


def test_a_torn_last_line_is_left_out_and_cut_off_before_the_next(tmp_path: Path) -> None:
    Cells(tmp_path).append(Cell(KEY))
    path = tmp_path / "cells.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    cells = Cells(tmp_path)
    assert cells.finished(KEY) == Cell(KEY)
    other = replace(KEY, seed=1)
    cells.append(Cell(other))
    assert [cell.key for cell in read(path)] == [KEY, other]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    Cells(tmp_path).append(Cell(KEY))
    path = tmp_path / "cells.jsonl"
    path.write_bytes(b'{"task": 1}\n' + path.read_bytes())
    with pytest.raises(RunDirectoryError, match="Line 1 of .*cells.jsonl is not a cell"):
        Cells(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_an_interval_holds_its_share_and_stays_between_nothing_and_all(share: float) -> None:
    low, high = wilson(share, 40)
    assert 0.0 <= low <= share <= high <= 1.0 and high - low > 0.05


# --- the stand-in proposer ---


def propose(*texts: str, seed: int = 0) -> str:
    roles = ["system", "user"] if len(texts) == 2 else ["user"]
    return PhrasebookEngine(seed).write([{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])


def is_instruction(text: str) -> bool:
    return 0 < len(text) < 200 and not any(mark in text for mark in "<>[]{}\n")


@pytest.mark.parametrize(
    ("request_text", "before", "after"),
    [
        ("Send it as <IMPROVED_TEXT>{the improved text}</IMPROVED_TEXT>", "<IMPROVED_TEXT>", "</IMPROVED_TEXT>"),
        ("Write an instruction that begins with <INS> and ends with </INS>: <INS> and </INS>", "<INS>", "</INS>"),
        ("Generate a final prompt bracketed with <prompt> and </prompt>.", "<prompt>", "</prompt>"),
        ("I gave:\n```\nDo.\n```\nProvide the new instructions within ``` blocks.", "```\n", "\n```"),
        ("Write your new text that is different from the old ones. Write the text in square brackets.", "[", "]"),
        ("I wrote 1 different improved prompts. Each prompt is wrapped with <START> and <END>.", "<START>", "<END>"),
        ("Generate a variation of the following instruction while keeping the semantic meaning.\nInput: Go.", "", ""),
        ("I gave a friend an instruction. Input: 1 Output: 2. The instruction was", "", ""),
    ],
)  # fmt: skip
def test_a_proposal_comes_in_the_format_that_is_asked_for(request_text: str, before: str, after: str) -> None:
    for seed in range(5):
        written = propose(request_text, seed=seed)
        assert written.startswith(before) and written.endswith(after)
        assert is_instruction(written.removeprefix(before).removesuffix(after))


def test_a_text_that_is_handed_over_in_tags_is_not_taken_for_the_format() -> None:
    written = propose(
        "The variable is the text within the span: <VARIABLE> Do it. </VARIABLE>. Give feedback and criticism to it."
    )
    assert "<" not in written and "instruction" in written


def test_as_many_reasons_are_given_as_are_asked_for() -> None:
    written = propose(
        "give 4 reasons why the prompt could have gotten these wrong. Wrap each reason with <START> and <END>"
    )
    assert written.count("<START>") == written.count("<END>") == 4


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()])
def test_fields_are_filled_by_type_and_name(adapter: dspy.Adapter) -> None:
    class Offer(dspy.Signature):
        """Propose."""

        module_names: list[str] = dspy.InputField()
        number: int = dspy.InputField()
        observations: str = dspy.OutputField()
        proposed_instruction: str = dspy.OutputField()
        proposed_prefix_for_output_field: str = dspy.OutputField()
        module_advice: dict[str, str] = dspy.OutputField()
        versions: list[str] = dspy.OutputField()
        useful: bool = dspy.OutputField()

    lm = models.prompt_model("phrasebook", 0, Budget(1))
    with dspy.context(lm=lm, adapter=adapter):
        offered = dspy.Predict(Offer)(module_names=["plan", "answer"], number=4)
    assert is_instruction(offered.proposed_instruction) and offered.observations
    assert set(offered.module_advice) == {"plan", "answer"} and len(offered.versions) == 4
    assert offered.proposed_prefix_for_output_field == "Answer:" and isinstance(offered.useful, bool)


def test_concerns_are_the_predictors_whose_prompts_are_shown() -> None:
    lm = models.prompt_model("phrasebook", 0, Budget(1))
    with dspy.context(lm=lm):
        offered = dspy.Predict("prompts -> feedback, concerns")(prompts="Predictor `plan`:\nA.\n\nPredictor `say`:\nB.")
    assert offered.concerns == "plan, say" and offered.feedback


def test_every_task_is_proposed_for_whatever_task_is_at_hand() -> None:
    engine, found = PhrasebookEngine(0), set()
    for _ in range(120):
        text = engine.write(
            [{"role": "user", "content": f"Propose an instruction for: {generate('navigate', random.Random(0))}"}]
        )
        found |= {task for task in TASKS if grammar.strength(text, task) >= 3}
    assert found == set(TASKS)


def test_a_variation_keeps_to_its_instruction_half_of_the_time() -> None:
    engine = PhrasebookEngine(0)
    request = [
        {"role": "user", "content": f"Generate a variation of the following instruction.\nInput: {FITTING}\nOutput:"}
    ]
    kept = sum(grammar.strength(engine.write(request), "navigate") >= 3 for _ in range(200))
    assert 60 < kept < 130


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_taken_for_an_instruction(task: str) -> None:
    rng = random.Random(0)
    assert not any(topics_of(line) for _ in range(200) for line in generate(task, rng).splitlines())


@pytest.mark.parametrize(("kind", "values"), [("Literal[1, 2]", {"1", "2"}), ("Literal['a', 'b c']", {"a", "b c"})])
def test_a_choice_is_one_of_those_that_are_offered(kind: str, values: set[str]) -> None:
    asked, draw = phrasebook_formats.read_request([{"role": "user", "content": "?"}]), lambda: "drawn"
    found = {phrasebook_formats._value("mood", kind, asked, draw, draw, random.Random(seed)) for seed in range(20)}
    assert found == values


def test_draws_follow_from_the_request_and_not_from_the_order_of_threads() -> None:
    requests = [[{"role": "user", "content": f"Propose a prompt. {number}"}] for number in range(6)]
    one, other = PhrasebookEngine(3), PhrasebookEngine(3)
    assert [one.write(each) for each in requests] == [other.write(each) for each in requests[::-1]][::-1]
    again = {one.write(requests[0]) for _ in range(12)}
    assert len(again) > 4


# --- the model behind LiteLLM ---


def ask(lm: Any, **sampling: Any) -> str:
    body = {"model": lm.model, "messages": chat(QUESTION), "temperature": 0.0, **sampling}
    return lm(lm15.request_from_openai_chat(body)).message.parts[0].text


def chat(question: str) -> list[dict[str, Any]]:
    program = tasks.load("pocket:navigate", data_dir=None, seed=0, limit=1).make_program()
    return dspy.ChatAdapter().format(program.predictors()[0].signature, [], {"question": question})


QUESTION = "If you follow these instructions, do you return to the starting point? Take 1 step.\nOptions:\n- Yes\n- No"


def test_litellm_reaches_the_very_weights_and_their_account(pocket: models.TaskModel) -> None:
    budget = Budget(10_000, counters=pocket.counters)
    with provider.served("task", pocket.metered(budget)) as name:
        answer = litellm.completion(model=name, messages=chat(QUESTION))
        text = answer.choices[0].message.content
    assert budget.close().generated == answer.usage.completion_tokens > 0
    assert text == ask(pocket.judge, max_tokens=200)
    with pytest.raises(SettingsError, match="has no engine object"), provider.served("x", dspy.LM("openai/x")):
        pass


def test_the_budget_reaches_through_litellm(pocket: models.TaskModel) -> None:
    budget = Budget(1, counters=pocket.counters)
    with provider.served("task", pocket.metered(budget)) as name:
        litellm.completion(model=name, messages=chat(QUESTION), max_tokens=2)
        with pytest.raises(BudgetSpent):
            litellm.completion(model=name, messages=chat(QUESTION), max_tokens=2)


def test_length_stop_samples_and_temperature_are_honoured() -> None:
    provider.register()
    call: dict[str, Any] = {"model": "dspy-greater/pocket", "messages": chat(QUESTION)}
    assert litellm.completion(**call, max_tokens=3).choices[0].finish_reason == "length"
    assert "answer" not in litellm.completion(**call, stop=["answer"]).choices[0].message.content
    drawn = litellm.completion(**call, n=6, temperature=2.0, seed=1, max_tokens=12)
    assert len({choice.message.content for choice in drawn.choices}) > 1
    assert drawn.usage.completion_tokens > 12


@pytest.mark.parametrize(
    "extra", [{"response_format": {"type": "json_object"}}, {"presence_penalty": 0.5}, {"logprobs": True}]
)
def test_what_cannot_be_honoured_is_refused_by_name(extra: dict[str, Any]) -> None:
    provider.register()
    with pytest.raises(litellm.exceptions.BadRequestError, match=f"does not honour {next(iter(extra))}; it takes"):
        litellm.completion(model="dspy-greater/pocket", messages=chat(QUESTION), **extra)


def test_streaming_is_refused() -> None:
    provider.register()
    with pytest.raises(litellm.exceptions.BadRequestError, match="does not stream"):
        list(litellm.completion(model="dspy-greater/pocket", messages=chat(QUESTION), stream=True))


# --- models ---


class Answering:
    """A server's model that says "hi", and what that cost."""

    supports_function_calling = supports_reasoning = supports_response_schema = False
    supported_params = frozenset({"temperature", "max_tokens"})

    def complete(self, request: lm15.Request) -> lm15.Response:
        usage = lm15.Usage(input_tokens=30, output_tokens=4)
        return lm15.Response(
            id=None, model=request.model, message=lm15.Message.assistant("hi"), finish_reason="stop", usage=usage
        )


def test_a_served_task_model_is_charged_by_the_usage_that_it_reports() -> None:
    budget = Budget(60)
    counted = models.CountedEngine(Answering(), budget.add_served, budget.check)
    lm = dspy.LM("local/served", engine=counted, cache=False)
    assert [lm("a"), lm("b")] == [["hi"], ["hi"]]
    assert budget.spent.charged == 68
    with pytest.raises(BudgetSpent):
        lm("c")


def test_a_proposer_on_the_same_weights_has_an_account_of_its_own(pocket: models.TaskModel) -> None:
    budget = Budget(1000, counters=pocket.counters)
    lm = models.prompt_model("dspy-greater/pocket", 0, budget)
    ask(lm, max_tokens=4)
    assert budget.spent.charged == 0 and budget.proposer.calls == 1 and budget.proposer.completion_tokens == 4


def test_a_proposer_that_is_the_task_model_is_charged_and_refused_once_the_budget_is_spent(
    pocket: models.TaskModel,
) -> None:
    budget = Budget(20, counters=pocket.counters)
    lm = models.prompt_model("self", 0, budget, pocket)
    ask(lm, max_tokens=4)
    written, read = budget.proposer.completion_tokens, budget.proposer.prompt_tokens
    assert (budget.proposer.calls, written) == (1, 4)
    assert budget.spent.generated == 4 and budget.spent.prefilled == read and budget.spent.charged >= 20
    with pytest.raises(BudgetSpent):
        ask(lm, max_tokens=5)


def test_a_proposer_writes_no_more_than_its_arguments_allow_and_a_cell_is_named_after_them(
    pocket: models.TaskModel,
) -> None:
    budget = Budget(10_000, counters=pocket.counters)
    lm = models.prompt_model("self", 0, budget, pocket, {"max_tokens": 3})
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm, adapter=adapter), pytest.raises(AdapterParseError):
        tasks.load("pocket:navigate", data_dir=None, seed=0, limit=1).make_program()(question=QUESTION)
    assert budget.proposer.completion_tokens == 3
    flags = ("--tasks", "gsm8k", "--optimizers", "seed", "--prompt-model", "self")
    assert [each.proposer for each in settings(*flags).keys()] == ["self"]
    named = settings(*flags, "--prompt-args", "temperature=1.0,max_tokens=300").keys()
    assert [each.proposer for each in named] == ["self,max_tokens=300,temperature=1.0"]


def test_a_served_proposer_that_is_the_task_model_is_charged_by_its_usage() -> None:
    served = models.TaskModel("openai/x", "openai/x", dspy.LM("local/x", engine=Answering(), cache=False), None)
    budget = Budget(1000)
    lm = models.prompt_model("self", 0, budget, served)
    lm("a")
    assert budget.spent.charged == budget.proposer.prompt_tokens + budget.proposer.completion_tokens == 34


def test_a_proposer_takes_what_the_model_behind_it_takes(pocket: models.TaskModel) -> None:
    lm = models.prompt_model("self", 0, Budget(10_000, counters=pocket.counters), pocket, {"max_tokens": 8})
    assert "response_format" not in lm.supported_params and not lm.supports_response_schema
    with dspy.context(lm=lm, adapter=SearchAdapter(dspy.Predict("question -> answer"))):
        with pytest.raises(AdapterParseError, match="JSONAdapter"):  # asked again in JSON, in words alone
            dspy.Predict("program -> tip")(program="p")
    served = models.prompt_model("openai/any", 0, Budget(1))
    assert "response_format" in served.supported_params


def test_a_served_task_model_is_asked_greedily_as_one_in_this_process() -> None:
    address = {"api_base": "http://localhost:1/v1", "api_key": "none"}
    for arguments, heat in ((address, 0.0), ({**address, "temperature": 0.7}, 0.7)):
        served = models.task_model("openai/some", arguments)
        assert served.judge.kwargs["temperature"] == served.metered(Budget(1)).kwargs["temperature"] == heat


def test_a_served_proposer_is_asked_at_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    whole = models.dspy.LM

    def lm(name: str, **settings: Any) -> Any:
        made.append({"name": name, **settings})
        return whole(name, **settings)

    monkeypatch.setattr(models.dspy, "LM", lm)
    arguments = {"api_base": "http://localhost:1/v1", "max_tokens": 50}
    proposer = models.prompt_model("openai/some", 0, Budget(1), arguments=arguments)
    assert made[0] == {"name": "openai/some", "cache": False, "api_base": "http://localhost:1/v1"}
    assert proposer.kwargs["max_tokens"] == 50 and "api_base" not in proposer.kwargs
    with pytest.raises(SettingsError, match="--prompt-args has api_base, and the proposer 'phrasebook' is not"):
        models.prompt_model("phrasebook", 0, Budget(1), arguments=arguments)


def test_a_proposer_that_is_the_task_model_needs_one() -> None:
    with pytest.raises(SettingsError, match="'self' is the task model, and there is none here"):
        models.prompt_model("self", 0, Budget(1))


def test_an_argument_that_means_nothing_to_the_model_is_refused() -> None:
    with pytest.raises(SettingsError, match="--model-args has colour, which an in-process model does not take"):
        models.task_model("pocket", {"colour": "red"})


class InJson:
    """A model that cannot write fields in DSPy's own form, only in JSON."""

    supports_function_calling = supports_reasoning = False
    supports_response_schema = True
    supported_params = frozenset({"temperature", "max_tokens", "response_format"})

    def complete(self, request: lm15.Request) -> lm15.Response:
        text = '{"answer": "yes", "tip": "Look twice."}'
        return lm15.Response(
            id=None,
            model=request.model,
            message=lm15.Message.assistant(text),
            finish_reason="stop",
            usage=lm15.Usage(input_tokens=3, output_tokens=9),
        )


def test_the_program_is_asked_once_and_a_proposer_again_in_json() -> None:
    program, proposer = dspy.Predict("question -> answer"), dspy.Predict("program -> tip")
    engine = InJson()
    lm = dspy.LM("local/json", engine=engine, async_engine=AsyncEngine(engine), cache=False)
    with dspy.context(lm=lm, adapter=SearchAdapter(program)):
        assert proposer(program="p").tip == "Look twice."
        for rewritten in (program, dspy.Predict(program.signature.with_instructions("Decide."))):
            with pytest.raises(AdapterParseError):
                rewritten(question="q")
        assert asyncio.run(proposer.acall(program="p")).tip == "Look twice."
        with pytest.raises(AdapterParseError):
            asyncio.run(program.acall(question="q"))


class InTurn:
    """A model that keeps to the format now and then."""

    supports_function_calling = supports_reasoning = supports_response_schema = False
    supported_params = frozenset({"temperature", "max_tokens"})

    def __init__(self, *texts: str) -> None:
        self.texts = itertools.cycle(texts)

    def complete(self, request: lm15.Request) -> lm15.Response:
        message = lm15.Message.assistant(next(self.texts))
        usage = lm15.Usage(input_tokens=3, output_tokens=9)
        return lm15.Response(id=None, model=request.model, message=message, finish_reason="stop", usage=usage)


@pytest.mark.parametrize(
    ("texts", "tips"),
    [
        (("[[ ## tip ## ]]\nLook twice.", "Look!", "[[ ## tip ## ]]\nCount."), ["Look twice.", "Count."]),
        (("Look!", '{"tip": "Look twice."}', "Look!", "{"), ["Look twice."]),  # the second three are asked in JSON
    ],
)
def test_of_several_samples_that_an_optimizer_asks_for_those_count_that_can_be_read(
    texts: tuple[str, ...], tips: list[str]
) -> None:
    lm = dspy.LM("local/turns", engine=InTurn(*texts), cache=False)
    with dspy.context(lm=lm, adapter=SearchAdapter(dspy.Predict("question -> answer"))):
        assert dspy.Predict("program -> tip", n=3, temperature=1.4)(program="p").completions.tip == tips
        lm = dspy.LM("local/turns", engine=InTurn("Look!"), cache=False)
        with dspy.context(lm=lm), pytest.raises(AdapterParseError):
            dspy.Predict("program -> tip", n=3, temperature=1.4)(program="p")


@pytest.mark.parametrize("patient", [True, False], ids=["in a cell", "by DSPy alone"])
def test_a_slow_row_is_run_once_in_a_cell(patient: bool) -> None:
    calls: list[int] = []

    def slow(row: int) -> int:
        calls.append(row)
        time.sleep(2.5)
        return row

    with rows_run_once() if patient else contextlib.nullcontext():
        executor = ParallelExecutor(num_threads=4, timeout=1, disable_progress_bar=True)
        assert executor.execute(slow, [0, 1]) == [0, 1]
    assert (len(calls) == 2) is patient
    assert ParallelExecutor(timeout=1).timeout == 1


# --- judging ---


def test_a_tie_keeps_the_seed_and_the_best_three_recorded_take_part() -> None:
    seed = dspy.Predict(dspy.Signature("question -> answer", "Seed."))
    notebook = Notebook()
    for place, text in enumerate(["a", "b", "c", "d"]):
        notebook.record({"self": text}, 0.9 - place / 10, 50)
    notebook.record({"of_another_program": "z"}, 1.0, 500)
    verdict = judging.decide(seed, None, notebook.best(20), lambda program: 0.5)
    assert verdict.origin == "seed" and verdict.program is seed
    assert [each.instructions["self"] for each in verdict.contenders] == ["Seed.", "a", "b", "c"]


def test_the_seed_and_what_is_returned_take_no_place_of_the_recorded() -> None:
    seed, returned = (dspy.Predict(dspy.Signature("question -> answer", text)) for text in ("Seed.", "b"))
    notebook = Notebook()
    for place, text in enumerate(["Seed.", "a", "b", "c", "d", "e"]):
        notebook.record({"self": text}, 0.9 - place / 10, 50)
    verdict = judging.decide(seed, returned, notebook.best(20), lambda program: 0.5)
    assert [each.instructions["self"] for each in verdict.contenders] == ["Seed.", "b", "a", "c", "d"]
    assert [each.own_score for each in verdict.contenders[:2]] == [0.9, 0.7]


def test_a_returned_program_is_judged_on_the_model_of_all_and_not_on_its_own() -> None:
    seed = dspy.Predict(dspy.Signature("question -> answer", "Seed."))
    returned = dspy.Predict(dspy.Signature("question -> answer", "Better."))
    returned.lm = dspy.LM("openai/metered")
    seen: list[Any] = []

    def score(program: dspy.Module) -> float:
        seen.append(program.predictors()[0].lm)
        return float(len(seen))

    verdict = judging.decide(seed, returned, [], score)
    assert verdict.origin == "returned" and seen == [None, None] and returned.lm is not None


def test_a_model_that_cannot_be_called_is_an_error_and_not_a_score_of_zero() -> None:
    rows = tasks.load("pocket:navigate", data_dir=None, seed=0, limit=3)
    broken = dspy.LM("local/broken", engine=PhrasebookEngine(0), cache=False)
    broken.engine.complete = lambda request: (_ for _ in ()).throw(ConnectionError("refused"))
    with dspy.context(lm=broken, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        with pytest.raises(ProgramError, match="The program failed on all 3 rows"):
            judging.accuracy(rows.make_program(), rows.test, rows.metric, 2)


# --- runs ---


def test_a_run_writes_one_row_for_every_cell_and_does_not_run_it_again(tmp_path: Path) -> None:
    cells, lines, failed = a_run(tmp_path, "seed", seeds=(0, 1))
    assert failed == 0 and [cell.key.seed for cell in cells] == [0, 1]
    first = cells[0]
    assert first.test == first.seed_test and first.test is not None and len(first.test.correct) == 6
    assert first.chosen == "seed" and first.instructions == {"predict": "Answer the question."}
    assert first.tokens["charged"] == 0 and first.error is None and first.stopped is None
    assert first.model_identity.startswith("pocket@") and first.versions["torch"] and first.finished.endswith("+00:00")
    again, lines, _ = a_run(tmp_path, "seed", seeds=(0, 1))
    assert again == cells and all("finished before" in line for line in lines)


@pytest.mark.slow
def test_what_an_optimizer_returns_is_judged_on_dev_and_tested_once(tmp_path: Path, enter: Any) -> None:
    enter("planted", lambda student, *_: with_text(student, FITTING))
    (cell,), _, _ = a_run(tmp_path, "planted")
    assert cell.test is not None and cell.seed_test is not None and cell.test.accuracy > cell.seed_test.accuracy
    assert cell.chosen == "returned" and cell.instructions == {"predict": FITTING}


def test_a_worse_program_loses_to_the_seed(tmp_path: Path, enter: Any) -> None:
    enter("worse", lambda student, *_: with_text(student, "[[ ## completed ## ]] " * 3))
    (cell,), _, _ = a_run(tmp_path, "worse")
    assert cell.chosen == "seed" and cell.test == cell.seed_test and len(cell.contenders) == 2


@pytest.mark.slow
def test_an_optimizer_is_stopped_at_its_budget_and_judged_by_its_best_so_far(tmp_path: Path, enter: Any) -> None:
    def endless(student: Student, train: Rows, dev: Rows, context: Context) -> Student:
        context.budget.record(with_text(student, FITTING), 1.0, 40)
        while True:
            try:
                student(**train[0].inputs())
            except Exception:  # as careless as an optimizer can be
                continue

    enter("endless", endless)
    (cell,), lines, failed = a_run(tmp_path, "endless", budget=500)
    assert failed == 0 and cell.stopped == "tokens" and cell.chosen == "recorded"
    assert 500 <= cell.tokens["charged"] < 2000 and cell.instructions == {"predict": FITTING}
    assert "stopped by tokens" in lines[-1]


def test_an_optimizer_that_makes_an_error_of_being_stopped_has_not_failed(tmp_path: Path, enter: Any) -> None:
    def translating(student: Student, train: Rows, dev: Rows, context: Context) -> Student:
        try:
            while True:
                student(**train[0].inputs())
        except BudgetSpent as spent:
            raise RuntimeError("all threads died") from spent

    enter("translating", translating)
    (cell,), _, failed = a_run(tmp_path, "translating", budget=300)
    assert failed == 0 and cell.error is None and cell.stopped == "tokens" and cell.test is not None


def test_an_optimizer_that_never_comes_back_is_interrupted(
    tmp_path: Path, enter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ALARM_GRACE", 0.1)

    def asleep(*_: object) -> None:
        while True:
            try:
                time.sleep(60)
            except Exception:  # a time-out is none
                continue

    enter("asleep", asleep)
    (cell,), _, _ = a_run(tmp_path, "asleep", time_limit=0.2)
    assert cell.stopped == "seconds" and cell.error is None and cell.seconds < 30


def test_a_failure_is_a_row_with_its_error_and_the_next_cell_goes_on(tmp_path: Path, enter: Any) -> None:
    ways: Iterator[Any] = iter([ValueError("no beam"), None])

    def sometimes(student: Student, *_: object) -> Student:
        way = next(ways)
        if way is not None:
            raise way
        return student

    enter("sometimes", sometimes)
    cells, _, failed = a_run(tmp_path, "sometimes", "seed")
    assert failed == 1 and [cell.error for cell in cells] == ["ValueError: no beam", None]
    assert cells[0].test is None and cells[0].seed_test == cells[1].seed_test
    _, lines, _ = a_run(tmp_path, "sometimes", "seed")
    assert "failed: ValueError: no beam, finished before" in lines[0]
    cells, _, failed = a_run(tmp_path, "sometimes", "seed", retry_errors=True)
    assert failed == 0 and [cell.error for cell in cells] == ["ValueError: no beam", None, None]


def test_what_a_search_cost_and_found_stays_where_judging_fails(
    tmp_path: Path, enter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searched(student: Student, train: Rows, dev: Rows, context: Context) -> Student:
        context.task_lm("hello", max_tokens=1)
        context.budget.record({"predict": "Track it."}, 0.5, 4)
        return student

    def dead(*_: object) -> Accuracy:
        raise ProgramError("The program failed on all 6 rows.")

    enter("searched", searched)
    monkeypatch.setattr(bench, "accuracy", dead)
    (cell,), _, failed = a_run(tmp_path, "searched")
    assert failed == 1 and cell.error == "ProgramError: The program failed on all 6 rows." and cell.test is None
    assert cell.tokens["charged"] > 0 and cell.seconds > 0 and cell.scored_candidates == 1


def test_the_folder_of_a_cell_has_a_name_that_a_file_system_takes_and_that_is_its_own(tmp_path: Path) -> None:
    keys = [replace(KEY, model=f"/cache/{'x' * 300}/{name}.gguf") for name in "ab"]
    folders = [bench.fresh_directory(tmp_path, key) for key in keys]
    assert len(set(folders)) == 2 and all(folder.is_dir() and len(folder.name) <= 200 for folder in folders)
    assert all(folder.name.startswith("pocket_navigate-seed-0-_cache_xxx") for folder in folders)


def test_a_thing_that_is_no_program_is_an_error(tmp_path: Path, enter: Any) -> None:
    enter("odd", lambda *_: "Think step by step.")
    (cell,), _, _ = a_run(tmp_path, "odd")
    assert cell.error == "TypeError: the optimizer returned a str, not a program"


def test_stray_threads_cannot_charge_or_record_once_the_turn_is_over(tmp_path: Path, enter: Any) -> None:
    caught: list[BaseException] = []

    def leaves_a_thread(student: Student, train: Rows, dev: Rows, context: Context) -> Student:
        def later() -> None:
            while not caught:
                time.sleep(0.01)
                try:
                    context.task_lm("hello", max_tokens=1)
                except BaseException as error:
                    caught.append(error)

        threading.Thread(target=later, daemon=True).start()
        return student

    enter("stray", leaves_a_thread)
    (cell,), _, _ = a_run(tmp_path, "stray")
    deadline = time.monotonic() + 10
    while not caught and time.monotonic() < deadline:
        time.sleep(0.01)
    assert isinstance(caught[0], BudgetSpent) and cell.error is None


@pytest.mark.slow
def test_a_cell_leaves_random_numbers_settings_and_output_as_they_were(
    tmp_path: Path, enter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[float] = []

    def noisy(student: Student, *_: object) -> Student:
        sys.stdout.write("noise")
        drawn.append(random.random() + float(numpy.random.rand()))
        return student

    enter("noisy", noisy)
    random.seed(5)
    expected = random.Random(5).random()
    before = dspy.settings.lm
    a_run(tmp_path, "noisy")
    assert random.random() == expected and dspy.settings.lm is before
    assert "noise" not in capsys.readouterr().out
    (written,) = (tmp_path / "out" / "logs").glob("*/output.txt")
    assert "noise" in written.read_text()
    a_run(tmp_path / "second", "noisy")
    assert drawn[0] == drawn[1]


def test_an_interrupt_ends_the_run_and_loses_only_its_cell(tmp_path: Path, enter: Any) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    enter("interrupted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        a_run(tmp_path, "seed", "interrupted")
    assert [cell.key.optimizer for cell in read(tmp_path / "out" / "cells.jsonl")] == ["seed"]


# --- the command line ---


def settings(*flags: str) -> config.RunConfig:
    import argparse

    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return config.from_flags(parser.parse_args(flags))


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "tasks: [pocket:navigate, gsm8k]\noptimizers: seed\nbudget: medium\nseeds: [0, 1]\nprompt-model: x/y\n"
    )
    found = settings("--config", str(file), "--budget", "250k", "--model-args", "dtype=bfloat16,max_tokens=300")
    assert found.tasks == ("pocket:navigate", "gsm8k") and found.optimizers == ("seed",)
    assert (found.budget, found.seeds, found.prompt_model) == (250_000, (0, 1), "x/y")
    assert found.model_args == {"dtype": "bfloat16", "max_tokens": 300}


def test_patterns_stand_for_names_and_any_task_can_be_decomposed() -> None:
    found = settings("--tasks", "pocket:*,two-step:bbh:navigate", "--optimizers", "*")
    assert found.tasks == (*(f"pocket:{task}" for task in TASKS), "two-step:bbh:navigate")
    assert found.optimizers == registry.names()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--optimizers", "seed"), "Which tasks"),
        (("--tasks", "gsm9k", "--optimizers", "seed"), "There is no task 'gsm9k'"),
        (("--tasks", "gsm8k", "--optimizers", "sead"), "There is no optimizer 'sead'"),
        (("--tasks", "gsm8k", "--optimizers", "seed", "--budget", "tiny"), "--budget tiny is neither small, medium"),
        (("--tasks", "gsm8k", "--optimizers", "seed", "--seeds", "a"), "--seeds a: give whole numbers"),
        (("--tasks", "gsm8k", "--optimizers", "seed", "--limit", "0"), "limit=0: give a positive number"),
        (("--tasks", "gsm8k", "--optimizers", "seed", "--model-args", "fast"), "--model-args 'fast' is not key"),
        (("--tasks", "gsm8k", "--optimizers", "seed", "--prompt-args", "fast"), "--prompt-args 'fast' is not key"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        settings(*flags)


def test_an_unknown_setting_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("taks: gsm8k\n")
    with pytest.raises(SettingsError, match="has taks; it takes tasks, optimizers"):
        settings("--config", str(file))


def test_a_dry_run_says_what_would_be_run_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "run",
        "--tasks",
        "bbh:navigate",
        "--optimizers",
        "seed",
        "--seeds",
        "0,1",
        "--out",
        str(tmp_path / "o"),
        "--dry-run",
    ]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert out.count(": to run") == 2 and "bbh:navigate · seed · seed 1" in out
    assert not (tmp_path / "o").exists()


def test_ls_lists_every_task_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in (*tasks.names(), *registry.names()))


def test_run_ends_with_the_number_of_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["run", "--tasks", "pocket:navigate", "--optimizers", "seed", "--limit", "4", "--out", str(tmp_path)]
    assert main(flags) == 0
    assert "1 cells, 0 failed" in capsys.readouterr().out
    assert main(["run", "--tasks", "nowhere", "--optimizers", "seed"]) == 2
    assert "There is no task 'nowhere'" in capsys.readouterr().err


def test_an_optimizer_whose_library_is_missing_costs_only_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "elsewhere", "a_library_that_is_not_here:Optimizer")
    with pytest.raises(
        SettingsError, match="'elsewhere' cannot be loaded: No module named 'a_library_that_is_not_here'"
    ):
        make("elsewhere")
    with pytest.raises(SettingsError, match="There is no optimizer 'nobody'"):
        make("nobody")


def test_the_task_model_is_never_answered_from_a_cache(pocket: models.TaskModel) -> None:
    budget = Budget(10_000, counters=pocket.counters)
    lm = pocket.metered(budget)
    first = (ask(lm, max_tokens=200), budget.spent.generated)
    second = (ask(lm, max_tokens=200), budget.spent.generated)
    assert first[0] == second[0] and second[1] == 2 * first[1]
    assert local_lm("pocket").engine.engine is pocket.engine
