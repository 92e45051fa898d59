"""What was tried on the weights, and is tried again once they have changed: the handshake, and a gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from dspy_greater.model.backward_probe import Backward, try_backward
from dspy_greater.model.handshake import shake_hands
from dspy_greater.model.kv_cache import reach_of, rotation_is_fixed_up_to
from dspy_greater.model.placement import refuse_parts
from dspy_greater.model.weights import Weights
from dspy_greater.model.weights_digest import WeightsDigest, quantisation


class Checks:
    """Which weights these are at the moment, and whether they can be used.

    Args:
        weights: the model and its tokenizer.
        hold: holds the model while something is tried; see `frozen.ModelLock`.
        revision: which version the weights are; found out from the weights themselves when not given.

    Attributes:
        handshake: what the last handshake found.
        cache_reach: the most tokens of a sequence in which key-value states of its beginning can be shared; 0: never.
        fixed_rotation: the most tokens of a sequence up to which positions are embedded in one way (LongRoPE, NTK).

    Raises:
        WeightsError: model and tokenizer failed the handshake, or this process has a part of them; says why.
    """

    def __init__(
        self, weights: Weights, hold: Callable[[], AbstractContextManager[None]], revision: str | None = None
    ) -> None:
        self._weights, self._hold = weights, hold
        refuse_parts(weights.name, weights.model)
        self._shake_hands()
        self._digest = WeightsDigest(weights.model, weights.tokenizer, known=revision)
        self._checked = self._digest.first
        self._backward: tuple[str, Backward] | None = None  # of which revision

    @property
    def revision(self) -> str:
        """Which version the weights are, found out anew each time: see `weights_digest`."""
        return self._digest.label()

    @property
    def identity(self) -> str:
        """`name@revision:dtype`, with the quantisation method if there is one; of the weights as they are now."""
        return self._identity(self.revision)

    def renew(self) -> str:
        """The identity, after a new handshake where the weights are not those of the last one.

        Raises:
            WeightsError: they were changed into something that cannot be used.
        """
        revision = self.revision
        if revision != self._checked:
            with self._hold():
                self._shake_hands()
                self._checked = revision
        return self._identity(revision)

    def backward(self) -> Backward:
        """Whether these weights give gradients; tried once, and again when they have changed."""
        revision = self.revision
        if self._backward is None or revision != self._backward[0]:
            with self._hold():
                self._backward = (revision, try_backward(self._weights.model, self._weights.tokenizer))
        return self._backward[1]

    def _shake_hands(self) -> None:
        model = self._weights.model
        self.handshake = shake_hands(model, self._weights.tokenizer, self._weights.name)
        self.fixed_rotation = rotation_is_fixed_up_to(model)
        self.cache_reach: float = reach_of(model) if self.handshake.keys_and_values else 0

    def _identity(self, revision: str) -> str:
        method = quantisation(self._weights.model)
        dtype = str(self._weights.dtype).removeprefix("torch.")
        return f"{self._weights.name}@{revision}:{dtype}{f'+{method}' if method else ''}"
