"""The benchmarks' command line: `python -m benchmarks NAME ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

# name -> (module with a `main(argv)` that returns the exit code, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "ls": ("benchmarks.harness.list_command", "which tasks and optimizers there are"),
    "screen": ("benchmarks.harness.screen_command", "on which tasks an instruction matters to a model"),
    "run": ("benchmarks.harness.run_command", "optimizers on tasks, at equal budgets"),
    "status": ("benchmarks.harness.status_command", "how far a run is that goes on elsewhere"),
    "report": ("benchmarks.report.command", "tables and curves from the finished cells of a run"),
    "transfer": ("benchmarks.report.transfer_command", "instructions found on one model, evaluated on another"),
    "fidelity": ("benchmarks.fidelity.command", "do gradients and forecasts come true?"),
    "ablation": ("benchmarks.ablation.command", "what each part of the search is worth, at equal generated tokens"),
    "estimate": ("benchmarks.speed.estimate", "what a search was said to cost, and what it cost"),
    "speed": ("benchmarks.speed.command", "how fast one step of the search is, against rivals and the floor"),
    "workers": ("benchmarks.speed.workers", "how much faster a step reads on several workers than on one"),
}


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with; returns its exit code, 2 for one that is not known."""
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        said = f"There is no benchmark {name!r}." if name else "Which benchmark?"
        hint = f" Did you mean {close[0]!r}?" if close else ""
        sys.stderr.write(f"{said}{hint}\n{_usage()}")
        return 2
    return import_module(COMMANDS[name][0]).main(list(argv[1:]))


def _usage() -> str:
    listed = "\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())
    return f"usage: python -m benchmarks NAME [options]\n\n{listed}\n\npython -m benchmarks NAME --help says more.\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
