"""A model that is left as it was: in eval mode, without gradients for its weights, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Eval mode and no gradients for parameters, both as they were afterwards."""
    training = [module for module in model.modules() if module.training]
    # Tensors made in inference mode get no gradient, and their flag could not be put back.
    wanted = [each for each in model.parameters() if each.requires_grad and not each.is_inference()]
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
