"""`python -m benchmarks ls`: the tasks and the optimizers that there are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dspy_greater.errors import SettingsError


def main(argv: Sequence[str]) -> int:
    """Print both lists; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ls", description=__doc__)
    parser.parse_args(argv)
    from benchmarks import optimizers
    from benchmarks.tasks import registry

    listed = registry.about_all()
    lines = ["tasks", *_table(listed), "", "optimizers", *_table({name: _about(name) for name in optimizers.names()})]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _about(name: str) -> str:
    from benchmarks.optimizers import make

    try:
        return make(name).about
    except SettingsError as error:
        return str(error)


def _table(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries)) + 2
    return [f"  {name:{width}}{about}" for name, about in entries.items()]
