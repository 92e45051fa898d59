"""Which tokens are proposed for a position, and that nothing but the given generator decides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.search.proposals import Proposal, ProposalSizes, intersection, propose
from tests.tiny_models import tiny_model, tiny_tokenizer

VOCABULARY = 512


def engine_for(model: Any, **options: Any) -> Engine:
    return Engine(model, tiny_tokenizer(), name="tiny", **options)


def contexts(count: int = 12) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (1, *torch.randint(5, VOCABULARY, (2 + index % 5,), generator=generator).tolist()) for index in range(count)
    ]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A small `sharpness` makes contexts agree on likely tokens, as they do in a trained model."""
    return engine_for(tiny_model("llama", VOCABULARY, sharpness=0.05))


def anything(token: int) -> str:
    return f"token {token}"


def proposed(engine: Engine, seed: int = 0, canonical: Any = anything, **settings: Any) -> Proposal[Any]:
    of = settings.pop("contexts", contexts())
    return propose(engine, of, ProposalSizes(**settings), generator=random.Random(seed), canonical=canonical)


def obvious_log_probabilities(model: Any, context: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([context])).logits[0, -1].log_softmax(-1)  # [V]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_candidates_are_what_every_context_of_a_draw_finds_likely(kind: Any) -> None:
    model = tiny_model(kind, VOCABULARY, sharpness=0.05)
    found = proposed(engine_for(model), top_k=40, sample_size=3, draws=4, minimum=1)
    generator = random.Random(0)
    expected: set[int] = set()
    used: dict[tuple[int, ...], torch.Tensor] = {}
    for _ in range(4):
        tops = []
        for context in generator.sample(contexts(), 3):
            used[context] = obvious_log_probabilities(model, context)
            tops.append(set(used[context].topk(found.top_k).indices.tolist()))
        expected |= set.intersection(*tops)
    mean = torch.stack(list(used.values())).mean(0)
    assert found.candidates == tuple(sorted(expected, key=lambda token: -mean[token].item()))
    assert found.mean_log_probabilities == pytest.approx([mean[token].item() for token in found.candidates], rel=1e-5)
    assert found.distinct_contexts == len(used)
    assert found.canonical == tuple(map(anything, found.candidates))


def test_the_intersection_is_taken_over_all_rankings_of_a_draw() -> None:
    assert intersection([[1, 2, 3], [3, 2, 9], [2, 3, 1]], k=2) == {2}
    assert intersection([[1, 2, 3], [3, 2, 9], [2, 3, 1]], k=3) == {2, 3}
    assert intersection([], k=3) == set()


def test_widening_doubles_until_enough_legal_tokens_are_left(engine: Engine) -> None:
    found = proposed(engine, top_k=10, minimum=9)
    assert len(found.candidates) >= 9
    assert found.top_k in {20, 40, 80, 160}
    half = proposed(engine, top_k=found.top_k // 2, minimum=1, max_widening=1)
    assert len(half.candidates) < 9


def test_widening_is_bounded_when_no_token_is_legal(engine: Engine) -> None:
    asked: list[int] = []
    found = proposed(engine, top_k=3, max_widening=5, canonical=asked.append)
    assert (found.candidates, found.canonical, found.top_k) == ((), (), 15)
    assert len(asked) == len(set(asked)) <= 4 * 15


def test_fewer_than_the_minimum_come_back_rather_than_none(engine: Engine) -> None:
    likeliest = proposed(engine).candidates[0]
    found = proposed(engine, canonical=lambda token: "kept" if token == likeliest else None)
    assert (found.candidates, found.canonical, found.top_k) == ((likeliest,), ("kept",), 160)


def test_a_k_beyond_the_vocabulary_proposes_every_token(engine: Engine) -> None:
    assert len(proposed(engine, top_k=2 * VOCABULARY).candidates) == VOCABULARY


def test_tokens_that_are_not_canonical_are_dropped_before_counting(engine: Engine) -> None:
    found = proposed(engine, minimum=6, canonical=lambda token: token if token % 2 else None)
    assert len(found.candidates) >= 6
    assert all(token % 2 for token in found.candidates)


def test_a_canonical_form_that_is_false_is_still_one(engine: Engine) -> None:
    assert set(proposed(engine, canonical=lambda token: "").canonical) == {""}


def test_equally_likely_tokens_come_in_the_order_of_their_ids() -> None:
    model = tiny_model("llama", VOCABULARY, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert proposed(engine_for(model), top_k=7).candidates == (0, 1, 2, 3, 4, 5, 6)


def test_only_the_given_generator_decides(engine: Engine) -> None:
    random.seed(5)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    first = proposed(engine, seed=3)
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    random.seed(6)
    assert proposed(engine, seed=3) == first
    samples = {proposed(engine, seed=seed).mean_log_probabilities for seed in range(5)}
    assert len(samples) > 1


def test_a_generator_that_is_handed_on_continues(engine: Engine) -> None:
    generator = random.Random(0)
    state = generator.getstate()
    propose(engine, contexts(), generator=generator, canonical=anything)
    assert generator.getstate() != state


@pytest.mark.parametrize("max_batch_tokens", [1, 12, 10_000])
def test_candidates_do_not_depend_on_how_contexts_are_batched(engine: Engine, max_batch_tokens: int) -> None:
    expected = proposed(engine)
    found = proposed(engine_for(engine.model, max_batch_tokens=max_batch_tokens))
    assert found.candidates == expected.candidates
    assert found.mean_log_probabilities == pytest.approx(expected.mean_log_probabilities, rel=1e-5)


def test_one_pass_serves_every_draw_and_every_k(engine: Engine) -> None:
    before = engine.counters
    found = proposed(engine, draws=50, canonical=lambda token: None)
    spent = engine.counters - before
    assert found.distinct_contexts == len(contexts())
    assert (spent.forwards, spent.lm_head_rows) == (1, len(contexts()))
    assert spent.prefilled_tokens == sum(map(len, contexts()))
    assert (spent.generated_tokens, spent.backward_tokens) == (0, 0)


def test_equal_contexts_are_read_once(engine: Engine) -> None:
    before = engine.counters
    assert proposed(engine, contexts=[(1, 7, 8)] * 9).distinct_contexts == 1
    assert (engine.counters - before).lm_head_rows == 1


def test_fewer_contexts_than_the_sample_size_are_all_used(engine: Engine) -> None:
    assert proposed(engine, contexts=contexts(2), sample_size=5).distinct_contexts == 2


def test_a_context_whose_probabilities_are_not_numbers_takes_no_part() -> None:
    model = tiny_model("llama", VOCABULARY, tie_word_embeddings=False, sharpness=0.05)
    good = [(1, 7, 8), (1, 9, 10, 11)]
    expected = proposed(engine_for(model), contexts=good)
    with torch.no_grad():
        model.get_input_embeddings().weight[100] = torch.nan
    found = proposed(engine_for(model), contexts=[*good, (1, 100)])
    assert found.candidates == expected.candidates
    assert proposed(engine_for(model), contexts=[(1, 100)]).candidates == ()


@pytest.mark.parametrize("name", ["top_k", "sample_size", "draws", "minimum", "max_widening"])
def test_a_number_below_one_is_refused(engine: Engine, name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is 0; give at least 1"):
        proposed(engine, **{name: 0})


def test_contexts_that_cannot_be_continued_are_refused(engine: Engine) -> None:
    with pytest.raises(LayoutError, match="no context to propose tokens for; give one per training example"):
        proposed(engine, contexts=[])
    with pytest.raises(LayoutError, match="context of example 1 is empty; give it the rendered input"):
        proposed(engine, contexts=[(1, 2), ()])
