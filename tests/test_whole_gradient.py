"""The whole gradient over reasoning against finite differences, and its score term against all possible reasonings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.estimators.score_gradient import CandidateSlopes, whole_gradient
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.shared_backward import _sum_of_rows, read_segment
from dspy_greater.objective.replay import ReasonedSequence, Reasoning, advantages
from dspy_greater.prompt.spans import Span
from dspy_greater.settings import Point, Term
from tests.test_gradient import InDouble
from tests.tiny_models import tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]
CANDIDATES = (17, 300, 42, 9, 511)
POSITION = 2


def engine_for(model: Any) -> Engine:
    return Engine(model, tiny_tokenizer(), name="tiny")


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
        written, answer = some(3 + 2 * (index % 4)), some(1 + index % 2) if gold else []
        start, stop = len(head), len(head) + len(written)
        ids = (*head, *written, *answer)
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
                written = [log_f(at, 1.0) for at in range(call.written.start, call.written.stop)]
                loss = loss + run.share / total * advantage * torch.stack(written).sum()
            if term != "score" and call.answer is not None:
                answer = [log_f(at, 0.2) for at in range(call.answer.start, call.answer.stop)]
                loss = loss - run.share / total * torch.stack(answer).mean()
    return loss


def obvious_slopes(model: Any, runs: Sequence[Reasoning], term: Term, point: Point, step: float = 1e-5) -> list[float]:
    """Central differences of S along every candidate's embedding."""
    with torch.no_grad():
        E = model.get_input_embeddings()(torch.tensor(CANDIDATES))
        current = model.get_input_embeddings()(
            torch.tensor(runs[0].sequences[0].token_ids[runs[0].sequences[0].instruction.start + POSITION])
        )
        at = {"current": current, "centroid": E.mean(0), "midpoint": (current + E.mean(0)) / 2}[point]
        return [
            (
                obvious_loss(model, runs, term, at + step * each) - obvious_loss(model, runs, term, at - step * each)
            ).item()
            / (2 * step)
            for each in E
        ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", ["pathwise", "score", "whole"])
def test_every_term_equals_central_differences_of_the_expected_loss(kind: Any, term: Term) -> None:
    model = tiny_model(kind, dtype=torch.float64)
    with InDouble():
        found = whole_gradient(
            engine_for(model), reasonings(), position=POSITION, candidates=CANDIDATES, term=term, point="current"
        )
        expected = obvious_slopes(model, reasonings(), term, "current")
    assert found.slopes == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("point", ["current", "midpoint", "centroid"])
def test_the_linear_model_is_taken_where_it_is_asked_for(point: Point) -> None:
    model = tiny_model(dtype=torch.float64)
    with InDouble():
        found = whole_gradient(engine_for(model), reasonings(), position=POSITION, candidates=CANDIDATES, point=point)
        expected = obvious_slopes(model, reasonings(), "whole", point)
    assert found.slopes == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_that_is_shared_and_read_once_changes_nothing(kind: Any) -> None:
    model, runs = tiny_model(kind, dtype=torch.float64), reasonings(alike=30)
    engine = engine_for(model)
    with InDouble():
        found = whole_gradient(engine, runs, position=POSITION, candidates=CANDIDATES, point="current")
        expected = obvious_slopes(model, runs, "whole", "current")
    assert found.slopes == pytest.approx(expected, rel=1e-5)
    tokens = sum(len(call.token_ids) for run in runs for call in run.sequences)
    assert engine.counters.prefilled_tokens < tokens - 6 * 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", ["pathwise", "score", "whole"])
@pytest.mark.parametrize("alike", [0, 30])
def test_what_follows_the_instruction_in_every_row_is_differentiated_once(kind: Any, term: Term, alike: int) -> None:
    model, runs = tiny_model(kind, dtype=torch.float64), reasonings(alike=alike, behind=50)
    engine = engine_for(model)
    with InDouble():
        found = whole_gradient(engine, runs, position=POSITION, candidates=CANDIDATES, term=term, point="current")
        expected = obvious_slopes(model, runs, term, "current")
    assert found.slopes == pytest.approx(expected, rel=1e-5)
    of_each = 1 + 3 + 2 + 3 + 9 + 2  # one token is left to the rows, and what they do not share
    rows = len([call for run in runs for call in run.sequences])
    longest = max(len(call.token_ids) for run in runs for call in run.sequences)
    at_once = longest <= engine.prefixes.reach  # with a window that slides, states cannot be handed on
    assert (engine.counters.backward_tokens <= 4 + 50 + alike * (alike < 16) + rows * of_each) == at_once
    assert at_once == (kind != "gemma2")


def slopes_of(
    runs: list[Reasoning], *, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[tuple[float, ...], int]:
    """The slopes, and how many tokens were differentiated for them."""
    engine = engine_for(tiny_model(dtype=dtype))
    found = whole_gradient(engine, runs, position=POSITION, candidates=CANDIDATES, **settings)
    return found.slopes, engine.counters.backward_tokens


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspy_greater.estimators.score_gradient.worth_sharing", lambda *_, **__: False)


@pytest.mark.parametrize("point", ["current", "midpoint", "centroid"])
@pytest.mark.parametrize("max_batch_tokens", [8_192, 150, 1])
def test_a_shared_segment_gives_what_reading_every_row_on_its_own_gives(
    point: Point, max_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, settings = reasonings(behind=50), {"point": point, "max_batch_tokens": max_batch_tokens}
    with InDouble():
        together, few = slopes_of(runs, dtype=torch.float64, **settings)
        one_by_one(monkeypatch)
        apart, many = slopes_of(runs, dtype=torch.float64, **settings)
    assert together == pytest.approx(apart, rel=1e-10)
    assert few < many / 2


def test_in_half_precision_too_candidates_that_differ_have_different_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = reasonings(behind=50)
    engine = engine_for(tiny_model(dtype=torch.bfloat16))
    found = whole_gradient(engine, runs, position=POSITION, candidates=range(5, 205))
    assert len(set(found.slopes)) > 198
    together, _ = slopes_of(runs, dtype=torch.bfloat16)
    one_by_one(monkeypatch)
    apart, _ = slopes_of(runs, dtype=torch.bfloat16)
    assert together == pytest.approx(apart, rel=0.1, abs=0.2 * max(map(abs, apart)))


@pytest.mark.parametrize(
    "where,how",
    [("logits_at", "memory"), ("SharedSegment.pull_back", "memory"), ("SharedSegment.pull_back", "overflow")],
)
def test_where_the_segment_cannot_be_had_every_row_is_read_on_its_own(
    where: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = reasonings(behind=50)
    expected, _ = slopes_of(runs)
    asked = []

    def fail(*_: Any, **__: Any) -> Tensor:
        asked.append(where)
        if how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.full((32,), math.inf)

    monkeypatch.setattr(f"dspy_greater.model.fast.shared_backward.{where}", fail)
    found, many = slopes_of(runs)
    assert asked == [where]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert many >= sum(len(call.token_ids) for run in runs for call in run.sequences) - 9 * len(runs)


@pytest.mark.parametrize("failing", [1, 3, 7])
def test_a_batch_that_runs_out_of_memory_is_counted_once(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = reasonings(behind=50)
    expected, few = slopes_of(runs)
    sums, real = [], _sum_of_rows

    def short_of_memory(gradient: Tensor) -> Tensor:
        sums.append(len(gradient))
        if len(sums) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(gradient)

    monkeypatch.setattr("dspy_greater.model.fast.shared_backward._sum_of_rows", short_of_memory)
    # Two batches, of which the one that fails is halved.
    found, again = slopes_of(runs, max_batch_tokens=300)
    assert len(sums) > failing and len(set(sums)) > 1
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert again < 2 * few


def test_a_row_that_is_not_finite_takes_no_part_in_a_shared_segment() -> None:
    engine, tokens, place = engine_for(tiny_model()), (1, 5, 6, 7, 8), 2
    layer = engine.model.get_input_embeddings()

    def pulled_back(rows: list[int], *, spoil: float | None = None) -> Tensor | None:
        leaf = layer(torch.tensor([tokens[place]])).detach().requires_grad_()
        with engine.exclusive():
            segment = read_segment(engine, tokens, None, place=place, leaf=leaf)
            assert segment is not None
            _, copies = segment.copies(3)
            asked = [torch.arange(each.numel(), dtype=each.dtype).reshape(each.shape).sin() for each in copies]
            if spoil is not None:
                asked[1][1, 0, 2, 3] = spoil
            segment.collect([each[rows] for each in asked])
            return segment.pull_back()

    expected = pulled_back([0, 2])
    assert expected is not None and bool((expected != 0).any())
    for spoil in (math.nan, math.inf):
        torch.testing.assert_close(pulled_back([0, 1, 2], spoil=spoil), expected)
    assert pulled_back([1], spoil=math.nan) is None


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
        found = whole_gradient(engine_for(model), runs, position=1, candidates=[0, 3, 4], term="score", point="current")
    assert found.slopes == pytest.approx(exact, rel=1e-5)


def test_all_candidates_share_one_forward_and_one_backward_pass() -> None:
    spent = []
    for candidates in (CANDIDATES[:2], CANDIDATES):
        engine = engine_for(tiny_model())
        whole_gradient(engine, reasonings(), position=POSITION, candidates=candidates)
        spent.append(engine.counters)
    assert spent[0] == spent[1]
    assert spent[0].forwards == 1
    assert spent[0].backward_tokens == sum(len(call.token_ids) for run in reasonings() for call in run.sequences)


def test_small_batches_change_nothing() -> None:
    engine = engine_for(tiny_model())
    together = whole_gradient(engine, reasonings(), position=POSITION, candidates=CANDIDATES)
    alone = whole_gradient(engine, reasonings(), position=POSITION, candidates=CANDIDATES, max_batch_tokens=1)
    assert alone.slopes == pytest.approx(together.slopes, rel=1e-4)


def test_at_the_centroid_any_token_may_fill_the_gap() -> None:
    engine = engine_for(tiny_model())
    instructions = [(9, 8, gap, 7) for gap in (5, 400)]
    found = [
        whole_gradient(
            engine,
            [each.under(ids) for each in reasonings()],
            position=POSITION,
            candidates=CANDIDATES,
            point="centroid",
        )
        for ids in instructions
    ]
    assert found[0].slopes == pytest.approx(found[1].slopes, rel=1e-5)


def test_runs_that_are_all_equally_wrong_say_nothing_by_the_score_term() -> None:
    runs = [Reasoning(n, 1.0, 1.0, each.sequences) for n, each in enumerate(reasonings())]
    found = whole_gradient(engine_for(tiny_model()), runs, position=POSITION, candidates=CANDIDATES, term="score")
    assert all(math.isnan(slope) for slope in found.slopes)
    assert found.most_negative(3) == ()


def test_where_nothing_was_written_the_score_term_says_nothing_and_the_answer_all() -> None:
    spoken = reasonings()
    silent = [
        Reasoning(each.example, each.mistake, each.share, tuple(without_reasoning(one) for one in each.sequences))
        for each in spoken
    ]

    def slopes(runs: list[Reasoning], term: Term) -> tuple[float, ...]:
        return whole_gradient(
            engine_for(tiny_model()), runs, position=POSITION, candidates=CANDIDATES, term=term
        ).slopes

    assert all(math.isnan(slope) for slope in slopes(silent, "score"))
    assert slopes(silent, "whole") == pytest.approx(slopes(silent, "pathwise"))
    assert all(math.isfinite(slope) for slope in slopes([*spoken[:1], *silent[1:]], "score"))


def without_reasoning(sequence: ReasonedSequence) -> ReasonedSequence:
    return replace(sequence, written=Span(sequence.written.start, sequence.written.start))


def test_a_sequence_without_a_finite_gradient_takes_no_part() -> None:
    model = tiny_model()
    runs = reasonings()
    broken = 77
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = math.nan
    spoiled = runs[0].sequences[0]
    bad = ReasonedSequence((*spoiled.token_ids[:-1], broken), spoiled.instruction, spoiled.written, spoiled.answer)
    found = whole_gradient(
        engine_for(model), [Reasoning(0, 1.0, 1.0, (bad,)), *runs[1:]], position=POSITION, candidates=CANDIDATES
    )
    assert len(found.slopes) == len(CANDIDATES)
    assert all(math.isnan(slope) for slope in found.slopes) or all(math.isfinite(slope) for slope in found.slopes)


def test_most_negative_leaves_out_what_is_not_a_number_and_keeps_the_order_of_equals() -> None:
    slopes = CandidateSlopes((4, 5, 6, 7), (0.0, math.nan, -1.0, 0.0))
    assert slopes.most_negative(4) == (6, 4, 7)


def test_what_cannot_work_is_refused_with_a_remedy() -> None:
    engine = engine_for(tiny_model())
    with pytest.raises(LayoutError, match="no reasoning to take the gradient over; give at least one"):
        whole_gradient(engine, [], position=0, candidates=[1])
    with pytest.raises(LayoutError, match=r"Position 4 is not in the instruction \[1, 5\).*one instruction"):
        whole_gradient(engine, reasonings(), position=4, candidates=[1])
    with pytest.raises(SettingsError, match="no candidate to take the slope for"):
        whole_gradient(engine, reasonings(), position=0, candidates=[])
    with pytest.raises(SettingsError, match="Candidate token 512 is outside the model's vocabulary of 512"):
        whole_gradient(engine, reasonings(), position=0, candidates=[512])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    whole_gradient(engine_for(model), reasonings(), position=POSITION, candidates=CANDIDATES)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
