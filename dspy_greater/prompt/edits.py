"""An instruction's tokens as every prompt holds them, and edits of these tokens that survive the encoder.

Tokenising the instruction on its own gives other tokens: its first one usually takes in the last blank of the adapter's
indentation. So an edit is written into the prompt as text, and what comes back is what the encoder makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from dspy_greater.errors import LayoutError
from dspy_greater.prompt.encoder import PromptEncoder
from dspy_greater.prompt.template import Templates, remember
from dspy_greater.prompt.token_filter import TokenFilter

Edited: TypeAlias = tuple[tuple[int, ...], str]  # an instruction's ids and its text
_Parts: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # ids before it, its own, ids behind it


@dataclass(frozen=True)
class TokenEdits:
    """Edits of one predictor's instruction, token by token or by phrases.

    `fixed` is the leading text of the instruction that no edit may change; what follows it is searched. `templates` has
    the prompt around the instruction, `token_filter` says which tokens and characters may be put into it.

    An edit is legal when writing its text into the signature, rendering and tokenising gives the ids that were meant:
    all positions besides those that it changes have the ids that they had. At both ends a token may take in the blanks
    around the instruction, so that there the id of "Think" comes back as that of " Think". The text begins with
    `fixed`, to the byte, and no word grows on to its last one.

    Raises `LayoutError` when `fixed` is not as DSPy keeps an instruction.

    ```python
    edits = Layout(tokenizer, dspy.ChatAdapter(), signature).edits
    ids = edits.instruction_ids("Think step by step.")
    edits.replace(ids, 1, token)  # (ids, text), or None
    edits.splice(ids, 1, 3, (token, other, third))  # three tokens in the place of two
    ```
    """

    encoder: PromptEncoder
    templates: Templates
    token_filter: TokenFilter
    fixed: str = ""
    _parts: dict[str, _Parts] = field(default_factory=dict, repr=False, compare=False)
    _fixed_tokens: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if inspect.cleandoc(self.fixed) != self.fixed:
            raise LayoutError(
                f"The fixed text {self.fixed[:60]!r} is not as DSPy keeps an instruction, without indentation and "
                "empty lines around it. Pass `signature.instructions`."
            )

    # ------------------------------------------------------------ text and tokens

    def instruction_ids(self, instruction: str) -> tuple[int, ...]:
        """The token ids that cover the instruction, the same in every prompt.

        Raises `LayoutError` when the instruction is empty or only blanks.
        """
        return self._divided(instruction)[1]

    def around(self, instruction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before the instruction and behind it, where placeholders stand for the inputs.

        They depend on it: "Think" takes in the blank before it, "6" may leave that a token of its own.

        Raises `LayoutError` as `instruction_ids` does.
        """
        before, _, behind = self._divided(instruction)
        return before, behind

    def text_of(self, ids: Sequence[int]) -> str:
        """The instruction that these ids deploy.

        Raises `LayoutError` when no instruction is tokenised to them.
        """
        found = self._resolve(tuple(ids), frozenset())
        if found is None:
            raise LayoutError(
                f"No instruction is tokenised to the {len(ids)} ids {list(ids)[:8]}: they do not survive "
                "decoding, rendering and tokenising. Use ids from instruction_ids, replace or append."
            )
        return found[1]

    def positions(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The positions that may be edited: all but line breaks, the indentation after them, and `fixed`.

        Raises `LayoutError` when there is a fixed text and these ids are of an instruction without it.
        """
        old = tuple(ids)
        first = self._tokens_of_fixed(old) if self.fixed else 0
        return tuple(position for position in self.token_filter.positions(old) if position >= first)

    def length(self, ids: Sequence[int]) -> int:
        """How many tokens count towards the longest length: all, or those behind the fixed text."""
        return len(self.positions(ids)) if self.fixed else len(ids)

    # ---------------------------------------------------------------------- edits

    def splice(self, ids: Sequence[int], start: int, stop: int, tokens: Sequence[int]) -> Edited | None:
        """The instruction with `tokens` in the place of those at `start ... stop - 1`; None when that is not legal.

        Where `start` is `stop`, the tokens are put before that position, or at the end.
        """
        old, added = tuple(ids), tuple(tokens)
        new = (*old[:start], *added, *old[stop:])
        if not new or not self._may_change(old, start, stop) or not all(map(self.token_filter.token, added)):
            return None
        # Only the tokens at both ends can take in characters around the instruction.
        free = {0, len(new) - 1} & set(range(start, start + max(len(added), 1)))
        if (start == len(old)) != (start == len(new)):  # the token before was the last one, or is now
            free.add(start - 1)
        found = self._resolve(new, frozenset(free))
        if found is None or not self._keeps_fixed(found[1]):
            return None
        return found if self.token_filter.no_worse(found[1], self.text_of(old)) else None

    def replace(self, ids: Sequence[int], position: int, token: int) -> Edited | None:
        """`splice`: the instruction with `token` at `position`."""
        return self.splice(ids, position, position + 1, (token,))

    def append(self, ids: Sequence[int], token: int) -> Edited | None:
        """`splice`: the instruction with one token more at its end."""
        return self.splice(ids, len(ids), len(ids), (token,))

    def insert(self, ids: Sequence[int], position: int, token: int) -> Edited | None:
        """`splice`: the instruction with `token` before `position`."""
        return self.splice(ids, position, position, (token,))

    def delete(self, ids: Sequence[int], position: int) -> Edited | None:
        """`splice`: the instruction without the token at `position`."""
        return self.splice(ids, position, position + 1, ())

    def rewrite(self, text: str, kept: str = "") -> Edited | None:
        """Another instruction altogether, behind the fixed text if there is one; None when that is not legal.

        Where it begins with `kept`, which stands in an instruction already, that may have what no new text may have:
        line breaks.
        """
        joint = " " if self.fixed and not self.fixed[-1].isspace() else ""
        whole, added = f"{self.fixed}{joint}{text}", text.removeprefix(kept).strip() if kept else text
        if inspect.cleandoc(whole) != whole or not self.token_filter.whole(added) or not self._keeps_fixed(whole):
            return None
        ids = self.instruction_ids(whole)
        return self._resolve(ids, frozenset())

    # ------------------------------------------------------------------ internals

    def _divided(self, instruction: str) -> _Parts:
        if instruction not in self._parts:
            encoded, span, _ = self.templates.encode(self.templates.reference, instruction)
            ids = encoded.token_ids
            remember(self._parts, instruction, (ids[: span.start], ids[span.start : span.stop], ids[span.stop :]))
        return self._parts[instruction]

    def _may_change(self, old: tuple[int, ...], start: int, stop: int) -> bool:
        """Whether every token that goes, or the one that something is put before, is at an editable position."""
        editable = self.positions(old)
        if start == stop:
            return start == len(old) or start in editable
        return start < stop and all(position in editable for position in range(start, stop))

    def _keeps_fixed(self, text: str) -> bool:
        added = text[len(self.fixed) :]
        return text.startswith(self.fixed) and not (self.fixed[-1:].isalnum() and added[:1].isalnum())

    def _tokens_of_fixed(self, ids: tuple[int, ...]) -> int:
        """How many leading tokens overlap the fixed text."""
        text = self.text_of(ids)
        if text not in self._fixed_tokens:
            fixed = self.templates.spell(self.fixed)
            if not text.startswith(self.fixed) or not self.templates.spell(text).startswith(fixed):
                raise LayoutError(
                    f"The instruction {text[:60]!r} does not begin with the fixed text {self.fixed[:60]!r}, which has "
                    "to stay. Use ids from instruction_ids(fixed), append, insert or replace."
                )
            encoded, span, _ = self.templates.encode(self.templates.reference, text)
            stop = len(self.templates.reference.before) + len(fixed)
            starts = [start for start, _ in encoded.offsets[span.start : span.stop]]
            remember(self._fixed_tokens, text, sum(start < stop for start in starts))
        return self._fixed_tokens[text]

    def _resolve(self, ids: tuple[int, ...], free: frozenset[int]) -> Edited | None:
        """Canonical ids and text; they may differ from `ids` at the `free` positions only."""
        for text in self._readings(self._decoded(ids)):
            if not text or inspect.cleandoc(text) != text:
                continue
            canonical = self.instruction_ids(text)
            if len(canonical) == len(ids) and all(
                a == b or i in free for i, (a, b) in enumerate(zip(canonical, ids, strict=True))
            ):
                return canonical, text
        return None

    def _decoded(self, ids: tuple[int, ...]) -> str:
        """The text of these ids in a prompt; a fixed text is known, and may hold what its tokens do not spell."""
        if not self.fixed:
            return self.encoder.decode(ids)
        fixed = self.instruction_ids(self.fixed)
        if ids[: len(fixed) - 1] != fixed[:-1]:  # its last token may take in what follows it
            return self.encoder.decode(ids)
        return self.templates.spell(self.fixed) + self.encoder.decode(ids[len(fixed) :])

    def _readings(self, decoded: str) -> list[str]:
        """The instructions that a decoded span may stand for: its ends may carry text from around it."""
        before, after = self.templates.reference.before, self.templates.reference.after
        core = decoded.strip()
        lefts = [k for k in range(1, min(len(core), 16)) if before.rstrip().endswith(core[:k])]
        rights = [k for k in range(1, min(len(core), 16)) if after.lstrip().startswith(core[-k:])]
        pairs = [(0, 0), *((k, 0) for k in lefts), *((0, k) for k in rights)]
        texts = [core[left : len(core) - right].strip() for left, right in pairs]
        if decoded.endswith(" "):
            texts.append(decoded.lstrip())  # DSPy keeps blanks at the end of a seed, and some templates too
        if "\n" not in self.templates.joiner:
            return texts
        return [text.replace(self.templates.joiner, "\n") for text in texts]
