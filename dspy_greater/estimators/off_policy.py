"""What an instruction would be worth, from reasonings that were generated under another: off-policy estimates.

Nothing is generated. The change of the expected loss J(p) = E_r [ℓ(r) + α D(r)] from the instruction p to another c is
estimated by the terms of the score gradient, with exact differences in the place of first-order ones:

    Ĵ(c) - Ĵ(p) = 1/V Σ_m v_m [ (ℓ_m - b) κ tanh(log[f(r_m|x,c) / f(r_m|x,p)] / κ) + α (D(r_m; c) - D(r_m; p)) ]

over M reasonings r_m, with ℓ_m the mistake that the metric saw (1 - score), D = 1 - e^(-L_CE) the uncertainty of the
gold answer after the reasoning, between 0 and 1 (left out where there is no gold answer), α its weight beside mistakes,
v_m the reasoning's share in its example, V = Σ v_m, and b the baseline: what is assumed of reasonings that were not
seen. The first term asks whether c makes the model *reason* as it did when it was right, the second how sure the answer
is once it has. In the gradient L_CE stands in the place of D, which is flat where it matters; in exact differences D is
right: after a wrong reasoning the gold answer is nearly impossible, and an instruction that makes it a thousand times
likelier, since the model trusts its reasoning less, saves no mistake. Any edit can be asked about, for one forward pass
over M sequences.

The log-ratios are bounded softly: a reasoning that has become e^κ times less likely is gone, however much further it
goes. How much the reasonings say about c is the effective sample size (Σ w)² / Σ w² of the importance weights
w_m = v_m exp(bounded log-ratio).

Shapes: M reasonings, R queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.interface import Model, TokenQuery
from dspy_greater.model.tensors import floats
from dspy_greater.objective.replay import ReasonedSequence, Reasoning


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds one reasoning, in nats; what is not finite is nan."""

    generated: float  # log f(r | x, p): sum over the tokens that were generated
    answer: float | None  # cross-entropy of the gold answer after them, mean over its tokens; None without one

    @classmethod
    def together(cls, parts: Sequence[Likelihood]) -> Likelihood:
        """Of several calls of one run: log-likelihoods add up, cross-entropies of gold answers are averaged.

        >>> Likelihood.together([Likelihood(-1.0, None), Likelihood(-2.0, 0.5)])
        Likelihood(generated=-3.0, answer=0.5)
        """
        answers = [part.answer for part in parts if part.answer is not None]
        answer = math.fsum(answers) / len(answers) if answers else None
        return cls(math.fsum(part.generated for part in parts), answer)


@dataclass(frozen=True)
class Forecast:
    """How the expected loss of a candidate differs from that of the instruction now; negative is good."""

    change: float  # Ĵ(c) - Ĵ(p): mistakes, and nats if D does not saturate; nan when no reasoning has finite numbers
    effective_samples: float  # of the M reasonings


def likelihoods(model: Model, reasonings: Sequence[Reasoning], *, answer_temperature: float = 0.2) -> list[Likelihood]:
    """One for each reasoning, its calls together; one forward pass over each sequence.

    What was generated is taken at temperature 1, the gold answer at `answer_temperature`.

    Raises `LayoutError` for a span that is empty or does not fit, `SettingsError` for a temperature that is not
    positive.

    >>> from dspy_greater.model.engine import Engine
    >>> from dspy_greater.prompt.spans import Span
    >>> sequence = ReasonedSequence((1, 5, 6, 7, 9), Span(1, 2), Span(2, 4), Span(4, 5))
    >>> [found] = likelihoods(Engine.from_pretrained("pocket"), [Reasoning(0, 1.0, 1.0, (sequence,))])
    >>> found.generated < 0 < found.answer
    True
    """
    if not answer_temperature > 0:
        raise SettingsError(f"answer_temperature is {answer_temperature}; give a number above 0, like 0.2.")
    sequences = [sequence for reasoning in reasonings for sequence in reasoning.sequences]
    queries: list[TokenQuery] = []
    for row, sequence in enumerate(sequences):
        _check(row, sequence)
        queries += [TokenQuery(row, at) for at in range(sequence.generated.start, sequence.generated.stop)]
        if sequence.answer is not None:
            queries += [
                TokenQuery(row, at, answer_temperature) for at in range(sequence.answer.start, sequence.answer.stop)
            ]
    taken = iter(floats(model.token_logprobs([sequence.token_ids for sequence in sequences], queries)))  # R numbers
    found = iter([_of_sequence([next(taken) for _ in range(_asked(sequence))], sequence) for sequence in sequences])
    return [Likelihood.together([next(found) for _ in reasoning.sequences]) for reasoning in reasonings]


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
    lack = _uncertainty if saturates else _cross_entropy
    rows = [
        (share, advantage, after.generated - before.generated, lack(after) - lack(before))
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


def _asked(sequence: ReasonedSequence) -> int:
    return len(sequence.generated) + (len(sequence.answer) if sequence.answer is not None else 0)


def _of_sequence(logprobs: Sequence[float], sequence: ReasonedSequence) -> Likelihood:
    generated = math.fsum(logprobs[: len(sequence.generated)])
    if sequence.answer is None:
        return Likelihood(_finite(generated), None)
    answer = -math.fsum(logprobs[len(sequence.generated) :]) / len(sequence.answer)
    return Likelihood(_finite(generated), _finite(answer))


def _check(row: int, sequence: ReasonedSequence) -> None:
    length = len(sequence.token_ids)
    spans = {"generated": sequence.generated} | ({"answer": sequence.answer} if sequence.answer is not None else {})
    for name, span in spans.items():
        # What was generated may be nothing; an answer may not.
        if not 1 <= span.start <= span.stop <= length or (name == "answer" and span.start == span.stop):
            raise LayoutError(
                f"Sequence {row}: the {name} span [{span.start}, {span.stop}) does not fit its {length} tokens. It "
                "needs a token before it that predicts it, and an answer needs at least one token."
            )


def _cross_entropy(found: Likelihood) -> float:
    return 0.0 if found.answer is None else found.answer


def _uncertainty(found: Likelihood) -> float:
    """D; 0 without a gold answer."""
    return 0.0 if found.answer is None else 1.0 - math.exp(-found.answer)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
