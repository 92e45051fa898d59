"""The product of the last states and an output layer's weights, three ways: a slice, its copy, and rows alone.

    python benchmarks/results/output-layer-2026-11-30/slice.py

Sizes are those of Qwen2.5-0.5B: 8 prompts of 60 tokens, width 896, 151,936 tokens. Medians of five, in seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice [8, 1, 896], as `logits_to_keep=1` takes": lambda states: states[:, -1:, :],
    "its copy [8, 1, 896]": lambda states: states[:, -1:, :].contiguous(),
    "rows alone [8, 896]": lambda states: states[:, -1],
}


def main() -> None:
    """One line a type and a way."""
    for dtype in (torch.bfloat16, torch.float32):
        states = torch.randn(8, 60, 896, dtype=dtype)
        weights = torch.randn(151_936, 896, dtype=dtype)
        for name, way in WAYS.items():
            linear(way(states), weights)
            print(f"{dtype} {name}: {statistics.median(_seconds(states, weights, way) for _ in range(5)):.3f}")


def _seconds(states: Tensor, weights: Tensor, way: Callable[[Tensor], Tensor]) -> float:
    began = time.perf_counter()
    linear(way(states), weights)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
