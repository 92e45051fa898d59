"""What all sequences share behind the leaf is differentiated once, and the gradient is that of each on its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dspy_greater.errors import EngineMemoryError
from dspy_greater.model.fast import shared_backward
from dspy_greater.objective.replay import Reasoning
from tests.test_score_gradient import POINTS, Point, engine_for, reasonings, slopes
from tests.tiny_models import InDouble, tiny_model


def slopes_of(
    runs: list[Reasoning], point: Point = "centroid", *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[tuple[float, ...], int]:
    """The slopes, and how many tokens were differentiated for them."""
    engine = engine_for(tiny_model(dtype=dtype), **options)
    found = slopes(engine, runs, point=point)
    return found, engine.counters.backward_tokens


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_backward, "_worth_sharing", lambda *_, **__: False)


def tokens_of(runs: list[Reasoning]) -> list[int]:
    return [len(call.token_ids) for run in runs for call in run.sequences]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("max_batch_tokens", [8_192, 150, 1])
def test_a_shared_segment_gives_what_reading_every_row_on_its_own_gives(
    point: Point, max_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, options = reasonings(behind=50), {"dtype": torch.float64, "max_batch_tokens": max_batch_tokens}
    with InDouble():
        together, few = slopes_of(runs, point, **options)
        one_by_one(monkeypatch)
        apart, many = slopes_of(runs, point, **options)
    assert together == pytest.approx(apart, rel=1e-10)
    assert few < many / 2


def test_the_segment_is_read_and_differentiated_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = torch.autograd.grad

    def noted(outputs: Any, *args: Any, **options: Any) -> Any:
        passes.append("segment" if isinstance(outputs, list) else "batch")
        return real(outputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", noted)
    slopes_of(reasonings(behind=50), max_batch_tokens=1)
    assert passes == ["batch"] * 8 + ["segment"]


def test_in_half_precision_a_shared_segment_gives_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = reasonings(behind=50)
    together, _ = slopes_of(runs, dtype=torch.bfloat16)
    one_by_one(monkeypatch)
    apart, _ = slopes_of(runs, dtype=torch.bfloat16)
    assert together == pytest.approx(apart, rel=0.1, abs=0.2 * max(map(abs, apart)))


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("logits_at", torch.OutOfMemoryError("CUDA out of memory")),
        ("_through", torch.OutOfMemoryError("CUDA out of memory")),
        ("in_batches", EngineMemoryError("A row alone does not fit into memory")),
        ("_through", math.inf),
    ],
)
def test_where_the_segment_cannot_be_had_every_row_is_read_on_its_own(
    where: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = reasonings(behind=50)
    expected, _ = slopes_of(runs)
    asked, real = [], getattr(shared_backward, where)

    def fail(*args: Any, **options: Any) -> Tensor:
        asked.append(where)
        if len(asked) > 1:
            return real(*args, **options)
        if isinstance(how, Exception):
            raise how
        return torch.full((1, 32), how)

    monkeypatch.setattr(shared_backward, where, fail)
    found, many = slopes_of(runs)
    assert asked
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert many >= sum(tokens_of(runs))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_batch_that_runs_out_of_memory_is_counted_once(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = reasonings(behind=50)
    expected, few = slopes_of(runs)
    calls, real = [], torch.autograd.grad

    def short_of_memory(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", short_of_memory)
    # Two batches, of which the one that fails is halved.
    found, again = slopes_of(runs, max_batch_tokens=60)
    assert len(calls) == 2 + 2 + 1
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert again == few
