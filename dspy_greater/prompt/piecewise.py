"""Tokenising chat prompts piece by piece: what stands between two special tokens is tokenised once.

A tokenizer cuts a text at its special tokens before anything else, and nothing merges across the cut (for which see
`cuts`). The prompts of a search differ in few pieces: the system message is the same for all rows, the user message for
all instructions.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 500_000  # remembered; some 130 bytes each
_OF_A_PIECE = 8  # tokens that it weighs besides its own


@dataclass(frozen=True)
class EncodedText:
    """Token ids, and for each the characters `[start, stop)` of the text that it covers."""

    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Piece:
    """A piece of text between two special tokens, and where it lies in a text."""

    left: str  # the special token before it; "" at the beginning of the text
    text: str
    right: str
    begin: int


def cuts(tokenizer: Any) -> dict[str, int]:
    """The special tokens at which a text is cut wherever they occur in it, and their ids.

    Left out are those that count only as words of their own, those that are looked for in the normalised text, and
    those inside other added tokens: what is cut there depends on what is around them.

    >>> from dspy_greater.model.engine import Engine
    >>> sorted(cuts(Engine.from_pretrained("pocket").tokenizer))[:2]
    ['<|assistant|>', '<|end|>']
    """
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    normalises = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None) is not None
    texts = [str(token) for token in added.values()]
    return {
        str(token): index
        for index, token in added.items()
        if token.special
        and not token.single_word
        and not (token.normalized and normalises)
        and not any(str(token) in text and str(token) != text for text in texts)
    }


class PiecewiseTokenizer:
    """The tokens of a text from those of its pieces, which are remembered: the tokenizer may not change meanwhile.

    Args:
        encode: tokenises a whole text; the slow twin.
        special: the id of each special token's text. In the text it has to stand for the token everywhere.

    >>> def letters(text):
    ...     return EncodedText(tuple(map(ord, text)), tuple((at, at + 1) for at in range(len(text))))
    >>> PiecewiseTokenizer(letters, {"|": ord("|")}).encode("a|b")
    EncodedText(token_ids=(97, 124, 98), offsets=((0, 1), (1, 2), (2, 3)))
    """

    def __init__(self, encode: Callable[[str], EncodedText], special: Mapping[str, int]) -> None:
        self._encode, self._special, self._lock = encode, dict(special), threading.Lock()
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._known: dict[tuple[str, str, str], EncodedText | None] = {}
        self._tokens = 0

    def encode(self, text: str) -> EncodedText:
        """The tokens of a text; where a piece does not stand alone, the whole text is tokenised."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for piece in self._cut(text):
            found = self._piece(piece)
            if found is None:
                return self._encode(text)
            begin = piece.begin - len(piece.left)
            own = [(start + begin, stop + begin) for start, stop in found.offsets]
            if piece.left:  # it was the last one of the piece before, and may take in blanks on both sides
                offsets[-1] = (offsets[-1][0], own[0][1])
            ids += found.token_ids[bool(piece.left) :]
            offsets += own[bool(piece.left) :]
        return EncodedText(tuple(ids), tuple(offsets))

    def _cut(self, text: str) -> Iterator[_Piece]:
        left, begin = "", 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            yield _Piece(left, text[begin : match.start()], match.group(), begin)
            left, begin = match.group(), match.end()
        yield _Piece(left, text[begin:], "", begin)

    def _piece(self, piece: _Piece) -> EncodedText | None:
        """The tokens of a piece and of the special tokens around it; None where these do not come out as such."""
        key = (piece.left, piece.text, piece.right)
        known = self._known  # another thread may put a new one in its place
        if key in known:
            return known[key]
        found = self._read(piece)
        with self._lock:
            weight = _OF_A_PIECE + (len(found.token_ids) if found else 0)
            self._tokens += weight
            if self._tokens > MOST_TOKENS:
                self._known, self._tokens = {}, weight
            self._known[key] = found
        return found

    def _read(self, piece: _Piece) -> EncodedText | None:
        found = self._encode(piece.left + piece.text + piece.right)
        ids, left, right = found.token_ids, self._special.get(piece.left), self._special.get(piece.right)
        begins = left is None or ids[:1] == (left,)
        ends = right is None or ids[-1:] == (right,)
        alone = len(ids) >= (left is not None) + (right is not None)
        return found if begins and ends and alone else None
