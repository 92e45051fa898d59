"""Freed memory goes back to the system.

Key-value states grow by a token at a time, and each growth frees the block before. glibc keeps such blocks for later,
in pieces too small for the next batch.
"""

from __future__ import annotations

import ctypes
import sys


def release() -> None:
    """Hand back what the C library keeps of freed memory; nothing happens where it cannot be asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none
    if trim is not None:
        trim(0)
