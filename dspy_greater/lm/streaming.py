"""Text from tokens as they are written: whole characters only, up to a stop string."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what decoding yields for the first bytes of a longer character


class TextWriter:
    """Collect the tokens of one answer, watch for stop strings, and hand out text that will not change.

    Args:
        tokenizer: decodes ids; only its `decode` is used.
        stop: the answer ends before the first of these strings.
        on_text: called with each new piece of text; the pieces and `rest()` together are the answer.
        cancelled: once it is set, by whichever thread, the answer ends at the next token.

    Example:
        >>> class Letters:
        ...     def decode(self, ids, **options):
        ...         return "".join(map(chr, ids))
        >>> writer = TextWriter(Letters(), stop=["."])
        >>> [writer.accept(ord(letter)) for letter in "ab."], writer.finish()
        ([False, False, True], 'ab')
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: Sequence[str] = (),
        on_text: Callable[[str], object] | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self._tokenizer, self._stop, self._on_text = tokenizer, tuple(stop), on_text
        self._watches = bool(stop) or on_text is not None
        self._hold = max((len(text) - 1 for text in stop), default=0)
        self._ids: list[int] = []
        self._text = ""
        self._known = self._new = 0  # ids[known:new] is the tail already in the text, kept as context
        self._given = 0
        self._cancelled = cancelled or threading.Event()
        self._cut: int | None = None

    def accept(self, token: int) -> bool:
        """Take one token; True when the answer is over (a stop string, or nobody listens any more)."""
        if self._cut is not None:
            return True
        self._ids.append(token)
        if self._cancelled.is_set():
            return True
        if not self._watches:
            return False
        before = self._decode(self._ids[self._known : self._new])
        after = self._decode(self._ids[self._known :])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return False
        searched = max(0, len(self._text) - self._hold)
        self._text += after[len(before) :]
        self._known, self._new = self._new, len(self._ids)
        places = [place for text in self._stop if (place := self._text.find(text, searched)) >= 0]
        self._cut = min(places, default=None)
        self._give(self._cut if self._cut is not None else len(self._text) - self._hold)
        return self._cut is not None

    def cancel(self) -> None:
        """End the answer at the next token."""
        self._cancelled.set()

    def finish(self) -> str:
        """The whole answer: everything written, without the stop string and what came after it."""
        if self._cut is not None:
            return self._text[: self._cut]
        text = self._decode(self._ids)
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def rest(self) -> str:
        """What of the answer has not been handed out."""
        text = self.finish()
        return text[self._given :] if text.startswith(self._text[: self._given]) else ""

    def _give(self, stop: int) -> None:
        if self._on_text is not None and stop > self._given:
            self._on_text(self._text[self._given : stop])
            self._given = stop

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
