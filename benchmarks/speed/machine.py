"""What this machine can do at best, measured: matrix products and copies, in the dtype of the run."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from functools import partial

import torch
import transformers

from benchmarks.speed.sizes import Ceilings, ModelSize
from benchmarks.speed.step import synchronise

_LEAST_SECONDS = 0.2  # of a measurement
_LONG_SECONDS = 1.0  # of one call: it is measured once, and larger products are not, which would be no faster
_COPY_BYTES = (8 << 20, 1 << 30)  # least and most that is copied


def measure(
    size: ModelSize, *, tokens: int, device: torch.device, dtype: torch.dtype, now: Callable[[], float]
) -> Ceilings:
    """Matrix products of `tokens` rows through layers of the model's widths, and copies as large as its weights."""
    shapes = [(rows, size.hidden, wide) for rows in (tokens, 2048) for wide in (size.hidden, size.intermediate, 2048)]
    shapes.append((2048, 2048, 2048))
    rate = 0.0
    for rows, inner, columns in sorted(shapes, key=math.prod):
        a = torch.ones(rows, inner, device=device, dtype=dtype)
        b = torch.ones(inner, columns, device=device, dtype=dtype)
        seconds = _best_seconds(partial(torch.matmul, a, b), device, now)
        rate = max(rate, 2 * rows * inner * columns / seconds)
        if seconds > _LONG_SECONDS:
            break
    count = min(max(size.weight_bytes, _COPY_BYTES[0]), _COPY_BYTES[1])
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device, now)
    return Ceilings(rate, 2 * count / seconds)


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """The machine and the versions, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "device_type": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _best_seconds(work: Callable[[], object], device: torch.device, now: Callable[[], float]) -> float:
    """Seconds of one call: the best of five measurements of many calls together, or of one where a call takes long."""
    work()
    calls, best = 1, float("inf")
    measured = 0
    while measured < 5:
        synchronise(device)
        started = now()
        for _ in range(calls):
            work()
        synchronise(device)
        seconds = now() - started
        if seconds < _LEAST_SECONDS / 5:
            calls *= 2
            continue
        measured, best = measured + 1, min(best, seconds / calls)
        if best > _LONG_SECONDS:
            break
    return best


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
