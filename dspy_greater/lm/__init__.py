"""A `dspy.LM` over open weights in this process, or over several servers of one model."""

from dspy_greater.lm.local import DEFAULT_MAX_TOKENS, AsyncLocalEngine, LocalEngine, local_lm
from dspy_greater.lm.served import AsyncServerPool, ServerPool, served_lm

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "AsyncLocalEngine",
    "AsyncServerPool",
    "LocalEngine",
    "ServerPool",
    "local_lm",
    "served_lm",
]
