"""What a run will take, before it is begun: tokens, hours of the device, memory. Arithmetic on what a config states.

Nothing is loaded. The rates are the config's own statement about a device, and its comment says where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from dspy_greater.errors import SettingsError

if TYPE_CHECKING:
    from benchmarks.harness.config import RunConfig

_CONTENDERS = 5  # that meet on the dev split at most: the seed, what was returned, three that were recorded
_ACTIVATIONS = 34  # bytes a token, layer and unit of width that a backward pass needs; Korthikanti et al. 2022, table 2
_TOGETHER = 4096  # tokens that a gradient goes through at a time
_GIGABYTE = 1e9
_HOUR = 3600.0


@dataclass(frozen=True)
class Plan:
    """A model on a device, as a config states it under `plan:`.

    Attributes:
        device: in words.
        parameters: of the model.
        layers: of the model.
        width: of its hidden states.
        kv_width: of the keys of a token in one layer; the values are as wide.
        reads: tokens a second that the device reads in a batch.
        writes: tokens a second that it writes, all rows of a batch together.
        prompt: tokens of a row's prompt.
        written: tokens that the model writes for a row.
        bytes_a_number: of weights and states.
        rows: of each split, (train, dev, test).
    """

    device: str
    parameters: float
    layers: int
    width: int
    kv_width: int
    reads: float
    writes: float
    prompt: int
    written: int
    bytes_a_number: int = 2
    rows: tuple[int, int, int] = (50, 100, 100)

    @classmethod
    def of(cls, stated: Mapping[str, Any]) -> Plan:
        """The plan that a config states.

        Raises:
            SettingsError: a name that means nothing here, or one that is missing.
        """
        names = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if strangers := sorted(set(stated) - names):
            raise SettingsError(f"plan has {', '.join(strangers)}; it takes {', '.join(sorted(names))}.")
        if missing := sorted(needed - set(stated)):
            raise SettingsError(f"plan lacks {', '.join(missing)}.")
        return cls(**{**stated, "rows": tuple(stated.get("rows", cls.rows))})

    def judging(self, config: RunConfig, cells: int) -> tuple[int, int]:
        """Tokens read and written by judging so many cells at most; the seed's test is shared by a task's cells."""
        _, dev, test = (min(size, config.limit or size) for size in self.rows)
        runs = cells * (_CONTENDERS * dev + test) + len(config.tasks) * len(config.seeds) * test
        return runs * self.prompt, runs * self.written

    def hours(self, config: RunConfig, cells: int) -> tuple[float, float]:
        """Hours, where optimizers do nothing but read, and where they do nothing but write."""
        read, written = self.judging(config, cells)
        after = read / self.reads + written / self.writes
        charged = cells * config.budget
        return (charged / self.reads + after) / _HOUR, (charged / self.writes + after) / _HOUR

    def memory(self, threads: int) -> dict[str, float]:
        """Bytes of weights, of the states of so many rows, and of a gradient."""
        states = 2 * self.layers * self.kv_width * self.bytes_a_number * (self.prompt + self.written)
        return {
            "weights": self.parameters * self.bytes_a_number,
            f"states of {threads} rows": states * threads,
            "a gradient": float(_ACTIVATIONS * self.layers * self.width * _TOGETHER),
        }


def told(config: RunConfig, cells: int) -> Iterator[str]:
    """What so many cells take at most, in lines; of a config without a plan the tokens alone."""
    yield f"{cells} cells to run, at most {cells * config.budget:,} charged tokens for the optimizers"
    if not config.plan:
        return
    plan = Plan.of(config.plan)
    read, written = plan.judging(config, cells)
    yield f"judging: at most {read:,} tokens read and {written:,} written"
    least, most = plan.hours(config, cells)
    yield (
        f"{plan.device}, at {plan.reads:,.0f} tokens/s read and {plan.writes:,.0f} written: {least:,.0f} hours if "
        f"optimizers only read, {most:,.0f} if they only write"
    )
    parts = plan.memory(config.threads)
    shown = ", ".join(f"{what} {size / _GIGABYTE:.1f} GB" for what, size in parts.items())
    yield f"memory: {sum(parts.values()) / _GIGABYTE:.0f} GB ({shown})"
