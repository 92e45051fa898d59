"""One batch of work for a worker, and what the worker makes of it.

A job is whole: what a worker computes follows from the job and the weights alone, never from what the worker did
before. So it does not matter which worker gets it, how many there are, or how often one died.

Shapes: N sequences of a job, R queries, V vocabulary, d embedding, P tokens of the opening.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import Prefix, PrefixCache
from dspy_greater.model.fast.session import Session
from dspy_greater.model.interface import Leaf, TokenQuery, Tokens


@dataclass(frozen=True)
class Opening:
    """The tokens that all sequences of a call begin with, how many sequences there are, and how long the longest is.

    Each worker reads them once, alone and from the first one, whichever of the call's jobs it gets.
    """

    token_ids: Tokens = ()  # [P]
    rows: int = 0
    longest: int = 0


@dataclass(frozen=True, eq=False)
class Job:
    """A part of a call of `interface.Model`; its tensors are on the CPU.

    Attributes:
        kind: which call: `next_token_logprobs`, `token_logprobs` or `logprob_gradient`.
        sequences: N sequences, or contexts.
        queries: about these.
        leaf: of a gradient.
        opening: what all sequences of the whole call begin with.
    """

    kind: Literal["next", "logprobs", "gradient"]
    sequences: tuple[Tokens, ...]
    queries: tuple[TokenQuery, ...] = ()
    leaf: Leaf | None = None
    opening: Opening = Opening()

    @property
    def size(self) -> str:
        """For a message.

        >>> Job("next", ((1, 2, 3), (4, 5))).size
        '2 rows of at most 3 tokens'
        """
        longest = max(map(len, self.sequences), default=0)
        return f"{len(self.sequences)} rows of at most {longest} tokens"


@dataclass(frozen=True, eq=False)
class Answer:
    """What a job came to.

    Attributes:
        values: [N, V], [R], [N, d] or [1, d], on the CPU.
        spent: what it took, without the opening.
        opened: what it takes to read the opening, whether it was read for this job or before.
    """

    values: Tensor
    spent: Counters
    opened: Counters


class JobRunner:
    """Does jobs one after the other on the weights of an engine.

    >>> runner = JobRunner(Engine.from_pretrained("pocket", device="cpu"))
    >>> runner.run(Job("logprobs", ((1, 5, 6),), (TokenQuery(row=0, at=2),))).values.shape
    torch.Size([1])
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._opened: tuple[Opening, Prefix | None, Counters] = (Opening(), None, Counters())

    def run(self, job: Job) -> Answer:
        """The job's answer; raises what `interface.Model` raises."""
        with self.engine.exclusive():
            prefix, opened = self._read(job.opening)
            before = self.engine.counters
            values = _computed(Session(self.engine, keeps=False, beginning=prefix), job, self.engine)
            return Answer(values.detach().cpu(), self.engine.counters - before, opened)

    def _read(self, opening: Opening) -> tuple[Prefix | None, Counters]:
        """The states of the opening, kept for the next job of the same call."""
        if opening != self._opened[0]:
            self._opened = (Opening(), None, Counters())  # the memory of the old one first
            before = self.engine.counters
            prefix = PrefixCache(self.engine).read(opening.token_ids, rows=opening.rows, longest=opening.longest)
            self._opened = (opening, prefix, self.engine.counters - before)
        return self._opened[1:]


def _computed(session: Session, job: Job, engine: Engine) -> Tensor:
    if job.kind == "next":
        return session.next_token_logprobs(job.sequences)
    if job.leaf is None:
        return session.token_logprobs(job.sequences, job.queries)
    leaf = Leaf(job.leaf.places, job.leaf.embedding.to(engine.weights.device))
    return session.logprob_gradient(job.sequences, job.queries, leaf)
