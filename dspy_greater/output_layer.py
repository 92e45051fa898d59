"""Logits where they are needed: what comes last in a model is applied to chosen places and no others.

That is the output layer, the widest of all, and the feed-forward network of the last decoder layer: after the last
attention no place looks at another, so what happens at places without a loss changes nothing.

Shapes: N rows, T tokens, R chosen places, U hidden states from elsewhere, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList

from .prefix import frozen

Places = tuple[Tensor, ...]  # rows and columns, [R] each
_ROUNDING = 0.02  # of the largest logit, in half precision; what is wrong is wrong by much more


@contextmanager
def computed_only_at(
    model: Any, places: Places, shape: torch.Size, before: Tensor | None = None
) -> Iterator[list[bool]]:
    """Inside, a forward pass over [N, T] tokens, `shape`, gives logits that count at `places` alone.

    Arguments and what is yielded as in `output_layer_sees_only`. What the cache gets is the same for all places.
    """
    with last_network_sees_only(model, places, shape), output_layer_sees_only(model, places, shape, before) as narrowed:
        yield narrowed


@contextmanager
def output_layer_sees_only(
    model: Any, places: Places, shape: torch.Size, before: Tensor | None = None
) -> Iterator[list[bool]]:
    """Inside, the output layer maps [U, d] and [N, T, d] to [1, U + R, V]. Yields a list, not empty once it has.

    A model without such a layer, or that feeds it something else, runs unchanged: the caller picks the places
    from the full logits instead.
    """
    narrowed: list[bool] = []

    def keep_places(_layer: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or inputs[0].shape[:-1] != shape:
            return None
        narrowed.append(True)
        kept = inputs[0][places]  # [R, d]
        return ((kept if before is None else torch.cat([before, kept]))[None], *inputs[1:])  # [1, U + R, d]

    layer = model.get_output_embeddings()
    if layer is None:
        yield narrowed
        return
    hook = layer.register_forward_pre_hook(keep_places)
    try:
        yield narrowed
    finally:
        hook.remove()


@contextmanager
def last_network_sees_only(model: Any, places: Places, shape: torch.Size) -> Iterator[None]:
    """Inside, the last decoder layer's feed-forward network is applied to `places` of [N, T, d], and is 0 elsewhere.

    A model that was not `verified` runs unchanged, and so does one that feeds its network something else.
    """
    network = _verified_network(model)
    wanted = torch.zeros(shape, dtype=torch.bool)
    wanted[places] = True
    if network is None or bool(wanted.all()):
        yield
        return
    # A place that is asked for twice is computed once, and so is its gradient.
    with _applied_at(network, wanted.nonzero().unbind(1), shape):
        yield


def verified(model: Any) -> bool:
    """Whether the last decoder layer's feed-forward network is one that treats every place alike and alone.

    Looked for once in each model: only linear layers may hold weights in it, and a short pass has to give the same
    logits when the network sees some places only. A network that divides places among experts, that looks at several
    of them, that is used by several layers, or that other layers come after, is left as it is. Where the model gets
    other layers later nothing is narrowed; what is changed inside the network has to treat places alone, too.
    """
    with _LOOKING:
        if model not in _verified:
            network = _candidate(model)
            _verified[model] = ref(network) if network is not None and _logits_stay(model, network) else None
    return _verified_network(model) is not None


_LOOKING = Lock()
_verified: WeakKeyDictionary[Any, ref[Module] | None] = WeakKeyDictionary()


def _verified_network(model: Any) -> Module | None:
    """What was verified, if the model still has it in its last layer."""
    found = _verified.get(model)
    network = found() if found else None
    return network if network is not None and network is _network_of_last_layer(model) else None


@contextmanager
def _applied_at(network: Module, places: Places, shape: torch.Size) -> Iterator[list[bool]]:
    """Inside, `network` maps [N, T, d] at `places` alone. Yields a list with one entry for each time that it did."""
    narrowed: list[bool] = []  # True until the output is put back

    def keep_places(_network: Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any] | None:
        if named or len(inputs) != 1 or inputs[0].shape[:-1] != shape:
            return None
        narrowed.append(True)
        return (inputs[0][places][None],), named  # [1, R, d]

    def put_back(_network: Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if not narrowed or not narrowed[-1]:
            return None
        narrowed[-1] = False
        return output.new_zeros(*shape, output.shape[-1]).index_put(places, output[0])  # [N, T, d]

    hooks = [
        network.register_forward_pre_hook(keep_places, with_kwargs=True),
        network.register_forward_hook(put_back),
    ]
    try:
        yield narrowed
    finally:
        for hook in hooks:
            hook.remove()


def _network_of_last_layer(model: Any) -> Any:
    find = getattr(model, "get_decoder", None)
    layers = getattr(find() if find else None, "layers", None)
    return getattr(layers[-1], "mlp", None) if isinstance(layers, ModuleList) and len(layers) else None


def _candidate(model: Any) -> Module | None:
    network = _network_of_last_layer(model)
    if not isinstance(network, Module):
        return None
    own = {id(each) for each in network.parameters()}
    linear = {id(each) for part in network.children() if isinstance(part, Linear) for each in part.parameters()}
    on_meta = any(each.is_meta for each in model.parameters())
    return network if own and own == linear and not on_meta else None


def _logits_stay(model: Any, network: Module) -> bool:
    """Whether a pass over 2 x 6 tokens has the logits of two places whether or not the network sees the others."""
    weight = model.get_input_embeddings().weight
    token_ids = (torch.arange(12) % weight.shape[0]).reshape(2, 6).to(weight.device)
    places = (torch.tensor([0, 1]), torch.tensor([2, 5]))

    def logits() -> Tensor:
        return model(input_ids=token_ids, use_cache=False).logits[places]

    try:
        with frozen(model), torch.no_grad():
            everywhere = logits()
            with _applied_at(network, places, token_ids.shape) as narrowed:
                some = logits()
    except Exception:  # whatever it is that the model needs besides, it is then left as it is
        return False
    alike = ((some - everywhere).abs() <= _ROUNDING * everywhere.abs().max()).all()
    return len(narrowed) == 1 and bool(alike)
