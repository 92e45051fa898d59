"""Which predictors are to be optimised, and whether each is rewritten or appended to, as the caller asked for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from dspy_greater.errors import ProgramError, SettingsError
from dspy_greater.program.predictors import Predictor

Mode = Literal["rewrite", "append"]
Modes = Mode | Mapping[str, Mode] | None


def selected_of(predictors: Sequence[Predictor], asked: Iterable[str] | None) -> list[Predictor]:
    """The predictors that are named; all where none is.

    Raises:
        ProgramError: a name that the program does not have.
        SettingsError: no names.
    """
    if asked is None:
        return list(predictors)
    names = _names(asked)
    if not names:
        raise SettingsError(f"predictors={asked!r}: give a list of names, such as [{predictors[0].name!r}].")
    _refuse_strangers(predictors, names, argument="predictors")
    return [predictor for predictor in predictors if predictor.name in names]


def _names(asked: object) -> list[str]:
    listed = isinstance(asked, Iterable) and not isinstance(asked, str)
    return list(cast("Iterable[str]", asked)) if listed else []


def modes_of(predictors: Sequence[Predictor], selected: Sequence[Predictor], mode: Modes) -> dict[str, Mode | None]:
    """The mode that was asked for, of every predictor.

    Raises:
        ProgramError: a name that the program does not have, or a rewriting that would lose a list of tools.
        SettingsError: a mode that is not known.
    """
    modes: dict[str, Any] = {predictor.name: None for predictor in predictors}
    if isinstance(mode, Mapping):
        _refuse_strangers(predictors, list(mode), argument="mode")
        modes |= mode
    else:
        modes = dict.fromkeys(modes, mode)
    for asked in modes.values():
        if asked not in ("rewrite", "append", None):
            raise SettingsError(
                f"mode={mode!r} is not known. Use 'rewrite', 'append', or a mapping from predictor names to them."
            )
    for predictor in selected:
        if predictor.lists_tools and modes[predictor.name] == "rewrite":
            raise ProgramError(
                f"Predictor `{predictor.name}` lists its tools in its instruction, and rewriting it would lose them. "
                "Use mode='append' for it, which it gets without a mode, or leave it out of predictors=[...]."
            )
    return modes


def _refuse_strangers(predictors: Sequence[Predictor], names: Sequence[str], *, argument: str) -> None:
    known = [predictor.name for predictor in predictors]
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ProgramError(
            f"{argument} names {', '.join(f'`{name}`' for name in strangers)}, which the program does not have; its "
            f"predictors are {', '.join(f'`{name}`' for name in known)}."
        )
