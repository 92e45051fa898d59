"""Who answers: what kind of server stands behind an LM, what it serves, and which weights it says those are.

A server is known by what it answers, never by the name of a model. Nothing is loaded for that: it is asked what it
knows by heart, and for one token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dspy_greater.errors import GreaterError, OutageError, ServerError
from dspy_greater.lm.address import SEVERAL, Address, addresses_of
from dspy_greater.notices import warn_caller
from dspy_greater.program.faults import FaultKind, ServerFault, by_status
from dspy_greater.program.servers import Servers, Spent
from dspy_greater.served.http import Reply, ask, unsendable

_PATIENCE = 120.0  # seconds for a first token: a server may load its weights only then
_FROM = re.compile(r'^FROM\s+"?(.+?)"?\s*$', re.MULTILINE)  # of an Ollama modelfile
_LISTED = 8  # names shown in an error
# Settings that leave the model's own distribution as it is, whatever a server takes from generation_config.json.
_PENALTIES = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repeat_penalty": 1.0}
_CUTS = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
_IDS = {"return_token_ids": True}


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        kind: by what it answers.
        address: where it is.
        listed: the names that `/models` tells.
        said: the weights as the server names them, None where it names none.
        told_by: the question that it answered so, or all that were asked in vain.
        neutral: sampling settings that it takes and that switch its defaults off.
        tells_ids: whether it returns the token ids of a prompt and of what it wrote.
        others: the other servers of a `served_lm`; what one of them does not take, none has in `neutral`.
    """

    kind: str
    address: Address
    listed: tuple[str, ...]
    said: str | None
    told_by: str
    neutral: Mapping[str, float] = field(default_factory=dict[str, float])
    tells_ids: bool = False
    others: tuple[Server, ...] = ()

    @property
    def every(self) -> tuple[Server, ...]:
        """It and the others."""
        return (self, *self.others)

    @property
    def settings(self) -> dict[str, Any]:
        """What it is given beside the messages: its defaults do not count then, and it tells token ids."""
        return {**self.neutral, **(_IDS if self.tells_ids else {})}


def who_answers(
    lm: Any, *, predictor_name: str = "", servers: Servers | None = None, strict: bool = False
) -> Server | None:
    """The server behind an LM; None for an LM in this process, or of a provider's own service.

    `servers` waits for one that answered before, or says that it has too much to do; by default nobody waits. Of a
    `served_lm` it is the first server that answers, with the others. Where some do not answer, a warning says so;
    with `strict`, an error.

    Raises:
        OutageError: the server gave no answer for longer than `servers` waits.
        ServerError: nothing answers there, it is no chat API, or the model is not served; says what was asked, what
            came back, and the line to write.
    """
    addresses = list(addresses_of(lm))
    if not addresses:
        return None
    options: Mapping[str, Any] = getattr(lm, "kwargs", None) or {}
    of_whom = f" of predictor {predictor_name!r}" if predictor_name else ""
    found: list[Server] = []
    silent: list[GreaterError] = []
    for address in addresses if len(addresses) > 1 else ():
        with not_waiting(servers) as at_once:
            try:
                found.append(_server_at(address, options, of_whom, at_once))
            except (OutageError, ServerError) as error:
                silent.append(error)
    if not found:
        return _server_at(addresses[0], options, of_whom, servers)
    if silent:
        tell_of_silent(silent, strict=strict)
    return _together(found)


@contextmanager
def not_waiting(servers: Servers | None) -> Iterator[Servers]:
    """Servers that are not waited for, as there are others; what they spend counts for `servers`."""
    at_once = Servers()
    try:
        yield at_once
    finally:
        if servers is not None:
            servers.count(at_once.spent)


def tell_of_silent(errors: Sequence[GreaterError], *, strict: bool) -> None:
    """Say which servers of several could not be compared.

    Raises:
        ServerError: with `strict`.
    """
    text = (
        f"{len(errors)} of the servers of a served_lm cannot be compared with the weights that are loaded here: "
        f"{' '.join(str(error) for error in errors)}"
    )
    if strict:
        raise ServerError(f"{text} strict=False searches all the same, with those that answer.")
    warn_caller(f"{text} Calls go to those that answer, and to these once they do.", RuntimeWarning)


def _together(servers: Sequence[Server]) -> Server:
    """The first with the others, each with the settings that all of them take: a call may go to any."""
    neutral = {
        name: value
        for name, value in servers[0].neutral.items()
        if all(server.neutral.get(name) == value for server in servers)
    }
    tells = all(server.tells_ids for server in servers)
    first, *others = (replace(server, neutral=neutral, tells_ids=tells) for server in servers)
    return replace(first, others=tuple(others))


def _server_at(address: Address, options: Mapping[str, Any], of_whom: str, servers: Servers | None) -> Server:
    """The server at an address that an LM with these options uses; raises what `who_answers` raises."""
    who = f"the LM {address.lm!r}{of_whom}"
    if strange := unsendable(address.headers):
        raise ServerError(
            f"The server at {address.base} ({address.given_by}) cannot be asked for {who}: {strange}. Write "
            f"{_line(address, key='YOUR KEY')}."
        )
    models = ask(f"{address.api}/models", address.headers)
    if models.status is None:
        raise ServerError(
            f"No server answers at {address.base} ({address.given_by}), where {who} sends its calls. {models}. Start "
            f"the server, or write its address: {_line(address, base='http://HOST:PORT/v1')}."
        )
    entries = _entries(models)
    answered, taken = _settings_taken(address, _neutral(options), servers)
    if not answered.ok:
        raise ServerError(_refusal(address, who, models, entries, answered))
    listed = tuple(str(entry["id"]) for entry in entries if entry.get("id"))
    same = [entry for entry in entries if entry.get("id") == address.model] or (entries if len(entries) == 1 else [])
    kind, said, told_by = _weights_said(address, models, same[0] if same else {}, answered)
    neutral = {} if address.native else {name: value for name, value in taken.items() if name not in _IDS}
    tells = isinstance((answered.data or {}).get("prompt_token_ids"), list)
    return Server(kind, address, listed, said, told_by, neutral, tells)


def chat(address: Address, messages: Any, *, most: int, extra: Mapping[str, Any], servers: Servers | None) -> Reply:
    """What the server answers to these messages at temperature 0, with at most `most` tokens.

    With `servers` it is asked again while no language model answers, like a row of a search, and its cost is counted.

    Raises:
        OutageError: the server gave no answer for longer than `servers` waits.
    """
    fixed = {"model": address.model, "messages": messages, "temperature": 0.0, "max_tokens": most}
    body = {**fixed, **address.options, **extra}

    def asked(_: object = None) -> list[_Asked]:
        return [_Asked(ask(f"{address.api}/chat/completions", address.headers, body, seconds=_PATIENCE))]

    if servers is None:
        return asked()[0].reply
    [found] = servers.settled(asked(), asked)
    usage = (found.reply.data or {}).get("usage")
    told = usage if isinstance(usage, dict) else {}
    servers.count(Spent(told.get("prompt_tokens") or 0, told.get("completion_tokens") or 0))
    return found.reply


@dataclass(frozen=True)
class _Asked:
    """A reply, and whether it says that nobody answered. What a server refuses is told of elsewhere."""

    reply: Reply

    @property
    def faults(self) -> tuple[ServerFault, ...]:
        kind = self._kind()
        return () if kind is None else (ServerFault(kind, str(self.reply)),)

    def _kind(self) -> FaultKind | None:
        if self.reply.ok:
            return None if (self.reply.data or {}).get("choices") else "empty"
        if self.reply.status is None:
            return "unreachable"
        kind = by_status(self.reply.status)
        if self.reply.refused and kind in (None, "refused"):
            return None
        return kind or "malformed"


# ------------------------------------------------------------------ internals


def _neutral(options: Mapping[str, Any]) -> dict[str, float]:
    """The settings to try: those that the LM does not have of its own."""
    extra = options.get("extra_body")
    own = {**options, **extra} if isinstance(extra, Mapping) else options
    wanted = _PENALTIES if own.get("temperature") == 0 else {**_PENALTIES, **_CUTS}
    return {name: value for name, value in wanted.items() if own.get(name) is None}


def _settings_taken(
    address: Address, wanted: Mapping[str, float], servers: Servers | None
) -> tuple[Reply, dict[str, Any]]:
    """A first answer of one token, and which of the settings the server takes: all, or those it takes alone."""
    hello = [{"role": "user", "content": "Hello"}]
    ask_with = partial(chat, address, hello, most=1, servers=servers)
    every = {**wanted, **_IDS}
    reply = ask_with(extra=every)
    if not reply.refused:
        return reply, every
    reply = ask_with(extra={})
    if not reply.ok:
        return reply, {}
    taken = {name: value for name, value in every.items() if ask_with(extra={name: value}).ok}
    return (ask_with(extra=taken) if taken else reply), taken


def _entries(models: Reply) -> list[Mapping[str, Any]]:
    listed = (models.data or {}).get("data")
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _weights_said(
    address: Address, models: Reply, entry: Mapping[str, Any], answered: Reply
) -> tuple[str, str | None, str]:
    """Kind, weights and the question; each kind of server has a place of its own where it says its weights."""
    asked = []
    for path in ("/model_info", "/get_model_info"):
        reply = ask(f"{address.root}{path}", address.headers)
        asked.append(reply.asked)
        if reply.ok and (place := _text(reply.data, "model_path")):
            return "SGLang", place, f"{reply.asked}, model_path"
    reply = ask(f"{address.root}/props", address.headers)
    asked.append(reply.asked)
    if reply.ok and (place := _text(reply.data, "model_path")):
        return "llama.cpp", place, f"{reply.asked}, model_path"
    reply = ask(f"{address.root}/api/show", address.headers, {"model": address.model})
    asked.append(reply.asked)
    if reply.ok and (modelfile := _text(reply.data, "modelfile")):
        found = _FROM.search(modelfile)
        return "Ollama", found.group(1) if found else None, f"{reply.asked}, the line FROM of modelfile"
    if place := _text(entry, "root"):
        kind = "vLLM" if "max_model_len" in entry else "OpenAI-compatible"
        return kind, place, f"{models.asked}, root"
    name, _, revision = (_text(answered.data, "model") or "").rpartition("@")
    if revision and name == address.model.partition("@")[0]:  # it answers with the name that it loads, and a revision
        return "transformers serve", name, f"{answered.asked}, model"
    shown = f"{models} (no field root)" if models.ok else str(models)
    return "OpenAI-compatible", None, f"{shown}; nor do {', '.join(asked)} name any"


def _text(data: Mapping[str, Any] | None, field: str) -> str | None:
    found = (data or {}).get(field)
    return found if isinstance(found, str) and found else None


def _refusal(address: Address, who: str, models: Reply, entries: list[Mapping[str, Any]], answered: Reply) -> str:
    """Why the server does not answer a message, and what to write instead."""
    at = f"The server at {address.base} ({address.given_by})"
    if answered.status in (401, 403):
        return f"{at} does not accept the key of {who}. {answered}. Write {_line(address, key='YOUR KEY')}."
    if answered.status is None:
        return f"{at} is there, but {who} gets no answer from it. {answered}. See the server's own log."
    names = [str(entry["id"]) for entry in entries if entry.get("id")]
    if not models.ok and not address.native and (base := _with_v1(address)):
        return (
            f"{at} answers one level deeper: {who} has an api_base that lacks /v1. {answered}, and {base}/models is "
            f"there. Write {_line(address, base=base)}."
        )
    if not answered.refused:
        return f"{at} cannot answer a message of one word for {who}. {answered}. See the server's own log."
    listed = ", ".join(map(repr, names[:_LISTED])) + (", ..." if len(names) > _LISTED else "")
    if address.model not in names and (names or _names_it(answered, address)):
        serves = f"; it lists {listed}" if names else ""
        return (
            f"{at} does not serve {address.model!r}, which {who} asks for{serves}. {answered}. Write the name that "
            f"it serves: {_line(address, model=names[0] if names else 'NAME')}."
        )
    return f"{at} does not take chat messages for {who}. {answered}. {models}. Is that the address of its API?"


def _names_it(answered: Reply, address: Address) -> bool:
    return address.model in answered.text


def _with_v1(address: Address) -> str | None:
    """The address with /v1, if a server answers there with a list of models, or knows the chat API."""
    base = f"{address.base}/v1"
    if ask(f"{base}/models", address.headers).ok:
        return base
    known = ask(f"{base}/chat/completions", address.headers, {})
    return base if known.status not in (None, 404, 405) else None


def _line(address: Address, *, base: str | None = None, model: str | None = None, key: str | None = None) -> str:
    """What to write in a program."""
    prefix = address.lm.partition("/")[0]
    name = address.lm if model is None else f"{prefix}/{model}"
    more = f", api_key={key!r}" if key else ""
    if address.given_by == SEVERAL:
        return f"served_lm({name!r}, api_bases=[{(base or address.base)!r}, ...]{more})"
    return f"dspy.LM({name!r}, api_base={(base or address.base)!r}{more})"
