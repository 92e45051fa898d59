"""Which weights a model holds at the moment, told by a few hexadecimal digits, cheaply enough to ask again and again.

DSPy's cache knows a model by a string. Weights that are trained on, merged, quantised or exchanged in this process
have to change the string; weights that are loaded again in another process must not.

- A sample of the weights is read: one number of every row of a matrix, each in another column, and up to 4096 of a
  vector. Besides, what else changes the text: adapters that are on, the size of the vocabulary, the chat template.
- PyTorch counts how often a tensor was written to (`Tensor._version`). Where a weight was written to or moved since
  the first look, the sample may have missed what changed. Then the weights are read whole, once for each such change.

Cost: the sample of a model of 8 billion parameters is 1.7 million numbers, which takes tenths of a second on two CPU
cores; the counters take milliseconds. Reading everything takes seconds, and happens only after a change. What neither
sees: a few numbers that were changed behind PyTorch's back (through `.data` or a NumPy view).

Any tensor can be read: a wrapper (torchao's, `DTensor`) by its parts, another subclass by its memory. Weights that
cannot be read get a label that never comes again, so that nothing is answered from a cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Buffer, Module, Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dspy_greater.errors import WeightsError
from dspy_greater.model.placement import copies_of_others, fetched_later
from dspy_greater.notices import warn_caller

_MOST_ROWS = 1 << 18  # of a matrix, and numbers of bare memory, that are sampled
_MOST_OF_VECTOR = 4096
_CHUNK = 1 << 22  # numbers that are summed at once
_SPREAD = 0x9E3779B1  # odd and large: neighbouring rows are sampled in columns that lie far apart
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the text of an object: another one in every process

Named = tuple[str, Tensor]
Stamp = tuple[tuple[str, int, int], ...]  # of each tensor: name, address, how often it was written to


class WeightsDigest:
    """Labels the weights of a model; knows whether they were written to since it was made.

    Args:
        model: any module.
        tokenizer: its tokenizer.
        known: what to call the weights as long as nobody has changed them, such as a commit.

    >>> model = torch.nn.Linear(3, 2)
    >>> digest = WeightsDigest(model, "a tokenizer")
    >>> before = digest.label()
    >>> with torch.no_grad():
    ...     _ = model.weight[0, 0].add_(1e-3)
    >>> digest.label() == before, digest.label() == digest.label()
    (False, True)
    """

    def __init__(self, model: Module, tokenizer: Any, *, known: str | None = None) -> None:
        self._model, self._tokenizer, self._known = model, tokenizer, known
        self._warned = False
        self._first = self._look()
        self.first = secrets.token_hex(6) if self._first is None else known or self._first[1]  # the label then
        self._whole: tuple[object, str] = (None, "")  # what was seen when everything was read last, and the digest

    def label(self) -> str:
        """Twelve hexadecimal digits, or what was `known` while nothing has changed.

        Warns, the first time, when the weights cannot be read.
        """
        now = self._look()
        if now is None or self._first is None:
            return secrets.token_hex(6)
        stamp, sample = now
        if now == self._first:
            return self._known or sample
        if stamp == self._first[0]:
            return sample
        if self._whole[0] != now:
            self._whole = (now, _digest(sample.encode(), *_checksums(self._model)))
        return self._whole[1]

    def _look(self) -> tuple[Stamp, str] | None:
        """How often each tensor was written to, and the digest of a sample; None when they cannot be read."""
        try:
            tensors = list(_tensors(self._model))
            stamp = tuple((name, _address(tensor), _writes(tensor)) for name, tensor in tensors)
            settings = (len(self._tokenizer), getattr(self._tokenizer, "chat_template", None), *_switches(self._model))
            elsewhere = fetched_later(self._model)
            samples = (_sample(_fetched(named, elsewhere)) for named in tensors)
            return stamp, _digest(*samples, repr(settings).encode())
        except Exception as error:  # an identity is not worth a failed load, whatever kind of tensor comes next
            if not self._warned:
                self._warned = True
                warn_caller(
                    f"The weights of {type(self._model).__name__} cannot be read to tell them from others "
                    f"({type(error).__name__}: {error}). They get a new name each time, so that no answer comes from "
                    "DSPy's cache, and an interrupted run cannot be resumed.",
                    RuntimeWarning,
                )
            return None


def quantisation(model: Any) -> str:
    """How the weights are quantised, as far as the configuration or the kind of the tensors says; nothing if not."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None:
        known = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        return str(getattr(known, "value", known) or "quantized")
    kinds = {type(parameter).__name__ for parameter in model.parameters()} - {"Tensor", "Parameter"}
    return "+".join(sorted(kinds))


def _digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=6)
    for part in parts:
        found.update(part)
    return found.hexdigest()


# ---- what there is to read


def _tensors(model: Module) -> Iterator[Named]:
    """Every weight as plain tensors: parameters, buffers that are saved with the model, and what is packed away."""
    copies = copies_of_others(model)
    for name, parameter in model.named_parameters():
        if name not in copies:
            yield from _plain(name, parameter)
    for prefix, module in model.named_modules():
        temporary = module._non_persistent_buffers_set
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in temporary:
                yield from _plain(f"{prefix}.{key}", buffer)
        if not (module._parameters or module._buffers or module._modules):
            # Modules that pack their weights into an object of their own show them only here.
            yield from _packed(prefix, module.state_dict())


def _packed(name: str, value: Any) -> Iterator[Named]:
    if isinstance(value, Tensor):
        yield from _plain(name, value)
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _packed(f"{name}.{key}", part)


def _plain(name: str, tensor: Tensor) -> Iterator[Named]:
    """The tensor, or the plain tensors that it is made of."""
    if is_traceable_wrapper_subclass(tensor):
        parts, settings = tensor.__tensor_flatten__()
        about = f"{name}:{type(tensor).__name__}:{_ADDRESS.sub('', repr(settings))}"
        for part in parts:
            yield from _plain(f"{about}.{part}", getattr(tensor, part))
    elif tensor.is_quantized:
        yield f"{name}:{tensor.q_scale() if tensor.qscheme() == torch.per_tensor_affine else ''}", tensor.int_repr()
    elif type(tensor) in (Tensor, Parameter, Buffer) and tensor.layout == torch.strided:
        yield name, tensor.detach()
    else:
        yield name, _memory(tensor)


def _memory(tensor: Tensor) -> Tensor:
    """The bytes that a subclass keeps, whatever it makes of them."""
    storage = tensor.untyped_storage()
    if not tensor.is_meta and storage.nbytes() and not storage.data_ptr():  # reading on would end the process
        raise WeightsError(f"{type(tensor).__name__} keeps its numbers in other tensors and does not say in which")
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _switches(model: Module) -> Iterator[str]:
    """Which adapters are on, and how strongly."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "adapter" in key or key == "scaling":
                try:
                    yield f"{name}.{key}={json.dumps(value, sort_keys=True)}"
                except (TypeError, ValueError):  # an object, not a setting
                    continue


# ---- reading it


def _fetched(named: Named, elsewhere: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> Named:
    """The weight itself where a placeholder stands for it."""
    name, tensor = named
    if not tensor.is_meta or name not in elsewhere:
        return named
    store, key = elsewhere[name]
    return name, store[key].detach()


def _address(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.data_ptr()


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(named: Named) -> bytes:
    name, tensor = named
    about = f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()
    if tensor.is_meta or not tensor.numel():
        return about
    matrix = tensor.reshape(1, 1) if tensor.ndim == 0 else tensor
    *outer, width = matrix.shape
    rows = math.prod(outer)
    if matrix.ndim == 1:
        most = _MOST_ROWS if tensor.dtype == torch.uint8 else _MOST_OF_VECTOR
        values = matrix[_spaced(width, most, tensor.device)]
    else:
        row = _spaced(rows, _MOST_ROWS, tensor.device)
        place = (row,) if len(outer) == 1 else torch.unravel_index(row, tuple(outer))
        values = matrix[(*place, row * _SPREAD % width)]
    return about + values.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _spaced(count: int, most: int, device: torch.device) -> Tensor:
    """All of 0 ... count - 1, or `most` of them, from the first to the last."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.arange(most, device=device) * (count - 1) // (most - 1)


def _checksums(model: Module) -> Iterator[bytes]:
    """Of every tensor: each word of 8 bytes times an odd number of its own, so that no single change is missed."""
    odd: dict[torch.device, Tensor] = {}
    elsewhere = fetched_later(model)
    for name, tensor in (_fetched(named, elsewhere) for named in _tensors(model)):
        if tensor.is_meta or not tensor.numel():
            continue
        if tensor.device not in odd:
            odd[tensor.device] = 2 * torch.arange(_CHUNK, device=tensor.device) + 1
        memory = tensor.contiguous().reshape(-1).view(torch.uint8)
        memory = memory if memory.data_ptr() % 8 == 0 else memory.clone()
        words = memory[: len(memory) // 8 * 8].view(torch.int64)
        totals = [_dot(words[start : start + _CHUNK], odd[tensor.device]) for start in range(0, len(words), _CHUNK)]
        yield f"{name}{totals}".encode() + memory[8 * len(words) :].cpu().numpy().tobytes()


def _dot(words: Tensor, odd: Tensor) -> int:
    odd = odd[: len(words)]
    return int(torch.dot(words, odd) if words.device.type == "cpu" else (words * odd).sum())
