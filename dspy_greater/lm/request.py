"""DSPy's request and error types at the boundary of `local_lm`: what is read from a request, what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dspy import lm15

from dspy_greater.errors import ContextLengthError, GreaterError, LayoutError, SettingsError

PROVIDER = "local"  # the first part of the model string of every local_lm
SUPPORTED_PARAMETERS = frozenset({"temperature", "max_tokens", "top_p", "stop", "seed", "stream"})


def told_apart(*parts: object) -> int:
    """A `rollout_id` for answers that depend on these parts: DSPy keeps it out of requests, and its cache tells by it.

    It is a number because DSPy's BestOfN and Refine count on from it.

    >>> told_apart("one server", None) == told_apart("one server", None) != told_apart("another", None)
    True
    """
    return int(hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12], 16)


def messages_of(request: lm15.Request) -> list[dict[str, str]]:
    """The request's chat messages as role and text, the system's first.

    Raises:
        lm15.UnsupportedFeatureError: a part that is not text.
    """
    messages: list[dict[str, str]] = []
    if request.system is not None:
        parts = (lm15.TextPart(request.system),) if isinstance(request.system, str) else request.system
        messages.append({"role": "system", "content": _text(parts, "system")})
    for index, message in enumerate(request.messages):
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": _text(message.parts, f"messages[{index}]")})
    return messages


def _text(parts: Sequence[Any], where: str) -> str:
    for part in parts:
        if not isinstance(part, lm15.TextPart):
            raise lm15.UnsupportedFeatureError(
                f"{where} has a part of type {part.type!r}; a local text model takes text only", feature=where
            )
    return "\n".join(part.text for part in parts)


def refuse_unsupported_features(request: lm15.Request) -> None:
    """Refuse what would change the answer and cannot be done, rather than ignore it."""
    config = request.config
    asked = {
        "tools": bool(request.tools),
        "response_format": config.response_format is not None,
        "tool_choice": config.tool_choice is not None,
        "reasoning": config.reasoning is not None,
        "logprobs": config.logprobs is not None,
        "probabilities": config.probabilities is not None,
        "top_k": config.top_k is not None,
        "frequency_penalty": bool(config.frequency_penalty),
        "presence_penalty": bool(config.presence_penalty),
        **dict.fromkeys(config.extensions or (), True),
    }
    found = sorted(name for name, present in asked.items() if present)
    if found:
        raise lm15.UnsupportedFeatureError(
            f"A local_lm does not support {', '.join(found)}; it takes {', '.join(sorted(SUPPORTED_PARAMETERS))}.",
            feature=f"config.{found[0]}",
        )


@contextmanager
def as_lm15_errors() -> Iterator[None]:
    """Say this package's errors in the terms of DSPy's LM layer, which decides by them what to retry."""
    try:
        yield
    except ContextLengthError as error:
        raise lm15.ContextLengthError(str(error), provider=PROVIDER) from error
    except (LayoutError, SettingsError) as error:
        raise lm15.InvalidRequestError(str(error), provider=PROVIDER) from error
    except GreaterError as error:  # memory ran out, or the computing thread was interrupted
        raise lm15.ServerError(str(error), provider=PROVIDER) from error
