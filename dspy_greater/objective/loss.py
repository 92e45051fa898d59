"""The loss of a prompt, given the reasoning that it led to: equations 5 and 6 of the paper.

Nothing is generated here. Each example arrives as one finished sequence x ⊙ p ⊙ r ⊙ p_extract ⊙ y that says
where its instruction p and its gold answer y stand, and the model says how likely it finds both.
`estimators.paper_gradient` differentiates the very same numbers.

Shapes: N examples, R queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.interface import Model, TokenQuery
from dspy_greater.prompt.spans import Span, Supervised


@dataclass(frozen=True)
class Losses:
    """The two parts of equation 6 for each of N examples, in natural-log units (nats) per token.

    A part that came out as infinity or not-a-number is kept as nan, and its example's `finite` is False.

    >>> losses = Losses(cross_entropy=(0.5, float("nan")), fluency_nll=(0.0, 0.0))
    >>> losses.finite, losses.perplexity
    ((True, False), (1.0, 1.0))
    >>> losses.total(fluency_weight=0.2)
    (0.7, nan)
    """

    cross_entropy: tuple[float, ...]  # [N]  mean over the answer's tokens, at the answer temperature
    fluency_nll: tuple[float, ...]  # [N]  mean over the instruction's tokens, at temperature 1

    @property
    def finite(self) -> tuple[bool, ...]:
        """Per example: whether both parts are numbers."""
        pairs = zip(self.cross_entropy, self.fluency_nll, strict=True)
        return tuple(math.isfinite(first) and math.isfinite(second) for first, second in pairs)

    @property
    def perplexity(self) -> tuple[float, ...]:
        """L_perpl of equation 6, exp(mean NLL) of the instruction; infinity where that overflows a double."""
        return tuple(math.exp(nll) if not nll > 709.0 else math.inf for nll in self.fluency_nll)

    def total(self, fluency_weight: float) -> tuple[float, ...]:
        """L = L_CE + λ · L_perpl per example, with λ = `fluency_weight`; λ = 0 leaves perplexity out."""
        if fluency_weight == 0:
            return self.cross_entropy
        pairs = zip(self.cross_entropy, self.perplexity, strict=True)
        return tuple(answer + fluency_weight * perplexity for answer, perplexity in pairs)


def losses(model: Model, examples: Sequence[Supervised], *, answer_temperature: float = 0.2) -> Losses:
    """Equations 5 and 6, in the order given.

    `answer_temperature` divides the logits of the answer's tokens (not the instruction's) before the softmax.

    Raises `LayoutError` for an empty or misplaced span, `SettingsError` for a temperature that is not positive.

    >>> from dspy_greater.model.engine import Engine
    >>> example = Supervised((1, 5, 6, 7, 9), instruction=Span(1, 3), reasoning=Span(3, 4), answer=Span(4, 5))
    >>> losses(Engine.from_pretrained("pocket"), [example]).finite
    (True,)
    """
    check_supervised(examples, answer_temperature)
    queries = [query for row, example in enumerate(examples) for query in span_queries(row, example.instruction, 1.0)]
    instructions = len(queries)
    for row, example in enumerate(examples):
        queries += span_queries(row, example.answer, answer_temperature)
    logprobs = model.token_logprobs([example.token_ids for example in examples], queries)  # [R]
    answer = means(logprobs[instructions:], [example.answer for example in examples])
    fluency = means(logprobs[:instructions], [example.instruction for example in examples])
    return Losses(tuple(_finite(-value) for value in answer), tuple(_finite(-value) for value in fluency))


def span_queries(row: int, span: Span, temperature: float, weight: float = 1.0) -> list[TokenQuery]:
    """Every token of a span, sharing the weight: the weighted sum is `weight` times the mean log-probability.

    >>> span_queries(0, Span(3, 5), 1.0)
    [TokenQuery(row=0, at=3, temperature=1.0, weight=0.5), TokenQuery(row=0, at=4, temperature=1.0, weight=0.5)]
    """
    return [TokenQuery(row, at, temperature, weight / len(span)) for at in range(span.start, span.stop)]


def means(logprobs: Tensor, spans: Sequence[Span]) -> list[float]:
    """[R] log-probabilities, span after span -> the mean of each, [N]."""
    stops = accumulate(map(len, spans))
    return [float(logprobs[stop - len(span) : stop].mean()) for span, stop in zip(spans, stops, strict=True)]


def check_supervised(examples: Sequence[Supervised], answer_temperature: float) -> None:
    """Raises `LayoutError` or `SettingsError` for what `losses` cannot use."""
    if not answer_temperature > 0:
        raise SettingsError(f"answer_temperature is {answer_temperature}; give a number above 0, like 0.2.")
    for row, example in enumerate(examples):
        for name, span in (("instruction", example.instruction), ("answer", example.answer)):
            if not 1 <= span.start < span.stop <= len(example.token_ids):
                raise LayoutError(
                    f"Example {row}: the {name} span [{span.start}, {span.stop}) does not fit its "
                    f"{len(example.token_ids)} tokens. It must hold a token and have one before it that "
                    "predicts it; begin the sequence with a chat template or a begin-of-text token."
                )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
