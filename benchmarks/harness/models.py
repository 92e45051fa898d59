"""The models of a cell as `dspy.LM`s: the task model, metered and unmetered, and the proposer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy import lm15

from benchmarks.harness.budget import Budget, Usage, no_counters
from benchmarks.harness.cells import SELF
from benchmarks.harness.phrasebook import PHRASEBOOK, PhrasebookEngine
from benchmarks.harness.shared_model import RemoteEngine
from dspy_greater import local_lm
from dspy_greater.errors import SettingsError
from dspy_greater.lm.asynchronous import AsyncEngine
from dspy_greater.lm.local import AsyncLocalEngine, LocalEngine

_LOADING = ("device", "dtype", "revision", "trust_remote_code")
_CONNECTION = ("api_base", "api_key", "num_retries", "timeout")
_SAMPLING = ("temperature", "max_tokens", "top_p", "stop", "seed")


class MeteredLocalEngine(LocalEngine):
    """The in-process task model as an optimizer sees it: every call first asks whether the budget allows it."""

    def __init__(self, engine: Any, budget: Budget) -> None:
        super().__init__(engine)
        self._budget = budget

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request; `BudgetSpent` once the budget is."""
        self._budget.check()
        return super().complete(request)

    def stream(self, request: lm15.Request) -> Any:
        """Answer one request in pieces; `BudgetSpent` once the budget is."""
        self._budget.check()
        return super().stream(request)


class CountedEngine:
    """A `dspy.LM` or engine as an engine whose usage is added up, and whose calls may be refused."""

    supports_function_calling = False
    supports_reasoning = True
    supports_response_schema = True
    supported_params = frozenset({"temperature", "max_tokens", "top_p", "stop", "seed", "response_format"})

    def __init__(self, inner: Any, add: Callable[[Usage], None], check: Callable[[], None] | None = None) -> None:
        self._inner, self._add, self._check = inner, add, check
        if hasattr(inner, "complete"):  # an engine says what it takes, a `dspy.LM` passes on what its server may know
            self.supported_params = inner.supported_params
            self.supports_response_schema = inner.supports_response_schema
            self.supports_reasoning = inner.supports_reasoning

    def __deepcopy__(self, memo: dict[int, Any]) -> CountedEngine:
        return self  # one account, however often the program is copied

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request, and add up what it cost."""
        if self._check is not None:
            self._check()
        ask = getattr(self._inner, "complete", self._inner)
        response = ask(request)
        usage = response.usage
        self._add(Usage(1, getattr(usage, "input_tokens", 0) or 0, getattr(usage, "output_tokens", 0) or 0))
        return response

    def close(self) -> None:
        """Nothing of its own to close."""


class CountedAsyncEngine(AsyncEngine):
    """The asynchronous side of a `CountedEngine`: the same calls in a thread."""

    kind = CountedEngine
    supports_function_calling = False
    supports_reasoning = True

    def __init__(self, engine: CountedEngine) -> None:
        super().__init__(engine)
        self.supported_params = engine.supported_params
        self.supports_response_schema = engine.supports_response_schema
        self.supports_reasoning = engine.supports_reasoning


@dataclass(frozen=True)
class TaskModel:
    """The model that all programs run on.

    Attributes:
        name: as on the command line.
        identity: which weights, exactly; the model string where a server holds them.
        judge: the model outside of any budget.
        engine: the in-process engine, or the way to that of another process; None for a served model.
        sampling: generation settings that every use of it shares.
    """

    name: str
    identity: str
    judge: dspy.LM
    engine: Any | None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counters(self) -> Any:
        """What reads the engine's counters."""
        engine = self.engine
        return no_counters if engine is None else lambda: engine.counters

    def metered(self, budget: Budget) -> dspy.LM:
        """The same model as an optimizer gets it."""
        if self.engine is None:
            counted = CountedEngine(self.judge.copy(cache=False), budget.add_served, budget.check)
            return self._asking(counted, CountedAsyncEngine(counted))
        if isinstance(self.engine, RemoteEngine):  # the other process counts
            counted = CountedEngine(self.engine, lambda usage: None, budget.check)
            return self._asking(counted, CountedAsyncEngine(counted))
        local = MeteredLocalEngine(self.engine, budget)
        return self._asking(local, AsyncLocalEngine(local))

    def _asking(self, engine: Any, asynchronous: Any) -> dspy.LM:
        return dspy.LM(self.judge.model, engine=engine, async_engine=asynchronous, cache=False, **self.sampling)


def task_model(name: str, arguments: Mapping[str, Any]) -> TaskModel:
    """Load the task model.

    Args:
        name: `pocket`, a directory or a hub id for weights in this process; with `api_base` among the
            arguments, the LiteLLM name of a served model.
        arguments: how to load (`device`, `dtype`, `revision`, `trust_remote_code`) and how to sample
            (`temperature`, `max_tokens`, `top_p`, `stop`, `seed`).

    Raises:
        WeightsError: the weights cannot be loaded.
        SettingsError: an argument that means nothing to the model.
    """
    arguments = {"temperature": 0.0, **arguments}  # greedy, wherever it runs
    sampling = {key: value for key, value in arguments.items() if key not in _LOADING}
    if "api_base" in arguments:
        judge = dspy.LM(name, cache=False, **arguments)
        kept = {key: value for key, value in sampling.items() if key not in _CONNECTION}
        return TaskModel(name, name, judge, None, kept)
    strangers = sorted(set(sampling) - set(_SAMPLING))
    if strangers:
        raise SettingsError(
            f"--model-args has {', '.join(strangers)}, which an in-process model does not take; it takes "
            f"{', '.join((*_LOADING, *_SAMPLING))}. A served model needs api_base."
        )
    judge: Any = local_lm(name, cache=False, **arguments)
    kept = {"max_tokens": judge.kwargs["max_tokens"], **sampling}
    return TaskModel(name, judge.engine.engine.identity, judge, judge.engine.engine, kept)


def prompt_model(
    name: str, seed: int, budget: Budget, model: TaskModel | None = None, arguments: Mapping[str, Any] | None = None
) -> dspy.LM:
    """The proposer of one cell, whose tokens are counted in the budget's books.

    Args:
        name: `phrasebook`; `self` for the task model, whose tokens are charged whatever they are written for; or any
            LiteLLM name; weights in this process go by `dspy-greater/NAME`, with an account of their own.
        seed: of the phrasebook's draws.
        budget: of the cell.
        model: the task model, which `self` needs.
        arguments: of the LM, such as `max_tokens`; of one that is served its address, too.

    Raises:
        SettingsError: `self` without a task model, or an address for a proposer that has none.
    """
    check: Callable[[], None] | None = None
    sampling = {key: value for key, value in (arguments or {}).items() if key not in _CONNECTION}
    connection = {key: value for key, value in (arguments or {}).items() if key in _CONNECTION}
    if connection and (name in (SELF, PHRASEBOOK) or name.startswith("dspy-greater/")):
        raise SettingsError(
            f"--prompt-args has {', '.join(sorted(connection))}, and the proposer {name!r} is not asked by an address; "
            "leave it out, or give the name of a served model to --prompt-model."
        )
    if name == SELF:
        if model is None:
            raise SettingsError("The proposer 'self' is the task model, and there is none here.")
        inner, add, check = _itself(model, budget)
    elif name == PHRASEBOOK:
        inner, add = PhrasebookEngine(seed), budget.add_proposer
    elif name.startswith("dspy-greater/"):
        inner, add = _own_account(name.removeprefix("dspy-greater/")), budget.add_proposer
    else:
        inner, add = dspy.LM(name, cache=False, **connection), budget.add_proposer
    counted = CountedEngine(inner, add, check)
    if name == PHRASEBOOK:
        name = f"local/{PHRASEBOOK}"
    elif model is not None and name == SELF:
        name = model.judge.model  # a request names the model that it is for
    return dspy.LM(name, engine=counted, async_engine=CountedAsyncEngine(counted), cache=False, **sampling)


def _itself(model: TaskModel, budget: Budget) -> tuple[Any, Callable[[Usage], None], Callable[[], None]]:
    """The task model as proposer: what it computes in this process is charged by its counters, a server's by usage."""

    def add(usage: Usage) -> None:
        budget.add_proposer(usage)
        if model.engine is None:
            budget.add_served(usage)

    if isinstance(model.engine, RemoteEngine):
        return model.engine, add, budget.check
    inner: Any = model.judge.copy(cache=False) if model.engine is None else LocalEngine(model.engine)
    return inner, add, budget.check


def remote_task_model(
    name: str, identity: str, model_string: str, engine: RemoteEngine, sampling: Mapping[str, Any]
) -> TaskModel:
    """The task model of another process, which only answers.

    Args:
        name: as on the command line.
        identity: which weights, exactly.
        model_string: of its LMs.
        engine: the way to it.
        sampling: as in `TaskModel`.
    """
    counted = CountedEngine(engine, lambda usage: None)
    judge = dspy.LM(model_string, engine=counted, async_engine=CountedAsyncEngine(counted), cache=False, **sampling)
    return TaskModel(name, identity, judge, engine, sampling)


def _own_account(name: str) -> LocalEngine:
    """An engine with counters of its own on weights that may be the task model's as well."""
    from dspy_greater.model.engine import Engine
    from dspy_greater.model.registry import shared_engine

    shared = shared_engine(name)
    return LocalEngine(Engine(shared.model, shared.tokenizer, name=shared.name, revision=shared.checks.revision))
