"""The fast model is the plain one: the same tokens, log-probabilities and gradients, whatever a session keeps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import GenerationRequest, Leaf, TokenQuery
from dspy_greater.model.plain import PlainModel
from tests.tiny_models import InDouble, numbered_tokenizer, tiny_model

VOCABULARY = 64


@pytest.fixture
def in_double() -> Iterator[None]:
    with InDouble():
        yield


KINDS = ["llama", "qwen2", "gemma2"]


def engine_of(kind: Any = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Engine:
    return Engine(tiny_model(kind, VOCABULARY, dtype), numbered_tokenizer(VOCABULARY), name=kind, **options)


def rows(count: int = 6, *, head: int = 20, common: int = 45, seed: int = 0) -> list[tuple[int, ...]]:
    """Sequences that begin alike, as prompts with demonstrations do, and end at different lengths."""
    drawn = random.Random(seed)
    alike = [drawn.randrange(3, VOCABULARY) for _ in range(head + common)]
    return [tuple(alike + [drawn.randrange(3, VOCABULARY) for _ in range(4 + 3 * row)]) for row in range(count)]


def queries(sequences: list[tuple[int, ...]], *, early: int = 25, late: int = 3) -> list[TokenQuery]:
    """A few tokens that all share, as an instruction is, and the last ones of each, as answers are."""
    found: list[TokenQuery] = []
    for row, tokens in enumerate(sequences):
        found += [TokenQuery(row, at, 1.0, 0.3) for at in range(early, early + 4)]
        found += [TokenQuery(row, at, 0.2, -0.5 - row) for at in range(len(tokens) - late, len(tokens))]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 6])
def test_log_probabilities_are_those_of_reading_each_sequence_alone(kind: Any, count: int) -> None:
    engine = engine_of(kind, max_batch_tokens=300)
    sequences = rows(count)
    asked = queries(sequences)
    plain = PlainModel(engine).token_logprobs(sequences, asked)
    torch.testing.assert_close(engine.token_logprobs(sequences, asked), plain, rtol=1e-9, atol=1e-10)
    with engine.session() as session:  # and again, with a prefix that is kept
        for _ in range(2):
            torch.testing.assert_close(session.token_logprobs(sequences, asked), plain, rtol=1e-9, atol=1e-10)


def test_queries_in_any_order_are_answered_in_that_order() -> None:
    engine, sequences = engine_of(), rows()
    asked = queries(sequences)
    shuffled = random.Random(0).sample(asked, len(asked))
    found = dict(zip(shuffled, engine.token_logprobs(sequences, shuffled).tolist(), strict=True))
    expected = PlainModel(engine).token_logprobs(sequences, asked).tolist()
    assert [found[each] for each in asked] == pytest.approx(expected, rel=1e-9)


def test_a_beginning_that_all_share_is_read_once() -> None:
    engine, sequences = engine_of(), rows(6)
    before = engine.counters
    engine.token_logprobs(sequences, queries(sequences))
    read = (engine.counters - before).prefilled_tokens
    everything = sum(map(len, sequences))
    assert read < 0.5 * everything


@pytest.mark.parametrize("kind", KINDS)
def test_generated_rows_are_scored_from_where_their_states_end(kind: Any) -> None:
    engine = engine_of(kind)
    prompts = rows(5)
    requests = [GenerationRequest(prompt, 12, stop_token_ids=(7, 9)) for prompt in prompts]
    with engine.session() as session:
        generated = [each.token_ids for each in session.generate(requests)]
        sequences = [(*prompt, *text, 5, 6, 8) for prompt, text in zip(prompts, generated, strict=True)]
        asked = queries(sequences, late=2)
        before = engine.counters
        found = session.token_logprobs(sequences, asked)
        read = (engine.counters - before).prefilled_tokens
    torch.testing.assert_close(found, PlainModel(engine).token_logprobs(sequences, asked), rtol=1e-9, atol=1e-10)
    slides = engine.checks.cache_reach < max(map(len, sequences))  # states of a beginning are then not kept whole
    assert slides == (kind == "gemma2")
    assert slides or read < 0.3 * sum(map(len, sequences))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_reading_each_row_again_for_every_token(kind: Any, temperature: float) -> None:
    engine = engine_of(kind, torch.float32)  # pads that see nothing are nan in float64 models
    requests = [
        GenerationRequest(prompt, 10, temperature, 0.9, seed=row, stop_token_ids=tuple(range(3, 14)))
        for row, prompt in enumerate(rows(6))
    ]
    plain = PlainModel(engine).generate(requests)
    assert len({len(each.token_ids) for each in plain}) > 1, "no row ended early, so this shows little"
    assert engine.generate(requests) == plain
    expected = [(request.prompt, (*each.token_ids[:3], 4, 4)) for request, each in zip(requests, plain, strict=True)]
    with engine.session(expected) as session:
        assert session.generate(requests) == plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [22, 60])
def test_gradients_are_those_of_each_sequence_alone(kind: Any, place: int, in_double: None) -> None:
    engine, sequences = engine_of(kind, max_batch_tokens=300), rows()
    asked = queries(sequences)
    own = Leaf((place,) * len(sequences), engine.embed([each[place] for each in sequences]))
    expected = PlainModel(engine).logprob_gradient(sequences, asked, own)
    found = engine.logprob_gradient(sequences, asked, own)
    assert found.shape == (len(sequences), own.embedding.shape[1])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    shared = Leaf(own.places, engine.embed([5, 8]).mean(0, keepdim=True))
    expected = PlainModel(engine).logprob_gradient(sequences, asked, shared)
    found = engine.logprob_gradient(sequences, asked, shared)
    assert found.shape == (1, own.embedding.shape[1]) and found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_shared_leaf_costs_its_common_part_once() -> None:
    engine, sequences = engine_of(), rows(6, common=90)
    asked = queries(sequences, early=105)
    own = Leaf((22,) * 6, engine.embed([each[22] for each in sequences]))
    costs = []
    for leaf in (own, Leaf(own.places, own.embedding[:1])):
        before = engine.counters
        engine.logprob_gradient(sequences, asked, leaf)
        costs.append((engine.counters - before).backward_tokens)
    assert costs[1] < 0.6 * costs[0]


def test_the_gradient_is_that_of_finite_differences(in_double: None) -> None:
    engine, sequences = engine_of(), rows(3)
    asked, place, step = queries(sequences), 23, 1e-5
    value = engine.embed([9])
    plain = PlainModel(engine)

    def total(embedding: torch.Tensor) -> float:
        sums = 0.0
        for row, tokens in enumerate(sequences):
            embedded = engine.embed(tokens)
            embedded[place] = embedding[0]
            logits = plain._logits(tokens, embedded)
            for query in (each for each in asked if each.row == row):
                logprob = (logits[query.at - 1] / query.temperature).log_softmax(-1)[tokens[query.at]]
                sums += query.weight * float(logprob)
        return sums

    found = engine.logprob_gradient(sequences, asked, Leaf((place,) * 3, value))[0]
    with torch.no_grad():
        for at in (0, 5, 11):
            nudge = torch.zeros_like(value)
            nudge[0, at] = step
            slope = (total(value + nudge) - total(value - nudge)) / (2 * step)
            assert float(found[at]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_queries_that_the_leaf_does_not_reach_add_nothing() -> None:
    engine, sequences = engine_of(), rows(3)
    asked = [TokenQuery(row, at) for row in range(3) for at in (3, 22)]
    for leaf in (Leaf((22,) * 3, engine.embed([4, 5, 6])), Leaf((22,) * 3, engine.embed([4]))):
        assert not engine.logprob_gradient(sequences, asked, leaf).any()


class Poisoned(torch.nn.Module):
    """An embedding layer in which one token is not a number."""

    def __init__(self, layer: Any, token: int) -> None:
        super().__init__()
        self.layer, self.token = layer, token

    @property
    def weight(self) -> Any:
        return self.layer.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(ids).masked_fill((ids == self.token)[..., None], torch.nan)


def test_a_sequence_without_a_finite_gradient_takes_no_part_in_the_sum() -> None:
    engine, sequences = engine_of(), [tuple(min(token, 60) for token in each) for each in rows(4)]
    engine.model.set_input_embeddings(Poisoned(engine.model.get_input_embeddings(), 63))
    broken = [*sequences[:3], (*sequences[3][:-4], 63, *sequences[3][-3:])]
    leaf = Leaf((22,) * 4, engine.embed([5]))
    found = engine.logprob_gradient(broken, queries(broken), leaf)
    assert found.isfinite().all()
    good = engine.logprob_gradient(sequences[:3], queries(sequences[:3]), Leaf((22,) * 3, leaf.embedding))
    torch.testing.assert_close(found, good, rtol=1e-9, atol=1e-10)
    alone = engine.logprob_gradient(broken[3:], queries(broken[3:]), Leaf((22,), leaf.embedding))
    assert alone.isnan().any()


def test_next_tokens_are_those_of_each_context_alone() -> None:
    engine, contexts = engine_of(max_batch_tokens=100), rows(5)
    found = engine.next_token_logprobs(contexts)
    assert found.shape == (5, VOCABULARY)
    torch.testing.assert_close(found, PlainModel(engine).next_token_logprobs(contexts), rtol=1e-9, atol=1e-10)


def test_the_first_token_of_a_sequence_cannot_be_asked_for() -> None:
    with pytest.raises(LayoutError, match="nothing in this pass predicts.*Ask for later tokens"):
        engine_of().token_logprobs([(5, 6, 7)], [TokenQuery(0, 0)])


def test_a_token_outside_the_vocabulary_has_no_embedding() -> None:
    with pytest.raises(SettingsError, match="token 64 is outside the model's vocabulary of 64"):
        engine_of().embed([3, VOCABULARY])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_weights_are_summed_in_float32(dtype: torch.dtype) -> None:
    engine, sequences = engine_of("llama", dtype), rows(4)
    asked = queries(sequences)
    found, plain = engine.token_logprobs(sequences, asked), PlainModel(engine).token_logprobs(sequences, asked)
    assert found.dtype == torch.float32
    tolerance = 0.15 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)


def test_two_sessions_on_one_model_keep_apart() -> None:
    engine = engine_of("llama", torch.float32)
    sequences, others = rows(4), rows(4, seed=1)
    with engine.session() as alone:
        expected = alone.token_logprobs(sequences, queries(sequences))
    with engine.session() as one, engine.session() as two:
        two.token_logprobs(others, queries(others))
        two.token_logprobs([each[:-2] for each in sequences], queries([each[:-2] for each in sequences]))
        assert torch.equal(one.token_logprobs(sequences, queries(sequences)), expected)
