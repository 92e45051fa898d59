"""Is the model behind a server the one that is loaded here? The same prompt, and the same choice of tokens.

A prompt is compared by its token ids where the server tells them, else by its number of tokens. What the server
wrote at temperature 0 is read here once: the share of its tokens that are the likeliest here is the agreement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dspy_greater.errors import LayoutError, ParityError, ServerError
from dspy_greater.program.servers import Servers
from dspy_greater.prompt.chat_template import content_text, with_template_options
from dspy_greater.prompt.encoder import PromptEncoder
from dspy_greater.served.http import Reply, ask
from dspy_greater.served.kinds import Server, chat

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

Messages = Sequence[Mapping[str, Any]]
LEAST_AGREEMENT = 0.95  # quantised weights reach 0.98; another model far less
_PROBED_TOKENS = 32  # that the server writes for each row


@dataclass(frozen=True)
class Written:
    """One answer of a server, with what it tells of it.

    `prompt_ids` and `token_ids` are None where the server does not tell them, `prompt_tokens` too.
    """

    messages: tuple[Mapping[str, Any], ...]
    text: str | None
    prompt_tokens: int | None
    prompt_ids: tuple[int, ...] | None = None
    token_ids: tuple[int, ...] | None = None


class Twin:
    """The weights that are loaded here, beside the server that should have the same.

    Args:
        server: what answers.
        engine: the weights.
        predictor: whose LM it is, for messages.
    """

    def __init__(self, server: Server, engine: Engine, predictor: str) -> None:
        self.server, self.engine, self.predictor = server, engine, predictor

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Of the prompts, with the variables that the LM gives to the chat template."""
        tokenizer, options = self.engine.tokenizer, dict(self.server.address.options)
        template, given = str(tokenizer.chat_template), dict(options.pop("chat_template_kwargs", None) or {})
        variables = {name: value for name, value in {**options, **given}.items() if name in template}
        return PromptEncoder(with_template_options(tokenizer, variables))

    def different(self, written: Written) -> str | None:
        """How the server's prompt differs from the one here, with both numbers; None where it does not, or is not told.

        Raises:
            LayoutError: the messages cannot be rendered here.
        """
        here = self.encoder.chat_ids(written.messages)
        there = written.prompt_ids
        if there is not None and there != here:
            pairs = enumerate(zip(there, here, strict=False))
            at = next((place for place, (one, other) in pairs if one != other), min(len(there), len(here)))
            return (
                f"it read {len(there)} tokens, and here the same messages are {len(here)}; the first that differs is "
                f"token {at}: {self._shown(there, at)} there, {self._shown(here, at)} here"
            )
        count = written.prompt_tokens
        if there is None and count is not None and count != len(here):
            return f"it read {count} tokens, and here the same messages are {len(here)}"
        return None

    def refusal(self, written: Written, difference: str) -> str:
        """The text of an error: what differs, why it may, and what to write."""
        address = self.server.address
        texts = "".join(content_text(message.get("content")) for message in written.messages)
        special = sorted({texts[start:stop] for start, stop in self.encoder.special_ranges(texts)})
        cause = (
            f"The messages spell the special tokens {', '.join(special)}, which the server takes for markup and a "
            "search for text: take them out of the data."
            if special
            else "Likely causes: other weights, another chat template, or special tokens in the data. Pass the weights "
            f"that it serves, as in GReaTer(..., weights={{{address.lm!r}: 'ORG/NAME'}}), with the server's own chat "
            "template."
        )
        return (
            f"Predictor `{self.predictor}`: the server at {address.base} ({self.server.kind}, {address.model!r}) reads "
            f"another prompt than {self.engine.name!r}, which is loaded here: {difference}. {cause}"
        )

    def agreement(self, answers: Sequence[Written]) -> tuple[int, int]:
        """Of all tokens that the server wrote: how many are the likeliest here, and how many there are.

        A text whose token ids are not told is tokenised here, and the token that ended it is left out.
        """
        from dspy_greater.model.greedy import greedy_tokens

        limit, rows = self.engine.context_length, list[tuple[tuple[int, ...], int]]()
        for answer in answers:
            prompt = self.encoder.chat_ids(answer.messages)
            sequence = (*prompt, *self._token_ids(answer))
            if len(sequence) > len(prompt) and (limit is None or len(sequence) <= limit):
                rows.append((sequence, len(prompt)))
        found = [same for row in greedy_tokens(self.engine, rows) for same in row] if rows else []
        return sum(found), len(found)

    def _token_ids(self, written: Written) -> Sequence[int]:
        if written.token_ids is not None:
            return written.token_ids
        return self.engine.tokenizer(written.text or "", add_special_tokens=False)["input_ids"]

    def _shown(self, token_ids: tuple[int, ...], at: int) -> str:
        """The text at a place; an id that the tokenizer does not know is shown as a number."""
        try:
            return repr(self.encoder.decode(token_ids[at : at + 4]))
        except (KeyError, TypeError, OverflowError, IndexError, ValueError):
            return repr(token_ids[at : at + 4])


@dataclass(frozen=True)
class Probed:
    """What the probe of a few rows found: prompts compared, those by ids, tokens compared and how many agree."""

    prompts: int
    by_ids: int
    written: int
    agreed: int


def probe(twin: Twin, prompts: Sequence[Messages], servers: Servers | None = None) -> Probed:
    """Ask the server for each prompt's beginning of an answer, and compare both.

    Raises:
        OutageError: it gave no answer for longer than `servers` waits; by default nobody waits.
        ParityError: it reads another prompt.
        ServerError: it does not take what a row asks.
    """
    answers = [_asked(twin, messages, servers) for messages in prompts]
    told = [answer for answer in answers if answer.prompt_ids is not None or answer.prompt_tokens is not None]
    for answer in told:
        try:
            difference = twin.different(answer)
        except LayoutError as error:
            raise ParityError(
                f"Predictor `{twin.predictor}`: the server at {twin.server.address.base} answers these messages, and "
                f"{twin.engine.name!r}, which is loaded here, cannot render them: {error}"
            ) from error
        if difference is not None:
            raise ParityError(twin.refusal(answer, difference))
    agreed, written = twin.agreement(answers)
    return Probed(len(told), sum(answer.prompt_ids is not None for answer in told), written, agreed)


def too_little(twin: Twin, agreed: int, written: int) -> str | None:
    """A warning where the server's tokens are too seldom the likeliest here; None where they agree.

    Two tokens may always differ: on few, rounding alone can fall below the share.
    """
    if written - agreed <= 2 or agreed >= LEAST_AGREEMENT * written:
        return None
    address = twin.server.address
    return (
        f"Predictor `{twin.predictor}`: of {written} tokens that the server at {address.base} ({twin.server.kind}, "
        f"{address.model!r}) wrote at temperature 0, {agreed} ({agreed / written:.1%}) are what {twin.engine.name!r}, "
        f"loaded here in {_dtype(twin.engine)}, would have written; at least {LEAST_AGREEMENT:.0%} are expected of the "
        "same weights. The gradient is that of another model than the served one. Likely causes: other weights of the "
        "same family, a coarse quantisation, or sampling defaults of the server. Pass the very weights that it "
        "serves, as in GReaTer(..., weights='FILE.gguf')."
    )


def _asked(twin: Twin, messages: Messages, servers: Servers | None) -> Written:
    server = twin.server
    reply = chat(server.address, list(messages), most=_PROBED_TOKENS, extra=server.settings, servers=servers)
    if not reply.ok:
        raise ServerError(
            f"Predictor `{twin.predictor}`: the server at {server.address.base} does not answer what a training row "
            f"asks. {reply}. See the server's own log."
        )
    written = answer_of(reply.data or {}, messages)
    if written.prompt_ids is None and (told := _tokenised(server, messages)):
        return Written(written.messages, written.text, written.prompt_tokens, told, written.token_ids)
    return written


def answer_of(data: Mapping[str, Any], messages: Messages) -> Written:
    """What a chat API's answer tells.

    >>> answer_of({"usage": {"prompt_tokens": 9}, "choices": [{"message": {"content": "yes"}}]}, []).prompt_tokens
    9
    """
    choices = data.get("choices")
    first: Any = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    message, usage = first.get("message"), data.get("usage")
    content = message.get("content") if isinstance(message, Mapping) else None
    apart = isinstance(message, Mapping) and bool(message.get("reasoning_content") or message.get("reasoning"))
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return Written(
        messages=tuple(messages),
        text=content if isinstance(content, str) and not apart else None,
        prompt_tokens=count if isinstance(count, int) and count > 0 else None,  # LiteLLM fills in what is not told
        prompt_ids=_ids(data.get("prompt_token_ids")),
        token_ids=_ids(first.get("token_ids")),
    )


def _tokenised(server: Server, messages: Messages) -> tuple[int, ...] | None:
    """The prompt's ids from a server that tokenises on demand: messages, or the text of its own chat template."""
    address = server.address
    if server.kind == "vLLM":
        body = {"model": address.model, "messages": list(messages), "add_generation_prompt": True, **address.options}
        return _tokens(ask(f"{address.root}/tokenize", address.headers, body))
    if server.kind == "llama.cpp":
        rendered = ask(
            f"{address.root}/apply-template", address.headers, {"messages": list(messages), **address.options}
        )
        text = (rendered.data or {}).get("prompt")
        if rendered.ok and isinstance(text, str):
            body = {"content": text, "add_special": True, "parse_special": True}
            return _tokens(ask(f"{address.root}/tokenize", address.headers, body))
    return None


def _tokens(reply: Reply) -> tuple[int, ...] | None:
    return _ids((reply.data or {}).get("tokens")) if reply.ok else None


def _ids(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
        return None
    return tuple(value)


def _dtype(engine: Engine) -> str:
    return str(engine.weights.dtype).removeprefix("torch.")
