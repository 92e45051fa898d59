"""Whether a model gives gradients: asked before a search that needs them, once for each state of its weights.

Layers without a backward pass are common where weights are quantised: a kernel that is made for inference, a function
under `no_grad`. Nothing fails then. The gradient is zero, or lacks what would have come through those layers.

Cost: one forward and one backward pass over 2 x 10 tokens, and a second call of each kind of layer that stands out.

Shapes: T = 10 tokens of a row, V vocabulary, d embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves, tree_map

from dspy_greater.model.handshake import left_alone, sample_rows
from dspy_greater.model.incremental import uncached
from dspy_greater.model.placement import input_device
from dspy_greater.model.weights_digest import quantisation

_EARLY = 2  # tokens that the last prediction has to depend on


@dataclass(frozen=True)
class Backward:
    """What came back from the last prediction to the embeddings of the first tokens.

    >>> Backward(None, ()).works, Backward("It is zero.", ()).works
    (True, False)
    """

    fault: str | None  # why there is no gradient, as a sentence; None when there is one
    blocked: tuple[str, ...]  # layers whose output follows their input, and that pass no gradient back

    @property
    def works(self) -> bool:
        """Whether there is a gradient, though perhaps not the whole of it."""
        return self.fault is None

    def explained(self, name: str, model: Any) -> str:
        """What is wrong with the weights called `name`, where it comes from, and what to do about it."""
        method = quantisation(model)
        return (
            f"{self.fault or 'The gradient is not the whole one.'}{self._culprits(model)}"
            f"{f' The weights are quantised ({method}).' if method else ''} "
            f"Load {name!r} in bfloat16 or float32, without quantisation and inference kernels, and pass that as "
            "weights= (a name, a path or a (model, tokenizer) pair). The LM itself may stay as it is."
        )

    def _culprits(self, model: Any) -> str:
        if not self.blocked:
            return ""
        kinds = sorted({type(model.get_submodule(name)).__name__ for name in self.blocked})
        return f" No gradient passes {len(self.blocked)} layers of type {', '.join(kinds)}, such as {self.blocked[0]}."


def try_backward(model: Any, tokenizer: Any) -> Backward:
    """Differentiate the last prediction of two rows to their first embeddings; the model is left as it was.

    >>> from dspy_greater.model.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> try_backward(engine.model, engine.tokenizer)
    Backward(fault=None, blocked=())
    """
    rows = sample_rows(model, tokenizer)  # [2, T]
    with left_alone(model), torch.inference_mode(False):
        with torch.enable_grad(), _watched(model) as stopped:
            fault = _fault(model, rows)
        with torch.no_grad():
            found = {type(module): _follows_its_input(module, inputs) for _, module, inputs in stopped}
    blocked = [name for name, module, _ in stopped if found[type(module)]]
    inner = [name for name in blocked if not any(other.startswith(f"{name}.") for other in blocked)]
    return Backward(fault, tuple(inner))


def _fault(model: Any, rows: Tensor) -> str | None:
    layer = model.get_input_embeddings()
    with torch.no_grad():
        leaf = layer(rows.to(input_device(model))).detach().clone()  # [2, T, d]
    leaf.requires_grad_(True)
    hook = layer.register_forward_hook(lambda *_: leaf.clone())  # some models scale it in place
    try:
        last = uncached(model, rows)[:, -1].float()  # [2, V]
        signs = 1 - 2 * (torch.arange(last.shape[-1], device=last.device) % 2)
        asked = (last.masked_fill(~(last.abs() < 1e30), 0) * signs).sum()
        (gradient,) = torch.autograd.grad(asked, leaf, allow_unused=True)
    except (RuntimeError, TypeError, ValueError) as error:  # kernels without a backward pass raise what they like
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"The backward pass fails: {said[0]}"
    finally:
        hook.remove()
    early = None if gradient is None else gradient[:, :_EARLY]
    if early is not None and not bool(early.isfinite().all()):
        return "The gradient of a prediction with respect to an earlier token's embedding is not finite."
    if early is None or not bool(early.any()):
        return _unless_blind(model, rows)
    return None


def _unless_blind(model: Any, rows: Tensor) -> str | None:
    """A gradient of zero is right where the last prediction does not depend on the first tokens."""
    swapped = torch.cat([rows.flip(0)[:, :_EARLY], rows[:, _EARLY:]], 1)
    with torch.no_grad():
        if torch.equal(uncached(model, rows)[:, -1], uncached(model, swapped)[:, -1]):
            return None
    return "The gradient of a prediction with respect to an earlier token's embedding is zero, though they are related."


@contextmanager
def _watched(model: Any) -> Iterator[list[tuple[str, Module, tuple[Any, Any]]]]:
    """Inside, modules are listed, with their inputs, that are given something to differentiate and return nothing."""
    stopped: list[tuple[str, Module, tuple[Any, Any]]] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: Module, inputs: Any, named: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # what chooses among places is under no_grad on purpose
            return
        returned = [value for value in tree_leaves(output) if _is_float(value)]
        if _differentiable((inputs, named)) and returned and not _differentiable(returned):
            stopped.append((names[module], module, tree_map(_detached, (inputs, named))))

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in names if module is not model]
    try:
        yield stopped
    finally:
        for hook in hooks:
            hook.remove()


def _follows_its_input(module: Module, inputs: tuple[Any, Any]) -> bool:
    """Whether other numbers come out where others go in; position embeddings only look at a tensor's type."""

    def output(scale: float) -> list[Tensor]:
        given, named = tree_map(lambda value: value * scale if _is_float(value) else value, inputs)
        return [value for value in tree_leaves(module(*given, **named)) if _is_float(value)]

    try:
        return any(not torch.equal(one, other) for one, other in zip(output(1.0), output(0.5), strict=True))
    except Exception:  # it cannot be called a second time, so nothing can be said about it
        return False


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _differentiable(values: Any) -> bool:
    return any(_is_float(value) and value.requires_grad for value in tree_leaves(values))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
