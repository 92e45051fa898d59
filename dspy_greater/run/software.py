"""Which versions of what a run depends on are installed; nothing is imported for that."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from dspy_greater import __version__

_PACKAGES = ("dspy", "torch", "transformers", "tokenizers")


def installed() -> dict[str, str]:
    """Version by name, of Python and of the packages that are installed.

    Example:
        >>> sorted(installed())[:2]
        ['dspy', 'dspy_greater']
    """
    found = {"dspy_greater": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
