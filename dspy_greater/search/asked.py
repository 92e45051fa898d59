"""Which predictors are to be optimised, and whether each is rewritten or appended to, as the caller asked for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from dspy_greater.errors import ProgramError, SettingsError
from dspy_greater.program.predictors import PredictorSite

Mode = Literal["rewrite", "append"]
Modes = Mode | Mapping[str, Mode] | None


def selected_of(sites: Sequence[PredictorSite], predictors: Iterable[str] | None) -> list[PredictorSite]:
    """The predictors that are named; all where none is.

    Raises:
        ProgramError: a name that the program does not have.
        SettingsError: no names.
    """
    if predictors is None:
        return list(sites)
    names = _names(predictors)
    if not names:
        raise SettingsError(f"predictors={predictors!r}: give a list of names, such as [{sites[0].name!r}].")
    _refuse_strangers(sites, names, argument="predictors")
    return [site for site in sites if site.name in names]


def _names(predictors: object) -> list[str]:
    listed = isinstance(predictors, Iterable) and not isinstance(predictors, str)
    return list(cast("Iterable[str]", predictors)) if listed else []


def modes_of(sites: Sequence[PredictorSite], selected: Sequence[PredictorSite], mode: Modes) -> dict[str, Mode | None]:
    """The mode that was asked for, of every predictor.

    Raises:
        ProgramError: a name that the program does not have, or a rewriting that would lose a list of tools.
        SettingsError: a mode that is not known.
    """
    modes: dict[str, Any] = {site.name: None for site in sites}
    if isinstance(mode, Mapping):
        _refuse_strangers(sites, list(mode), argument="mode")
        modes |= mode
    else:
        modes = dict.fromkeys(modes, mode)
    for asked in modes.values():
        if asked not in ("rewrite", "append", None):
            raise SettingsError(
                f"mode={mode!r} is not known. Use 'rewrite', 'append', or a mapping from predictor names to them."
            )
    for site in selected:
        if site.lists_tools and modes[site.name] == "rewrite":
            raise ProgramError(
                f"Predictor `{site.name}` lists its tools in its instruction, and rewriting it would lose them. Use "
                "mode='append' for it, which it gets without a mode, or leave it out of predictors=[...]."
            )
    return modes


def _refuse_strangers(sites: Sequence[PredictorSite], names: Sequence[str], *, argument: str) -> None:
    known = [site.name for site in sites]
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ProgramError(
            f"{argument} names {', '.join(f'`{name}`' for name in strangers)}, which the program does not have; its "
            f"predictors are {', '.join(f'`{name}`' for name in known)}."
        )
