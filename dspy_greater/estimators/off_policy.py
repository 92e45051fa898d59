"""What an instruction would be worth, from reasonings that were written under other instructions.

Nothing is generated. The change of the expected loss J(p) = E_r [ℓ(r) + α D(r)] from the instruction p to another c is
estimated by the terms of the whole gradient over reasoning, with exact differences in the place of first-order ones:

    Ĵ(c) - Ĵ(p) = 1/V Σ_m v_m [ (ℓ_m - b) (log f(r_m|x,c) - log f(r_m|x,p)) + α (D(r_m; c) - D(r_m; p)) ]

over M reasonings r_m that are at hand, with ℓ_m the mistake that the metric saw (1 - score), D = 1 - e^(-L_CE) the
doubt about the gold answer after the reasoning, between 0 and 1 (left out where there is no gold answer), α its weight
beside mistakes, v_m the reasoning's share in its example, V = Σ v_m, and b what is assumed of reasonings that
were not seen: `optimism` times the mean of the ℓ_m. The first term asks whether c makes the model *reason* as it did
when it was right, the second how sure the answer is once it has. In the gradient L_CE stands in the place of D, which
is flat where it matters; in exact differences D is right: after a wrong reasoning the gold answer is nearly impossible,
and an instruction that makes it a thousand times likelier, since the model trusts its reasoning less, saves no mistake.
Any edit can be asked about, for one forward pass over M sequences.

The log-ratios are bounded softly, κ tanh(· / κ): a reasoning that has become e^κ times less likely is gone, however
much further it goes. How much the reasonings say about c is the effective sample size (Σ w)² / Σ w² of the importance
weights w_m = v_m exp(bounded log-ratio).

Shapes: M reasonings, R predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import Beginning, shared_length
from dspy_greater.model.teacher_forcing import TokenSpan, in_batches, logits_before


class ReasonedTokens(Protocol):
    """A finished sequence: what was written in it, and the gold answer after that, if there is one."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def written(self) -> TokenSpan: ...
    @property
    def answer(self) -> TokenSpan | None: ...


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds one sequence, in nats; what is not finite is nan."""

    written: float  # log f(r | x, p): sum over the tokens that were written
    answer: float | None  # cross-entropy of the gold answer after them, mean over its tokens; None without one

    @classmethod
    def together(cls, parts: Sequence[Likelihood]) -> Likelihood:
        """Of several calls of one run: log-likelihoods add up, cross-entropies of gold answers are averaged.

        >>> Likelihood.together([Likelihood(-1.0, None), Likelihood(-2.0, 0.5)])
        Likelihood(written=-3.0, answer=0.5)
        """
        answers = [part.answer for part in parts if part.answer is not None]
        answer = math.fsum(answers) / len(answers) if answers else None
        return cls(math.fsum(part.written for part in parts), answer)


@dataclass(frozen=True)
class Forecast:
    """How the expected loss of a candidate differs from that of the instruction now; negative is good."""

    change: float  # Ĵ(c) - Ĵ(p): mistakes, and nats if D does not saturate; nan when no reasoning has finite numbers
    effective_samples: float  # of the M reasonings


def likelihoods(
    engine: Engine,
    sequences: Sequence[ReasonedTokens],
    *,
    answer_temperature: float = 0.2,
    max_batch_tokens: int = 8_192,
) -> list[Likelihood]:
    """One forward pass over each sequence without gradient; what all begin with is read once.

    What was written is taken at temperature 1, the gold answer at `answer_temperature`. `max_batch_tokens` bounds rows
    times longest row of one batch.

    Raises `LayoutError` for a span that is empty or does not fit, `SettingsError` for a temperature that is not
    positive.

    >>> from types import SimpleNamespace as Row
    >>> from dspy_greater.model.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> row = Row(token_ids=(1, 5, 6, 7, 9), written=Row(start=2, stop=4), answer=Row(start=4, stop=5))
    >>> [found] = likelihoods(engine, [row])
    >>> found.written < 0 < found.answer
    True
    """
    if not answer_temperature > 0:
        raise SettingsError(f"answer_temperature is {answer_temperature}; give a number above 0, like 0.2.")
    for row, each in enumerate(sequences):
        _check(row, each)
    if not sequences:
        return []
    first_asked = min(each.written.start for each in sequences)
    alike = shared_length([tuple(each.token_ids[: first_asked - 1]) for each in sequences])
    longest = max(len(each.token_ids) for each in sequences)
    tokens = sequences[0].token_ids[:alike]
    lengths = [len(each.token_ids) for each in sequences]
    with engine.exclusive(), torch.no_grad():
        beginning = Beginning(engine.prefixes, tokens, rows=len(sequences), longest=longest)
        work = partial(_read, engine, beginning, answer_temperature=answer_temperature)
        return in_batches(work, sequences, lengths, max_batch_tokens, beginning.length(), beginning.forget)


def forecast(
    now: Sequence[Likelihood],
    then: Sequence[Likelihood],
    advantages: Sequence[float],
    shares: Sequence[float],
    *,
    answer_weight: float = 1.0,
    bound: float = 3.0,
    saturates: bool = True,
) -> Forecast:
    """Ĵ(c) - Ĵ(p) from the likelihoods of M reasonings under p, `now`, and under c, `then`.

    `advantages` are ℓ_m - b, `shares` v_m and `answer_weight` α; `bound` is κ, in nats. Unless the answer's part
    `saturates`, L_CE takes the place of D: where nothing is reasoned it is all there is to tell a better instruction
    by, and D is flat where the gold answers are far from likely. A reasoning with a number that is not finite takes
    no part.

    >>> now = [Likelihood(-3.0, None), Likelihood(-1.0, None)]
    >>> then = [Likelihood(-1.0, None), Likelihood(-1.5, None)]  # likelier when it was right, less when wrong
    >>> forecast(now, then, advantages=[-0.5, 0.5], shares=[1.0, 1.0]).change
    -0.5609...
    """
    lack = _doubt if saturates else _cross_entropy
    rows = [
        (share, advantage, after.written - before.written, lack(after) - lack(before))
        for before, after, advantage, share in zip(now, then, advantages, shares, strict=True)
    ]
    rows = [row for row in rows if all(map(math.isfinite, row))]
    if not rows:
        return Forecast(math.nan, 0.0)
    total = math.fsum(share for share, *_ in rows)
    rows = [(share, advantage, bound * math.tanh(ratio / bound), lacks) for share, advantage, ratio, lacks in rows]
    change = math.fsum(share * (advantage * ratio + answer_weight * lacks) for share, advantage, ratio, lacks in rows)
    weights = [share * math.exp(ratio) for share, _, ratio, _ in rows]
    return Forecast(change / total, math.fsum(weights) ** 2 / math.fsum(weight**2 for weight in weights))


def _read(
    engine: Engine, beginning: Beginning, batch: Sequence[ReasonedTokens], *, answer_temperature: float
) -> list[Likelihood]:
    spans = [[(each.written, 1.0), *([(each.answer, answer_temperature)] if each.answer else [])] for each in batch]
    asked = [
        (row, at, heat) for row, each in enumerate(spans) for span, heat in each for at in range(span.start, span.stop)
    ]
    places = [(row, at) for row, at, _ in asked]
    logits = logits_before(engine, [each.token_ids for each in batch], places, prefix=beginning.read())  # [R, V]
    targets = torch.tensor([batch[row].token_ids[at] for row, at in places], device=logits.device)  # [R]
    heat = logits.new_tensor([heat for *_, heat in asked])  # [R]
    nll = cross_entropy(logits / heat[:, None], targets, reduction="none").tolist()  # [R]

    found: list[Likelihood] = []
    taken = iter(nll)
    for each in batch:
        written = -math.fsum(next(taken) for _ in range(each.written.start, each.written.stop))
        answer = None
        if each.answer is not None:
            length = each.answer.stop - each.answer.start
            answer = math.fsum(next(taken) for _ in range(length)) / length
        found.append(Likelihood(_finite(written), None if answer is None else _finite(answer)))
    return found


def _check(row: int, each: ReasonedTokens) -> None:
    length = len(each.token_ids)
    spans = {"written": each.written} | ({"answer": each.answer} if each.answer is not None else {})
    for name, span in spans.items():
        # What was written may be nothing; an answer may not.
        if not 1 <= span.start <= span.stop <= length or (name == "answer" and span.start == span.stop):
            raise LayoutError(
                f"Sequence {row}: the {name} span [{span.start}, {span.stop}) does not fit its {length} tokens. It "
                "needs a token before it that predicts it, and an answer needs at least one token."
            )


def _cross_entropy(found: Likelihood) -> float:
    return 0.0 if found.answer is None else found.answer


def _doubt(found: Likelihood) -> float:
    """D, as `select.evaluation` has it; 0 without a gold answer."""
    return 0.0 if found.answer is None else 1.0 - math.exp(-found.answer)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
