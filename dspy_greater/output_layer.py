"""Logits where they are needed: what comes last in a model is applied to chosen places and no others.

That is the output layer, the widest of all, and the feed-forward network of the last decoder layer: after the last
attention no place looks at another, so what happens at places without a loss changes nothing.

Shapes: N rows, T tokens, R chosen places, U hidden states from elsewhere, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList

Places = tuple[Tensor, Tensor]  # rows and columns, [R] each


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

    A model in which no such network is found runs unchanged, and so does one that feeds it something else.
    """
    network = last_network(model)
    wanted = torch.zeros(shape, dtype=torch.bool)
    wanted[places] = True
    if network is None or bool(wanted.all()):
        yield
        return
    distinct = wanted.nonzero().unbind(1)  # a place that is asked for twice is computed once, and so is its gradient
    narrowed: list[bool] = []

    def keep_places(_network: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(inputs) != 1 or inputs[0].shape[:-1] != shape:
            return None
        narrowed.append(True)
        return (inputs[0][distinct][None],)  # [1, R, d]

    def put_back(_network: Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if not narrowed:
            return None
        narrowed.clear()
        everywhere = output.new_zeros(*shape, output.shape[-1])  # [N, T, d]
        return everywhere.index_put(distinct, output[0])

    hooks = [network.register_forward_pre_hook(keep_places), network.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_network(model: Any) -> Module | None:
    """The feed-forward network of the last decoder layer, if it is one that treats every place alike and alone.

    Only linear layers may hold weights in it: a router that divides places among experts, or anything that sees
    several places, is left as it is.
    """
    find = getattr(model, "get_decoder", None)
    decoder = find() if find else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, ModuleList) or not len(layers):
        return None
    network = getattr(layers[-1], "mlp", None)
    if not isinstance(network, Module):
        return None
    own = {id(each) for each in network.parameters()}
    linear = {id(each) for part in network.children() if isinstance(part, Linear) for each in part.parameters()}
    return network if own and own == linear else None
