"""Two instructions, word by word: what stayed, what went, what came."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

_WORDS = re.compile(r"\s+|\w+|[^\w\s]", re.ASCII | re.DOTALL)
_MOST_WORDS = 1_500  # of both together; what is longer is shown as a whole, for comparing takes their product


@dataclass(frozen=True)
class Piece:
    """A run of text that both have, or only the first ("removed"), or only the second ("added")."""

    kind: Literal["same", "removed", "added"]
    text: str


def word_diff(before: str, after: str) -> tuple[Piece, ...]:
    """The pieces that make up both texts: without the added ones the first, without the removed ones the second.

    Example:
        >>> word_diff("Answer the question.", "Answer each question.")
        ... # doctest: +NORMALIZE_WHITESPACE
        (Piece(kind='same', text='Answer '), Piece(kind='removed', text='the'), Piece(kind='added', text='each'),
         Piece(kind='same', text=' question.'))
    """
    one, other = _words(before), _words(after)
    pieces: list[Piece] = []
    if len(one) + len(other) > _MOST_WORDS and before != after:
        pieces = [Piece("removed", before), Piece("added", after)]
    else:
        for kind, start, stop, begin, end in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
            if kind == "equal":
                pieces.append(Piece("same", "".join(one[start:stop])))
            else:
                pieces += [Piece("removed", "".join(one[start:stop])), Piece("added", "".join(other[begin:end]))]
    return _readable([piece for piece in pieces if piece.text])


def _words(text: str) -> list[str]:
    return _WORDS.findall(text)


def _readable(pieces: list[Piece]) -> tuple[Piece, ...]:
    """With blanks between two changes made part of both, so that a changed phrase is one change."""
    removed, added, found = "", "", list[Piece]()

    def flush() -> None:
        nonlocal removed, added
        found.extend(piece for piece in (Piece("removed", removed), Piece("added", added)) if piece.text)
        removed = added = ""

    for place, piece in enumerate(pieces):
        between = piece.kind == "same" and piece.text.isspace() and 0 < place < len(pieces) - 1
        if piece.kind == "same" and not between:
            flush()
            found.append(piece)
        else:
            removed += piece.text if piece.kind != "added" else ""
            added += piece.text if piece.kind != "removed" else ""
    flush()
    return tuple(found)
