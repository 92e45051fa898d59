"""Whose failure ended a run: the language model's, its answer's, a tool's, an interpreter's, or the program's own.

DSPy tells its callbacks of every error where it arises. The error that ends a run is looked up among those, and so
are its causes: an error that was raised `from` a language model's is the language model's.
"""

from __future__ import annotations

from typing import Any, Literal

from dspy.primitives.code_interpreter import CodeInterpreterError
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError, LMError

from dspy_greater.program.faults import ServerFault, causes, empty_answer, is_served, server_fault

Failure = Literal["parse", "lm", "setup", "program"]
Part = Literal["lm", "tool", "interpreter", "predictor"]


class FailureListener(BaseCallback):
    """Remembers the errors of one run and where each arose; safe in the threads that the run starts."""

    def __init__(self) -> None:
        self._heard: list[tuple[BaseException, Part, str]] = []  # those that arose further inside come first
        self._tools: dict[str, str] = {}
        self._served: dict[str, tuple[Any, Any]] = {}  # call id -> the LM on a server that is asked, and the messages
        self._faults: list[ServerFault] = []

    @property
    def faults(self) -> tuple[ServerFault, ...]:
        """What servers did instead of answering, call by call."""
        return tuple(self._faults)

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if is_served(instance):
            self._served[call_id] = instance, inputs.get("messages")

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.hear(exception, "lm")
        served = self._served.pop(call_id, None)
        if served is None:
            return
        fault = empty_answer(*served, outputs) if exception is None else server_fault(exception)
        if fault is not None:
            self._faults.append(fault)

    def faults_behind(self, error: BaseException) -> tuple[ServerFault, ...]:
        """What servers did instead of answering in a run that this error ended, called out of DSPy's hearing too."""
        unheard = None
        if self.is_lms(error) and not any(part == "lm" for _, part, _ in self._heard):
            unheard = server_fault(error)
        return self.faults if unheard is None else (*self.faults, unheard)

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._tools[call_id] = str(getattr(instance, "name", ""))

    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.hear(exception, "tool", self._tools.pop(call_id, ""))

    def on_interpreter_startup_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.hear(exception, "interpreter")

    def on_interpreter_execute_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.hear(exception, "interpreter")

    def hear(self, error: BaseException | None, part: Part, name: str = "") -> None:
        """An error passed through this part of the run; None: it ended well."""
        if error is not None:
            self._heard.append((error, part, name))

    def is_lms(self, error: BaseException | None) -> bool:
        """Whether a language model raised it, or what it was raised from."""
        return any(isinstance(cause, LMError) or self._passed(cause, "lm") for cause in causes(error))

    def failure_of(self, error: BaseException) -> Failure:
        """What kind of error ended the run.

        "parse": the model's text did not parse. "lm": the language model could not be called. "setup": something is
        missing on this machine, which no text of a model can mend. "program": anything else.
        """
        if isinstance(error, AdapterParseError):
            return "parse"
        if self.is_lms(error):
            return "lm"
        # DSPy raises an error of this very type for what code cannot repair, and of a subclass for wrong code.
        missing = type(error) is CodeInterpreterError or isinstance(error, (ImportError, OSError))
        return "setup" if missing and not isinstance(error, TimeoutError) else "program"

    def source_of(self, error: BaseException) -> str:
        """Who raised it, for a message."""
        passed = [
            (part, name) for cause in causes(error) for heard, part, name in self._heard if heard is cause
        ]  # of the error itself first
        predictor = next((f"predictor `{name}`" for part, name in passed if part == "predictor"), "")
        if self.is_lms(error):
            return "the language model" + (f" of {predictor}" if predictor else "")
        for part, name in passed:
            if part == "tool":
                return f"the tool `{name}`"
            if part == "interpreter":
                return "the code interpreter"
        return predictor or "the program's own code"

    def _passed(self, error: BaseException, where: Part) -> bool:
        return any(heard is error and part == where for heard, part, _ in self._heard)
