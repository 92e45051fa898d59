"""One question to a server and its reply, whatever happens: no error is raised, and no redirect followed."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECONDS = 5.0  # for what a server knows by heart
_MOST_BYTES = 16_000_000
_SHOWN = 200
_FAILURES = (OSError, http.client.HTTPException, ValueError)


@dataclass(frozen=True)
class Reply:
    """What came back. `status` is None where nothing did, and `data` None where it was not a JSON object."""

    asked: str  # such as "GET http://localhost:8000/v1/models"
    status: int | None
    data: Mapping[str, Any] | None
    text: str  # what was said, shortened, or why nothing was

    @property
    def ok(self) -> bool:
        """Whether the server answered with a JSON object."""
        return self.status is not None and 200 <= self.status < 300 and self.data is not None

    @property
    def refused(self) -> bool:
        """Whether the server took the question for a wrong one."""
        return self.status is not None and 400 <= self.status < 500

    def __str__(self) -> str:
        said = f": {self.text}" if self.text else ""
        return f"{self.asked} gave {'no answer' if self.status is None else f'status {self.status}'}{said}"


def ask(
    url: str, headers: Mapping[str, str], body: Mapping[str, Any] | None = None, *, seconds: float = SECONDS
) -> Reply:
    """GET, or POST with a body as JSON.

    >>> print(ask("http://127.0.0.1:9/v1/models", {}))
    GET http://127.0.0.1:9/v1/models gave no answer: ...
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {**headers, "Content-Type": "application/json"})
    asked = f"{request.get_method()} {url}"
    try:
        with urllib.request.build_opener(_StayHere).open(request, timeout=seconds) as answer:
            status, raw = answer.status, answer.read(_MOST_BYTES)
    except urllib.error.HTTPError as error:
        status = error.code
        try:
            with error:
                raw = error.read(_MOST_BYTES)
        except _FAILURES as failure:  # of the connection, in the middle of what the server says
            return Reply(asked, status, None, _reason(failure, headers))
    except _FAILURES as error:
        return Reply(asked, None, None, _reason(error, headers))
    text = raw.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return Reply(asked, status, found if isinstance(found, dict) else None, _shortened(text))


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the key in the request is for this server only."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def unsendable(headers: Mapping[str, str]) -> str | None:
    """Which headers HTTP cannot carry, without their values, which may be keys; None where it can.

    >>> unsendable({"Authorization": "Bearer sk-\\n1"})
    'the header Authorization (the API key?) has characters that HTTP does not allow'
    """
    strange = [name for name, value in headers.items() if {"\r", "\n"} & set(value) or max(value, default="") > "\xff"]
    if not strange:
        return None
    return f"the header {', '.join(strange)} (the API key?) has characters that HTTP does not allow"


def _reason(error: Exception, headers: Mapping[str, str]) -> str:
    """Why nothing came."""
    if isinstance(error, ValueError) and (strange := unsendable(headers)):
        return strange
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason).strip()


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
