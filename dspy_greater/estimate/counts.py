"""From what a probe measured to what a search costs: every part of a step, counted from the settings.

A part is counted as `search.default_step` and `search.paper_step` do it. What steps do only sometimes (exploring,
edits that are all known) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspy_greater.estimate.probe import Measured, prompt_lengths
from dspy_greater.estimate.reasoned import Reasoned
from dspy_greater.run.estimate import Cost
from dspy_greater.search.default_step import TRIAL_ROWS
from dspy_greater.search.phrases import LONGEST
from dspy_greater.search.prices import KINDS, Glance, affordable_glance
from dspy_greater.search.written import asked_for
from dspy_greater.settings import Settings
from dspy_greater.stats import mean

_ASKING = 0.5  # of steps ask for whole instructions where neither kind pays more
_BETTER = 0.5  # how likely the best of the whole instructions on a few rows goes on to the others
_DRAFTED = 0.7  # of the decoding steps are left where earlier rows are drafts,
_IN_VAIN = 0.5  # of which so much is read in vain
_WORTH_SHARING = 256  # tokens: what sequences have alike behind an edit is differentiated once where that saves so many


@dataclass(frozen=True)
class Sizes:
    """How many rows and candidates; `selections` is μ, and `price` that of a written token in tokens read."""

    settings: Settings
    train_rows: int
    validation_rows: int
    selections: int
    price: float
    looks_ahead: bool  # the default variant's step


@dataclass(frozen=True)
class Counts:
    """What the parts of one search cost, if reasoning is as long as `reasoned`."""

    sizes: Sizes
    measured: Measured
    reasoned: Reasoned

    def seed(self) -> Cost:
        """The evaluation of the instruction that the search begins with."""
        return self.evaluated(1, drafted=1.0)

    def validation(self) -> Cost:
        """The finalists and the seed on the validation rows."""
        instructions = self.sizes.settings.finalists + 1
        return self._runs(instructions, self.sizes.validation_rows, drafted=1.0)

    def step(self) -> Cost:
        """A step, on the mean over its kinds."""
        settings = self.sizes.settings
        if not self.sizes.looks_ahead:
            return self._proposed() + self._differentiated(1, 1, self.sizes.train_rows) + self._tried()
        seen = self._glance()
        usual = self._looked(seen) + self._tried()
        if not settings.written:
            return usual
        return (1.0 - _ASKING) * usual + _ASKING * self._rewritten()

    def evaluated(self, instructions: float, drafted: float = _DRAFTED) -> Cost:
        """Instructions with reasoning of their own on all training rows, and the losses."""
        return self._scored(instructions, self.sizes.train_rows, drafted)

    def _scored(self, instructions: float, on: float, drafted: float = _DRAFTED) -> Cost:
        rows = instructions * on
        drafts = 0.0 if self.measured.served or drafted == 1.0 else _IN_VAIN * self._generated()
        read = rows * (self.measured.loss_read + drafts)
        return self._runs(instructions, on, drafted) + Cost(read=read, seconds=self._reading(read))

    def _tried(self) -> Cost:
        return self.evaluated(self.sizes.selections)

    def _runs(self, instructions: float, rows: float, drafted: float) -> Cost:
        """The program on rows, under so many instructions at once."""
        measured, speed, runs = self.measured, self.measured.speed, instructions * rows
        shared, own = prompt_lengths(self.reasoned.runs)
        read = 0.0 if measured.served else instructions * shared + runs * own * measured.calls
        written = runs * self.reasoned.written
        at_once = self.sizes.settings.num_threads if measured.served else runs
        seconds = runs * measured.run_seconds / (at_once if measured.served else 1)
        seconds += measured.metric_seconds * math.ceil(runs / max(1, at_once))
        if not measured.served:
            seconds += speed.read * read + drafted * speed.writing(runs, self.reasoned.longest, written)
        return Cost(runs, read, 0.0, written, seconds)

    def _glance(self) -> Glance:
        sizes, found = self.sizes, self.reasoned.runs
        runs = [found[row % len(found)] for row in range(sizes.train_rows)] if found else []
        return affordable_glance(sizes.settings, sizes.selections, runs, sizes.price)

    def _own(self) -> float:
        """Tokens of a reasoning that it does not share with others: input, reasoning, gold answer."""
        _, own = prompt_lengths(self.reasoned.runs)
        return own + self._generated() + self.measured.gold

    def _generated(self) -> float:
        """Of a reasoning, tokens that the model wrote."""
        return mean([float(len(written)) for _, written in self.reasoned.runs] or [0.0])

    def _looked(self, seen: Glance) -> Cost:
        """Edits, slopes and forecasts at the positions ahead."""
        found = seen.positions * (self._proposed() + self._phrased())
        if seen.reasonings and seen.slopes:
            found += self._differentiated(seen.positions, KINDS, seen.reasonings)
        return found + self._forecast(seen, seen.positions, seen.candidates)

    def _rewritten(self) -> Cost:
        """Whole instructions are written, and reason on a few rows; the best of them may reason on the others."""
        rows, wanted = self.sizes.train_rows, self.sizes.settings.written
        usable = min(wanted, asked_for(wanted) * self.measured.asked.usable)
        trial = min(TRIAL_ROWS, rows)
        return self._asked() + self._scored(usable, trial) + min(usable, _BETTER) * self._scored(1, rows - trial)

    def _asked(self) -> Cost:
        """Whole instructions, written by the model."""
        requests, asked, speed = asked_for(self.sizes.settings.written), self.measured.asked, self.measured.speed
        read, written = requests * asked.read, requests * asked.written
        seconds = speed.read * read + speed.writing(requests, asked.longest, written)
        return Cost(0, read, 0.0, written, seconds)

    def _proposed(self) -> Cost:
        """Equations 3 and 4: one pass over the distinct contexts of all draws."""
        settings, rows = self.sizes.settings, self.sizes.train_rows
        sample = min(settings.proposal_rows, rows)
        distinct = rows * (1.0 - (1.0 - sample / rows) ** settings.proposal_draws)
        read = distinct * self.measured.context
        return Cost(read=read, seconds=self._reading(read) + self.measured.edit_seconds)

    def _phrased(self) -> Cost:
        """Phrases: a context is continued, and the others say how likely that is."""
        settings, speed = self.sizes.settings, self.measured.speed
        if not settings.phrases:
            return Cost()
        written = settings.phrases * LONGEST
        others = max(1, min(settings.proposal_rows, self.sizes.train_rows - 1))
        read = self.measured.context + settings.phrases * others * (self.measured.context + LONGEST)
        seconds = self._reading(read) + speed.writing(settings.phrases, LONGEST, written)
        return Cost(0, read, 0.0, written, seconds)

    def _differentiated(self, positions: int, kinds: int, sequences: float) -> Cost:
        tail = self.measured.tail
        alike = tail if tail * (sequences - 1) >= _WORTH_SHARING else tail * sequences
        tokens = positions * kinds * (sequences * self._own() + alike)
        return Cost(differentiated=tokens, seconds=self.measured.speed.differentiate * tokens)

    def _forecast(self, seen: Glance, positions: int, candidates: int) -> Cost:
        """The current instruction once, and each candidate as long as it is in the race."""
        if not candidates or not self.sizes.settings.forecasts:
            return Cost()
        beginnings = sum(kept for kept, _ in seen.rounds(candidates))
        readings = positions * seen.forecasts(candidates) + seen.reasonings
        read = readings * self._own() + positions * beginnings * self.measured.tail
        return Cost(read=read, seconds=self._reading(read))

    def _reading(self, tokens: float) -> float:
        return self.measured.speed.read * tokens


def peak_bytes(counts: Counts, max_batch_rows: int, max_batch_tokens: int) -> int:
    """What is in use already, and the larger of the states of a batch that writes and of a backward pass."""
    speed, rows = counts.measured.speed, counts.sizes.train_rows * max(1, counts.sizes.selections)
    together = max(rows, counts.sizes.validation_rows * (counts.sizes.settings.finalists + 1))
    shared, own = prompt_lengths(counts.reasoned.runs)
    states = min(together, max_batch_rows) * (shared + own + counts.reasoned.longest) * speed.state_bytes
    backward = min(max_batch_tokens, counts.sizes.settings.replayed * counts._own()) * speed.gradient_bytes
    return round(counts.measured.resident_bytes + max(states, backward))
