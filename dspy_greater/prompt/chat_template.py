"""A list of chat messages -> the exact text a model reads.

Scoring and serving both render through `render_chat`, so what is scored is what is deployed. The module
needs neither torch nor DSPy: it works on the tokenizer object it is given and never changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspy_greater.errors import LayoutError

_SYSTEM_PROBE, _USER_PROBE = "zqsystemprobe", "zquserprobe"
_ABSENT = object()
_accepts_system: dict[str, bool] = {}  # chat template -> whether the system role reaches the text


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
) -> str:
    """Render chat messages with the tokenizer's own chat template.

    Tokenise the result with `add_special_tokens=False`: the template has written every special token,
    the beginning of the sequence included. A template that refuses or drops the system role (probed, not
    looked up by name) gets the system text as the beginning of the first user message. Text parts of a
    multi-part message are joined by newlines.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: mappings with `role` and `content` (text, or a list of text parts).
        add_generation_prompt: end where the assistant starts to write.
        continue_final: the last message is an assistant message that stays open. It is appended to what
            the model reads before it writes, character for character, so that scoring text the model
            wrote sees what the model saw when it wrote it.

    Raises:
        LayoutError: there is no chat template, it refuses these messages, or a part is not text.

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
    written = ""
    if continue_final:
        if plain[-1]["role"] != "assistant":
            raise LayoutError(
                f"continue_final=True needs an assistant message at the end, not one of {plain[-1]['role']!r}."
            )
        written = plain.pop()["content"]
    if any(message["role"] == "system" for message in plain) and not _takes_system(tokenizer, template):
        plain = fold_system(plain)
    text = _apply(tokenizer, plain, continue_final or add_generation_prompt)
    return _single_beginning(tokenizer, text) + written


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


def fold_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
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
    exchange = [{"role": "user", "content": _USER_PROBE}, {"role": "assistant", "content": _SYSTEM_PROBE}]
    try:
        text = _apply(tokenizer, exchange, False)
    except LayoutError:
        return ()
    _, found, tail = text.rpartition(_SYSTEM_PROBE)
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


def _apply(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template can raise anything its author wrote
        roles = [message["role"] for message in messages]
        raise LayoutError(f"The chat template refused messages with the roles {roles}: {error}") from error


def _takes_system(tokenizer: Any, template: str) -> bool:
    known = _accepts_system.get(template)
    if known is None:
        probe = [{"role": "system", "content": _SYSTEM_PROBE}, {"role": "user", "content": _USER_PROBE}]
        try:
            known = _SYSTEM_PROBE in _apply(tokenizer, probe, True)
        except LayoutError:
            known = False
        _accepts_system[template] = known
    return known


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
