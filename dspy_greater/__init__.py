"""GReaTer as a drop-in DSPy optimizer: gradients through a local model's own reasoning.

Importing this package imports neither torch nor DSPy; each public name brings in what it needs
when it is first used.

Example:
    >>> import dspy_greater
    >>> sorted(dspy_greater.__all__)[:4]
    ['Estimate', 'GReaTer', 'GReaTerTeleprompter', 'GradSum']

`GReaTerTeleprompter` and `GradSumTeleprompter` are other names of `GReaTer` and `GradSum`.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspy_greater.errors import GreaterError
    from dspy_greater.gradsum.optimizer import GradSum, GradSumTeleprompter
    from dspy_greater.lm.local import local_lm
    from dspy_greater.lm.served import served_lm
    from dspy_greater.optimizer import GReaTer, GReaTerTeleprompter
    from dspy_greater.run.estimate import Estimate
    from dspy_greater.settings import Settings

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent, unless the program configures logging

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "GReaTer",
    "GReaTerTeleprompter",
    "GradSum",
    "GradSumTeleprompter",
    "GreaterError",
    "Settings",
    "__version__",
    "local_lm",
    "served_lm",
]

_HOME = {
    "Estimate": "run.estimate",
    "GReaTer": "optimizer",
    "GradSum": "gradsum.optimizer",
    "GReaTerTeleprompter": "optimizer",
    "GradSumTeleprompter": "gradsum.optimizer",
    "GreaterError": "errors",
    "Settings": "settings",
    "local_lm": "lm.local",
    "served_lm": "lm.served",
}


if not TYPE_CHECKING:  # a type checker that saw this would accept every misspelt name

    def __getattr__(name: str) -> object:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"{__name__}.{home}"), name)
        globals()[name] = value  # the next use finds it without coming here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
