"""Reading rows token by token, whichever way a model remembers what it has read: slow, and right.

`generate.decode` and all that is shared between rows rely on a cache of keys and values and nothing else. A hybrid or
state-space model remembers more than these, and some models have no cache that can be used. `handshake` finds out
which way works; here the rows of such a model are generated:

- `KeysAndValues`: the keys and values of a plain cache. The handshake tries it to see whether it may be used.
- `OwnStates`: whatever the model hands out beside its logits, and takes back under the same name.
- `NoCache`: nothing; every token reads its whole row again.

Shapes: n rows, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig

from dspy_greater.model.kv_cache import held_states, plain_cache
from dspy_greater.model.placement import input_device
from dspy_greater.model.sampling import Row, choose
from dspy_greater.model.teacher_forcing import computed_only_at

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

Tally = Callable[..., None]

_COMPACT_BELOW = 0.9  # finished rows leave once they are a tenth of the batch
_MOST_TOKENS = 8192  # of one pass without a cache


class Memory(Protocol):
    """What a model remembers of n rows: `read` them once, then `step` by one token each, and `keep` some of them.

    `read` and `step` return the logits [n, V] of the tokens that come next.
    """

    def read(self, contexts: Sequence[Sequence[int]]) -> Tensor: ...
    def step(self, tokens: Sequence[int]) -> Tensor: ...
    def keep(self, rows: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class StateFormat:
    """How a model hands out its states, as far as that was found out by trying."""

    names: tuple[str, ...]  # fields of its output, and arguments of its `forward`
    axes: Mapping[str, int]  # path of a tensor in them -> the axis of the rows
    ragged: bool  # whether rows of unequal length may be read together, with pads on their left
    mask_in_steps: bool  # whether a step is given the attention mask, as the first reading is


class _Padded:
    """Rows with pads on their left: their attention mask and positions."""

    def __init__(self, model: Any, *, pad: int = 0, tally: Tally = lambda **_: None) -> None:
        self._model, self._pad, self._tally = model, pad, tally
        self._device = input_device(model)

    def read(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        width, real = max(map(len, contexts)), sum(map(len, contexts))
        ids = [[self._pad] * (width - len(context)) + list(context) for context in contexts]  # [n, T]
        pads = torch.tensor([[width - len(context)] for context in contexts])
        steps = torch.arange(width)[None] - pads
        self._mask = (steps >= 0).long().to(self._device)  # [n, T]
        self._positions = steps.clamp(min=0).to(self._device)  # [n, T]
        self._tally(prefilled_tokens=real, padded_tokens=len(contexts) * width - real)
        return self._forward(torch.tensor(ids, device=self._device), attention_mask=self._mask)

    def step(self, tokens: Sequence[int]) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._positions = self._positions[:, -1:] + 1
        return self._forward(torch.tensor(tokens, device=self._device)[:, None], attention_mask=self._mask)

    def keep(self, rows: Sequence[int]) -> None:
        self._mask, self._positions = self._mask[list(rows)], self._positions[list(rows)]

    def _forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        given = {**inputs, "position_ids": self._positions, "use_cache": True}
        last = torch.arange(len(ids)), torch.full((len(ids),), ids.shape[1] - 1)
        with computed_only_at(self._model, last, ids.shape) as narrowed:
            output = self._model(input_ids=ids, **accepted(self._model, **given))
        self._take(output)
        self._tally(forwards=1, lm_head_rows=output.logits.shape[0] * output.logits.shape[1])
        return output.logits[0] if narrowed else output.logits[:, -1]

    def _take(self, output: Any) -> None:
        """Take the states out of the model's output."""


class KeysAndValues(_Padded):
    """The keys and values of a plain cache, taken out of it and put into a new one wherever rows are kept."""

    def read(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        self._cache = plain_cache(self._model)
        return super().read(contexts)

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        held = [held_states(layer) for layer in self._cache.layers]
        self._cache = plain_cache(self._model)
        layers: list[Any] = self._cache.layers
        for layer, (keys, values) in zip(layers, held, strict=True):
            if keys.numel():
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys[list(rows)], values[list(rows)]

    def _forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        return super()._forward(ids, past_key_values=self._cache, **inputs)


class OwnStates(_Padded):
    """Whatever the model hands out beside its logits; where rows are kept, they are selected in every state."""

    def __init__(self, model: Any, states: StateFormat, **options: Any) -> None:
        super().__init__(model, **options)
        self._format = states
        self.states: dict[str, Any] = {}

    def read(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        self.states = {}
        return super().read(contexts)

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self.states = selected(self.states, list(rows), self._format.axes)

    def _forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        if not self._format.ragged or (self.states and not self._format.mask_in_steps):
            del inputs["attention_mask"]
        return super()._forward(ids, **inputs, **self.states)

    def _take(self, output: Any) -> None:
        self.states = {name: output[name] for name in self._format.names}


class NoCache:
    """Nothing is remembered: rows are padded on their right and read whole for every token."""

    def __init__(self, model: Any, *, pad: int = 0, tally: Tally = lambda **_: None) -> None:
        self._model, self._pad, self._tally = model, pad, tally
        self._rows: list[list[int]] = []

    def read(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        self._rows = [list(context) for context in contexts]
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Tensor:
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token)
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def _logits(self) -> Tensor:
        at_once = max(1, _MOST_TOKENS // max(map(len, self._rows)))
        parts = [self._rows[start : start + at_once] for start in range(0, len(self._rows), at_once)]
        return torch.cat([self._of(part) for part in parts])

    def _of(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width, real = max(map(len, rows)), sum(map(len, rows))
        ids = torch.tensor([[*row, *[self._pad] * (width - len(row))] for row in rows])  # [n, T]
        places = (torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows]))
        with computed_only_at(self._model, places, ids.shape) as narrowed:
            logits = uncached(self._model, ids)
        self._tally(forwards=1, prefilled_tokens=real, padded_tokens=ids.numel() - real)
        self._tally(lm_head_rows=len(rows) if narrowed else ids.numel())
        return logits[0] if narrowed else logits[places]


@torch.no_grad()
def decode_by(engine: Engine, rows: Sequence[Row]) -> None:
    """Generate every row to its end; as `generate.decode`, with one memory for rows that may be read together.

    Rows are changed in place, so what was generated before an out-of-memory error is not lost.
    """
    found = engine.checks.handshake
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[0 if found.ragged else len(row.context)].append(row)
    for group in groups.values():
        _decode_group(
            found.memory(engine.model, pad=engine.weights.pad_token_id, tally=engine.tally.add), group, engine.tally.add
        )


def _decode_group(memory: Memory, rows: Sequence[Row], tally: Tally) -> None:
    rows = list(rows)
    logits = memory.read([row.context for row in rows])
    while True:
        before = sum(len(row.generated) for row in rows)
        for row, token in zip(rows, choose(logits, rows), strict=True):
            if row.finish_reason is None:
                row.accept(token)
        tally(generated_tokens=sum(len(row.generated) for row in rows) - before)
        live = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if not live:
            return
        if len(live) <= _COMPACT_BELOW * len(rows):
            memory.keep(live)
            rows = [rows[index] for index in live]
        tally(padded_tokens=len(rows) - len(live) if len(live) > _COMPACT_BELOW * len(rows) else 0)
        logits = memory.step([row.context[-1] for row in rows])


def uncached(model: Any, ids: Tensor) -> Tensor:
    """The logits [n, T, V] of a plain pass over [n, T] tokens, called as the losses call it."""
    device = input_device(model)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    return model(input_ids=ids.to(device), position_ids=positions, use_cache=False).logits


def state_names(model: Any, output: Any) -> tuple[str, ...]:
    """What the model both hands out and takes back; where it takes anything, all that it hands out beside logits."""
    fields = [name for name in getattr(output, "keys", list)() if name not in ("logits", "loss")]
    named = tuple(name for name in fields if name in _parameters(model))
    return named or (tuple(fields) if _takes_anything(model) else ())


def row_axes(one: Any, several: Any) -> Mapping[str, int]:
    """The axis of the rows in every state, from the states of one row and those of several that are as long.

    >>> dict(row_axes({"a": [torch.zeros(3, 1)]}, {"a": [torch.zeros(3, 2)]}))
    {'/a/0': 1}
    """
    shapes = {path: leaf.shape for path, leaf in _leaves(one)}
    found: dict[str, int] = {}
    for path, leaf in _leaves(several):
        before = shapes.get(path, leaf.shape)
        differ = [axis for axis, (less, more) in enumerate(zip(before, leaf.shape, strict=False)) if less != more]
        if differ and len(before) == leaf.ndim:
            found[path] = differ[0]
    return MappingProxyType(found)


def selected(state: Any, rows: Sequence[int], axes: Mapping[str, int], path: str = "") -> Any:
    """The same states for some of the rows; nothing is written to.

    >>> selected({"a": (torch.tensor([5, 6, 7]), "b")}, [2, 0], {"/a/0": 0})
    {'a': (tensor([7, 5]), 'b')}
    """
    if isinstance(state, Tensor):
        index = torch.tensor(rows, device=state.device)
        return state.index_select(axes[path], index) if path in axes else state
    before = dict(_parts(state))
    parts = {key: selected(part, rows, axes, f"{path}/{key}") for key, part in before.items()}
    if all(parts[key] is before[key] for key in parts):
        return state
    if isinstance(state, (list, tuple)):
        values = parts.values()
        return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
    other = copy.copy(state)
    if isinstance(other, MutableMapping):
        other.update(parts)
    else:
        vars(other).update(parts)
    return other


def accepted(model: Any, **inputs: Any) -> dict[str, Any]:
    """Those of the inputs that the model's `forward` takes."""
    return inputs if _takes_anything(model) else {name: inputs[name] for name in inputs if name in _parameters(model)}


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _takes_anything(model: Any) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in _parameters(model).values())


def _leaves(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield path, state
    for key, part in _parts(state):
        yield from _leaves(part, f"{path}/{key}")


def _parts(state: Any) -> Iterator[tuple[Any, Any]]:
    """What a state is made of: the items of a container, the attributes of an object."""
    if isinstance(state, Mapping):
        yield from state.items()
    elif isinstance(state, (list, tuple)):
        yield from enumerate(state)
    elif not isinstance(state, (Tensor, Module, PreTrainedConfig, type)) and not callable(state):
        yield from getattr(state, "__dict__", {}).items()
