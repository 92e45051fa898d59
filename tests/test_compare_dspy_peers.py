"""The adapters of the comparison whose optimizers come from a library: this package, DSPy and textgrad.

Each runs through its real library. The task model answers rightly exactly when a planted phrase is in its instruction,
and the proposer writes that phrase every third time.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy import lm15
from scripted_engine import SEED as PLANTED_SEED
from scripted_engine import planted_engine, planted_rows, worth_of
from scripted_text import Asked, chat_answer

from benchmarks.harness.budget import Budget, BudgetSpent, Usage
from benchmarks.harness.candidates import EvaluationWatch
from benchmarks.harness.models import CountedEngine, MeteredLocalEngine, prompt_model
from benchmarks.optimizers import Context, DescribeTask, make
from benchmarks.optimizers.copro import Copro
from benchmarks.optimizers.gepa import Gepa, with_feedback
from benchmarks.optimizers.gradsum import GradSum
from benchmarks.optimizers.greater import Greater, GreaterNoReasoning, GreaterPaper, RandomSearch, Recorder
from benchmarks.optimizers.miprov2 import Mipro, MiproZeroShot
from benchmarks.optimizers.simba import Simba
from benchmarks.optimizers.textgrad import TextGrad
from dspy_greater.objective.types import Evaluation, RowOutcome
from dspy_greater.run.events import StepTaken

SEED = "Answer the question."
BEST = "Put an a before the number."
OTHERS = ("Think about it.", "Read the question twice and answer.")
ROWS = [dspy.Example(question=str(number), answer=f"a{number}").with_inputs("question") for number in range(18)]
TRAIN, DEV = ROWS[:8], ROWS[8:14]
PROMPT_TOKENS, ANSWER_TOKENS = 10, 2

# name -> the adapter, cut to what a test can wait for
TEXTUAL: dict[str, Callable[[], Any]] = {
    "gradsum": lambda: GradSum(beam_width=2, iterations=2, sample_size=4, subset_size=3, validation_rows=6),
    "miprov2-0shot": MiproZeroShot,
    "miprov2": Mipro,
    "gepa": lambda: Gepa(auto=None, max_metric_calls=80),
    "copro": lambda: Copro(breadth=4, depth=2),
    "simba": lambda: Simba(num_candidates=3, max_steps=4),
    "textgrad": lambda: TextGrad(iterations=4),
}


class Scripted(ABC):
    """DSPy's engine contract over a method that writes; `asked` keeps every request."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = frozenset({"temperature", "max_tokens", "response_format"})

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.settings: list[tuple[Any, Any]] = []
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def complete(self, request: Any) -> Any:
        system = request.system if isinstance(request.system, str) else "".join(p.text for p in request.system or ())
        asked = Asked(system, request.messages[-1].text or "")
        with self._lock:
            self.asked.append(asked)
            self.settings.append((request.config.temperature, request.config.max_tokens))
            text = self.write(asked, request.config.temperature or 0.0)
        usage = lm15.Usage(
            input_tokens=PROMPT_TOKENS, output_tokens=ANSWER_TOKENS, total_tokens=PROMPT_TOKENS + ANSWER_TOKENS
        )
        message = lm15.Message.assistant([lm15.TextPart(text)])
        return lm15.Response(id=None, model="scripted", message=message, finish_reason="stop", usage=usage)

    def close(self) -> None:
        self.closed = True

    @abstractmethod
    def write(self, asked: Asked, temperature: float) -> str: ...


class Obedient(Scripted):
    """The task model: right where the planted phrase is in the instruction; at a temperature, otherwise by luck."""

    def __init__(self) -> None:
        super().__init__()
        self._luck = random.Random(0)

    def write(self, asked: Asked, temperature: float) -> str:
        lucky = temperature > 0 and self._luck.random() < 0.5
        right = BEST in asked.instruction or lucky
        return chat_answer(reasoning="I look.", answer=f"a{asked['question']}" if right else "wrong")


class Proposer(Scripted):
    """Answers in the format that it is asked for; every third instruction is the planted one."""

    def __init__(self, proposals: Sequence[str] = (*OTHERS, BEST)) -> None:
        super().__init__()
        self._proposals = itertools.cycle(proposals)

    def write(self, asked: Asked, temperature: float) -> str:
        listed = re.search(r"Your output fields are:\n(.*?)\nAll interactions", asked.text, re.DOTALL)
        named = re.findall(r"^\d+\. `(\w+)` \((.+?)\):", listed[1], re.MULTILINE) if listed else []
        if "<IMPROVED_VARIABLE>" in asked.text:
            return f"<IMPROVED_VARIABLE>{next(self._proposals)}</IMPROVED_VARIABLE>"
        if not named:
            return "It does not say what to put before the number."
        values = {name: self._value(name, kind, asked) for name, kind in named}
        if "Respond with a JSON object" in asked.text:
            return json.dumps(values)
        return chat_answer(**{name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()})

    def _value(self, name: str, kind: str, asked: Asked) -> Any:
        proposes = "instruction" in name or name in ("versions", "module_advice")
        text = next(self._proposals) if proposes else "It says too little."
        if name == "concerns":
            return "plan, solve"
        if kind.startswith("dict"):
            return dict.fromkeys(json.loads(asked["module_names"]), text)
        return [text] if kind.startswith("list") else text


@dataclass
class Arena:
    """A cell without the harness around it."""

    log_dir: Path
    limit: int = 10**9
    seed: int = 0
    threads: int = 4
    engine: Any = field(default_factory=Obedient)
    proposer: Any = field(default_factory=Proposer)

    def __post_init__(self) -> None:
        self.budget = Budget(self.limit)
        self.scored: list[Any] = []
        task = CountedEngine(self.engine, self.budget.add_served, self.budget.check)
        self.task_lm = dspy.LM("scripted/task", engine=task, cache=False, num_retries=0, temperature=0.0)
        self.prompt_lm = dspy.LM(
            "scripted/proposer", engine=CountedEngine(self.proposer, self.budget.add_proposer), cache=False
        )

    def metric(self, example: Any, prediction: Any, trace: object = None) -> float:
        self.scored.append(example)
        return float(prediction.answer == example.answer)

    @property
    def context(self) -> Context:
        described = DescribeTask("planted", "Say the number with a letter before it.", SEED)
        return Context(
            metric=self.metric,
            task_lm=self.task_lm,
            prompt_lm=self.prompt_lm,
            seed=self.seed,
            log_dir=self.log_dir,
            budget=self.budget,
            requests=described,
        )

    def optimise(self, optimizer: Any, student: Any = None, train: Any = TRAIN, dev: Any = DEV) -> Any:
        student = student or program()
        watch = EvaluationWatch(self.budget.notebook, student)
        adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
        settings = {"adapter": adapter, "num_threads": self.threads, "max_errors": 1_000_000, "callbacks": [watch]}
        with dspy.context(lm=self.task_lm, **settings):
            return optimizer.optimise(student, train, dev, self.context)


def program(instruction: str = SEED) -> Any:
    return dspy.ChainOfThought(dspy.Signature("question -> answer", instruction))


def instruction_of(found: Any) -> str:
    return found.predictors()[0].signature.instructions


def recorded(budget: Budget) -> list[tuple[str, float]]:
    return [(each.candidate.instructions[0][1], each.score) for each in budget.notebook.best(100)]


@pytest.fixture(params=TEXTUAL)
def peer(request: pytest.FixtureRequest) -> Any:
    return TEXTUAL[request.param]()


@pytest.mark.parametrize("name", [*TEXTUAL, "greater", "greater-paper", "greater-no-reasoning", "random-search"])
def test_every_adapter_is_made_by_its_name_with_published_settings(name: str) -> None:
    made = make(name)
    assert made.name == name
    assert 20 < len(made.about) <= 120


@pytest.mark.slow
def test_a_peer_finds_the_best_instruction_that_its_proposer_writes(peer: Any, tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    found = arena.optimise(peer)
    assert BEST in instruction_of(found)
    assert instruction_of(program()) == SEED


def test_a_peer_gets_our_rows_metric_and_seed_instruction(peer: Any, tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    arena.optimise(peer)
    ours = {row.question for row in (*TRAIN, *DEV)}
    assert {row.question for row in arena.scored} <= ours
    assert {row.question for row in TRAIN} & {row.question for row in arena.scored}
    assert SEED in {asked.instruction for asked in arena.engine.asked}
    assert {asked["question"] for asked in arena.engine.asked} <= ours
    assert any(SEED in asked.text for asked in arena.proposer.asked)


@pytest.mark.slow
def test_a_peer_that_is_stopped_leaves_what_it_found(peer: Any, tmp_path: Path) -> None:
    whole = Arena(tmp_path / "whole")
    whole.optimise(peer)
    calls = len(whole.engine.asked)
    share = (PROMPT_TOKENS + ANSWER_TOKENS) * (calls * 9 // 10)
    arena = Arena(tmp_path / "stopped", limit=share)
    with pytest.raises(BudgetSpent, match="The budget of"):
        arena.optimise(peer)
    assert arena.budget.stopped == "tokens"
    assert len(arena.engine.asked) <= calls * 9 // 10 + 4  # calls that were under way in other threads
    found = recorded(arena.budget)
    assert BEST in found[0][0], found


def test_a_peer_that_is_stopped_at_once_ends_at_once(peer: Any, tmp_path: Path) -> None:
    arena = Arena(tmp_path, limit=1)
    with pytest.raises(BudgetSpent):
        arena.optimise(peer)
    assert len(arena.engine.asked) <= 4


def test_a_peer_writes_nothing_outside_its_directory(
    peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    environment = dict(os.environ)
    Arena(tmp_path / "cell").optimise(peer)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert dict(os.environ) == environment


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEXTUAL if name != "simba"])  # without a row that varies, no rule
def test_a_peer_goes_on_where_the_program_fails_on_many_rows(name: str, tmp_path: Path) -> None:
    class Babbling(Obedient):
        def write(self, asked: Asked, temperature: float) -> str:
            return super().write(asked, temperature) if BEST in asked.text else "I do not keep the format."

    rows = [dspy.Example(question=str(n), answer=f"a{n}").with_inputs("question") for n in range(40)]
    arena = Arena(tmp_path, engine=Babbling(), proposer=Proposer((BEST,)))
    shown = {"auto": None, "max_metric_calls": 80, "add_format_failure_as_feedback": True}
    peer = Gepa(**shown) if name == "gepa" else TEXTUAL[name]()
    found = arena.optimise(peer, train=rows[:20], dev=rows[20:])
    assert instruction_of(found) == BEST


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTUAL)
def test_the_same_seed_makes_the_same_search(name: str, tmp_path: Path) -> None:
    runs = []
    for attempt in ("one", "two"):
        phrasebook = prompt_model("phrasebook", 3, Budget(1)).engine
        arena = Arena(tmp_path / attempt, proposer=phrasebook, seed=3, threads=1)
        found = arena.optimise(TEXTUAL[name]())
        runs.append((instruction_of(found), sorted(recorded(arena.budget))))
    assert runs[0] == runs[1]


# --- what is particular to one of them ---


def test_gepa_is_told_the_score_and_the_gold_values_where_it_asks_for_feedback() -> None:
    metric = with_feedback(lambda example, prediction, trace=None: float(prediction.answer == example.answer))
    row, right, wrong = ROWS[0], dspy.Prediction(answer="a0"), dspy.Prediction(answer="b0")
    assert (metric(row, right), metric(row, wrong)) == (1.0, 0.0)
    told = metric(row, wrong, None, "predict", None)
    assert (told.score, told.feedback) == (0.0, "That is wrong; the score is 0. Expected was\nanswer: a0")
    assert metric(row, right, None, "predict", None).feedback.startswith("That is right.")


def test_simba_reports_programs_at_our_temperature_and_not_its_samples(tmp_path: Path) -> None:
    arena = Arena(tmp_path, proposer=Proposer(OTHERS))
    arena.optimise(TEXTUAL["simba"]())
    scores = dict(recorded(arena.budget))
    assert len(scores) > 1
    assert set(scores.values()) == {0.0}  # a sample is right half of the time, and so is what follows from it


def two_steps() -> Any:
    class TwoSteps(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = dspy.Predict(dspy.Signature("question -> reasoning", "Plan it."))
            self.solve = dspy.Predict(dspy.Signature("question, reasoning -> answer", SEED))

        def forward(self, question: str) -> Any:
            return self.solve(question=question, reasoning=self.plan(question=question).reasoning)

    return TwoSteps()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEXTUAL if name != "simba"])
def test_a_program_of_two_predictors_is_optimised_whole(name: str, tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    found = arena.optimise(TEXTUAL[name](), student=two_steps())
    assert [predictor for predictor, _ in found.named_predictors()] == ["plan", "solve"]
    assert len({asked.instruction for asked in arena.engine.asked}) > 3
    proposals = [asked.text for asked in arena.proposer.asked]
    assert any("Plan it." in text for text in proposals) and any(SEED in text for text in proposals)


def test_textgrad_takes_a_prompt_back_that_scores_less_on_the_validation_rows(tmp_path: Path) -> None:
    arena = Arena(tmp_path, proposer=Proposer((BEST, *OTHERS)))
    found = arena.optimise(TextGrad(iterations=3))
    assert instruction_of(found) == BEST
    improvements = [asked.text for asked in arena.proposer.asked if "<IMPROVED_VARIABLE>" in asked.text]
    assert [BEST in text for text in improvements] == [False, True, True]


def test_textgrad_sees_gradients_through_the_program_from_the_metric(tmp_path: Path) -> None:
    arena = Arena(tmp_path, proposer=Proposer(OTHERS))
    arena.optimise(TextGrad(iterations=1))
    texts = [asked.text for asked in arena.proposer.asked]
    assert len(texts) == 3 + 3 + 1  # of three responses, through each to the instruction, and the improvement
    assert all("<OUTPUT_OF_FUNCTION> 0 </OUTPUT_OF_FUNCTION>" in text for text in texts[::2][:3])
    assert "reasoning: I look.\nanswer: wrong" in texts[-1]
    assert texts[-1].count("<FEEDBACK>It does not say what to put") == 3


def test_textgrad_shows_the_proposer_all_of_a_question_and_of_an_instruction(tmp_path: Path) -> None:
    arena = Arena(tmp_path, proposer=Proposer(OTHERS))
    long = " ".join(f"word{number}" for number in range(60))
    rows = [row.copy(question=f"{long} {row.question}").with_inputs("question") for row in TRAIN]
    arena.optimise(TextGrad(iterations=1), program(f"Begin. {long.replace('word', 'term')} End."), rows)
    about_runs = [asked.text for asked in arena.proposer.asked[:6]]
    assert sum("word30" in text and "term30" in text for text in about_runs) == 3


def test_textgrad_keeps_its_prompt_where_an_improvement_has_no_tags(tmp_path: Path) -> None:
    class Rambling(Proposer):
        def write(self, asked: Asked, temperature: float) -> str:
            return "I would rather not."

    arena = Arena(tmp_path, proposer=Rambling())
    assert instruction_of(arena.optimise(TextGrad(iterations=2))) == SEED


def test_textgrad_asks_as_its_own_engines_do_unless_the_proposer_has_settings(tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    arena.optimise(TextGrad(iterations=1))
    assert arena.proposer.settings[0] == (0.0, 2000)
    arena = Arena(tmp_path)
    arena.prompt_lm.kwargs.update(temperature=0.7, max_tokens=50)
    arena.optimise(TextGrad(iterations=1))
    assert arena.proposer.settings[0] == (0.7, 50)


def test_an_adapter_whose_library_is_missing_costs_only_its_own_row() -> None:
    code = """
import sys
sys.modules["optuna"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "textgrad" else found(name, package)
from benchmarks.optimizers import make
from dspy_greater.errors import SettingsError
make("gepa")
for name in ("miprov2", "miprov2-0shot", "textgrad"):
    try:
        make(name)
    except SettingsError as error:
        assert f"The optimizer '{name}' cannot be loaded" in str(error) and "[bench]" in str(error), error
    else:
        raise SystemExit(f"{name} was made")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


# --- this package's own optimizer, on a model with weights ---

GREATER: dict[str, Callable[..., Any]] = {
    "greater": Greater,
    "greater-paper": GreaterPaper,
    "greater-no-reasoning": GreaterNoReasoning,
    "random-search": RandomSearch,
}
QUICK = {"auto": None, "steps": 3, "train_rows": 8, "validation_rows": 8, "selections": 3}


@pytest.fixture(params=list(GREATER))
def ours(request: pytest.FixtureRequest) -> Any:
    return GREATER[request.param](**QUICK)


class WeightsArena(Arena):
    """A cell on a model with weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        engine = planted_engine()
        self.budget = Budget(self.limit, counters=lambda: engine.counters)
        local = MeteredLocalEngine(engine, self.budget)
        self.task_lm = dspy.LM("local/planted", engine=local, cache=False, temperature=0.0, max_tokens=64)


def on_weights(optimizer: Any, log_dir: Path, **settings: Any) -> tuple[Any, Any]:
    arena = WeightsArena(log_dir, **settings)
    rows = planted_rows(16)
    return arena, lambda: arena.optimise(optimizer, program(PLANTED_SEED), rows[:8], rows[8:])


@pytest.mark.slow
def test_ours_finds_a_better_instruction_also_when_it_is_stopped(ours: Any, tmp_path: Path) -> None:
    whole, optimise = on_weights(ours, tmp_path / "whole")
    found = optimise()
    assert worth_of(instruction_of(found)) > worth_of(PLANTED_SEED)
    assert {row.question for row in whole.scored} == {row.question for row in planted_rows(16)}
    endless = type(ours)(**{**QUICK, "steps": 100})
    arena, optimise = on_weights(endless, tmp_path / "stopped", limit=whole.budget.spent.charged)
    with pytest.raises(BudgetSpent):
        optimise()
    best = arena.budget.notebook.best(1)[0]
    assert best.rows == 8
    assert worth_of(best.candidate.instructions[0][1]) > worth_of(PLANTED_SEED)


def test_a_search_whose_steps_call_no_program_ends_at_its_budget_too(tmp_path: Path) -> None:
    arena = Arena(tmp_path, limit=100)
    listener = Recorder(arena.context)
    row = RowOutcome(0, 1.0, {}, {}, 1.0)
    same = Evaluation((1,), "Think.", (row, row), 0.5, 1.0, 1.0, (0.5, 1.0))
    step = StepTaken("predict", 0, 0, 1, (), same, "every candidate is known", {})
    arena.budget.add_served(Usage(1, 99, 0))
    listener(step)
    arena.budget.add_served(Usage(1, 1, 0))
    with pytest.raises(BudgetSpent):
        listener(step)
    assert [each.rows for each in arena.budget.notebook.best(2)] == [2]
