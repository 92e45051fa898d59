"""Every knob of GRAD-SUM, what it means and what it costs.

One iteration runs the program at most `beam_width` x `sample_size` times for generation and `beam_width` x
`candidates_per_edit` x `subset_size` times to score candidates. With criteria, each of these outputs is
judged in one call. There is one gradient call per output below full score, one summary and one
edit per member of the beam and predictor. What is known already is not run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from typing_extensions import TypedDict

from dspy_greater.errors import SettingsError
from dspy_greater.scalars import plain_scalar
from dspy_greater.settings import Auto, check_seconds, check_waits, check_whole_numbers, chosen_knobs, make_plain


@dataclass(frozen=True)
class GradSumSettings:
    """The knobs of GRAD-SUM. The first four have the paper's values, the others are this package's choice.

    Example:
        >>> GradSumSettings.of("light", beam_width=1).beam_width
        1
    """

    beam_width: int = 3
    iterations: int = 10
    sample_size: int = 30  # training rows of one iteration, drawn anew for each when there are more
    summarize: bool = True  # False gives the editor the raw gradients
    candidates_per_edit: int = 3  # new prompts per member of the beam
    subset_size: int = 10  # rows of the sample on which members and candidates are compared
    validation_rows: int = 100  # rows on which the last beam meets the seed
    train_rows: int = 1_000_000  # rows that samples are drawn from: all, unless there are more
    judge_scale: tuple[int, int] = (1, 5)  # the judge's whole numbers; (0, 1) is right or wrong
    full_score: float = 1.0  # the metric's score from which an output needs no gradient
    retries: int = 2  # how often an answer that cannot be used is asked for again
    tried_shown: int = 8  # prompts tried before that the editor is shown; 0 is the paper's editor
    longest_text: int = 4000  # characters of one input, output or trace that a module is shown
    num_threads: int = 16  # LM calls under way at a time
    failure_score: float = 0.0  # the metric's, of a row on which the program or the metric fails
    max_lm_calls: int | None = None  # of the whole run, the final comparison included
    max_lm_tokens: int | None = None  # prompt and completion tokens of the whole run
    max_seconds: float | None = None  # after which no iteration begins; recorded ones count when a run is resumed
    max_outage_seconds: float = 300.0  # without an answer from a server, after which the run stops; 0 waits for none
    request_timeout: float = 600.0  # seconds that a server may take for an answer, where the LM has no timeout itself

    @classmethod
    def of(cls, auto: Auto | None, **overrides: object) -> GradSumSettings:
        """The settings of a preset, with some of them replaced; `auto=None` is the paper's own.

        Raises:
            SettingsError: an unknown preset or knob, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        return cls(**chosen_knobs(known, _PRESETS, auto, overrides))

    def __post_init__(self) -> None:
        """Raises `SettingsError` when a value is out of range."""
        make_plain(self)
        check_whole_numbers(self, _AT_LEAST)
        limits = {name: 1 for name in ("max_lm_calls", "max_lm_tokens") if getattr(self, name) is not None}
        check_whole_numbers(self, limits)
        check_seconds(self.max_seconds)
        check_waits(self)
        low, high = self._scale()
        if low >= high:
            raise SettingsError(f"judge_scale={self.judge_scale!r}: give (worst, best) with worst below best.")
        object.__setattr__(self, "judge_scale", (low, high))
        if isinstance(self.full_score, bool) or not isinstance(self.full_score, (int, float)):
            raise SettingsError(f"full_score={self.full_score!r}: give a number.")
        if isinstance(self.failure_score, bool) or not isinstance(self.failure_score, (int, float)):
            raise SettingsError(f"failure_score={self.failure_score!r}: give a number.")
        if not isinstance(self.summarize, bool):
            raise SettingsError(f"summarize={self.summarize!r}: give True or False.")

    def _scale(self) -> tuple[int, int]:
        try:
            low, high = map(plain_scalar, self.judge_scale)
        except (TypeError, ValueError):
            low = high = None
        if type(low) is not int or type(high) is not int:
            raise SettingsError(f"judge_scale={self.judge_scale!r}: give two whole numbers, (worst, best).")
        return low, high


class GradSumKnobs(TypedDict, total=False):
    """The fields of `GradSumSettings` as keywords; None stands for the preset's value."""

    beam_width: int | None
    iterations: int | None
    sample_size: int | None
    summarize: bool | None
    candidates_per_edit: int | None
    subset_size: int | None
    validation_rows: int | None
    train_rows: int | None
    judge_scale: tuple[int, int] | None
    full_score: float | None
    retries: int | None
    tried_shown: int | None
    longest_text: int | None
    num_threads: int | None
    failure_score: float | None
    max_lm_calls: int | None
    max_lm_tokens: int | None
    max_seconds: float | None
    max_outage_seconds: float | None
    request_timeout: float | None


_PRESETS: Mapping[Auto, Mapping[str, int]] = {
    "light": {"iterations": 3, "sample_size": 10, "subset_size": 5, "validation_rows": 50},
    "medium": {"iterations": 6, "sample_size": 20, "subset_size": 8, "validation_rows": 100},
    "heavy": {"iterations": 10, "sample_size": 30, "subset_size": 15, "validation_rows": 300},
}
_AT_LEAST = {
    "beam_width": 1,
    "iterations": 0,
    "sample_size": 1,
    "candidates_per_edit": 1,
    "subset_size": 1,
    "validation_rows": 1,
    "train_rows": 1,
    "retries": 0,
    "tried_shown": 0,
    "longest_text": 100,
    "num_threads": 1,
}
