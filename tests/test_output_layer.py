"""Logits are computed at the places that count, and these do not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dspy_greater.model.output_layer import computed_only_at
from tests.tiny_models import tiny_model

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
