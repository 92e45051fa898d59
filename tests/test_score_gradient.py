"""The score gradient against finite differences, and its score term against all possible reasonings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.estimators.score_gradient import score_gradient
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Model
from dspy_greater.objective.replay import ReasonedSequence, Reasoning, Replay, advantages
from dspy_greater.prompt.spans import Span
from tests.tiny_models import InDouble, tiny_model, tokenizer_for

KINDS = ["llama", "qwen2", "gemma2"]
CANDIDATES = (17, 300, 42, 9, 511)
POSITION = 2


Term = Literal["pathwise", "score", "both"]
Point = Literal["current", "midpoint", "centroid"]
TERMS: tuple[Term, ...] = ("pathwise", "score", "both")
POINTS: tuple[Point, ...] = ("current", "midpoint", "centroid")


def engine_for(model: Any, **options: Any) -> Engine:
    return Engine(model, tokenizer_for(model), name="tiny", **options)


def slopes(
    model: Model,
    runs: Sequence[Reasoning],
    term: Term = "both",
    point: Point = "centroid",
    *,
    position: int = POSITION,
    candidates: Sequence[int] = CANDIDATES,
) -> tuple[float, ...]:
    against = [0.0] * len(runs) if term == "pathwise" else advantages(runs)
    return score_gradient(
        model,
        Replay(runs, against),
        position=position,
        candidates=candidates,
        answer_weight=0.0 if term == "score" else 1.0,
        value=None if point == "centroid" else value_at(model, runs, position, candidates, point),
    )


def value_at(model: Model, runs: Sequence[Reasoning], position: int, candidates: Sequence[int], point: Point) -> Tensor:
    """Where the linear model is taken, [1, d]."""
    call = runs[0].sequences[0]
    current = model.embed([call.token_ids[call.instruction.start + position]])
    centroid = model.embed(candidates).mean(0, keepdim=True)
    return {"current": current, "centroid": centroid, "midpoint": (current + centroid) / 2}[point]


def reasonings(*, alike: int = 0, behind: int = 0) -> list[Reasoning]:
    """Seven runs on four examples, some without a gold answer, one with two calls.

    All have `alike` tokens before the instruction and `behind` after it in common.
    """
    generator = torch.Generator().manual_seed(0)

    def some(length: int) -> list[int]:
        return torch.randint(5, 512, (length,), generator=generator).tolist()

    before, instruction, demonstrations = [1, *some(alike)], some(4), some(behind)

    def sequence(index: int, gold: bool) -> ReasonedSequence:
        head = before + instruction + demonstrations + some(2 + index % 3)
        generated, answer = some(3 + 2 * (index % 4)), some(1 + index % 2) if gold else []
        start, stop = len(head), len(head) + len(generated)
        ids = (*head, *generated, *answer)
        return ReasonedSequence(
            ids, Span(len(before), len(before) + 4), Span(start, stop), Span(stop, len(ids)) if gold else None
        )

    runs = [Reasoning(n % 4, float(n % 3 == 0), 1.0 + n % 2, (sequence(n, n != 2),)) for n in range(6)]
    return [*runs, Reasoning(3, 0.5, 1.0, (sequence(7, False), sequence(8, True)))]


def obvious_loss(model: Any, runs: Sequence[Reasoning], term: Term, embedding: Tensor) -> Tensor:
    """S, one call at a time, with `embedding` at POSITION of every instruction."""
    total = sum(each.share for each in runs)
    loss = embedding.new_zeros(())
    for run, advantage in zip(runs, advantages(runs), strict=True):
        for call in run.sequences:
            embedded = model.get_input_embeddings()(torch.tensor(call.token_ids)).clone()  # [T, d]
            embedded[call.instruction.start + POSITION] = embedding
            logits = model(inputs_embeds=embedded[None]).logits[0]  # [T, V]

            def log_f(at: int, heat: float, logits: Tensor = logits, call: ReasonedSequence = call) -> Tensor:
                return (logits[at - 1] / heat).log_softmax(-1)[call.token_ids[at]]

            if term != "pathwise":
                generated = [log_f(at, 1.0) for at in range(call.generated.start, call.generated.stop)]
                loss = loss + run.share / total * advantage * torch.stack(generated).sum()
            if term != "score" and call.answer is not None:
                answer = [log_f(at, 0.2) for at in range(call.answer.start, call.answer.stop)]
                loss = loss - run.share / total * torch.stack(answer).mean()
    return loss


def obvious_slopes(model: Any, runs: Sequence[Reasoning], term: Term, point: Point, step: float = 1e-5) -> list[float]:
    """Central differences of S along every candidate's embedding."""
    with torch.no_grad():
        E = model.get_input_embeddings()(torch.tensor(CANDIDATES))
        at = value_at(engine_for(model), runs, POSITION, CANDIDATES, point)[0]
        return [
            (
                obvious_loss(model, runs, term, at + step * each) - obvious_loss(model, runs, term, at - step * each)
            ).item()
            / (2 * step)
            for each in E
        ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", TERMS)
def test_every_term_equals_central_differences_of_the_expected_loss(kind: Any, term: Term) -> None:
    model = tiny_model(kind, dtype=torch.float64)
    with InDouble():
        found = slopes(engine_for(model), reasonings(), term, "current")
        expected = obvious_slopes(model, reasonings(), term, "current")
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_the_linear_model_is_taken_where_it_is_asked_for(point: Point) -> None:
    model = tiny_model(dtype=torch.float64)
    with InDouble():
        found = slopes(engine_for(model), reasonings(), point=point)
        expected = obvious_slopes(model, reasonings(), "both", point)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_that_is_shared_and_read_once_changes_nothing(kind: Any) -> None:
    model, runs = tiny_model(kind, dtype=torch.float64), reasonings(alike=30)
    with InDouble():
        engine = engine_for(model)
        found = slopes(engine, runs, point="current")
        expected = obvious_slopes(model, runs, "both", "current")
    assert found == pytest.approx(expected, rel=1e-5)
    tokens = sum(len(call.token_ids) for run in runs for call in run.sequences)
    assert engine.counters.prefilled_tokens < tokens - 6 * 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("alike", [0, 30])
def test_what_follows_the_instruction_in_every_row_is_differentiated_once(kind: Any, term: Term, alike: int) -> None:
    model, runs = tiny_model(kind, dtype=torch.float64), reasonings(alike=alike, behind=50)
    engine = engine_for(model)
    with InDouble():
        found = slopes(engine, runs, term, "current")
        expected = obvious_slopes(model, runs, term, "current")
    assert found == pytest.approx(expected, rel=1e-5)
    of_each = 1 + 3 + 2 + 3 + 9 + 2  # one token is left to the rows, and what they do not share
    rows = len([call for run in runs for call in run.sequences])
    longest = max(len(call.token_ids) for run in runs for call in run.sequences)
    at_once = longest <= engine.checks.cache_reach  # with a window that slides, states cannot be handed on
    assert (engine.counters.backward_tokens <= 4 + 50 + alike * (alike < 16) + rows * of_each) == at_once
    assert at_once == (kind != "gemma2")


def all_reasonings(model: Any, embedding: Tensor | None, wrong: set[tuple[int, int]]) -> list[Reasoning]:
    """Every reasoning of two tokens that a model of eight tokens can write, shared out as it would write them."""
    prompt = (1, 5, 6, 7)
    found = []
    for pair in itertools.product(range(8), repeat=2):
        sequence = ReasonedSequence((*prompt, *pair), Span(1, 3), Span(4, 6))
        likelihood = probability(model, sequence.token_ids, embedding).item()
        found.append(Reasoning(0, float(pair in wrong), likelihood, (sequence,)))
    return found


def probability(model: Any, token_ids: Sequence[int], embedding: Tensor | None) -> Tensor:
    embedded = model.get_input_embeddings()(torch.tensor(token_ids)).clone()
    if embedding is not None:
        embedded[2] = embedding
    log_f = model(inputs_embeds=embedded[None]).logits[0].log_softmax(-1)
    return (log_f[3, token_ids[4]] + log_f[4, token_ids[5]]).exp()


def test_the_score_term_is_the_exact_gradient_of_the_expected_mistakes() -> None:
    model = tiny_model(vocab_size=8, dtype=torch.float64, sharpness=0.5)
    wrong = {(1, 2), (3, 3), (0, 7), (5, 1), (6, 6), (2, 4)}
    layer, step = model.get_input_embeddings(), 1e-5

    def expected_mistakes(embedding: Tensor) -> float:
        return sum(probability(model, (1, 5, 6, 7, *pair), embedding).item() for pair in wrong)

    with InDouble(), torch.no_grad():
        at = layer(torch.tensor(6))
        exact = [
            (expected_mistakes(at + step * each) - expected_mistakes(at - step * each)) / (2 * step)
            for each in layer(torch.tensor([0, 3, 4]))
        ]
        runs = all_reasonings(model, None, wrong)
    assert math.fsum(each.share for each in runs) == pytest.approx(1.0)
    with InDouble():
        found = slopes(engine_for(model), runs, "score", "current", position=1, candidates=[0, 3, 4])
    assert found == pytest.approx(exact, rel=1e-5)


def test_all_candidates_share_one_forward_and_one_backward_pass() -> None:
    spent = []
    for candidates in (CANDIDATES[:2], CANDIDATES):
        engine = engine_for(tiny_model())
        slopes(engine, reasonings(), candidates=candidates)
        spent.append(engine.counters)
    assert spent[0] == spent[1]
    assert spent[0].forwards == 1
    assert spent[0].backward_tokens == sum(len(call.token_ids) for run in reasonings() for call in run.sequences)


def test_small_batches_change_nothing() -> None:
    together = slopes(engine_for(tiny_model()), reasonings())
    alone = slopes(engine_for(tiny_model(), max_batch_tokens=1), reasonings())
    assert alone == pytest.approx(together, rel=1e-4)


def test_at_the_centroid_any_token_may_fill_the_gap() -> None:
    engine = engine_for(tiny_model())
    instructions = [(9, 8, gap, 7) for gap in (5, 400)]
    found = [slopes(engine, [each.under(ids) for each in reasonings()]) for ids in instructions]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_in_half_precision_too_candidates_that_differ_have_different_slopes() -> None:
    engine = engine_for(tiny_model(dtype=torch.bfloat16))
    found = slopes(engine, reasonings(behind=50), candidates=range(5, 205))
    assert len(set(found)) > 198


def test_runs_that_are_all_equally_wrong_say_nothing_by_the_score_term() -> None:
    engine = engine_for(tiny_model())
    runs = [Reasoning(n, 1.0, 1.0, each.sequences) for n, each in enumerate(reasonings())]
    assert all(math.isnan(slope) for slope in slopes(engine, runs, "score"))
    assert engine.counters.forwards == 0


def test_where_nothing_was_generated_the_score_term_says_nothing_and_the_answer_all() -> None:
    spoken, engine = reasonings(), engine_for(tiny_model())
    silent = [replace(each, sequences=tuple(map(without_reasoning, each.sequences))) for each in spoken]
    assert all(math.isnan(slope) for slope in slopes(engine, silent, "score"))
    assert slopes(engine, silent, "both") == pytest.approx(slopes(engine, silent, "pathwise"))
    assert all(math.isfinite(slope) for slope in slopes(engine, [*spoken[:1], *silent[1:]], "score"))


def without_reasoning(sequence: ReasonedSequence) -> ReasonedSequence:
    return replace(sequence, generated=Span(sequence.generated.start, sequence.generated.start))


@pytest.mark.parametrize("behind", [0, 50])
def test_a_sequence_without_a_finite_gradient_takes_no_part(behind: int) -> None:
    model, broken = tiny_model(tie_word_embeddings=False), 500
    runs = [first, *others] = reasonings(behind=behind)
    assert not any(broken in call.token_ids for run in runs for call in run.sequences)
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = math.nan
    spoiled = first.sequences[0]
    inside = spoiled.generated.start
    bad = replace(spoiled, token_ids=(*spoiled.token_ids[:inside], broken, *spoiled.token_ids[inside + 1 :]))
    engine, against = engine_for(model), advantages(runs)

    def found(runs: Sequence[Reasoning], against: Sequence[float]) -> list[float]:
        """What the runs add to the sum, whatever their shares are shares of."""
        total = math.fsum(run.share for run in runs)
        each = score_gradient(
            engine, Replay(runs, against), position=POSITION, candidates=CANDIDATES, answer_weight=1.0
        )
        return [total * slope for slope in each]

    assert all(map(math.isfinite, found(others, against[1:])))
    mixed = found([replace(first, sequences=(bad,)), *others], against)
    assert mixed == pytest.approx(found(others, against[1:]), rel=1e-4)
    assert all(map(math.isnan, found([replace(first, sequences=(bad,))], against[:1])))


def test_what_cannot_work_is_refused_with_a_remedy() -> None:
    engine = engine_for(tiny_model())
    with pytest.raises(LayoutError, match="no reasoning to take the gradient over; give at least one"):
        score_gradient(engine, Replay([], []), position=0, candidates=[1])
    with pytest.raises(LayoutError, match=r"Position 4 is not in the instruction \[1, 5\).*one instruction"):
        slopes(engine, reasonings(), position=4, candidates=[1])
    with pytest.raises(SettingsError, match="no candidate to take the slope for"):
        slopes(engine, reasonings(), position=0, candidates=[])
    with pytest.raises(SettingsError, match="Candidate token 512 is outside the model's vocabulary of 512"):
        slopes(engine, reasonings(), position=0, candidates=[512])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    slopes(engine_for(model), reasonings())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
