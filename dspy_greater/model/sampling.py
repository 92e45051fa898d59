"""One row of text on its way, and the choice of its next token: greedy, or drawn by random numbers of its own.

Shapes: V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dspy_greater.model.interface import Generation

_NOISE_BLOCK = 64


@dataclass
class Row:
    """One sequence on its way: what it reads, how it is sampled, and what it has generated so far."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    on_token: Callable[[int], bool | None] | None = None
    on_end: Callable[[Generation], None] | None = None
    draft: tuple[int, ...] = ()  # what it will probably generate
    generated: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "pause"] | None = None
    pause_at: int | None = None  # after so many generated tokens it leaves its batch, to go on in another one
    _noise: list[float] = field(default_factory=list)
    _generator: torch.Generator | None = None

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt and what was generated: a row interrupted by a lack of memory goes on from here."""
        return (*self.prompt, *self.generated)

    @property
    def expected(self) -> tuple[int, ...]:
        """What it will probably write from here on, but for the last token that it may."""
        begun = len(self.generated)
        return self.draft[begun : begun + self.room - 1] if self.draft[:begun] == tuple(self.generated) else ()

    @property
    def length(self) -> int:
        """How many tokens its context has."""
        return len(self.prompt) + len(self.generated)

    @property
    def room(self) -> int:
        """How many tokens it may generate until it ends or pauses."""
        most = self.max_new_tokens if self.pause_at is None else min(self.pause_at, self.max_new_tokens)
        return most - len(self.generated)

    def uniform(self) -> float:
        """The random number in [0, 1) of the token that is about to be generated."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        while len(self._noise) <= len(self.generated):
            block = torch.rand(_NOISE_BLOCK, generator=self._generator, dtype=torch.float64)
            self._noise.extend(block.tolist())
        return self._noise[len(self.generated)]

    def accept(self, token: int) -> None:
        """Take the next token: a stop token ends the row ungenerated, a full row ends by length."""
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
        else:
            self.generated.append(token)
            if self.on_token is not None and self.on_token(token):
                self.finish_reason = "stop"
            elif len(self.generated) >= self.max_new_tokens:
                self.finish_reason = "length"
            elif self.room <= 0:
                self.finish_reason = "pause"
        if self.finish_reason in ("stop", "length") and self.on_end is not None:
            self.on_end(self.result())

    def result(self) -> Generation:
        """What it generated."""
        return Generation(tuple(self.generated), "stop" if self.finish_reason == "stop" else "length")


def row_seed(seed: int, row: int) -> int:
    """A 63-bit seed for one row, a fixed function of the call's seed and the row's place in the call."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of every row from its logits [rows, V].

    Greedy is the arg max. Otherwise the inverse of the cumulative distribution, in token order, at the
    row's own uniform number: the same number gives the same token whatever else is in the batch.
    """
    tokens = logits.argmax(-1).tolist()
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0 and row.finish_reason is None]
    if not drawn:
        return tokens
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    options = {"device": logits.device, "dtype": exact}
    heat = torch.tensor([rows[i].temperature for i in drawn], **options)[:, None]
    nucleus = torch.tensor([rows[i].top_p for i in drawn], **options)[:, None]
    noise = torch.tensor([rows[i].uniform() for i in drawn], **options)[:, None]
    probabilities = torch.softmax(logits[drawn].to(exact) / heat, -1)  # [drawn, V]
    if bool((nucleus < 1).any()):
        ranked, order = torch.sort(probabilities, stable=True, dim=-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= nucleus
        outside[:, 0] = False  # the likeliest token always stays
        probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0)
    cumulative = probabilities.cumsum(-1)
    # Strictly above, so that a token of probability 0 is never drawn.
    above = cumulative > noise * cumulative[:, -1:]
    for i, token in zip(drawn, above.int().argmax(-1).tolist(), strict=True):
        tokens[i] = token
    return tokens
