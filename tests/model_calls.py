"""Calls of a model as tests make them, what they cost, and models that run out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Generation, GenerationRequest, Model
from dspy_greater.model.sampling import row_seed
from dspy_greater.prompt.spans import Span, Supervised


def generated(
    model: Model, prompts: Sequence[Sequence[int]], most: int, *, seed: int = 0, **options: Any
) -> list[Generation]:
    """What the model generates after every prompt; each row draws by a seed of its own."""
    return model.generate(
        [GenerationRequest(tuple(each), most, seed=row_seed(seed, row), **options) for row, each in enumerate(prompts)]
    )


def spent_on(engine: Engine, work: Callable[[], Any]) -> Counters:
    """What the work cost."""
    before = engine.counters
    work()
    return engine.counters - before


class Full(torch.nn.Module):
    """A model whose passes over more than a few rows run out of memory."""

    def __init__(self, model: Any, most: int) -> None:
        super().__init__()
        self.inner, self.most = model, most
        self.config = model.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Any, **inputs: Any) -> Any:
        if len(input_ids) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.inner(input_ids=input_ids, **inputs)


@contextmanager
def memory_runs_out(engine: Engine, when: Callable[[Tensor], bool]) -> Iterator[list[torch.Size]]:
    """Inside, a forward pass over input ids of which `when` is true fails; yields the shapes of those that did."""
    forward, failed = engine.model.forward, []

    def starved(*args: Any, logits_to_keep: int = 0, **options: Any) -> Any:
        ids = options["input_ids"]
        if when(ids):
            failed.append(ids.shape)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, logits_to_keep=logits_to_keep, **options)

    engine.model.forward = starved
    try:
        yield failed
    finally:
        del engine.model.forward


_VOCABULARY = 512  # of the tiny models


def example(token_ids: Sequence[int], instruction: Span, answer: Span) -> Supervised:
    """A sequence with nothing generated in it."""
    return Supervised(tuple(token_ids), instruction, Span(instruction.stop, instruction.stop), answer)


def ragged_rows(count: int = 4, seed: int = 0) -> list[Supervised]:
    """Examples with the same instruction of 4 tokens, and inputs, reasonings and answers of many lengths."""
    generator = torch.Generator().manual_seed(seed)

    def some(length: int) -> list[int]:
        return torch.randint(5, _VOCABULARY, (length,), generator=generator).tolist()

    instruction = some(4)
    found = []
    for index in range(count):
        before, after, answer = [1, *some(index % 3)], some(3 + 5 * (3 * index % 4)), some(1 + index % 3)
        prompt_end = len(before) + len(instruction)
        ids = before + instruction + after + answer
        found.append(example(ids, Span(len(before), prompt_end), Span(len(ids) - len(answer), len(ids))))
    return found
