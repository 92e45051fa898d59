"""What every model over an engine has in common, whether it is plain, fast or on several workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine


class OverEngine:
    """The part of `interface.Model` that is the engine's own.

    Args:
        engine: has the weights and the tokenizer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and output together."""
        return self._engine.context_length

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """See `interface.Model`."""
        return self._engine.embed(tokens)
