"""Tensors as Python's own numbers, with types that a checker can follow."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def floats(values: Tensor) -> list[float]:
    """The elements of a tensor of one dimension.

    >>> from torch import tensor
    >>> floats(tensor([0.5, -2.0]))
    [0.5, -2.0]
    """
    return cast("list[float]", cast(Any, values).tolist())


def whole(values: Tensor) -> list[int]:
    """The elements of a tensor of whole numbers of one dimension.

    >>> from torch import tensor
    >>> whole(tensor([3, 1]))
    [3, 1]
    """
    return cast("list[int]", cast(Any, values).tolist())
