"""`python -m benchmarks run`: optimizers on tasks, each cell appended to OUT/cells.jsonl as it finishes.

    python -m benchmarks run --tasks bbh:navigate,pocket:web_of_lies --optimizers greater,miprov2 --budget small \\
        --data-dir DIR --out runs/x

A run that was killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

# A hub that cannot be reached should not hold up a run; read when the hub's client is imported.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "3")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from dspy_greater.errors import GreaterError

if TYPE_CHECKING:
    from benchmarks.harness.config import RunConfig


def main(argv: Sequence[str]) -> int:
    """Run the cells: 0 when all of them succeeded, 1 when some failed, 2 for settings that cannot work."""
    from benchmarks.harness import config

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config.add_flags(parser)
    flags = parser.parse_args(argv)
    stream = sys.stdout  # optimizers' own output is redirected while they run; progress is not

    def say(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    try:
        settings = config.from_flags(flags)
        if settings.dry_run:
            return _dry_run(settings, say)
        from benchmarks.harness.run import run_all

        failed = run_all(settings, say)
    except GreaterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; the same command goes on from the last finished cell.\n")
        return 130
    say(f"{settings.out / 'cells.jsonl'}: {len(settings.keys())} cells, {failed} failed in this run")
    return 1 if failed else 0


def _dry_run(settings: RunConfig, say: Callable[[str], None]) -> int:
    """Say of every cell whether it would be run; an optimizer that cannot be loaded is found here as well."""
    from benchmarks.harness.cells import FILE, read
    from benchmarks.harness.plan import told
    from benchmarks.optimizers import make

    finished = {cell.key: cell for cell in read(settings.out / FILE)}
    for name in settings.optimizers:
        make(name)
    left = 0
    for key in settings.keys():
        known = finished.get(key)
        again = known is not None and known.error is not None and settings.retry_errors
        state = "to run" if known is None or again else "failed before" if known.error else "finished"
        left += state == "to run"
        say(f"{key.text}, {key.model}, {key.proposer}, {key.budget:,} tokens: {state}")
    for line in told(settings, left):
        say(line)
    return 0
