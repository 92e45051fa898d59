"""Any metric a DSPy user has becomes one number per row, or an error at once."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import dspy
import numpy as np
import pytest
import torch
from dspy.utils.dummies import DummyLM
from scripted_engine import ScriptedEngine, chat_answer, obedient_script, planted_rows, program_on, value_in

from dspy_greater import local_lm
from dspy_greater.errors import GreaterError, MetricError
from dspy_greater.metric import RowMetric, Score, refuse_useless_metric
from dspy_greater.program.rollout import Running, roll_out


def score_of(value: Any) -> Score:
    return RowMetric(lambda example, prediction, trace=None: value)(None, None)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1.0),
        (False, 0.0),
        (1, 1.0),
        (0.25, 0.25),
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.array([0.75]), 0.75),
        (torch.tensor(0.5), 0.5),
        (dspy.Prediction(score=0.5), 0.5),
        (dspy.Prediction(score=True, feedback="well done"), 1.0),
        (dspy.Prediction(score=np.float64(0.125)), 0.125),
        ({"score": 0.5}, 0.5),
        (SimpleNamespace(score=1), 1.0),
    ],
)
def test_what_is_a_score_becomes_a_plain_float(value: Any, number: float) -> None:
    score = score_of(value)
    assert (score.value, score.error) == (number, None)
    assert type(score.value) is float


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "NoneType"),
        ("yes", "str"),
        ("1.0", "str"),
        (dspy.Prediction(feedback="no score"), "Prediction"),
        (dspy.Prediction(score=None), "Prediction"),
        ({}, "dict"),
        (np.array([0.5, 1.0]), "ndarray"),
        ([1.0], "list"),
    ],
)
def test_what_is_no_score_is_an_error_that_shows_it_and_says_what_to_return(value: Any, kind: str) -> None:
    with pytest.raises(MetricError, match=f"of type {kind}, which is not a score. Return a bool, a number, or a dspy"):
        score_of(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float64("nan")])
def test_a_number_that_is_not_finite_is_a_failed_row_and_says_so(value: Any) -> None:
    score = score_of(value)
    assert score.value == 0.0
    assert score.error is not None and "the metric returned" in score.error


def test_a_metric_that_raises_makes_a_failed_row_with_the_error() -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        raise KeyError("answer")

    assert RowMetric(metric)(None, None) == Score(0.0, "the metric raised KeyError: 'answer'")


def test_an_interrupt_inside_a_metric_is_not_swallowed() -> None:
    def metric(example: Any, prediction: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RowMetric(metric)(None, None)


@pytest.mark.parametrize("metric", ["exact_match", 3, {"a": 1}])
def test_a_metric_that_cannot_be_called_is_shown_with_the_form_it_should_have(metric: Any) -> None:
    with pytest.raises(MetricError, match=r"cannot be called. Pass a function metric\(example, prediction, trace=None"):
        RowMetric(metric)
    with pytest.raises(GreaterError):
        RowMetric(metric)
    with pytest.raises(TypeError):
        RowMetric(metric)


def two(example: Any, prediction: Any) -> Any:
    return (example, prediction)


def with_trace(example: Any, prediction: Any, trace: Any) -> Any:
    return trace is None


def as_gepa(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
    return trace is pred_name is pred_trace is None


def as_gepa_with_defaults(
    gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
) -> Any:
    return trace is pred_name is pred_trace is None


def with_a_knob(example: Any, prediction: Any, trace: Any = None, threshold: float = 0.5) -> Any:
    return trace is None and threshold == 0.5


def anything(*args: Any, **kwargs: Any) -> Any:
    return len(args) == 2 and not kwargs


class Judge:
    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        return trace is None


class JudgeModule(dspy.Module):
    def forward(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0


@pytest.mark.parametrize(
    "metric",
    [
        lambda example, prediction: True,
        with_trace,
        as_gepa,
        as_gepa_with_defaults,
        with_a_knob,
        functools.partial(with_a_knob, threshold=0.5),
        anything,
        Judge(),
        Judge().__call__,
        JudgeModule(),
    ],
)
def test_every_form_of_metric_that_dspy_takes_is_called_with_its_own_defaults(metric: Any) -> None:
    assert RowMetric(metric)(None, None) == Score(1.0)


def test_a_metric_is_called_with_the_example_first() -> None:
    seen = []
    RowMetric(lambda example, prediction: seen.append((example, prediction)) or 1.0)("row", "answer")
    assert seen == [("row", "answer")]


def test_feedback_that_comes_with_a_score_is_kept() -> None:
    assert score_of(dspy.Prediction(score=0.5, feedback="shorter")).feedback == "shorter"
    assert score_of({"score": 0.5, "feedback": "shorter"}).feedback == "shorter"
    assert score_of(dspy.Prediction(score=0.5)).feedback is None
    assert score_of(True).feedback is None


def test_a_metric_that_worked_once_in_any_run_is_not_useless() -> None:
    failed = "the metric raised KeyError: 'answer'"
    refuse_useless_metric([failed, failed], [failed, None])
    refuse_useless_metric([failed, "AdapterParseError: no answer"])
    refuse_useless_metric()
    with pytest.raises(MetricError, match=r"failed on all 2 validation rows; on the first, the metric raised KeyError"):
        refuse_useless_metric([failed, failed], [failed, failed], rows="validation rows")


def test_nothing_bounds_a_score_from_above_or_below() -> None:
    assert [score_of(points).value for points in (250, -3.5)] == [250.0, -3.5]


def test_an_asynchronous_metric_is_refused_with_what_to_pass() -> None:
    async def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0

    with pytest.raises(
        MetricError, match=r"asynchronous: it returned a coroutine.*Pass an ordinary function; dspy.sync"
    ):
        RowMetric(metric)(None, None)


class LLMJudge(dspy.Module):
    """A metric that asks a language model, and gives its reasons."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.grade = dspy.ChainOfThought("question, answer -> correct: bool")
        self.grade.set_lm(lm)

    def forward(self, example: Any, prediction: Any, trace: Any = None) -> dspy.Prediction:
        verdict = self.grade(question=example.question, answer=prediction.answer)
        return dspy.Prediction(score=verdict.correct, feedback=verdict.reasoning)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")
def test_a_judge_that_asks_a_language_model_is_a_metric() -> None:
    replies = [{"reasoning": "It is four.", "correct": "True"}, {"reasoning": "It is not.", "correct": "perhaps"}]
    metric = RowMetric(LLMJudge(DummyLM(replies, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))))
    row = dspy.Example(question="2 + 2?").with_inputs("question")
    with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        good, unread = metric(row, dspy.Prediction(answer="4")), metric(row, dspy.Prediction(answer="5"))
    assert (good.value, good.feedback, good.error) == (1.0, "It is four.", None)
    assert unread.value == 0.0
    assert unread.error is not None and "the metric raised AdapterParseError" in unread.error


@pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")
@pytest.mark.parametrize("shared", [True, False])
def test_a_judge_may_run_on_the_model_that_is_judged(shared: bool) -> None:
    def script(prompt: str) -> str:
        if "[[ ## correct ## ]]" in prompt:
            return chat_answer(reasoning="I read.", correct=str(value_in(prompt, "answer") == "yes"))
        return obedient_script(prompt)

    engine = ScriptedEngine(script)
    judge = LLMJudge(local_lm(engine if shared else ScriptedEngine(script), cache=False))
    rows = planted_rows(6)
    [rollouts] = roll_out([program_on(engine, instruction="Please count.")], rows, RowMetric(judge), Running(4))
    assert [each.score for each in rollouts] == [float(each.prediction.answer == "yes") for each in rollouts]
    assert {each.feedback for each in rollouts} == {"I read."}
    # What the judge asked is no call of the program.
    assert {call.predictor for each in rollouts for call in each.trace} == {"predict"}
