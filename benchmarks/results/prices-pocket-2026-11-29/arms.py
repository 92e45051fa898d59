"""The arms of this comparison: `python -m arms run ...` is `python -m benchmarks run ...` with them."""

from __future__ import annotations

import sys

from benchmarks.__main__ import main
from benchmarks.optimizers.greater import Greater
from benchmarks.optimizers.optimizer import OPTIMIZERS


class Old(Greater):
    """As before: 8 reasonings for 3 candidates at 3 positions, single tokens."""

    name = "greater-old"
    defaults = {"auto": None, "replayed": 8, "forecasts": 3, "phrases": 0, "written": 0, "forecast_share": 0}


class Gates(Greater):
    """The look ahead bounded by its price, single tokens."""

    name = "greater-gates"
    defaults = {"auto": None, "phrases": 0, "written": 0}


class New(Greater):
    """The defaults."""

    name = "greater-new"
    defaults = {"auto": None}


if __name__ == "__main__":
    OPTIMIZERS.update({each.name: f"arms:{each.__name__}" for each in (Old, Gates, New)})
    sys.exit(main(sys.argv[1:]))
