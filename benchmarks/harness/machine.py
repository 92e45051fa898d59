"""Where a cell ran: versions, and the most memory that was in use."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import dspy_greater

_LIBRARIES = ("dspy", "torch", "transformers", "litellm", "textgrad", "promptolution", "gepa", "optuna")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append((library, version(library)))
    return tuple(found)


def versions() -> dict[str, str | int]:
    """Libraries that are installed, Python, the machine, its cores and its accelerator."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "dspy_greater": dspy_greater.__version__,
        **dict(_installed()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "accelerator": device,
    }


def forget_peak_memory() -> None:
    """Begin to measure the peak anew, where the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            _CLEAR.write_text("5")  # resets the high-water mark, Linux


def peak_memory() -> int:
    """Bytes: of the accelerator if there is one, else the process's resident memory at its highest."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
