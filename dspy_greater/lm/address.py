"""Where the calls of a language model go: its address, as DSPy and LiteLLM resolve it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dspy_greater.lm.served import ServerPool, served_name

# Provider prefixes of DSPy's model strings that stand for an OpenAI-compatible server -> variables of the environment
# that hold its address, first of all the one that counts most.
_OPENAI = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "openai": _OPENAI,
    "text-completion-openai": _OPENAI,
    "custom_openai": _OPENAI,
    "openai_like": ("OPENAI_LIKE_API_BASE",),
    "hosted_vllm": ("HOSTED_VLLM_API_BASE",),
    "vllm": ("VLLM_API_BASE",),
    "sglang": ("SGLANG_API_BASE",),
    "huggingface": ("HUGGINGFACE_API_BASE",),
    "lm_studio": ("LM_STUDIO_API_BASE",),
    "llamafile": ("LLAMAFILE_API_BASE",),
    "litellm_proxy": ("LITELLM_PROXY_API_BASE",),
    "ollama": ("OLLAMA_API_BASE",),
    "ollama_chat": ("OLLAMA_API_BASE",),
}
_DEFAULTS = {
    "ollama": "http://localhost:11434",
    "ollama_chat": "http://localhost:11434",
    "llamafile": "http://127.0.0.1:8080/v1",
}
NATIVE = frozenset({"ollama", "ollama_chat"})  # whose address has no /v1, and whose models are tags of its own
SEVERAL = "api_bases"  # what the addresses of a `served_lm` are given by


@dataclass(frozen=True)
class Address:
    """Where an LM's calls go.

    Attributes:
        base: the address, without a slash at its end.
        model: the name that the server is asked for.
        given_by: what it was read from, such as "api_base" or the name of a variable.
        lm: the LM's model string.
        native: the calls use Ollama's own API, whose address has no /v1.
        headers: go with every question; never shown.
        options: the LM's own settings that change a prompt, such as `chat_template_kwargs`.
    """

    base: str
    model: str
    given_by: str
    lm: str
    native: bool = False
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    options: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)

    @property
    def root(self) -> str:
        """The server's own address, without /v1."""
        return self.base.removesuffix("/v1").rstrip("/")

    @property
    def api(self) -> str:
        """The address of the OpenAI-compatible API."""
        return f"{self.root}/v1" if self.native else self.base


def model_name(model: str) -> str:
    """The name that a server knows a model by: a model string without its provider.

    >>> model_name("hosted_vllm/org/name"), model_name("openai//weights/here"), model_name("org/name")
    ('org/name', '/weights/here', 'org/name')
    """
    prefix, _, rest = model.partition("/")
    return rest if prefix in _VARIABLES and rest else model


def addresses_of(lm: Any) -> tuple[Address, ...]:
    """Where the calls of an LM go: one address, those of all servers of a `served_lm`, or none; as `address_of`.

    >>> from dspy_greater import served_lm
    >>> [found.base for found in addresses_of(served_lm("openai/name", ["http://one:8000/v1", "http://two:8000/v1"]))]
    ['http://one:8000/v1', 'http://two:8000/v1']
    """
    pool = getattr(lm, "engine", None)
    if not isinstance(pool, ServerPool):
        found = address_of(lm)
        return () if found is None else (found,)
    model = str(lm.model)
    return tuple(
        Address(base, served_name(model), SEVERAL, model, headers=pool.headers, options=_of_the_prompt(lm.kwargs))
        for base in pool.api_bases
    )


def address_of(lm: Any) -> Address | None:
    """Where the calls of an LM go; None for one in this process or over several servers, and for a provider's service.

    In this order: `api_base` or `base_url` of the LM, LiteLLM's global `api_base`, the environment, and the
    addresses that LiteLLM takes for Ollama and llamafile where nothing is said.

    >>> import dspy
    >>> address_of(dspy.LM("openai/name", api_base="http://localhost:8000/v1/", api_key="x")).base
    'http://localhost:8000/v1'
    """
    options: Mapping[str, Any] = getattr(lm, "kwargs", None) or {}
    model = str(getattr(lm, "model", ""))
    if not isinstance(getattr(lm, "engine", "auto"), str):  # an engine object has a connection of its own, or none
        return None
    prefix = model.partition("/")[0]
    found = _found(prefix, options)
    if found is None:
        return None
    given_by, base = found
    if urlsplit(base).scheme not in ("http", "https"):
        return None
    return Address(
        base=base.rstrip("/"),
        model=model_name(model).removeprefix("local:"),
        given_by=given_by,
        lm=model,
        native=prefix in NATIVE,
        headers=_headers(prefix, options),
        options=_of_the_prompt(options),
    )


def _found(prefix: str, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """What says the address, and the address."""
    said: list[tuple[str, Any]] = [(name, options.get(name)) for name in ("api_base", "base_url")]
    said.append(("litellm.api_base", getattr(sys.modules.get("litellm"), "api_base", None)))
    said += [(name, os.environ.get(name)) for name in _VARIABLES.get(prefix, ())]
    said.append((f"LiteLLM's default for {prefix}", _DEFAULTS.get(prefix)))
    return next(((name, value) for name, value in said if isinstance(value, str) and value), None)


def _headers(prefix: str, options: Mapping[str, Any]) -> dict[str, str]:
    more = options.get("extra_headers") or options.get("headers")
    found = {str(name): str(value) for name, value in more.items()} if isinstance(more, Mapping) else {}
    key = options.get("api_key") or os.environ.get(f"{prefix.upper()}_API_KEY")
    if isinstance(key, str) and key.strip():  # of a key that was read from a file the end of the line is no part
        found.setdefault("Authorization", f"Bearer {key.strip()}")
    return found


def _of_the_prompt(options: Mapping[str, Any]) -> dict[str, Any]:
    extra = options.get("extra_body")
    every = {**options, **extra} if isinstance(extra, Mapping) else options
    names = ("chat_template_kwargs", "reasoning_effort")
    return {name: every[name] for name in names if every.get(name) is not None}
