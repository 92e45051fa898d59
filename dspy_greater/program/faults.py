"""What a server did instead of answering, decided in one place: whose fault it is that there is no answer.

A prompt that is too long, or that a server refuses for what it says, is the prompt's fault (`faults.server_fault` knows
nothing of it). A connection that fails, a status of 5xx, too many requests, an answer that never comes or is no
language model's: these say nothing of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any, Literal

from dspy.utils.exceptions import (
    LMAuthError,
    LMBillingError,
    LMError,
    LMInvalidRequestError,
    LMProviderError,
    LMRateLimitError,
    LMServerError,
    LMStreamAssemblyError,
    LMTimeoutError,
    LMTransportError,
    LMUnsupportedModelError,
)

from dspy_greater.lm.local import local_engine

FaultKind = Literal["unreachable", "timeout", "rate limit", "server error", "malformed", "empty", "refused"]
_BY_STATUS: Mapping[int, FaultKind] = {
    401: "refused",
    402: "refused",
    403: "refused",
    404: "refused",
    405: "refused",
    408: "timeout",
    429: "rate limit",
    504: "timeout",
}
_LOOK_BACK = 512  # calls of a language model among which one is looked for
_NO_JSON = ("empty or invalid response", "received response", "not valid json")  # how LiteLLM says it


@dataclass(frozen=True)
class ServerFault:
    """A call of a language model on a server that came to nothing.

    "unreachable": no connection, or one that broke. "timeout": nothing came in time. "rate limit": too many requests.
    "server error": it says that it failed. "malformed": an answer that is no language model's, such as a page. "empty":
    an answer without text that tells of no prompt either. "refused": no such model there, or no right to ask it.
    """

    kind: FaultKind
    text: str = field(default="", compare=False)
    retry_after: float | None = field(default=None, compare=False)  # seconds, where the server says so


@dataclass(frozen=True)
class ServerUsage:
    """What a server says that a call cost; None where it does not say. `model` is the one that it says answered."""

    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    model: str | None = None


def is_served(lm: Any) -> bool:
    """Whether a language model is anything but an in-process one.

    >>> import dspy
    >>> is_served(dspy.LM("openai/some-model", api_base="http://127.0.0.1:8000/v1"))
    True
    """
    return local_engine(lm) is None


def server_fault(error: BaseException | None) -> ServerFault | None:
    """The server's fault behind an error, or behind what it was raised from; None where it is another's.

    >>> server_fault(LMServerError("overloaded", status=503)).kind
    'server error'
    >>> server_fault(LMInvalidRequestError("this prompt is too long", status=400)) is None
    True
    """
    chain = list(causes(error))
    kinds: list[FaultKind] = [found for cause in chain if (found := _kind(cause, chain)) is not None]
    if not kinds:
        return None
    waits = [cause.retry_after for cause in chain if isinstance(cause, LMError) and cause.retry_after is not None]
    return ServerFault(kinds[0], f"{type(error).__name__}: {error}", min(waits, default=None))


def usage_of(lm: Any, messages: Any) -> ServerUsage | None:
    """What the call with this very list of messages cost, as the LM's history has it; None where that is not kept."""
    entry = next((record for record in _history(lm) if record.get("messages") is messages), None)
    return None if entry is None or messages is None else _usage(entry)


def empty_answer(lm: Any, messages: Any, outputs: object) -> ServerFault | None:
    """The fault of an answer without text that tells of no prompt either; a model with nothing to say has read one.

    Where the server tells of none with its texts as well, an empty answer is the model's.
    """
    usage = None if _any_text(outputs) else usage_of(lm, messages)
    if usage is None or usage.prompt_tokens or any(map(_text_without_usage, _history(lm))):
        return None
    return ServerFault("empty", "an answer without text that says of no prompt that it was read")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, nearest first.

    >>> error = KeyError("x")
    >>> error.__cause__ = ValueError("y")
    >>> list(causes(error))
    [KeyError('x'), ValueError('y')]
    """
    seen: list[BaseException] = []
    while error is not None and not any(error is earlier for earlier in seen):
        seen.append(error)
        yield error
        error = error.__cause__


def _kind(error: BaseException, chain: list[BaseException]) -> FaultKind | None:
    if isinstance(error, LMTransportError):
        late = any(isinstance(cause, TimeoutError) for cause in chain) or "timed out" in str(error)
        return "timeout" if late else "unreachable"
    for kinds, found in _BY_CLASS:
        if isinstance(error, kinds):
            return found
    if isinstance(error, LMServerError):
        return _of_server_error(error, chain)
    if isinstance(error, LMInvalidRequestError):
        return "refused" if error.status in (404, 405) else None
    if isinstance(error, LMProviderError):
        return "malformed" if error.status is None or error.status < 300 else by_status(error.status)
    if isinstance(error, LMError):
        return None  # what it was raised from may say more
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionError):
        return "unreachable"
    return by_status(getattr(error, "status_code", None))


def _of_server_error(error: LMServerError, chain: list[BaseException]) -> FaultKind:
    told = str(error).lower()
    if any(isinstance(cause, JSONDecodeError) for cause in chain) or any(text in told for text in _NO_JSON):
        return "malformed"
    # LiteLLM makes a status of its own for a connection that failed.
    return "unreachable" if "connection error" in told else by_status(error.status) or "server error"


def by_status(status: object) -> FaultKind | None:
    """The fault that a status of HTTP stands for; None where it is none of the server's.

    >>> by_status(503), by_status(400)
    ('server error', None)
    """
    if not isinstance(status, int):
        return None
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return "server error" if status >= 500 else None


def _history(lm: Any) -> list[Mapping[str, Any]]:
    """The latest calls of a language model, the last first."""
    kept: list[Mapping[str, Any]] = list(getattr(lm, "history", None) or ())
    return kept[: -_LOOK_BACK - 1 : -1]


def _usage(entry: Mapping[str, Any]) -> ServerUsage:
    answers = entry.get("response")
    own = [getattr(answer, "usage", None) for answer in (answers if isinstance(answers, (list, tuple)) else [answers])]
    told = dict(entry.get("usage") or {})
    read = _count(told.get("prompt_tokens"), own, "input_tokens")
    written = _count(told.get("completion_tokens"), own, "output_tokens")
    untold = not read and not written  # LiteLLM fills in zeros; every prompt has tokens
    return ServerUsage(
        prompt_tokens=None if untold else read,
        generated_tokens=None if untold else written,
        model=entry.get("response_model"),
    )


def _count(told: object, own: list[Any], name: str) -> int | None:
    """A count of tokens as the entry has it, or as the answers themselves do, which a cache keeps."""
    if isinstance(told, int):
        return told
    known = [count for usage in own if isinstance(count := getattr(usage, name, None), int)]
    return sum(known) if known and len(known) == len(own) else None


def _text_without_usage(entry: Mapping[str, Any]) -> bool:
    cached = getattr(entry.get("response"), "cache_hit", False)  # LiteLLM's answers lose their usage in a cache
    return not cached and _any_text(entry.get("outputs")) and _usage(entry).prompt_tokens is None


def _any_text(outputs: object) -> bool:
    found: list[Any] = outputs if isinstance(outputs, list) else []
    return any(any(output.values()) if isinstance(output, Mapping) else output for output in found)


_BY_CLASS: tuple[tuple[type[LMError] | tuple[type[LMError], ...], FaultKind], ...] = (
    (LMTimeoutError, "timeout"),
    (LMRateLimitError, "rate limit"),
    (LMStreamAssemblyError, "malformed"),
    ((LMAuthError, LMBillingError, LMUnsupportedModelError), "refused"),
)
