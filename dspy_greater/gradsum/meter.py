"""What a run costs: LM calls and tokens by module, exact from any number of threads, and a budget on them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import dspy

from dspy_greater.errors import BudgetSpent

Module = Literal["generation", "evaluation", "gradients", "summarisation", "editing"]
_TOKENS = ("prompt_tokens", "completion_tokens")
_COUNTED = ("calls", *_TOKENS, "answered", "malformed", "unanswered")


class Meter:
    """Counts what goes through `counting` blocks, in the threads that they start too.

    A call that DSPy's cache answers costs nothing and is not counted; a call that fails before it has
    an answer is not either. `malformed` counts answers that could not be used, `unanswered` questions that
    were given up after all retries.
    """

    def __init__(self, *, max_calls: int | None = None, max_tokens: int | None = None) -> None:
        self._max_calls, self._max_tokens = max_calls, max_tokens
        self._reserved_calls = 0
        self._lock = threading.Lock()
        self._spent: dict[str, dict[str, int]] = {}

    @contextmanager
    def counting(self, module: Module) -> Iterator[None]:
        """LM calls inside are this module's; an enclosing `dspy.track_usage` hears of them as well."""
        tracker = _Tracker(self, module, dspy.settings.usage_tracker)
        with dspy.context(usage_tracker=tracker):
            yield

    def add(self, module: str, **amounts: int) -> None:
        """Count something more of a module's."""
        with self._lock:
            counted = self._spent.setdefault(module, dict.fromkeys(_COUNTED, 0))
            for name, amount in amounts.items():
                counted[name] = counted.get(name, 0) + amount

    def spent(self) -> dict[str, dict[str, int]]:
        """A copy of the counts by module."""
        with self._lock:
            return {module: dict(counted) for module, counted in self._spent.items()}

    def recall(self, spent: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from recorded counts."""
        with self._lock:
            self._spent = {module: dict(counted) for module, counted in spent.items()}

    def calls_per_run(self, unknown: int = 1) -> int:
        """LM calls of one run of the program, as measured so far and rounded up; `unknown` before the first run.

        `runs` and `predictor_calls` are counted with the LM calls. A predictor's call that a cache answered took no
        LM call, and the next prompt's will.
        """
        counted = self.spent().get("generation", {})
        if not counted.get("runs"):
            return unknown
        made = max(counted.get("calls", 0), counted.get("predictor_calls", 0))
        return max(1, math.ceil(made / counted["runs"]))

    def reserve(self, calls: int) -> None:
        """Keep so many calls, and as many tokens as they took on average, for what comes after the loop."""
        self._reserved_calls = calls

    def lift_limits(self) -> None:
        """From now on everything is admitted: what was reserved is being spent."""
        self._max_calls = self._max_tokens = None

    def admit(self, calls: int) -> None:
        """Refuse a stage of so many calls when what is left does not cover it.

        Raises:
            BudgetSpent: it does not.
        """
        spent = self.spent().values()
        made = sum(counted["calls"] for counted in spent)
        tokens = sum(counted[name] for counted in spent for name in _TOKENS)
        expected = made + calls + self._reserved_calls
        if self._max_calls is not None and expected > self._max_calls:
            raise BudgetSpent(f"{calls} more LM calls do not fit into max_lm_calls={self._max_calls} after {made}.")
        per_call = tokens / made if made else 0
        if self._max_tokens is not None and expected * per_call > self._max_tokens:
            raise BudgetSpent(
                f"{calls} more LM calls of {per_call:.0f} tokens do not fit into max_lm_tokens={self._max_tokens} "
                f"after {tokens}."
            )


class _Tracker:
    """What DSPy tells each call's usage to; `dspy.Parallel` deep-copies it for every thread."""

    def __init__(self, meter: Meter, module: Module, parent: Any) -> None:
        self._meter, self._module, self._parent = meter, module, parent

    def __deepcopy__(self, memo: Any) -> _Tracker:
        return self

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        amounts = {name: usage_entry.get(name) for name in _TOKENS}
        known = {name: value for name, value in amounts.items() if isinstance(value, int)}
        self._meter.add(self._module, calls=1, **known)
        if self._parent is not None:
            self._parent.add_usage(lm, usage_entry)
