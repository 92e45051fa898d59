"""Writing instructions into a copy of the program, and checking that they deploy what was scored."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspy_greater.errors import LayoutError
from dspy_greater.program.copies import with_instructions
from dspy_greater.prompt.layout import Layout


def write_back(program: Any, texts: Mapping[str, str]) -> Any:
    """A copy of the program in which each named predictor has its new instruction.

    The given program is unchanged, `_compiled` is left as it is, and language models are shared.

    Raises `ProgramError` when there is no such predictor.

    ```python
    better = write_back(program, {"predict": "List each item, then add them up."})
    ```
    """
    return with_instructions(program, texts)


def saved(program: Any, texts: Mapping[str, str]) -> str:
    """What DSPy's `save` writes into a JSON file for the program with these instructions; `load` reads it.

    Raises:
        Exception: whatever keeps DSPy from saving the program so.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.json"
        write_back(program, texts).save(path)
        return path.read_text(encoding="utf-8")


def round_trip(
    layout: Layout, instruction: str, ids: Sequence[int], *, inputs: Mapping[str, Any] | None = None
) -> None:
    """Check that the instruction, written into the signature and rendered by DSPy, gives these ids.

    Goes the long way, through the adapter and the chat template with nothing cached: the whole prompt
    has to equal the one that was scored, and `ids` have to be its instruction. `inputs` is a row to
    render with (placeholders without one).

    Raises `LayoutError` when they differ, with the first difference.
    """
    row = dict(inputs) if inputs is not None else layout.placeholders
    deployed_signature = layout.signature.with_instructions(instruction)
    messages = layout.adapter.format(deployed_signature, list(layout.demos), row)
    deployed = layout.encoder.chat_ids(messages)
    scored = layout.prompt(instruction, row)
    if deployed != scored.token_ids:
        raise LayoutError(
            f"The prompt that DSPy sends with {instruction[:60]!r} is not the one that was scored: "
            f"{_difference(layout, deployed, scored.token_ids)}. Keep the previous instruction, and report "
            "the adapter and the tokenizer."
        )
    span = deployed[scored.instruction.start : scored.instruction.stop]
    if span != tuple(ids):
        raise LayoutError(
            f"The instruction {instruction[:60]!r} is not tokenised to the ids that were scored: "
            f"{_difference(layout, span, tuple(ids))}. Keep the previous instruction."
        )


def _difference(layout: Layout, deployed: tuple[int, ...], scored: tuple[int, ...]) -> str:
    index = len(os.path.commonprefix([deployed, scored]))
    return (
        f"{len(deployed)} tokens against {len(scored)}, the first difference at token {index} "
        f"({_piece(layout, deployed, index)} against {_piece(layout, scored, index)})"
    )


def _piece(layout: Layout, ids: tuple[int, ...], index: int) -> str:
    return repr(layout.tokenizer.decode([ids[index]])) if index < len(ids) else "nothing"
