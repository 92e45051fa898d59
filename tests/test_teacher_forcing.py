"""Finished sequences in one pass: the logits that count are computed, in batches that fit, and nothing notices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dspy_greater.errors import EngineMemoryError, LayoutError, SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import PrefixCache
from dspy_greater.model.incremental import KeysAndValues
from dspy_greater.model.interface import GenerationRequest, TokenQuery
from dspy_greater.model.teacher_forcing import computed_only_at, in_batches, logprobs, next_logits, token_batches
from tests.tiny_models import tiny_model, tokenizer_for

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY = 64
IDS = torch.randint(5, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
# One place is asked for twice, as two losses of one token do.
PLACES = (torch.tensor([0, 0, 2, 2, 1]), torch.tensor([4, 7, 8, 8, 0]))
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def with_experts(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=2)).eval()
    config = Qwen3MoeConfig(**SMALL, **HEADS, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    return Qwen3MoeForCausalLM(config).eval()


def logits_and_gradient(model: Any, places: tuple[Tensor, Tensor], *, narrowed: bool) -> tuple[Tensor, Tensor]:
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    if narrowed:
        with computed_only_at(model, places, IDS.shape):
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
    else:
        logits = model(inputs_embeds=embedded, use_cache=False).logits[places]
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape).to(logits)
    return logits, torch.autograd.grad((logits * weights).sum(), embedded)[0]


def assert_as_if_every_place_was_computed(model: Any, *, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    found, expected = (logits_and_gradient(model, PLACES, narrowed=each) for each in (True, False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_computing_every_place(kind: Any) -> None:
    model = tiny_model(kind, VOCABULARY, torch.float64)
    assert logits_and_gradient(model, PLACES, narrowed=False)[1].abs().max() > 1e-6
    assert_as_if_every_place_was_computed(model)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_models_with_experts_give_the_same_logits_and_gradients(kind: str) -> None:
    model = with_experts(kind)
    assert_as_if_every_place_was_computed(model, rtol=1e-4, atol=1e-6)


def test_the_cache_gets_the_states_of_every_place() -> None:
    model = tiny_model("llama", VOCABULARY, torch.float64)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=True).past_key_values
        with computed_only_at(model, PLACES, IDS.shape):
            found = model(input_ids=IDS, use_cache=True).past_key_values
    for one, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)


def test_a_pass_over_other_tokens_inside_is_not_narrowed() -> None:
    model, other = tiny_model("llama", VOCABULARY, torch.float64), IDS[:2, :5]
    with torch.no_grad(), computed_only_at(model, PLACES, IDS.shape):
        found = model(input_ids=other, use_cache=False).logits
    torch.testing.assert_close(found, model(input_ids=other, use_cache=False).logits)


@pytest.mark.parametrize("slow", [False, True], ids=["prefill", "row by row"])
def test_the_output_layer_never_gets_a_slice_whose_product_would_copy_its_weights(slow: bool) -> None:
    engine = engine_for(tiny_model("qwen2", VOCABULARY, torch.float32))
    memory = KeysAndValues(engine.model)
    contiguous: list[bool] = []
    # A forward hook runs after every pre-hook, so it sees what the layer really multiplied.
    engine.model.get_output_embeddings().register_forward_hook(
        lambda _layer, inputs, _output: contiguous.append(inputs[0].is_contiguous())
    )
    contexts = [(5, 6, 7, 8), (9, 10, 11), (12, 13, 14)]
    if slow:
        with torch.no_grad():
            memory.read(contexts)
            memory.step([5, 6, 7])
    else:
        engine.generate([GenerationRequest(each, max_new_tokens=2) for each in contexts])
    assert len(contiguous) >= 2
    assert all(contiguous)


def test_a_model_without_decoder_layers_runs_unchanged() -> None:
    class Plain(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with computed_only_at(Plain(), PLACES, IDS.shape) as narrowed:
        assert narrowed == []


def test_no_hook_stays_behind_when_the_pass_fails() -> None:
    model = tiny_model("llama", VOCABULARY, torch.float32)
    with pytest.raises(RuntimeError), computed_only_at(model, PLACES, IDS.shape):
        raise RuntimeError("out of memory")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# --- which logits ---


def engine_for(model: Any, **options: Any) -> Engine:
    return Engine(model, tokenizer_for(model), name="tiny", **options)


def sequences() -> list[tuple[int, ...]]:
    """Many lengths, and nothing in common."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()) for length in (9, 23, 6, 17)]


def models_that_change_their_logits() -> dict[str, Any]:
    sizes = {**SMALL, **HEADS, "initializer_range": 0.5}
    return {
        "soft cap": lambda: tiny_model("gemma2", VOCABULARY, final_logit_softcapping=2.0),
        "division": lambda: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)).eval(),
        "multiplication": lambda: CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.1)).eval(),
        "nothing, Llama": lambda: tiny_model("llama", VOCABULARY),
        "nothing, Qwen2": lambda: tiny_model("qwen2", VOCABULARY, tie_word_embeddings=False),
    }


@pytest.mark.parametrize("change", list(models_that_change_their_logits()))
def test_log_probabilities_are_those_of_the_whole_model(change: str) -> None:
    model = models_that_change_their_logits()[change]()
    engine, asked = engine_for(model), []
    for row, tokens in enumerate(sequences()):
        asked += [(row, at, heat) for at in (1, 5, len(tokens) - 1) for heat in (1.0, 0.3)]
    with torch.no_grad():
        found = logprobs(engine, sequences(), asked)
        logits = [model(torch.tensor([tokens])).logits[0] for tokens in sequences()]  # each [T, V]
        following = next_logits(engine, sequences())
    for value, (row, at, heat) in zip(found.tolist(), asked, strict=True):
        expected = (logits[row][at - 1] / heat).log_softmax(-1)[sequences()[row][at]]
        assert value == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    for one, other in zip(following, logits, strict=True):
        torch.testing.assert_close(one, other[-1], rtol=1e-4, atol=1e-5)


def test_a_token_that_nothing_predicts_is_refused() -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY))
    message = "A token is asked for that nothing in this pass predicts.*Ask for later tokens, or read a shorter prefix"
    with pytest.raises(LayoutError, match=message):
        engine.token_logprobs([(1, 5, 6)], [TokenQuery(0, 2), TokenQuery(0, 0)])
    ids = tuple(range(5, 45))
    with engine.exclusive(), torch.no_grad():
        prefix = PrefixCache(engine).read(ids[:30], rows=2, longest=40)
        assert prefix is not None and len(prefix) == 30
        with pytest.raises(LayoutError, match=message):
            logprobs(engine, [ids], [(0, 30, 1.0)], prefix)
        assert logprobs(engine, [ids], [(0, 31, 1.0)], prefix).shape == (1,)


def test_low_precision_models_take_their_softmax_in_float32() -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY, torch.bfloat16))
    with torch.no_grad():
        assert next_logits(engine, [(1, 5, 6)]).dtype == torch.float32
        assert logprobs(engine, [(1, 5, 6)], [(0, 2, 0.2)]).dtype == torch.float32


# --- in batches ---


def test_a_batch_without_room_for_a_token_is_refused() -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY), max_batch_tokens=0)
    with pytest.raises(SettingsError, match="max_batch_tokens is 0; give at least 1"):
        engine.token_logprobs([(1, 5, 6)], [TokenQuery(0, 2)])


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
