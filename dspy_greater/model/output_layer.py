"""Logits where they are needed: the output layer, the widest of all, is applied to chosen places and no others.

Shapes: N rows, T tokens, R chosen places, U hidden states from elsewhere, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

Places = tuple[Tensor, ...]  # rows and columns, [R] each


@contextmanager
def computed_only_at(
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
