"""A list of chat messages -> the exact text a model reads.

Scoring and serving both render through `render_chat`, so what is scored is what is deployed. The module
needs neither torch nor DSPy: it works on the tokenizer object it is given and never changes it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dspy_greater.errors import LayoutError

Form = Literal["text", "parts"]  # how a template reads a message's content

_PROBE, _USER_PROBE = "zqsystemprobe", "zquserprobe"
_ABSENT = object()
_FORMS: tuple[Form, ...] = ("text", "parts")
_EARLIER = "earlier user"  # a user's message that is not the last one
_known_forms: dict[tuple[str, str], Form | None] = {}  # (chat template, role) -> form; None: it drops the content


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render chat messages with the tokenizer's own chat template.

    Tokenise the result with `add_special_tokens=False`: the template has written every special token,
    the beginning of the sequence included. What a template does with a message is probed, not looked up by name: one
    that does not read a text, as templates of vision-language models, gets a list with one text part; one that
    refuses or drops the system role gets the system text as the beginning of the first user message. Text parts of
    a multi-part message are joined by newlines.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: mappings with `role` and `content` (text, or a list of text parts).
        add_generation_prompt: end where the assistant starts to write.

    Raises:
        LayoutError: there is no chat template, it refuses these messages or drops what they say, or a part is not
            text.

    Example:
        >>> class Plain:
        ...     chat_template, bos_token = "{{ messages }}", None
        ...
        ...     def apply_chat_template(self, messages, **options):
        ...         return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
        ...
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": list(text.encode())}
        >>> render_chat(Plain(), [{"role": "user", "content": "Hi"}])
        '<user>Hi<assistant>'
    """
    plain = [{"role": str(message["role"]), "content": content_text(message.get("content"))} for message in messages]
    if not plain:
        raise LayoutError("There is no chat message to render; pass at least one.")
    template = _template_of(tokenizer)
    if any(message["role"] == "system" for message in plain) and _form(tokenizer, template, "system") is None:
        plain = _fold_system(plain)
    _refuse_dropped(tokenizer, template, plain)
    text = render_messages(tokenizer, plain, add_generation_prompt)
    return _single_beginning(tokenizer, text)


def content_text(content: Any) -> str:
    """The text of a message's content: itself, or its text parts joined by newlines.

    Raises:
        LayoutError: a part is not text (an image, audio, a file).
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise LayoutError(f"A message has a part of type {kind!r}; a local text model takes text parts only.")
    return "\n".join(texts)


def _fold_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Move all system text to the beginning of the first user message, a blank line between them."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if not system:
        return rest
    first = next((message for message in rest if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system}, *rest]
    first["content"] = f"{system}\n\n{first['content']}"
    return rest


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """Special tokens the chat template writes right after an assistant's message, if any.

    Found by rendering a short exchange: some models end a turn with a token that is not the tokenizer's
    end-of-sequence token, and generation has to stop there too.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return ()
    exchange = [{"role": "user", "content": _USER_PROBE}, {"role": "assistant", "content": _PROBE}]
    try:
        text = render_messages(tokenizer, exchange, False)
    except LayoutError:
        return ()
    _, found, tail = text.rpartition(_PROBE)
    ids = _plain_ids(tokenizer, tail.lstrip()) if found else []
    special = set(getattr(tokenizer, "all_special_ids", ()))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {index for index, token in added.items() if getattr(token, "special", False)}
    return (ids[0],) if ids and ids[0] in special else ()


def _template_of(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise LayoutError(
            f"The tokenizer of {name!r} has no chat template, so chat messages cannot be rendered; use an "
            "instruction-tuned model, or set tokenizer.chat_template before handing the pair over."
        )
    return str(template)


def with_template_options(tokenizer: Any, options: Mapping[str, Any]) -> Any:
    """The tokenizer, or a copy of it whose chat template always gets these variables (`enable_thinking` and such)."""
    if not options:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.apply_chat_template = functools.partial(tokenizer.apply_chat_template, **options)
    return changed


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template can raise anything its author wrote
        roles = [message["role"] for message in messages]
        raise LayoutError(f"The chat template refused messages with the roles {roles}: {error}") from error


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """What the chat template makes of messages whose contents are texts, in the form that it reads.

    Nothing is folded, checked or cleaned as `render_chat` does.

    Raises:
        LayoutError: there is no chat template, or it refuses these messages.
    """
    template = _template_of(tokenizer)
    formed = [_in_form(message, _form(tokenizer, template, message["role"])) for message in messages]
    return _apply(tokenizer, formed, add_generation_prompt)


def _in_form(message: Mapping[str, str], form: Form | None) -> dict[str, Any]:
    content: Any = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if form == "parts" else content}


def _form(tokenizer: Any, template: str, role: str) -> Form | None:
    """The form in which what a message of this role says reaches the prompt, text before a list of parts.

    None when it reaches it in neither form; text where the template refuses the probe, so that its own words are
    heard when it refuses a real prompt.
    """
    key = (template, role)
    if key not in _known_forms:
        _known_forms[key] = _probed(tokenizer, template, role)
    return _known_forms[key]


def _probed(tokenizer: Any, template: str, role: str) -> Form | None:
    if role not in ("system", "user", "assistant", _EARLIER):
        return "text"
    refuses_text = False
    for form in _FORMS:
        try:
            if _PROBE in _apply(tokenizer, _exchange(tokenizer, template, role, form), True):
                return form
        except LayoutError:
            refuses_text = refuses_text or form == "text"
    return "text" if refuses_text and role != "system" else None


def _exchange(tokenizer: Any, template: str, role: str, form: Form) -> list[dict[str, Any]]:
    """A short conversation in which a message of this role, in this form, says the probe."""
    probe = _in_form({"role": role.rpartition(" ")[2], "content": _PROBE}, form)
    if role == "user":
        return [probe]
    asked = _in_form({"role": "user", "content": _USER_PROBE}, _form(tokenizer, template, "user"))
    if role == "system":
        return [probe, asked]
    if role == "assistant":
        return [asked, probe, asked]
    said = {"role": "assistant", "content": _USER_PROBE}
    return [probe, _in_form(said, _form(tokenizer, template, "assistant")), asked]


def _refuse_dropped(tokenizer: Any, template: str, messages: Sequence[Mapping[str, str]]) -> None:
    """Raises `LayoutError` when the template leaves out what one of these messages says."""
    spoken = [message["role"] for message in messages if message["content"].strip()]
    asked = spoken.count("user")
    dropped = [
        what
        for what, role, needed in (
            ("a user's message says", "user", asked > 0),
            ("an assistant's earlier message says", "assistant", "assistant" in spoken[:-1]),
            ("a user's earlier messages say", _EARLIER, asked > 1),
        )
        if needed and _form(tokenizer, template, role) is None
    ]
    if dropped:
        raise LayoutError(
            f"The chat template drops what {dropped[0]}, whether it is given as text or as a list of parts. Set "
            "tokenizer.chat_template to one that keeps the system message and all others, or leave out what it "
            "drops: demonstrations and a history are earlier messages."
        )


def _single_beginning(tokenizer: Any, text: str) -> str:
    """Exactly one begin token where the template, the tokenizer or both write it."""
    beginning = getattr(tokenizer, "bos_token", None)
    if not beginning or not text.startswith(beginning):
        return text
    while text.startswith(beginning + beginning):
        text = text[len(beginning) :]
    return text[len(beginning) :] if _always_begins(tokenizer) else text


def _always_begins(tokenizer: Any) -> bool:
    """Whether the tokenizer prepends its begin token even when told to add no special tokens."""
    return _plain_ids(tokenizer, "a")[:1] == [getattr(tokenizer, "bos_token_id", _ABSENT)]


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
