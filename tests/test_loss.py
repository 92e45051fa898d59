"""Losses of equations 5 and 6 against the slow and obvious way to compute them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.objective.loss import Losses, losses
from dspy_greater.prompt.spans import Span, Supervised
from tests.model_calls import example, spent_on
from tests.model_calls import ragged_rows as rows
from tests.tiny_models import tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY = 512


def engine_for(model: Any, **options: Any) -> Engine:
    return Engine(model, tiny_tokenizer(), name="tiny", **options)


def full_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]  # [T, V]


def obvious_losses(model: Any, row: Supervised, temperature: float) -> tuple[float, float]:
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
    found = losses(engine_for(model), rows(), answer_temperature=temperature)
    expected = [obvious_losses(model, row, temperature) for row in rows()]
    assert found.cross_entropy == pytest.approx([answer for answer, _ in expected], rel=1e-5, abs=1e-5)
    assert found.fluency_nll == pytest.approx([instruction for _, instruction in expected], rel=1e-5)
    assert found.perplexity == pytest.approx([math.exp(nll) for _, nll in expected], rel=1e-4)


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 100_000])
def test_losses_do_not_depend_on_how_rows_are_batched_or_padded(max_batch_tokens: int) -> None:
    engine = engine_for(tiny_model("gemma2", VOCABULARY), max_batch_tokens=max_batch_tokens)
    alone = [losses(engine, [row]) for row in rows()]
    together = losses(engine, rows())
    assert together.cross_entropy == pytest.approx([each.cross_entropy[0] for each in alone], rel=1e-5)
    assert together.fluency_nll == pytest.approx([each.fluency_nll[0] for each in alone], rel=1e-5)


class _Headless(torch.nn.Module):
    """A model whose output layer cannot be found: its weight is used without a call to a layer."""

    def __init__(self, model: Any, layer: Any) -> None:
        super().__init__()
        self.inner, self.layer, self.config = model, layer, model.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.layer

    def forward(self, **inputs: Any) -> Any:
        hidden = self.inner.model(**inputs).last_hidden_state
        return SimpleNamespace(logits=hidden @ self.inner.lm_head.weight.T)


@pytest.mark.parametrize("known", [True, False])
def test_a_model_that_never_calls_its_output_layer_gives_the_same_losses(known: bool) -> None:
    inner = tiny_model("llama", VOCABULARY)
    engine = engine_for(_Headless(inner, inner.lm_head if known else None))
    found = losses(engine, rows())
    expected = losses(engine_for(inner), rows())
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-5)
    assert found.fluency_nll == pytest.approx(expected.fluency_nll, rel=1e-5)
    assert engine.counters.lm_head_rows == len(rows()) * max(len(row.token_ids) for row in rows())


def test_the_output_layer_is_applied_to_instruction_and_answer_only() -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY))
    spent = spent_on(engine, lambda: losses(engine, rows()))
    lengths = [len(row.token_ids) for row in rows()]
    assert spent.lm_head_rows == sum(4 + row.answer.stop - row.answer.start for row in rows())
    assert spent.prefilled_tokens == sum(lengths)
    assert spent.padded_tokens == len(lengths) * max(lengths) - sum(lengths)
    assert (spent.forwards, spent.generated_tokens, spent.backward_tokens) == (1, 0, 0)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", VOCABULARY).train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_state = torch.get_rng_state()
    losses(engine_for(model), rows())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


def test_an_example_that_is_not_a_number_is_flagged_and_spoils_no_other() -> None:
    model = tiny_model("llama", VOCABULARY, tie_word_embeddings=False)
    poison = VOCABULARY - 1
    good = [example(tuple(min(t, poison - 1) for t in row.token_ids), row.instruction, row.answer) for row in rows()]
    last = good[-1]
    bad = example((*last.token_ids[:6], poison, *last.token_ids[7:]), last.instruction, last.answer)
    expected = losses(engine_for(model), good)
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    found = losses(engine_for(model), [*good[:-1], bad])
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
    row = example((1, 5, 6, 7, 8, 9), spans["instruction"], spans["answer"])
    message = rf"Example 1: the {name} span \[{span[0]}, {span[1]}\) does not fit its 6 tokens.*begin-of-text"
    with pytest.raises(LayoutError, match=message):
        losses(engine_for(tiny_model()), [rows()[0], row])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(SettingsError, match="answer_temperature is .*; give a number above 0"):
        losses(engine_for(tiny_model()), rows(), answer_temperature=temperature)


def test_no_examples_have_no_losses() -> None:
    assert losses(engine_for(tiny_model()), []) == Losses((), ())
