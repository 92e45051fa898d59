"""Student, rows, metric and LMs -> a checked problem, or an error that says what to do.

Everything that can be refused is refused here, before the first token is generated.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .engine import Engine
from .errors import ContextLengthError, DataError, MetricError
from .identity import described, fingerprint
from .layout import Layout
from .lm import weights_behind
from .metric import Metric, RowMetric
from .program import PredictorSite, check_examples, predictors_of, refuse_unsupported, refuse_unusable
from .rollout import pin_lms
from .rows import CALL_OF_COMPILE, as_list, refuse_missing_gold, refuse_unfit_gold, split, supervised_field
from .run.serialise import JSON
from .settings import Settings

# Settings that say how the work is done and not what comes out: a run may go on with others.
_OF_THE_MACHINE = ("threads", "max_batch_tokens")


@dataclass(frozen=True)
class Target:
    """A predictor that will be optimised, the field it is supervised on and the weights behind it."""

    site: PredictorSite
    field: str
    engine: Engine


@dataclass(frozen=True)
class Problem:
    """All that the search needs, checked."""

    program: Any  # a copy of the student in which every predictor holds its LM
    targets: tuple[Target, ...]
    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    metric: RowMetric
    settings: Settings
    seed: int
    extractor: str | None = None

    def identity(self) -> dict[str, JSON]:
        """What must be the same for an interrupted run to be continued."""
        sites = {site.name: described(site) for site in predictors_of(self.program)}
        for target in self.targets:
            sites[target.site.name] |= {"field": target.field, "weights": target.engine.identity}
        settings = asdict(self.settings)
        return {
            "settings": {name: value for name, value in settings.items() if name not in _OF_THE_MACHINE},
            "seed": self.seed,
            "extractor": self.extractor,
            "metric": self.metric.name,
            "predictors": sites,
            "train": fingerprint(self.train),
            "validation": fingerprint(self.validation),
        }


def pose(
    student: Any,
    trainset: Iterable[Any],
    metric: Metric | None,
    valset: Iterable[Any] | None,
    *,
    settings: Settings,
    seed: int,
    weights: Any = None,
    extractor: str | None = None,
) -> Problem:
    """Check everything and gather it.

    Raises:
        DataError: rows are missing, lack gold values, have some that do not fit, or do not say which fields are
            inputs.
        MetricError: there is no metric, or it cannot be called.
        ProgramError: not a program, nothing to optimise, or a predictor that is not supported.
        WeightsError: a predictor's LM has no open weights that are known.
        ContextLengthError: a row's prompt leaves no room in the model's context.
    """
    rows, held_out = as_list(trainset, name="trainset"), as_list(valset, name="valset")
    check_examples(rows)
    if held_out:
        check_examples(held_out, name="valset")
    if metric is None:
        raise MetricError(
            "There is no metric. Pass one as GReaTerTeleprompter(metric=...) or compile(student, trainset, metric)."
        )
    row_metric = RowMetric(metric)
    sites = predictors_of(student)
    refuse_unusable(sites)
    targets = _targets(sites, rows, weights)
    for target in targets:
        refuse_missing_gold(target.site, target.field, held_out, name="valset")
    train, validation = split(rows, held_out, settings=settings, seed=seed)
    _warn_of_the_rest(sites, targets)
    for target in targets:
        if len(sites) == 1:  # the inputs of later predictors are known only once the program runs
            _check_context(target, [*train, *validation])
    return Problem(pin_lms(student), targets, train, validation, row_metric, settings, seed, extractor)


def _targets(sites: Sequence[PredictorSite], trainset: Sequence[Any], weights: Any) -> tuple[Target, ...]:
    """The predictors that the rows have gold values for, each of which can be optimised."""
    chosen = [(site, field) for site in sites if (field := supervised_field(site, trainset)) is not None]
    if not chosen:
        outputs = sorted({name for site in sites for name in site.output_fields})
        raise DataError(
            "No predictor has an output field with gold values in the trainset. The program's output fields are "
            f"{', '.join(outputs)}; the rows' labels are {', '.join(sorted(trainset[0].labels().keys())) or 'none'}. "
            "Give the examples a value for one of those fields, under the same name."
        )
    refuse_unsupported([site for site, _ in chosen])
    for site, field in chosen:
        refuse_unfit_gold(site, field, trainset)
    return tuple(
        Target(site, field, weights_behind(site.lm, weights=weights, predictor_name=site.name))
        for site, field in chosen
    )


def _warn_of_the_rest(sites: Sequence[PredictorSite], targets: Sequence[Target]) -> None:
    optimised = {target.site.name for target in targets}
    rest = [site.name for site in sites if site.name not in optimised]
    if rest:
        warnings.warn(
            f"Predictors {', '.join(rest)} have no gold values in the trainset and keep their instructions. "
            "Only predictors with an output field that the rows have a value for are optimised.",
            stacklevel=CALL_OF_COMPILE,
        )


def _check_context(target: Target, rows: Sequence[Any]) -> None:
    """Refuse a row whose prompt fills the context, naming the longest."""
    limit = target.engine.context_length
    if limit is None:
        return
    site = target.site
    layout = Layout(target.engine.tokenizer, site.adapter, site.signature, demos=site.demos)
    inputs = [{name: row[name] for name in site.input_fields if name in row} for row in rows]
    index, tokens = layout.longest(inputs, site.instruction)
    if tokens >= limit:
        raise ContextLengthError(
            f"The prompt of predictor `{site.name}` takes {tokens} tokens for the row "
            f"{_shortened(inputs[index])}, and {target.engine.name} has a context of {limit} tokens, which leaves "
            "no room for an answer. Leave out or shorten such rows, use fewer demos, or use a model with a longer "
            "context."
        )


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
