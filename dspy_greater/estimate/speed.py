"""How fast this model writes, reads and differentiates on this machine, tried on a program's own prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dspy_greater.estimate.watch import watched
from dspy_greater.estimators.off_policy import likelihoods
from dspy_greater.estimators.score_gradient import score_gradient
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import PrefixCache
from dspy_greater.model.interface import GenerationRequest, Tokens
from dspy_greater.objective.replay import Reasoning, Replay

_TOKENS = 6  # that each row of a trial writes
_QUICK = 0.15  # seconds: what takes no longer alone is tried on all reasonings too, as a step does it


@dataclass(frozen=True)
class Speed:
    """Seconds that a model takes, and bytes.

    Attributes:
        write_step: for a token of a batch, however many rows it has,
        write_row: and for each of its rows besides.
        read: for a token that is read.
        differentiate: for a token that is read and differentiated.
        state_bytes: of a token that was read, as long as it is kept.
        gradient_bytes: of all that a backward pass keeps, for a token.
    """

    write_step: float
    write_row: float
    read: float
    differentiate: float
    state_bytes: float
    gradient_bytes: float

    def writing(self, rows: float, longest: float, tokens: float) -> float:
        """Seconds for a batch whose longest row has so many tokens, and all rows together so many."""
        return self.write_step * longest + self.write_row * tokens if rows else 0.0


def try_speed(engine: Engine, prompt: Tokens, rows: int, reasonings: Sequence[Reasoning], position: int) -> Speed:
    """Try it: a few tokens of a row alone and of `rows` rows, and these reasonings read and differentiated.

    `position` is of the instruction, for the gradient.
    """
    limit = engine.context_length
    prompt = prompt[: limit - _TOKENS] if limit is not None else prompt
    many = max(2, min(rows, 32, engine.max_batch_rows))
    alone, together = _step_seconds(engine, prompt, 1), _step_seconds(engine, prompt, many)
    row = max(0.0, (together - alone) / (many - 1))
    read = _reading(engine, reasonings)
    differentiate, kept = _differentiating(engine, reasonings, position)
    return Speed(
        write_step=max(0.0, alone - row),
        write_row=row,
        read=read,
        differentiate=differentiate or 3.0 * read,
        state_bytes=_state_bytes(engine, prompt),
        gradient_bytes=kept,
    )


def _step_seconds(engine: Engine, prompt: Tokens, rows: int) -> float:
    """From one token of a batch to the next; the prompt is the same for all rows and read once."""
    told: list[float] = []

    def clock(_token: int) -> None:
        told.append(time.perf_counter())

    first = GenerationRequest(prompt, _TOKENS, stop_token_ids=(), on_token=clock)
    others = [GenerationRequest(prompt, _TOKENS, stop_token_ids=())] * (rows - 1)
    with watched(engine) as model:
        model.generate([first, *others])
    return statistics.median(later - earlier for earlier, later in pairwise(told))


def _reading(engine: Engine, reasonings: Sequence[Reasoning]) -> float:
    def read(some: Sequence[Reasoning]) -> float:
        with watched(engine) as model:
            likelihoods(model, some)
        return model.reading.seconds / max(model.reading.read, 1.0)

    if not reasonings:
        return 0.0
    began = time.perf_counter()
    alone = read(reasonings[:1])
    return read(reasonings) if time.perf_counter() - began < _QUICK else alone


def _differentiating(engine: Engine, reasonings: Sequence[Reasoning], position: int) -> tuple[float, float]:
    """Seconds and bytes a token; zeros where nothing can be differentiated."""
    if not reasonings or not any(
        len(sequence.generated) for reasoning in reasonings for sequence in reasoning.sequences
    ):
        return 0.0, 0.0

    def differentiate(some: Sequence[Reasoning]) -> tuple[float, float]:
        tokens = [0, min(1, len(engine.tokenizer) - 1)]
        replay = Replay(some, [1.0] * len(some))
        with watched(engine) as model, _SavedBytes(engine.model) as kept:
            score_gradient(model, replay, position=position, candidates=tokens)
        done = max(model.differentiating.differentiated, 1.0)
        return model.differentiating.seconds / done, kept.bytes / done

    began = time.perf_counter()
    alone = differentiate(reasonings[:1])
    return differentiate(reasonings) if time.perf_counter() - began < _QUICK else alone


class _SavedBytes:
    """Counts what backward passes keep besides the weights, while it is entered."""

    def __init__(self, model: Any) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._seen: set[tuple[int, int]] = set()
        self.bytes = 0

    def __enter__(self) -> _SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key[0] not in self._weights and key not in self._seen:
            self._seen.add(key)
            self.bytes += tensor.nbytes
        return tensor


def _state_bytes(engine: Engine, prompt: Tokens) -> float:
    """Bytes of a token's key-value states; 0 where they cannot be seen."""
    with engine.exclusive():
        found = PrefixCache(engine).read(prompt[:64], rows=2, longest=len(prompt[:64]) + 1)
    return sum(state.nbytes for state in found.states) / len(found) if found else 0.0


def resident_bytes(engine: Engine) -> int:
    """What is in use before a search: of the accelerator that the weights are on, or by the process; 0 if unknown."""
    device = engine.weights.device
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return sum(parameter.nbytes for parameter in engine.model.parameters())
    import resource

    return pages * resource.getpagesize()
