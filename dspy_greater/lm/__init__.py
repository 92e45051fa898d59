"""A `dspy.LM` over open weights in this process."""

from dspy_greater.lm.local import DEFAULT_MAX_TOKENS, AsyncLocalEngine, LocalEngine, local_lm

__all__ = ["DEFAULT_MAX_TOKENS", "AsyncLocalEngine", "LocalEngine", "local_lm"]
