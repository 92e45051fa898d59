"""What comes last in a model is computed for the places that count, and they do not notice."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dspy_greater.output_layer import computed_only_at, last_network_sees_only, verified
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
    assert verified(model)
    assert logits_and_gradient(model, PLACES, narrowed=False)[1].abs().max() > 1e-6
    assert_as_if_every_place_was_computed(model)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_experts_see_every_place(kind: str) -> None:
    model = with_experts(kind)
    assert not verified(model)
    assert_as_if_every_place_was_computed(model, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_network_computes_each_place_that_counts_once_and_no_other(kind: Any) -> None:
    model = tiny_model(kind, VOCABULARY, torch.float32)
    assert verified(model)
    seen: list[int] = []
    networks = [layer.mlp for layer in model.model.layers]
    hooks = [
        each.down_proj.register_forward_hook(lambda _m, _i, out: seen.append(out[..., 0].numel())) for each in networks
    ]
    logits_and_gradient(model, PLACES, narrowed=True)
    assert seen == [IDS.numel()] * (len(networks) - 1) + [4]
    for hook in hooks:
        hook.remove()


class Shifted(nn.Module):
    """Linear layers only, and yet every place sees the one before it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj = inner.up_proj, inner.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x + nn.functional.pad(x, (0, 0, 1, -1))))


class TimeMajor(nn.Module):
    """A layer whose network gets places before rows."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.mlp, self.layer = layer.mlp, layer
        layer.mlp = Turned(layer.mlp)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.layer(*inputs, **named)


class Turned(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.transpose(0, 1)).transpose(0, 1)


class Scaled(Shifted):
    """Takes a second argument for every place."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.down_proj(self.up_proj(x)) * (1.0 if scale is None else scale)


UNUSUAL = [
    "network used twice",
    "layer used twice",
    "network that looks at other places",
    "network that gets places before rows",
]


def unusual(kind: str) -> Any:
    model = tiny_model("llama", VOCABULARY, torch.float64)
    layers = model.model.layers
    if kind == "network used twice":
        layers[0].mlp = layers[-1].mlp
    elif kind == "layer used twice":
        layers[0] = layers[-1]
    elif kind == "network that gets places before rows":
        layers[-1] = TimeMajor(layers[-1])
    else:
        layers[-1].mlp = Shifted(layers[-1].mlp)
    return model


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_network_that_is_not_the_last_or_not_for_each_place_alone_sees_every_place(kind: str) -> None:
    model = unusual(kind)
    assert not verified(model)
    assert_as_if_every_place_was_computed(model)


def test_a_network_that_is_given_more_than_hidden_states_sees_every_place() -> None:
    model = tiny_model("llama", VOCABULARY, torch.float64)
    model.model.layers[-1].mlp = Scaled(model.model.layers[-1].mlp)
    assert verified(model)
    network, seen = model.model.layers[-1].mlp, []
    network.up_proj.register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape))
    hidden = torch.randn(*IDS.shape, model.config.hidden_size, dtype=torch.float64)
    with last_network_sees_only(model, PLACES, IDS.shape):
        network(hidden, scale=torch.ones(*IDS.shape, 1))
    assert seen == [(*IDS.shape, model.config.intermediate_size)]


@pytest.mark.parametrize("change", ["swapped", "appended", "replaced"])
def test_a_model_that_gets_other_layers_later_sees_every_place(change: str) -> None:
    model = tiny_model("llama", VOCABULARY, torch.float64)
    assert verified(model)
    layers, more = model.model.layers, tiny_model("llama", VOCABULARY, torch.float64).model.layers[0]
    if change == "swapped":
        layers[0], layers[-1] = layers[-1], layers[0]
    elif change == "appended":
        more.self_attn.layer_idx = len(layers)
        layers.append(more)
    else:
        layers[-1].mlp = Shifted(layers[-1].mlp)
    assert not verified(model)
    assert_as_if_every_place_was_computed(model)


def test_a_model_that_was_looked_at_can_be_freed() -> None:
    model = tiny_model("llama", VOCABULARY, torch.float32)
    assert verified(model)
    network, gone = model.model.layers[-1].mlp, weakref.ref(model)
    network.owner = [model]  # as a hook's closure may have it
    del model, network
    gc.collect()
    assert gone() is None


def test_looking_at_a_model_leaves_it_as_it_was() -> None:
    model, state = tiny_model("llama", VOCABULARY, torch.float32).train(), torch.get_rng_state()
    assert verified(model)
    assert model.training and all(each.requires_grad and each.grad is None for each in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_that_cannot_be_looked_at_runs_unchanged() -> None:
    model = tiny_model("llama", VOCABULARY, torch.float32)
    forward, model.forward = model.forward, lambda **_: (_ for _ in ()).throw(TypeError("needs an image"))
    assert not verified(model)
    model.forward = forward


def test_the_cache_gets_the_states_of_every_place() -> None:
    model = tiny_model("llama", VOCABULARY, torch.float64)
    assert verified(model)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=True).past_key_values
        with computed_only_at(model, PLACES, IDS.shape):
            found = model(input_ids=IDS, use_cache=True).past_key_values
    for one, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)


def test_a_pass_over_other_tokens_inside_is_not_narrowed() -> None:
    model, other = tiny_model("llama", VOCABULARY, torch.float64), IDS[:2, :5]
    assert verified(model)
    with torch.no_grad(), last_network_sees_only(model, PLACES, IDS.shape):
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
    assert verified(model)
    with pytest.raises(RuntimeError), computed_only_at(model, PLACES, IDS.shape):
        raise RuntimeError("out of memory")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
