"""Every knob of the search, what it means and what it costs.

With `variant="paper"`, one step on N training rows runs the program at most μ x N times: on every row with each of the
μ candidates that are tried (`selections`).
The current instruction's runs are kept, and so are those of every candidate that was tried before. A step that
appends a token runs at most N more, for the likeliest one, which it improves on. The seed costs N runs.

Besides, a step makes one forward and backward pass over N rows, whatever the number of candidates, one forward
pass over the rows of the candidates, and one over at most `proposal_draws` x
`proposal_rows` short contexts.

The default variant looks at `positions_ahead` positions. At each it reads short contexts,
makes up to two forward and backward passes over `replayed` sequences, for replacements and insertions, and up to
`forecasts` forward passes over them, and one more a step; appending costs no run.
All that is bounded by `forecast_share` of what the step's runs cost, counted in tokens (`search.prices`): on a CPU a
step of one candidate usually looks at one position, with a handful of reasonings. Phrases write up to 8 tokens each.
The first step, and later ones while that pays more (`search.payoff`), try `written` whole instructions in place of it:
behind a new best instruction two say what the gold values look like. The model is asked for the others, half as often
again as there are to be, in up to `max_instruction_tokens` + 32 tokens each. Each runs the program on 8 rows, and the
best of them on the others.
Once its forecasts have proven themselves it tries fewer than μ candidates; while they do not come true,
about one step in `explore_every` makes neither forecasts nor gradients.

`max_generated_tokens` bounds the search: the seed's evaluation and the steps, of all predictors together. The
search stops after the first step that reaches it, and predictors whose turn has not come keep their instructions.
Counted are the tokens that in-process models write for any predictor of the program, and, where the LM is a server,
those that it says it wrote; where it does not say, the tokens of its answers as the tokenizer of the weights splits
them. What is resumed from a journal counts as it did then. Not counted are the prompts, the forward and backward
passes, what the metric asks of a server, and the final validation: at most (`finalists` + 1) x `validation_rows`
runs for each predictor.
`max_metric_calls` bounds the same search by runs of the program on a row.

`max_seconds` bounds it by the clock, from the seed's evaluation on; here the validations of earlier predictors count,
and the final one comes on top. The search stops after the first step that reaches it. A resumed run counts the seconds
that its journal records; replaying them costs none, and no recorded step is given up. With more of them an
interrupted run may go on; the other two belong to the run, as does every other setting but `num_threads` and the two
of servers.

Where the LM is a server, a call may take `request_timeout` seconds, and after DSPy's own retries a row that was not
answered is asked again for `max_outage_seconds` (`program.servers`): then the step is given up, and the run stops.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from typing_extensions import TypedDict

from dspy_greater.errors import SettingsError
from dspy_greater.scalars import plain_scalar

Auto = Literal["light", "medium", "heavy"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """The knobs of GReaTer's search, with the paper's values (arXiv 2412.09722, appendix A).

    Example:
        >>> Settings.of("light", steps=5).steps
        5
    """

    steps: int = 105  # T: steps per predictor
    train_rows: int = 50  # N: rows the loss is summed over; a seeded sample when there are more
    validation_rows: int = 100  # rows on which the finalists meet the seed
    top_k: int = 10  # k of equation 3
    proposal_rows: int = 5  # q of equation 4: rows whose top k are intersected
    proposal_draws: int = 4  # how many such intersections are united
    minimum_candidates: int = 6  # k is widened until as many legal candidates survive
    selections: int | None = None  # μ: candidates that reason for themselves; None: 1, or the paper's 3
    fluency_weight: float = 0.2  # λ of equation 6
    score_fluency_weight: float = 0.02  # nats per token against mistakes when candidates are compared
    answer_temperature: float = 0.2  # divides the logits of the answer tokens
    finalists: int = 3  # best instructions by training objective that are validated
    max_instruction_tokens: int = 64  # the instruction grows no longer than this; text that must stay does not count
    num_threads: int = 16  # concurrent rows where the LM is a server; in-process models batch all rows
    failure_score: float = 0.0  # of a row on which the program or the metric fails
    # From here to `explore_every`, the default variant alone.
    replayed: int = 24  # reasonings of the current instruction that are read again
    forecasts: int = 6  # candidates of a position that pass from the gradient to off-policy forecasts
    forecast_share: float = 1.0  # of the price of a step's runs, what its gradients and forecasts may cost; 0: no bound
    write_price: float | None = None  # of a token written, in tokens read; None: 4 on a CPU, 32 on an accelerator
    phrases: int = 3  # continuations of a position that are drawn as phrases; 0: none
    written: int = 6  # whole instructions at the first step, and while they pay more than edits; 0: none
    positions_ahead: int = 3  # positions at which a step forecasts; candidates are tried at the one that promises most
    answer_weight: float = 1.0  # α: the gold answer's part of the gradient, in nats, and of forecasts, against mistakes
    uncertainty_weight: float = 0.3  # of gold answers, against mistakes, when instructions are compared
    baseline_scale: float = 0.5  # times the mean mistake: how wrong unseen reasonings count until the seed is outdone
    explore_every: int = 2  # while forecasts do not come true, one step in about so many tries edits by chance; 0: none
    max_failed_steps: int = 5  # steps in a row without one finite loss before the search gives up
    max_errors: int | None = None  # rows of one predictor's search that may fail, trials left out; None: any number
    max_generated_tokens: int | None = None  # of the whole search, without the validation; see above
    max_metric_calls: int | None = None  # runs of the program on a row, counted and bounded in the same way
    max_seconds: float | None = None  # of the whole search, without the final validation
    max_outage_seconds: float = 300.0  # without an answer from a server, after which the run stops; 0 waits for none
    request_timeout: float = 600.0  # seconds that a server may take for an answer, where the LM has no timeout itself

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
        make_plain(self)
        check_whole_numbers(self, _AT_LEAST)
        optional = {name: 1 for name in _AT_LEAST_ONE_OR_NONE if getattr(self, name) is not None}
        check_whole_numbers(self, optional)
        if self.max_errors is not None:
            check_whole_numbers(self, {"max_errors": 0})
        check_seconds(self.max_seconds)
        if not _is_finite(self.failure_score):
            raise SettingsError(f"failure_score={self.failure_score!r}: give a finite number.")
        check_waits(self)
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not _is_finite(value) or value < 0:
                raise SettingsError(f"{name}={value!r}: give a finite number that is not negative.")
        if self.write_price is not None and not (_is_finite(self.write_price) and self.write_price > 0):
            raise SettingsError(f"write_price={self.write_price!r}: give a positive number, or None for the device's.")
        if self.explore_every == 1:
            raise SettingsError("explore_every=1: no step would forecast again; give 2 or more, or 0 for none.")
        if self.answer_temperature == 0:
            raise SettingsError("answer_temperature=0: logits are divided by it; give a positive number.")


class Knobs(TypedDict, total=False):
    """The fields of `Settings` as keywords; None stands for the preset's value."""

    steps: int | None
    train_rows: int | None
    validation_rows: int | None
    top_k: int | None
    proposal_rows: int | None
    proposal_draws: int | None
    minimum_candidates: int | None
    selections: int | None
    fluency_weight: float | None
    score_fluency_weight: float | None
    answer_temperature: float | None
    finalists: int | None
    max_instruction_tokens: int | None
    num_threads: int | None
    failure_score: float | None
    replayed: int | None
    forecasts: int | None
    forecast_share: float | None
    write_price: float | None
    phrases: int | None
    written: int | None
    positions_ahead: int | None
    answer_weight: float | None
    uncertainty_weight: float | None
    baseline_scale: float | None
    explore_every: int | None
    max_failed_steps: int | None
    max_errors: int | None
    max_generated_tokens: int | None
    max_metric_calls: int | None
    max_seconds: float | None
    max_outage_seconds: float | None
    request_timeout: float | None


def spelled_out(knobs: type) -> Callable[[Function], Function]:
    """A decorator: `help` and `inspect.signature` name every knob in the place of `**settings`."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        named = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        annotations = knobs.__annotations__.items()
        keyword = inspect.Parameter.KEYWORD_ONLY
        named += [
            inspect.Parameter(name, keyword, default=None, annotation=_text_of(annotation))
            for name, annotation in annotations
        ]
        vars(function)["__signature__"] = signature.replace(parameters=named)
        return function

    return decorate


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


def make_plain(settings: Any) -> None:
    """Put Python's own numbers in the place of numpy's and torch's in a frozen dataclass that is being built."""
    for field in fields(settings):
        object.__setattr__(settings, field.name, plain_scalar(getattr(settings, field.name)))


def checked_seed(seed: Any) -> int:
    """The seed as a plain whole number.

    Raises:
        SettingsError: it is none.

    >>> checked_seed(3)
    3
    """
    found = plain_scalar(seed)
    if isinstance(found, bool) or not isinstance(found, int):
        raise SettingsError(f"seed={seed!r}: give a whole number.")
    return found


def checked_log_dir(log_dir: Any) -> str | Path | None:
    """The directory, as text or a `Path`.

    Raises:
        SettingsError: it is no path, or an empty one, which would be the current directory.

    >>> checked_log_dir("runs/navigate")
    'runs/navigate'
    """
    if log_dir is None or isinstance(log_dir, Path) or (isinstance(log_dir, str) and log_dir.strip()):
        return log_dir
    to_path = getattr(log_dir, "__fspath__", str)
    found = to_path()
    if not isinstance(found, str) or not found.strip():
        raise SettingsError(f"log_dir={log_dir!r}: give the path of a directory, or None to keep no journal.")
    return Path(found)


def check_whole_numbers(settings: object, at_least: Mapping[str, int]) -> None:
    """Raises `SettingsError` when an attribute that is named is not a whole number of at least that size."""
    for name, least in at_least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingsError(f"{name}={value!r}: give a whole number of at least {least}.")


def check_seconds(seconds: object) -> None:
    """Raises `SettingsError` where `max_seconds` is no positive number of seconds.

    >>> check_seconds(3600)
    """
    if seconds is not None and (not _is_finite(seconds) or cast("float", seconds) <= 0):
        raise SettingsError(f"max_seconds={seconds!r}: give a positive number of seconds, or None for any time.")


def check_waits(settings: Any) -> None:
    """Raises `SettingsError` where `max_outage_seconds` or `request_timeout` is no such number of seconds.

    >>> check_waits(Settings(max_outage_seconds=0))
    """
    if not _is_finite(settings.max_outage_seconds) or settings.max_outage_seconds < 0:
        raise SettingsError(
            f"max_outage_seconds={settings.max_outage_seconds!r}: give a number of seconds that is not negative."
        )
    if not _is_finite(settings.request_timeout) or settings.request_timeout <= 0:
        raise SettingsError(f"request_timeout={settings.request_timeout!r}: give a positive number of seconds.")


def _text_of(annotation: Any) -> str:
    return getattr(annotation, "__forward_arg__", None) or str(annotation)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_PRESETS: Mapping[Auto, Mapping[str, int]] = {
    "light": {"steps": 20, "train_rows": 24, "validation_rows": 50},
    "medium": {"steps": 50, "train_rows": 50, "validation_rows": 100},
    "heavy": {"steps": 105, "train_rows": 100, "validation_rows": 300},
}
_NOT_NEGATIVE = (
    "fluency_weight",
    "score_fluency_weight",
    "answer_temperature",
    "answer_weight",
    "uncertainty_weight",
    "baseline_scale",
    "forecast_share",
)
_AT_LEAST_ONE_OR_NONE = ("max_generated_tokens", "max_metric_calls", "selections")
_AT_LEAST = {
    "steps": 0,
    "train_rows": 1,
    "validation_rows": 1,
    "top_k": 1,
    "proposal_rows": 1,
    "proposal_draws": 1,
    "minimum_candidates": 1,
    "finalists": 1,
    "max_instruction_tokens": 1,
    "num_threads": 1,
    "replayed": 1,
    "forecasts": 0,
    "phrases": 0,
    "written": 0,
    "positions_ahead": 1,
    "explore_every": 0,
    "max_failed_steps": 1,
}
