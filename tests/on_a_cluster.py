"""One small search, in a process of its own; its journal is what others are compared with."""

from __future__ import annotations

import sys
from pathlib import Path

from test_workers import hiring, searched

from dspy_greater.errors import WorkerError

HERE, ALONE = "here", "alone"  # one worker in this process, and none


def main(where: str, folder: Path) -> None:
    workers = {HERE: hiring(1), ALONE: None}.get(where, where)
    try:
        searched(workers, folder, steps=2)
    except WorkerError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
