"""What looking ahead may cost: gradients and forecasts of a step, against the runs that they are made for.

Reading a token, differentiating through it and writing one cost differently on each kind of device. A list of prices
is stated, and tokens are counted; no clock has a say, so that a search can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspy_greater.model.engine import Engine
from dspy_greater.model.kv_cache import shared_length
from dspy_greater.search.step import StepContext
from dspy_greater.settings import Settings
from dspy_greater.stats import mean

# In tokens read. A CPU computes what it reads; an accelerator waits for the weights with every token that it writes.
_WRITE_ON_A_CPU, _WRITE_ON_AN_ACCELERATOR = 4.0, 32.0
_DIFFERENTIATE = 3.0  # a forward pass, and a backward pass of twice its work
KINDS = 2  # of edits that have slopes, each with a pass of its own
_FEWEST = 4  # reasonings from which anything is told


@dataclass(frozen=True)
class Glance:
    """How far a step looks ahead.

    Attributes:
        positions: at which edits are proposed and ranked.
        candidates: of a position that pass from the gradient to forecasts.
        reasonings: that gradients go through, and that the forecasts of the last candidates read.
        races: whether most candidates are forecast from fewer reasonings.
        slopes: whether a gradient ranks the edits before some of them are forecast.
        selections: how many of them will be tried, which stay in the race to its end.
    """

    positions: int
    candidates: int
    reasonings: int
    races: bool
    slopes: bool = True
    selections: int = 1

    def rounds(self, candidates: int) -> tuple[tuple[int, int], ...]:
        """Successive halving: how many candidates are still forecast, and from how many reasonings.

        >>> Glance(1, 8, 16, races=True).rounds(8)
        ((8, 4), (4, 8), (2, 16))
        """
        if not self.races:
            return ((candidates, self.reasonings),)
        few, least = max(2, self.reasonings // 4), min(candidates, self.selections)
        half, quarter = max(least, -(-candidates // 2)), max(least, -(-candidates // 4))
        stages = ((candidates, few), (half, 2 * few), (quarter, self.reasonings))
        return tuple((kept, min(read, self.reasonings)) for kept, read in stages)

    def forecasts(self, candidates: int) -> int:
        """Readings of a reasoning that so many candidates' forecasts take, the current instruction's left out.

        >>> Glance(1, 8, 16, races=True).forecasts(8)
        64
        """
        readings, done = 0, 0
        for kept, count in self.rounds(candidates):
            readings += kept * max(0, count - done)
            done = max(done, count)
        return readings


def write_price(engine: Engine, settings: Settings) -> float:
    """What writing a token costs, in tokens read: as set, or as the list has it for the kind of device."""
    if settings.write_price is not None:
        return settings.write_price
    return _WRITE_ON_A_CPU if engine.weights.device.type == "cpu" else _WRITE_ON_AN_ACCELERATOR


def glance(at: StepContext, selections: int) -> Glance:
    """As far as the settings allow, and as the price of the step's runs pays for."""
    runs = at.evaluator.generated(at.current)
    return affordable_glance(at.settings, selections, runs, write_price(at.evaluator.engine, at.settings))


def affordable_glance(
    settings: Settings, selections: int, runs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], price: float
) -> Glance:
    """How far a step looks whose instruction has these `runs`, prompts and what was written after each.

    `selections` is μ, `price` that of a token written. Positions are given up first, then the gradient, which costs six
    forecasts a position whatever the number of edits, then candidates; reasonings down to four before any of them.
    """
    # Without forecasts there is nothing to compare positions by.
    ahead = settings.positions_ahead if settings.forecasts else 1
    most = Glance(ahead, settings.forecasts, settings.replayed, races=False, selections=selections)
    if not settings.forecast_share or not runs:
        return most
    affordable = settings.forecast_share * selections * _readings_for(runs, price)
    if affordable >= _cost(most):
        return most
    ladder = [(positions, most.candidates, True) for positions in range(most.positions, 0, -1)]
    ladder += [(1, candidates, False) for candidates in range(most.candidates, min(2, most.candidates) - 1, -1)]
    fewest = min(_FEWEST, most.reasonings)
    looks = [
        Glance(positions, candidates, reasonings, races=True, slopes=slopes, selections=selections)
        for positions, candidates, slopes in ladder
        for reasonings in range(most.reasonings, fewest - 1, -1)
    ]
    return next((seen for seen in looks if _cost(seen) <= affordable), looks[-1])


def _readings_for(runs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], price: float) -> float:
    """How many reasonings can be read for the price of one instruction's runs on all rows.

    What all prompts begin with is read once, and is left out on both sides.
    """
    shared = shared_length([prompt for prompt, _ in runs]) if len(runs) > 1 else 0
    read = [len(prompt) - shared for prompt, _ in runs]
    written = [len(generated) for _, generated in runs]
    one = mean([before + behind for before, behind in zip(read, written, strict=True)])
    return (sum(read) + price * sum(written)) / max(one, 1.0)


def _cost(seen: Glance) -> float:
    """In reasonings read: gradients, forecasts, and the current instruction once."""
    slopes = KINDS * _DIFFERENTIATE * seen.reasonings if seen.slopes else 0.0
    return seen.positions * (slopes + seen.forecasts(seen.candidates)) + seen.reasonings
