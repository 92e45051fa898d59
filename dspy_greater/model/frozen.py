"""A model that is held by one thread, in eval mode and without gradients for its weights, and left as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Eval mode and no gradients for parameters, both as they were afterwards."""
    training = [module for module in model.modules() if module.training]
    # Tensors made in inference mode get no gradient, and their flag could not be put back.
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad and not parameter.is_inference()]
    try:
        for module in training:
            module.training = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)


class ModelLock:
    """Lets one thread at a time hold a model, which is frozen meanwhile."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock, self._depth = threading.RLock(), 0
        self._ours = False

    def freeze_for_good(self) -> None:
        """Freeze a model that nobody else has, so that nothing need be put back."""
        self._model.requires_grad_(False).eval()
        self._ours = True

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the model, re-entrantly; train/eval mode and `requires_grad` flags are put back at the end."""
        with self._lock:
            self._depth += 1
            try:
                if self._ours or self._depth > 1:
                    yield
                else:
                    with frozen(self._model):
                        yield
            finally:
                self._depth -= 1
