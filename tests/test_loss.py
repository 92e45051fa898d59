"""Teacher-forced losses against the slow and obvious way to compute them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from dspy_greater.errors import EngineMemoryError, LayoutError, SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import PrefixStore
from dspy_greater.model.teacher_forcing import Losses, in_batches, logits_before, teacher_forced_losses, token_batches
from tests.tiny_models import tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY = 512


@dataclass(frozen=True)
class Span:
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    token_ids: tuple[int, ...]
    instruction: Span
    answer: Span


def engine_for(model: Any) -> Engine:
    return Engine(model, tiny_tokenizer(), name="tiny")


def rows(count: int = 4, seed: int = 0) -> list[Row]:
    """Examples with the same instruction of 4 tokens, and inputs, reasonings and answers of many lengths."""
    generator = torch.Generator().manual_seed(seed)

    def some(length: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()

    instruction = some(4)
    found = []
    for index in range(count):
        before, after, answer = [1, *some(index % 3)], some(3 + 5 * (3 * index % 4)), some(1 + index % 3)
        prompt_end = len(before) + len(instruction)
        ids = before + instruction + after + answer
        found.append(Row(tuple(ids), Span(len(before), prompt_end), Span(len(ids) - len(answer), len(ids))))
    return found


def full_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]  # [T, V]


def obvious_losses(model: Any, row: Row, temperature: float) -> tuple[float, float]:
    log_likelihood = {"answer": [], "instruction": []}
    logits = full_logits(model, row.token_ids)
    for name, divisor in (("answer", temperature), ("instruction", 1.0)):
        span = getattr(row, name)
        for at in range(span.start, span.stop):
            log_probabilities = (logits[at - 1] / divisor).log_softmax(-1)
            log_likelihood[name].append(log_probabilities[row.token_ids[at]].item())
    answer, instruction = log_likelihood["answer"], log_likelihood["instruction"]
    return -sum(answer) / len(answer), -sum(instruction) / len(instruction)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_losses_equal_the_obvious_ones(kind: Any, temperature: float) -> None:
    model = tiny_model(kind, VOCABULARY)
    losses = teacher_forced_losses(engine_for(model), rows(), answer_temperature=temperature)
    expected = [obvious_losses(model, row, temperature) for row in rows()]
    assert losses.cross_entropy == pytest.approx([answer for answer, _ in expected], rel=1e-5, abs=1e-5)
    assert losses.fluency_nll == pytest.approx([instruction for _, instruction in expected], rel=1e-5)
    assert losses.perplexity == pytest.approx([math.exp(nll) for _, nll in expected], rel=1e-4)


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 100_000])
def test_losses_do_not_depend_on_how_rows_are_batched_or_padded(max_batch_tokens: int) -> None:
    engine = engine_for(tiny_model("gemma2", VOCABULARY))
    alone = [teacher_forced_losses(engine, [row]) for row in rows()]
    together = teacher_forced_losses(engine, rows(), max_batch_tokens=max_batch_tokens)
    assert together.cross_entropy == pytest.approx([each.cross_entropy[0] for each in alone], rel=1e-5)
    assert together.fluency_nll == pytest.approx([each.fluency_nll[0] for each in alone], rel=1e-5)


def sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5,
    }  # fmt: skip


def models_that_change_their_logits() -> dict[str, Any]:
    return {
        "soft cap": lambda: tiny_model("gemma2", VOCABULARY, final_logit_softcapping=2.0),
        "division": lambda: GraniteForCausalLM(GraniteConfig(**sizes(), logits_scaling=3.0)).eval(),
        "multiplication": lambda: CohereForCausalLM(CohereConfig(**sizes(), logit_scale=0.1)).eval(),
        "nothing, Llama": lambda: tiny_model("llama", VOCABULARY),
        "nothing, Qwen2": lambda: tiny_model("qwen2", VOCABULARY, tie_word_embeddings=False),
    }


@pytest.mark.parametrize("change", list(models_that_change_their_logits()))
def test_chosen_logits_are_those_of_the_whole_model(change: str) -> None:
    model = models_that_change_their_logits()[change]()
    places = [(row, at) for row, each in enumerate(rows()) for at in (1, 5, len(each.token_ids))]
    with torch.no_grad():
        found = logits_before(engine_for(model), [row.token_ids for row in rows()], places)
    for logits, (row, at) in zip(found, places, strict=True):
        torch.testing.assert_close(logits, full_logits(model, rows()[row].token_ids)[at - 1], rtol=1e-4, atol=1e-5)


def test_a_token_that_nothing_predicts_is_refused() -> None:
    engine = engine_for(tiny_model())
    with (
        torch.no_grad(),
        pytest.raises(LayoutError, match="at index 0 is predicted by what stands before it, of which 0"),
    ):
        logits_before(engine, [(1, 5, 6)], [(0, 2), (0, 0)])
    ids = tuple(range(5, 45))
    with engine.exclusive(), torch.no_grad():
        prefix = engine.prefixes.read(ids[:30], rows=2, longest=40)
        with pytest.raises(LayoutError, match="at index 30 is .* of which 30 tokens are not read here; ask for later"):
            logits_before(engine, [ids], [(0, 30)], prefix=prefix)


class _Headless(torch.nn.Module):
    """A model whose output layer cannot be found: its weight is used without a call to a layer."""

    def __init__(self, model: Any, layer: Any) -> None:
        super().__init__()
        self.inner, self.layer = model, layer

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.layer

    def forward(self, **inputs: Any) -> Any:
        hidden = self.inner.model(**inputs).last_hidden_state
        return SimpleNamespace(logits=hidden @ self.inner.lm_head.weight.T)


@dataclass
class PlainEngine:
    """The part of an engine that losses need, for a model that is not a `transformers` one."""

    model: Any
    projected: int = 0

    @property
    def prefixes(self) -> PrefixStore:
        return PrefixStore(self.model, self.tally)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        yield

    def tally(self, **increments: int) -> None:
        self.projected += increments.get("lm_head_rows", 0)


@pytest.mark.parametrize("known", [True, False])
def test_a_model_that_never_calls_its_output_layer_gives_the_same_losses(known: bool) -> None:
    inner = tiny_model("llama", VOCABULARY)
    engine: Any = PlainEngine(_Headless(inner, inner.lm_head if known else None))
    found = teacher_forced_losses(engine, rows())
    expected = teacher_forced_losses(engine_for(inner), rows())
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-5)
    assert found.fluency_nll == pytest.approx(expected.fluency_nll, rel=1e-5)
    assert engine.projected == len(rows()) * max(len(row.token_ids) for row in rows())


def test_the_output_layer_is_applied_to_instruction_and_answer_only() -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY))
    before = engine.counters
    teacher_forced_losses(engine, rows())
    spent = engine.counters - before
    lengths = [len(row.token_ids) for row in rows()]
    assert spent.lm_head_rows == sum(4 + row.answer.stop - row.answer.start for row in rows())
    assert spent.prefilled_tokens == sum(lengths)
    assert spent.padded_tokens == len(lengths) * max(lengths) - sum(lengths)
    assert (spent.forwards, spent.generated_tokens, spent.backward_tokens) == (1, 0, 0)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", VOCABULARY).train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_state = torch.get_rng_state()
    teacher_forced_losses(engine_for(model), rows())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


def test_low_precision_models_take_their_softmax_in_float32() -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY, torch.bfloat16))
    with torch.no_grad():
        assert logits_before(engine, [(1, 5, 6)], [(0, 3)]).dtype == torch.float32


def test_an_example_that_is_not_a_number_is_flagged_and_spoils_no_other() -> None:
    model = tiny_model("llama", VOCABULARY, tie_word_embeddings=False)
    poison = VOCABULARY - 1
    good = [Row(tuple(min(t, poison - 1) for t in row.token_ids), row.instruction, row.answer) for row in rows()]
    last = good[-1]
    bad = Row((*last.token_ids[:6], poison, *last.token_ids[7:]), last.instruction, last.answer)
    expected = teacher_forced_losses(engine_for(model), good)
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    found = teacher_forced_losses(engine_for(model), [*good[:-1], bad])
    assert found.finite == (True, True, True, False)
    assert math.isnan(found.cross_entropy[-1])
    assert found.cross_entropy[:-1] == pytest.approx(expected.cross_entropy[:-1], rel=1e-5)
    assert math.isnan(found.total(0.2)[-1])


def test_perplexity_beyond_the_largest_double_is_infinite_and_not_an_error() -> None:
    assert Losses((0.0,), (1e6,)).perplexity == (math.inf,)
    assert Losses((0.5,), (1e6,)).total(0.0) == (0.5,)


@pytest.mark.parametrize(
    ("span", "name"),
    [((0, 2), "instruction"), ((3, 3), "instruction"), ((5, 4), "answer"), ((4, 7), "answer")],
)
def test_a_span_that_cannot_be_scored_is_named(span: tuple[int, int], name: str) -> None:
    spans = {"instruction": Span(1, 2), "answer": Span(4, 5), name: Span(*span)}
    row = Row((1, 5, 6, 7, 8, 9), spans["instruction"], spans["answer"])
    message = rf"Example 1: the {name} span \[{span[0]}, {span[1]}\) does not fit its 6 tokens.*begin-of-text"
    with pytest.raises(LayoutError, match=message):
        teacher_forced_losses(engine_for(tiny_model()), [rows()[0], row])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(SettingsError, match="answer_temperature is .*; give a number above 0"):
        teacher_forced_losses(engine_for(tiny_model()), rows(), answer_temperature=temperature)


def test_a_batch_without_room_for_a_token_is_refused() -> None:
    with pytest.raises(SettingsError, match="max_batch_tokens is 0; give at least 1"):
        teacher_forced_losses(engine_for(tiny_model()), rows(), max_batch_tokens=0)


def test_no_examples_have_no_losses() -> None:
    assert teacher_forced_losses(engine_for(tiny_model()), []) == Losses((), ())


def test_a_batch_that_does_not_fit_into_memory_is_tried_again_in_halves() -> None:
    tried: list[int] = []

    def work(batch: Sequence[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * row for row in batch]

    assert in_batches(work, range(7), [1] * 7, 100) == [0, 10, 20, 30, 40, 50, 60]
    assert tried == [7, 3, 1, 2, 4, 2, 2]


def test_a_row_that_does_not_fit_into_memory_alone_is_an_error_with_advice() -> None:
    def work(batch: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(EngineMemoryError, match="A row of 30 tokens alone .*; use a smaller dtype"):
        in_batches(work, [1, 2], [30, 40], 100)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_batches_hold_every_row_once_and_stay_within_the_bound(lengths: list[int], bound: int) -> None:
    batches = token_batches(lengths, bound)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= bound
