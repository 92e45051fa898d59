"""A language model on a server as a search asks it: bounded in time, and with a cache that knows which server it is.

DSPy's cache takes the model's name for the model: two servers with one name would share their answers, and other
weights behind the same name would replay those of the old ones.
"""

from __future__ import annotations

from typing import Any

import dspy

from dspy_greater.lm.address import address_of
from dspy_greater.lm.request import told_apart
from dspy_greater.lm.served import ServerPool
from dspy_greater.program.faults import is_served


def for_search(lm: Any, *, weights: str = "", timeout: float | None = None) -> Any:
    """A copy of an LM on a server whose cached answers are of this server and these weights alone.

    In-process LMs, and those whose engine or `forward` is somebody's own, are returned as they are. A `served_lm` has
    its timeout itself.

    Args:
        lm: the LM; it is not changed.
        weights: the identity of the weights that it serves, as far as it is known.
        timeout: seconds that an answer may take, where the LM does not say so itself.

    Example:
        >>> one = dspy.LM("openai/model", api_base="http://127.0.0.1:8000/v1")
        >>> other = dspy.LM("openai/model", api_base="http://127.0.0.1:9000/v1")
        >>> for_search(one).kwargs["rollout_id"] == for_search(other).kwargs["rollout_id"]
        False
    """
    if not is_served(lm) or not _is_dspys_own(lm):
        return lm
    changes: dict[str, Any] = {}
    if lm.cache:
        changes["rollout_id"] = told_apart(lm.kwargs.get("rollout_id"), lm.model, _server_of(lm), weights)
    if timeout is not None and isinstance(lm.engine, str) and lm.kwargs.get("timeout") is None:
        changes["timeout"] = timeout
    if not changes:
        return lm
    copied = lm.copy(**changes)
    copied._warned_zero_temp_rollout = True  # that it draws nothing anew at temperature 0 is as it should be
    return copied


def uncached_lm(lm: Any) -> Any:
    """The LM, or a copy that asks again what DSPy's cache knows.

    >>> uncached_lm(dspy.LM("openai/model")).cache
    False
    """
    return lm.copy(cache=False) if getattr(lm, "cache", False) else lm


def _server_of(lm: Any) -> str:
    """Where an LM's server is, or its servers; "" for the provider's own."""
    if isinstance(lm.engine, ServerPool):
        return " ".join(sorted(lm.engine.api_bases))
    found = address_of(lm)
    return "" if found is None else found.base


def _is_dspys_own(lm: Any) -> bool:
    kind, own = type(lm), dspy.LM
    if not isinstance(lm, own) or not isinstance(lm.engine, (str, ServerPool)):
        return False
    return (kind.forward, kind.aforward) == (own.forward, own.aforward) and not {"forward", "aforward"} & set(vars(lm))
