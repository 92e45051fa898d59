"""Every knob of the search, what it means and what it costs.

One step on N training rows generates up to (μ + 1) x N reasonings, of which those of
the current instruction are reused; it makes one forward and backward pass over N rows
and one forward pass over at most `proposal_draws` x `proposal_rows` short contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from .errors import SettingsError

Variant = Literal["paper"]
Auto = Literal["light", "medium", "heavy"]


@dataclass(frozen=True)
class Settings:
    """The knobs of GReaTer's search, with the paper's values (arXiv 2412.09722, appendix A).

    Example:
        >>> Settings.of("light", steps=5).steps
        5
    """

    variant: Variant = "paper"
    steps: int = 105  # T: steps per predictor
    train_rows: int = 50  # N: rows the loss is summed over; a seeded sample when there are more
    validation_rows: int = 100  # rows on which the finalists meet the seed
    top_k: int = 10  # k of equation 3
    proposal_rows: int = 5  # q of equation 4: rows whose top k are intersected
    proposal_draws: int = 4  # how many such intersections are united
    minimum_candidates: int = 6  # k is widened until as many legal candidates survive
    selections: int = 3  # μ: candidates that are tried with reasoning of their own
    fluency_weight: float = 0.2  # λ of equation 6
    score_fluency_weight: float = 0.02  # nats per token against mistakes when candidates are compared
    answer_temperature: float = 0.2  # divides the logits of the answer tokens
    finalists: int = 3  # best instructions by training objective that are validated
    max_instruction_tokens: int = 64  # the instruction grows no longer than this
    max_batch_tokens: int = 8192  # rows x longest row of one teacher-forced batch: memory against speed
    threads: int = 16  # concurrent rows where the LM is a server; in-process models batch all rows
    max_failed_steps: int = 5  # steps in a row without one finite loss before the search gives up

    @classmethod
    def of(cls, auto: Auto | None, **overrides: object) -> Settings:
        """The settings of a preset, with some of them replaced; `auto=None` is the paper's own.

        Raises:
            SettingsError: an unknown preset or knob, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        return cls(**chosen_knobs(known, _PRESETS, auto, overrides))

    def __post_init__(self) -> None:
        """Raises `SettingsError` when a value is out of range."""
        if self.variant not in ("paper",):
            raise SettingsError(f"variant={self.variant!r} is not known. Use variant='paper'.")
        check_whole_numbers(self, _AT_LEAST)
        for name in ("fluency_weight", "score_fluency_weight", "answer_temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise SettingsError(f"{name}={value!r}: give a finite number that is not negative.")
        if self.answer_temperature == 0:
            raise SettingsError("answer_temperature=0: logits are divided by it; give a positive number.")


def chosen_knobs(
    known: Sequence[str], presets: Mapping[Auto, Mapping[str, int]], auto: Auto | None, overrides: Mapping[str, object]
) -> dict[str, Any]:
    """The knobs of a preset with those of `overrides` that are not None in their place.

    Raises:
        SettingsError: an unknown preset or knob.
    """
    if auto is not None and auto not in tuple(presets):
        raise SettingsError(f"auto={auto!r} is not a preset. Use one of {', '.join(map(repr, presets))} or None.")
    strangers = sorted(set(overrides) - set(known))
    if strangers:
        raise SettingsError(
            f"There is no setting {', '.join(strangers)}. The settings are: {', '.join(sorted(known))}."
        )
    preset: Mapping[str, int] = {} if auto is None else presets[auto]
    return {**preset, **{name: value for name, value in overrides.items() if value is not None}}


def check_whole_numbers(settings: object, at_least: Mapping[str, int]) -> None:
    """Raises `SettingsError` when an attribute that is named is not a whole number of at least that size."""
    for name, least in at_least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingsError(f"{name}={value!r}: give a whole number of at least {least}.")


_PRESETS: Mapping[Auto, Mapping[str, int]] = {
    "light": {"steps": 20, "train_rows": 24, "validation_rows": 50},
    "medium": {"steps": 50, "train_rows": 50, "validation_rows": 100},
    "heavy": {"steps": 105, "train_rows": 100, "validation_rows": 300},
}
_AT_LEAST = {
    "steps": 0,
    "train_rows": 1,
    "validation_rows": 1,
    "top_k": 1,
    "proposal_rows": 1,
    "proposal_draws": 1,
    "minimum_candidates": 1,
    "selections": 1,
    "finalists": 1,
    "max_instruction_tokens": 1,
    "max_batch_tokens": 1,
    "threads": 1,
    "max_failed_steps": 1,
}
