"""Thoughts that a server returns apart from the text, put back where the model wrote them.

A server with a reasoning parser cuts the block that a model thinks in out of what it returns. The model wrote it
between tags of its own, which its chat template knows; they are found by asking the template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dspy_greater.errors import LayoutError
from dspy_greater.prompt.chat_template import render_messages

_THOUGHT, _SAID = "zqthoughtprobe", "zqsaidprobe"
_KEYS = ("reasoning_content", "reasoning", "thinking")  # under which templates take thoughts
_OPEN = re.compile(r"<(\w+)>\s*$")
_CLOSING = re.compile(r"</(\w+)>")


@dataclass(frozen=True)
class ThoughtTags:
    """What a model writes before and after its thoughts, as its chat template has it.

    `opening` is empty where the prompt ends with it already.

    >>> ThoughtTags("<think>\\n", "\\n</think>\\n\\n").joined("Two and two.", "four")
    '<think>\\nTwo and two.\\n</think>\\n\\nfour'
    >>> ThoughtTags("<think>\\n", "\\n</think>\\n\\n").joined("Two and", None)  # cut off while it thought
    '<think>\\nTwo and'
    """

    opening: str
    closing: str

    def joined(self, thoughts: str, text: str | None) -> str:
        """All that the model wrote; without a text it did not come to an end of its thoughts."""
        if text is None:
            return self.opening + thoughts.strip("\n")
        return self.block(thoughts) + text.lstrip("\n")

    def block(self, thoughts: str) -> str:
        """The thoughts, brought to an end."""
        return self.opening + thoughts.strip("\n") + self.closing

    def said(self, text: str) -> str:
        """What a model wrote behind its thoughts; nothing where they did not come to an end.

        >>> ThoughtTags("<think>\\n", "\\n</think>\\n\\n").said("<think>\\nTwo and two.\\n</think>\\n\\nfour")
        'four'
        """
        opening, closing = self.opening.strip(), self.closing.strip()
        if not closing:  # where they end cannot be told
            return text
        _, ended, said = text.rpartition(closing)
        if ended:
            return said.lstrip("\n")
        return "" if opening in text else text  # an empty opening is in any text: the prompt has begun them


def thought_tags(tokenizer: Any) -> ThoughtTags | None:
    """The tags of the chat template; None where it has none, or they are special tokens.

    Special tokens are no text: what is laid out from text cannot hold them.
    """
    found = _rendered(tokenizer) or _left_open(tokenizer) or _cut_from_history(tokenizer)
    if found is None or any(text in found.opening + found.closing for text in _special_texts(tokenizer)):
        return None
    return found


def _rendered(tokenizer: Any) -> ThoughtTags | None:
    """From a template that writes the thoughts of an assistant's message."""
    before = _render(tokenizer, [_asked()], prompt=True)
    for key in _KEYS:
        answer = {"role": "assistant", "content": _SAID, key: _THOUGHT}
        text = _render(tokenizer, [_asked(), answer], prompt=False)
        if before and text.startswith(before):
            opening, thought, rest = text[len(before) :].partition(_THOUGHT)
            closing, said, _ = rest.partition(_SAID)
            if thought and said and _SAID not in opening:
                return ThoughtTags(opening, closing)
    return None


def _left_open(tokenizer: Any) -> ThoughtTags | None:
    """From a template whose prompt ends inside of them."""
    found = _OPEN.search(_render(tokenizer, [_asked()], prompt=True))
    name = found.group(1) if found else ""
    return ThoughtTags("", f"\n</{name}>\n\n") if name and f"</{name}>" in _source(tokenizer) else None


def _cut_from_history(tokenizer: Any) -> ThoughtTags | None:
    """From a template that takes them out of earlier messages."""
    for name in dict.fromkeys(_CLOSING.findall(_source(tokenizer))):
        answer = {"role": "assistant", "content": f"<{name}>\n{_THOUGHT}\n</{name}>\n\n{_SAID}"}
        text = _render(tokenizer, [_asked(), answer, _asked()], prompt=True)
        if _SAID in text and _THOUGHT not in text:
            return ThoughtTags(f"<{name}>\n", f"\n</{name}>\n\n")
    return None


def _asked() -> dict[str, str]:
    return {"role": "user", "content": "zquserprobe"}


def _render(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> str:
    try:
        return render_messages(tokenizer, messages, prompt)
    except LayoutError:
        return ""


def _source(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "chat_template", ""))


def _special_texts(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [str(token) for token in added.values() if getattr(token, "special", False)]
