"""Whether tokens that stand in a sequence are those that the model would have written at temperature 0.

Shapes: R asked tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dspy_greater.model.teacher_forcing import in_batches, logits_at, right_padded

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

Row = tuple[tuple[int, ...], int]  # a sequence, and the index of the first token that is asked for


def greedy_tokens(engine: Engine, rows: Sequence[Row]) -> list[list[bool]]:
    """For each row: is each token from the given index on a likeliest one after those before it?

    One forward pass over the sequences, without a gradient. Of equally likely tokens each counts.

    Raises:
        EngineMemoryError: a row alone does not fit into memory.
        LayoutError: the first token of a sequence is asked for, which nothing predicts.

    >>> from dspy_greater.model.engine import Engine
    >>> from dspy_greater.model.interface import GenerationRequest
    >>> engine = Engine.from_pretrained("pocket")
    >>> [written] = engine.generate([GenerationRequest((1, 5, 6), max_new_tokens=2)])
    >>> greedy_tokens(engine, [((1, 5, 6, *written.token_ids), 3)]) == [[True] * len(written.token_ids)]
    True
    """

    @torch.no_grad()
    def work(batch: Sequence[Row]) -> list[list[bool]]:
        token_ids, position_ids = right_padded([sequence for sequence, _ in batch])
        asked = [(row, at) for row, (sequence, start) in enumerate(batch) for at in range(start, len(sequence))]
        if not asked:
            return [[] for _ in batch]
        places = torch.tensor([row for row, _ in asked]), torch.tensor([at - 1 for _, at in asked])
        real = sum(len(sequence) for sequence, _ in batch)
        with engine.exclusive():
            logits = logits_at(engine, token_ids, position_ids, places, real=real)  # [R, V]
        written = torch.tensor([batch[row][0][at] for row, at in asked], device=logits.device)
        likeliest = (logits.gather(1, written[:, None])[:, 0] >= logits.amax(dim=1)).tolist()  # [R]
        found: list[list[bool]] = [[] for _ in batch]
        for (row, _), is_likeliest in zip(asked, likeliest, strict=True):
            found[row].append(is_likeliest)
        return found

    lengths = [len(sequence) for sequence, _ in rows]
    return in_batches(work, rows, lengths, engine.max_batch_tokens, apart=engine.checks.fixed_rotation)
