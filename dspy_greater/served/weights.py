"""Which open weights stand behind a language model: found, and loaded here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspy_greater.errors import WeightsError
from dspy_greater.lm.address import NATIVE, model_name
from dspy_greater.served.kinds import Server

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

# Provider prefixes of DSPy's model strings that stand for a server of open weights, wherever it is.
_SERVING = frozenset({"hosted_vllm", "vllm", "sglang", "huggingface", "lm_studio", "llamafile"})
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def weights_behind(lm: Any, *, weights: Any = None, predictor_name: str = "", server: Server | None = None) -> Engine:
    """The engine whose weights a `dspy.LM` runs on.

    In this order: `weights`; the engine of a `local_lm`; what the server says its weights are; the model string
    without its provider prefix, as a local directory or as a hub id. Nothing is downloaded for a model that is not
    served. Engines are shared: the same weights load once.

    Args:
        lm: the LM of a predictor.
        weights: an `Engine`, a `local_lm`, a loaded `(model, tokenizer)` pair, a name or path, or a
            mapping to one of these from the predictor's name or the LM's model string.
        predictor_name: the predictor's path in its program.
        server: what `who_answers` found behind the LM.

    Raises:
        WeightsError: no weights are known; names the predictor, the LM, what the server said and what to pass.

    Example:
        >>> engine = weights_behind(dspy.settings.lm, weights="Qwen/Qwen3-4B")  # doctest: +SKIP
    """
    from dspy_greater.model.engine import Engine
    from dspy_greater.model.registry import as_engine, first_line, is_here, shared_engine

    name = str(getattr(lm, "model", lm))
    if isinstance(weights, Mapping):
        weights = weights.get(predictor_name, weights.get(name))
    if weights is not None:
        return as_engine(weights)
    own = getattr(getattr(lm, "engine", None), "engine", None)
    if isinstance(own, Engine):
        return own
    tried: list[str] = []
    candidates = _unserved(name) if server is None else _served(server)
    for candidate, may_download in candidates:
        try:
            if not is_here(candidate):
                return shared_engine(candidate, local_files_only=True)
            return shared_engine(candidate)
        except WeightsError as error:
            tried.append(f"{candidate!r} ({first_line(error.__cause__ or error)})")
        if may_download and not is_here(candidate):
            try:
                return shared_engine(candidate)
            except WeightsError as error:
                tried[-1] = f"{candidate!r} ({first_line(error.__cause__ or error)})"
    raise WeightsError(_no_weights(name, predictor_name, tried, server))


def _unserved(model: str) -> list[tuple[str, bool]]:
    """(name or path, whether it may be downloaded) for a model string alone, best first."""
    from dspy_greater.model.registry import POCKET, is_here

    prefix, name = model.partition("/")[0], model_name(model)
    served = prefix in _SERVING
    if name.startswith("local:"):
        name, served = name.removeprefix("local:"), True
    if is_here(name) or name == POCKET:
        return [(name, False)]
    return [(name, True)] if served and prefix not in NATIVE and _HUB_ID.fullmatch(name) else []


def _served(server: Server) -> list[tuple[str, bool]]:
    """The same for a model behind a server: its word counts before the name, and no name means the packaged model."""
    from dspy_greater.model.registry import POCKET, is_here

    names = [] if server.said is None else [server.said]
    if not server.address.native:
        names.append(server.address.model)
    usable = (name for name in dict.fromkeys(names) if name != POCKET and (is_here(name) or _HUB_ID.fullmatch(name)))
    return [(name, True) for name in usable]


def _no_weights(name: str, predictor: str, tried: list[str], server: Server | None) -> str:
    who = f"predictor {predictor!r}" if predictor else "this predictor"
    attempts = f" Tried {'; '.join(tried)}." if tried else ""
    tags = (
        " Ollama tags are not hub ids; the line FROM of `ollama show --modelfile TAG` names a file that weights= takes."
        if name.partition("/")[0] in NATIVE
        else ""
    )
    return (
        f"No open weights are known for {who}, which runs on the LM {name!r}; a gradient needs them."
        f"{_said(server)}{tags}{attempts} Pass weights= with the model the LM serves, such as "
        f"GReaTer(..., weights={{{name!r}: 'ORG/NAME'}}) (a hub id, a directory, a GGUF file, or a "
        "loaded (model, tokenizer) pair), or use "
        "dspy_greater.local_lm(...) as the LM."
    )


def _said(server: Server | None) -> str:
    """What the server answered, where one was asked."""
    from dspy_greater.model.registry import is_here

    if server is None:
        return ""
    where = f" The server at {server.address.base} ({server.kind})"
    if server.said is None:
        return f"{where} answers, and does not say which weights it serves: {server.told_by}."
    missing = "" if is_here(server.said) or _HUB_ID.fullmatch(server.said) else ", which is not on this machine"
    return f"{where} says that its weights are {server.said!r} ({server.told_by}){missing}."
