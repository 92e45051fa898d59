"""Which tokens and characters an instruction may be made of."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from dspy_greater.prompt.encoder import PromptEncoder

# Control and format characters, surrogates, private use, unassigned, line and paragraph separators.
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_REPLACEMENT_CHARACTER = "\ufffd"
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class TokenFilter:
    """Decides what may stand in an instruction that is edited token by token.

    Not allowed: line breaks, tabs, control and invisible characters, undecodable bytes, blanks other than
    the space, special and added tokens or their spelling, the field markers `[[ ##` and `<field>` of the
    adapters, and an instruction without a letter or digit. What the seed instruction already holds is
    tolerated, but no edit may add to it.
    """

    def __init__(self, encoder: PromptEncoder, signature: Any) -> None:
        self._encoder = encoder
        self._size = len(encoder.tokenizer)
        tags = [f"{opening}{name}>" for name in signature.fields for opening in ("<", "</")]
        self._marks = ["[[ ##", "## ]]", *tags, *encoder.special_texts]
        self._mark_pattern = re.compile("|".join(re.escape(mark) for mark in self._marks))
        self._tokens: dict[int, bool] = {}
        self._pieces: dict[int, str] = {}

    def token(self, token: int) -> bool:
        """Whether this token may be put into an instruction at all."""
        if token not in self._tokens:
            self._tokens[token] = (
                0 <= token < self._size
                and token not in self._encoder.added_ids
                and not self._damage(self._piece(token))
            )
        return self._tokens[token]

    def no_worse(self, text: str, seed: str) -> bool:
        """Whether `text` has words, and holds nothing forbidden that `seed` does not hold."""
        if not any(char.isalnum() for char in text):
            return False
        if text != text.strip() and seed == seed.strip():
            return False
        damage = self._damage(text)
        # The line breaks are part of the prompt's shape: an edit may neither add nor join lines.
        return text.count("\n") == seed.count("\n") and (not damage or damage <= self._damage(seed))

    def whole(self, text: str) -> bool:
        """Whether `text` can be an instruction on a line of its own."""
        one_line = "\n" not in text and text == text.strip()
        return one_line and any(map(str.isalnum, text)) and not self._damage(text)

    def positions(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Indices of `ids` whose token is neither a line break nor the indentation after one."""
        allowed: list[int] = []
        breaking = False
        for index, token in enumerate(ids):
            piece = self._piece(token)
            # The last token may take in line breaks that follow the instruction.
            own = piece.rstrip() if index == len(ids) - 1 else piece
            if "\n" in own or "\r" in own:
                breaking = True
            elif breaking and not piece.strip():
                continue
            else:
                breaking = False
                allowed.append(index)
        return tuple(allowed)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._encoder.decode([token])
        return self._pieces[token]

    def _damage(self, text: str) -> Counter[str]:
        found: Counter[str] = Counter()
        if not (text.isascii() and text.isprintable()):
            found.update(char for char in text if _forbidden(char))
        found.update(self._mark_pattern.findall(text))
        found.update(tag for tag in _TAG.findall(text) if tag in self._encoder.markup)
        return found


def _forbidden(char: str) -> bool:
    if char == _REPLACEMENT_CHARACTER or unicodedata.category(char) in _FORBIDDEN_CATEGORIES:
        return True
    return char != " " and unicodedata.category(char) == "Zs"
