"""What a predictor's call really sent to its language model, and what came back, heard through DSPy's callbacks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dspy
from dspy.adapters.utils import serialize_for_json
from dspy.utils.exceptions import AdapterParseError

from dspy_greater.program.failures import FailureListener
from dspy_greater.program.faults import ServerUsage, is_served, usage_of

# Keyword arguments of a predictor's call that are no inputs: DSPy reads them itself.
PRIVILEGED = ("demos", "signature", "lm", "config")


@dataclass(frozen=True)
class Answer:
    """One sample of a language model; `thoughts` is what a server returns apart from the text."""

    text: str | None
    thoughts: str | None = None


@dataclass(frozen=True)
class Exchange:
    """One time that a predictor's call asked a language model.

    `adapter`, `signature`, `demos` and `inputs` are what the messages were rendered from; `messages` are those that
    the language model was given, None where it was not asked in messages. `options` are the call's own settings of
    the language model. `answers` holds one entry a sample, and `usage` what a server says that they cost.
    """

    adapter: Any = None
    signature: Any = None
    demos: tuple[Any, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    messages: tuple[Mapping[str, Any], ...] | None = None
    lm: Any = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    answers: tuple[Answer, ...] = ()
    usage: ServerUsage | None = None


@dataclass(frozen=True)
class PredictorCall:
    """One call of one predictor: its inputs, and its parsed outputs or what the model wrote instead.

    `completion` is the model's text, of its first sample where there are several; `outputs` holds the fields that could
    be parsed from it; `error` is None for a call that succeeded, and `lm_failed` says whether the language model
    could not be called. `thoughts` is what a server returned apart from that text. `sent` is the call's first
    question to the language model (an adapter may ask again in another way, which is another prompt), `exchanges`
    all of them, `given` the names among `demos`, `signature`, `lm` and `config` that the call was given, and
    `context_lm` the language model of a `dspy.context` around the call, None without one.
    """

    predictor: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    completion: str | None = None
    error: str | None = None
    lm_failed: bool = False
    thoughts: str | None = None
    sent: Exchange | None = field(default=None, compare=False, repr=False)
    exchanges: tuple[Exchange, ...] = field(default=(), compare=False, repr=False)
    given: tuple[str, ...] = field(default=(), compare=False, repr=False)
    context_lm: Any = field(default=None, compare=False, repr=False)

    @property
    def samples(self) -> tuple[Answer, ...]:
        """Everything that the model wrote in this call: one answer, or `n` of them; nothing if it was not asked.

        >>> PredictorCall("predict", {}, {}, "yes").samples, PredictorCall("predict", {}, {}).samples
        ((Answer(text='yes', thoughts=None),), ())
        """
        if self.sent is not None and self.sent.answers:
            return self.sent.answers
        return () if self.completion is None else (Answer(self.completion, self.thoughts),)


class CallRecorder(FailureListener):
    """Collects the predictor calls of one run; the program may call predictors from several threads.

    `names` are those of the predictors by their `id`. `lm` is the LM of DSPy's settings at the start of the run:
    another one at a call comes from a `dspy.context` inside of the program.
    """

    def __init__(self, names: Mapping[int, str], lm: Any) -> None:
        super().__init__()
        self._names, self._lm = names, lm
        self._lock = threading.Lock()
        self._open: dict[str, _OpenCall] = {}
        self._asking: dict[str, _OpenExchange] = {}  # call id of an LM or a parser -> what it belongs to
        self._done: dict[str, _Ended | None] = {}
        self._clock, self._own = itertools.count(), threading.get_ident()

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        name = self._names.get(id(instance))
        if name is None:
            return
        arguments = dict(inputs.get("kwargs", inputs))
        ambient = dspy.settings.lm
        with self._lock:
            fields = instance.signature.input_fields
            given = tuple(key for key in PRIVILEGED if key in arguments)
            own = {key: value for key, value in arguments.items() if key in fields}
            began = next(self._clock)
            self._open[call_id] = _OpenCall(name, own, given, None if ambient is self._lm else ambient, began)
            self._done[call_id] = None

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        with self._lock:
            call = self._open.get(active_call())
        if call is None:
            return
        given: Mapping[str, Any] = _argument(inputs, 2, "inputs") or {}
        rendered = Exchange(
            adapter=instance,
            signature=_argument(inputs, 0, "signature"),
            demos=tuple(_argument(inputs, 1, "demos") or ()),
            inputs={name: as_it_is_now(value) for name, value in given.items()},
        )
        with self._lock:
            call.exchanges.append(_OpenExchange(rendered))

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        super().on_lm_start(call_id, instance, inputs)
        with self._lock:
            call = self._open.get(active_call())
            if call is None:
                return
            if not call.exchanges or call.exchanges[-1].sent.lm is not None:
                call.exchanges.append(_OpenExchange())
            asked = self._asking[call_id] = call.exchanges[-1]
            asked.messages = inputs.get("messages")
            options = dict(inputs.get("kwargs") or {})
            asked.sent = replace(asked.sent, lm=instance, options=options, messages=_snapshot(asked.messages))

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        super().on_lm_end(call_id, outputs, exception)
        with self._lock:
            asked = self._asking.pop(call_id, None)
            if asked is not None:
                lm = asked.sent.lm
                messages = _snapshot(asked.messages)  # a callback of the LM's own may have changed them
                usage = usage_of(lm, asked.messages) if exception is None and is_served(lm) else None
                asked.sent = replace(asked.sent, answers=_answers(outputs), messages=messages, usage=usage)

    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        with self._lock:
            call = self._open.get(active_call())
            if call is None:
                return
            if not call.exchanges:
                call.exchanges.append(_OpenExchange())
            asked = self._asking[call_id] = call.exchanges[-1]
            asked.parsed.append(str(_argument(inputs, 1, "completion")))

    def on_adapter_parse_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        with self._lock:
            asked = self._asking.pop(call_id, None)
            if asked is None:
                return
            if isinstance(exception, AdapterParseError):
                asked.failure = exception
            if isinstance(outputs, Mapping) and len(asked.parsed) == 1:
                asked.values = dict(outputs)

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        with self._lock:
            if call_id not in self._open:
                return
            call = self._open.pop(call_id)
            self.hear(exception, "predictor", call.name)
            closed = call.closed(outputs, exception, lm_failed=self.is_lms(exception))
            elsewhere = threading.get_ident() != self._own
            self._done[call_id] = _Ended(closed, call.began, next(self._clock), elsewhere)

    def calls(self) -> tuple[PredictorCall, ...]:
        """The calls that have ended, in the order in which they started.

        Which of several threads starts first is chance. Calls of one predictor that other threads than the run's own
        make, one after another and some of them at once, are told in the order of their inputs.
        """
        with self._lock:
            return tuple(_in_order([call for call in self._done.values() if call is not None]))


@dataclass(frozen=True)
class _Ended:
    """A call, when it began and ended by the clock of its run, and whether another thread than the run's made it."""

    call: PredictorCall
    began: int
    ended: int
    elsewhere: bool


def _in_order(calls: Sequence[_Ended]) -> list[PredictorCall]:
    """Calls in the order in which they began; those of several threads by what they were given."""
    told = [each.call for each in calls]
    for name in dict.fromkeys(call.predictor for call in told):
        mine = [place for place, call in enumerate(told) if call.predictor == name]
        for elsewhere, group in itertools.groupby(mine, key=lambda place: calls[place].elsewhere):
            places = list(group)
            at_once = any(calls[after].began < calls[before].ended for before, after in itertools.pairwise(places))
            if elsewhere and at_once:
                ordered = sorted((told[place] for place in places), key=_given)
                for place, call in zip(places, ordered, strict=True):
                    told[place] = call
    return told


def _given(call: PredictorCall) -> str:
    return repr((dict(call.inputs), call.completion))


@dataclass
class _OpenExchange:
    """An exchange that is under way: what is known of it, and what was read of it."""

    sent: Exchange = field(default_factory=Exchange)
    messages: Any = None  # as they were handed to the LM
    parsed: list[str] = field(default_factory=list[str])  # the texts that were parsed, the last one with `failure`
    failure: AdapterParseError | None = None
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what the first of these texts says

    def read(self) -> Answer | None:
        """The sample whose values the call returns: the first one, or the one that could not be parsed."""
        place = len(self.parsed) - 1 if self.failure is not None else 0
        if place < len(self.sent.answers):
            return self.sent.answers[place]
        return Answer(self.parsed[place]) if place < len(self.parsed) else None


@dataclass
class _OpenCall:
    """A predictor's call that is under way."""

    name: str
    inputs: Mapping[str, Any]
    given: tuple[str, ...]
    context_lm: Any
    began: int
    exchanges: list[_OpenExchange] = field(default_factory=list[_OpenExchange])

    def closed(self, outputs: Any, exception: BaseException | None, *, lm_failed: bool) -> PredictorCall:
        first = self.exchanges[0] if self.exchanges else _OpenExchange()
        error: Any = exception if first.failure is None else first.failure
        answer = first.read()
        # A field may hold what a server returned apart, and the text something else.
        values = {**dict(outputs.items()), **first.values} if isinstance(outputs, dspy.Prediction) else {}
        if isinstance(error, AdapterParseError):  # also where the adapter asked again, with another prompt
            failed: Any = error
            values = dict(failed.parsed_result) if isinstance(failed.parsed_result, Mapping) else {}
            answer = answer or Answer(str(failed.lm_response))
        inputs = self.inputs
        if first.sent.signature is not None:  # with the defaults that DSPy filled in, and by the signature of this call
            fields = first.sent.signature.input_fields
            inputs = {key: value for key, value in first.sent.inputs.items() if key in fields}
        return PredictorCall(
            predictor=self.name,
            inputs=inputs,
            outputs=values,
            completion=None if answer is None else answer.text or "",
            error=None if error is None else described(error),
            lm_failed=lm_failed,
            thoughts=None if answer is None else answer.thoughts,
            sent=None if first.sent.lm is None else first.sent,
            exchanges=tuple(exchange.sent for exchange in self.exchanges if exchange.sent.lm is not None),
            given=self.given,
            context_lm=self.context_lm,
        )


def as_it_is_now(value: Any) -> Any:
    """An input as it is written into a prompt now: a program may go on filling a list or a conversation.

    >>> steps = ["look"]
    >>> kept = as_it_is_now(steps)
    >>> steps.append("count")
    >>> kept
    ['look']
    """
    if isinstance(value, dspy.History):
        return dspy.History(messages=[dict(as_it_is_now(dict(message))) for message in value.messages])
    return serialize_for_json(value) if isinstance(value, (list, dict, set)) else value


def described(error: BaseException) -> str:
    """An error as one line of a record.

    >>> described(ValueError("too long"))
    'ValueError: too long'
    """
    return f"{type(error).__name__}: {error}"


def active_call() -> str:
    """The id of the call inside which this is asked; "" outside of any."""
    from dspy.utils.callback_context import ACTIVE_CALL_ID

    return ACTIVE_CALL_ID.get() or ""


def _argument(inputs: Mapping[str, Any], place: int, name: str) -> Any:
    """An argument of an adapter's method; a method that a subclass inherits is told of as `args` and `kwargs`."""
    if name in inputs:
        return inputs[name]
    given = inputs.get("args", ())
    return given[place] if place < len(given) else inputs.get("kwargs", {}).get(name)


def _snapshot(messages: Any) -> tuple[Mapping[str, Any], ...] | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return None
    return tuple(dict(message) for message in messages if isinstance(message, Mapping))


def _answers(outputs: Any) -> tuple[Answer, ...]:
    found = outputs if isinstance(outputs, list) else []
    return tuple(
        Answer(output.get("text"), output.get("reasoning_content"))
        if isinstance(output, Mapping)
        else Answer(None if output is None else str(output))
        for output in found
    )
