"""Student, rows, metric and LMs -> a checked problem, or an error that says what to do.

Everything that can be refused is refused here, before the first token is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dspy_greater.errors import DataError, GreaterError, ProgramError, WeightsError
from dspy_greater.metric import Metric, RowMetric
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Model
from dspy_greater.notices import warn_caller
from dspy_greater.program.code import code_of_run
from dspy_greater.program.dataset import (
    as_list,
    check_examples,
    numbers_in,
    refuse_missing_gold,
    refuse_unfit_gold,
    refuse_unwritable_gold,
    split,
    supervised_field,
    warn_of_misread_gold,
)
from dspy_greater.program.fingerprint import described, fingerprint
from dspy_greater.program.inputs import refuse_strange_inputs, refuse_without_inputs
from dspy_greater.program.predictors import Predictor, predictors_of, refuse_unsupported, refuse_unusable
from dspy_greater.program.rollout import Running, pin_lms, searching_copy
from dspy_greater.program.servers import Servers
from dspy_greater.prompt.gold import row_gold
from dspy_greater.prompt.layout import Layout
from dspy_greater.run.serialise import JSON
from dspy_greater.search.asked import Mode, Modes, modes_of, selected_of
from dspy_greater.search.context import Case, refuse_long_answers, refuse_long_prompts
from dspy_greater.search.prices import write_price
from dspy_greater.search.step import Step
from dspy_greater.search.variants import described_step
from dspy_greater.served.kinds import who_answers
from dspy_greater.served.watch import Watch
from dspy_greater.served.weights import weights_behind
from dspy_greater.settings import Settings

# Settings that say how the work is done and not what comes out: a run may go on with others.
_OF_THE_MACHINE = ("num_threads", "max_seconds", "max_outage_seconds", "request_timeout")


@dataclass(frozen=True)
class Target:
    """A predictor that will be optimised, the field it is supervised on and the weights behind it.

    `field` is None for a predictor without gold values, which only the program's metric can judge. With `append`
    its instruction stays to the byte, and a sentence after it is searched. `watch` compares the server behind its LM
    with the weights; None where the LM is in this process.
    """

    predictor: Predictor
    field: str | None
    engine: Engine
    append: bool = False
    watch: Watch | None = None

    @property
    def fixed(self) -> str:
        """The leading text of its instruction that may not change."""
        return self.predictor.instruction if self.append else ""

    def layout(self, extractor: str | None) -> Layout:
        """Of its prompt."""
        predictor = self.predictor
        return Layout(
            self.engine.tokenizer,
            predictor.adapter,
            predictor.signature,
            demos=predictor.demos,
            extractor=extractor,
            fixed=self.fixed,
        )

    def refuse_long_answers(self, given: Mapping[int, Mapping[str, Any]], problem: Problem) -> None:
        """See `context.refuse_long_answers`; `given` maps training rows to what the predictor was given on them."""
        if self.field is None:
            return
        signature, rows = self.predictor.signature, problem.train
        cases = [
            Case(problem.numbers[row], inputs, row_gold(signature, self.field, rows[row]).answers)
            for row, inputs in given.items()
        ]
        refuse_long_answers(self.engine, self.layout(problem.extractor), self.predictor, self.field, cases)


@dataclass(frozen=True)
class Problem:
    """All that the search needs, checked.

    `numbers` says which rows of the caller's trainset the training rows are; `named` that the caller named the targets;
    `servers` waits for answers and counts them. `model_of` says what reads with the weights of a target: the engine
    itself, or workers that hold them too.
    """

    program: Any  # a copy of the student in which every predictor holds its LM
    targets: tuple[Target, ...]
    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    metric: RowMetric
    settings: Settings
    step: Step
    seed: int
    extractor: str | None = None
    borrowed: Mapping[str, Any] = field(default_factory=dict[str, Any])  # LMs of predictors without one of their own
    numbers: tuple[int, ...] = ()
    named: bool = False
    model_of: Callable[[Engine], Model] = field(default=lambda engine: engine)
    servers: Servers = field(default_factory=Servers)

    @property
    def running(self) -> Running:
        """How the program is run."""
        return Running(self.settings.num_threads, self.settings.failure_score, self.servers)

    def identity(self) -> dict[str, JSON]:
        """What must be the same for an interrupted run to be continued."""
        predictors = {predictor.name: described(predictor) for predictor in predictors_of(self.program)}
        for target in self.targets:
            predictors[target.predictor.name] |= {
                "field": target.field,
                "weights": target.engine.identity,
                "mode": "append" if target.append else "rewrite",
                "write_price": write_price(target.engine, self.settings),
            }
        settings = asdict(self.settings)
        return {
            "step": {**described_step(self.step)},
            "settings": {name: value for name, value in settings.items() if name not in _OF_THE_MACHINE},
            "seed": self.seed,
            "extractor": self.extractor,
            "metric": self.metric.name,
            "predictors": predictors,
            "train": fingerprint(self.train),
            "validation": fingerprint(self.validation),
        }

    def code(self) -> dict[str, str]:
        """Digests of the code that a run depends on."""
        return code_of_run(self.metric.function, self.program, predictors_of(self.program))


@dataclass(frozen=True)
class Options:
    """How a program is to be optimised.

    Attributes:
        settings: the search's knobs.
        step: the kind of step; with the paper's only predictors with gold values are optimised.
        seed: decides which rows are sampled.
        weights: see `weights_behind`.
        extractor: text between reasoning and answer.
        predictors: names of those to optimise; by default all that can be.
        mode: "rewrite" or "append", for all or by predictor name; by default an instruction that lists its tools
            is only appended to, and every other rewritten.
        strict: whether a server that writes other tokens than the weights would is an error.
    """

    settings: Settings
    step: Step
    seed: int = 0
    weights: Any = None
    extractor: str | None = None
    predictors: Iterable[str] | None = None
    mode: Modes = None
    strict: bool = False


def prepare(
    student: Any, trainset: Iterable[Any], metric: Metric | None, valset: Iterable[Any] | None, options: Options
) -> Problem:
    """Check everything and gather it.

    Args:
        student: the program.
        trainset: the rows to train on.
        metric: the user's metric.
        valset: the rows to validate on; without any, part of the trainset.
        options: how to optimise.

    Raises:
        DataError: rows are missing, lack gold values, have some that do not fit, or do not say which fields are
            inputs.
        MetricError: there is no metric, or it cannot be called.
        ProgramError: not a program, nothing to optimise, a predictor that is not there or not supported.
        SettingsError: `predictors` or `mode` is of no known form.
        OutageError: the server behind a predictor's LM gave no answer for longer than `max_outage_seconds`.
        ServerError: it has never answered, or is not the model that is loaded here.
        WeightsError: a predictor's LM has no open weights that are known.
        ContextLengthError: a row's prompt leaves no room in the model's context.
    """
    step, settings = options.step, options.settings
    rows, held_out = as_list(trainset, name="trainset"), as_list(valset, name="valset")
    check_examples(rows)
    if held_out:
        check_examples(held_out, name="valset")
    row_metric = RowMetric(metric)
    predictors = predictors_of(student)
    refuse_unusable(predictors)
    refuse_strange_inputs(student, rows)
    refuse_strange_inputs(student, held_out, name="valset")
    selected, named = selected_of(predictors, options.predictors), options.predictors is not None
    servers = Servers(settings.max_outage_seconds)
    modes = modes_of(predictors, selected, options.mode)
    targets, kept = _targets(selected, rows, options, modes, servers, named=named)
    _refuse_nothing_to_do(targets, kept, predictors, rows, step)
    for target in targets:
        if target.field is not None:
            refuse_missing_gold(target.predictor, target.field, held_out, name="valset")
    train, validation = split(rows, held_out, settings=settings, seed=options.seed)
    _warn_of_the_rest(kept, step)
    for target in targets:
        if target.field is not None:
            refuse_unwritable_gold(target.predictor, target.field, train, rows)
            warn_of_misread_gold(target.predictor, target.field, train)
    identities = {target.predictor.name: target.engine.identity for target in targets}
    pinned = pin_lms(student, weights=identities, timeout=settings.request_timeout)
    _warn_of_other_weights(predictors, pinned)
    program = searching_copy(pinned, {}, options.seed)
    if step.needs_gradient:
        _warn_of_partial_gradients(targets)
    problem = Problem(
        program,
        targets,
        train,
        validation,
        row_metric,
        settings,
        step,
        options.seed,
        options.extractor,
        borrowed={predictor.name: predictor.lm for predictor in predictors if not predictor.own_lm},
        numbers=numbers_in(train, rows),
        named=named,
        servers=servers,
    )
    if len(predictors) == 1:  # the inputs of later predictors are known only once the program runs
        _check_context(problem)
    for target in targets:
        if target.watch is not None:
            target.watch.begin(target.predictor, target.layout(problem.extractor), train, servers)
    return problem


def _targets(
    predictors: Sequence[Predictor],
    trainset: Sequence[Any],
    options: Options,
    modes: Mapping[str, Mode | None],
    servers: Servers,
    *,
    named: bool,
) -> tuple[tuple[Target, ...], dict[str, GreaterError]]:
    """The predictors that can be optimised, and why each of the others cannot.

    One that has gold values, or was asked for by its name, and cannot be optimised is an error.
    """
    targets: list[Target] = []
    kept: dict[str, GreaterError] = {}
    step = options.step
    for predictor in predictors:
        field = supervised_field(predictor, trainset)
        try:
            if field is None and step.needs_gold:
                raise DataError(
                    f"Predictor `{predictor.name}` has no output field with gold values in the trainset, and "
                    "variant='paper' needs them."
                )
            target = _target(predictor, field, trainset, options, modes[predictor.name], servers)
            if step.needs_gradient:
                _refuse_weights_without_gradient(target)
            targets.append(target)
        except (DataError, ProgramError, WeightsError) as error:
            if named or field is not None:
                raise
            kept[predictor.name] = error
    return tuple(targets), kept


def _target(
    predictor: Predictor,
    field: str | None,
    trainset: Sequence[Any],
    options: Options,
    mode: Mode | None,
    servers: Servers,
) -> Target:
    refuse_unsupported(predictor, trainset)
    refuse_without_inputs(predictor)
    if field is not None:
        refuse_unfit_gold(predictor, field, trainset)
    server = who_answers(predictor.lm, predictor_name=predictor.name, servers=servers, strict=options.strict)
    engine = weights_behind(predictor.lm, weights=options.weights, predictor_name=predictor.name, server=server)
    engine.checks.renew()
    watch = None if server is None else Watch(server, engine, predictor.name, strict=options.strict)
    return Target(
        predictor, field, engine, append=predictor.lists_tools if mode is None else mode == "append", watch=watch
    )


def _refuse_weights_without_gradient(target: Target) -> None:
    engine = target.engine
    found = engine.checks.backward()
    if not found.works:
        raise WeightsError(
            f"Predictor `{target.predictor.name}`: the weights of {engine.name!r} give no gradient, and the search "
            f"follows one. {found.explained(engine.name, engine.model)}"
        )


def _warn_of_partial_gradients(targets: Sequence[Target]) -> None:
    for engine in {id(target.engine): target.engine for target in targets}.values():
        found = engine.checks.backward()
        if found.blocked:
            warn_caller(found.explained(engine.name, engine.model))


def _warn_of_other_weights(predictors: Sequence[Predictor], program: Any) -> None:
    """An LM goes by the name that its weights had when it was made; DSPy's cache has their answers under it."""
    now = {predictor.name: predictor.lm for predictor in predictors_of(program)}
    stale = [
        predictor.lm
        for predictor in predictors
        if getattr(predictor.lm, "cache", False) and predictor.lm.model != now[predictor.name].model
    ]
    if stale:
        warn_caller(
            f"The weights behind {stale[0].model!r} have changed since this LM was made. The search runs on the "
            "weights as they are now, but elsewhere the LM may answer from DSPy's cache with what the old ones wrote; "
            "make a new one with local_lm."
        )


def _refuse_nothing_to_do(
    targets: Sequence[Target],
    kept: Mapping[str, GreaterError],
    predictors: Sequence[Predictor],
    trainset: Sequence[Any],
    step: Step,
) -> None:
    if targets:
        return
    if not step.needs_gold:
        first, *others = kept.values()
        raise type(first)(" ".join(["No predictor can be optimised.", str(first), *map(str, others)]))
    outputs = sorted({name for predictor in predictors for name in predictor.output_fields})
    raise DataError(
        "No predictor has an output field with gold values in the trainset. The program's output fields are "
        f"{', '.join(outputs)}; the rows' labels are {', '.join(sorted(trainset[0].labels().keys())) or 'none'}. "
        "Give the examples a value for one of those fields, under the same name, or leave variant='paper', which "
        "is the only one that needs gold values."
    )


def _warn_of_the_rest(kept: Mapping[str, GreaterError], step: Step) -> None:
    if not kept:
        return
    names = ", ".join(kept)
    if step.needs_gold:
        text = (
            f"Predictors {names} have no gold values in the trainset and keep their instructions. "
            "Only predictors with an output field that the rows have a value for are optimised."
        )
    else:
        text = f"Predictors {names} keep their instructions. {' '.join(map(str, kept.values()))}"
    warn_caller(text)


def _check_context(problem: Problem) -> None:
    """Refuse rows that do not fit into the context of the only predictor."""
    for target in problem.targets:
        predictor = target.predictor
        inputs = [
            {name: row[name] for name in predictor.input_fields if name in row}
            for row in [*problem.train, *problem.validation]
        ]
        refuse_long_prompts(target.engine, target.layout(problem.extractor), predictor, inputs)
        target.refuse_long_answers(dict(enumerate(inputs[: len(problem.train)])), problem)
