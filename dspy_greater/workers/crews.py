"""What `workers=` means, and who holds the workers while a program is optimised."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from dspy_greater.errors import SettingsError
from dspy_greater.scalars import plain_scalar

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine
    from dspy_greater.model.interface import Model
    from dspy_greater.workers.pool import Pool

Workers = int | str
Hire = Callable[["Engine"], "Pool"]

AUTO = "auto"


def checked_workers(workers: Any) -> Workers | Hire | None:
    """`workers=` of an optimizer: None, a number, "auto", the address of a cluster, or a function of one's own.

    Raises:
        SettingsError: it is none of these.
        MissingExtraError: Ray is asked for and not installed, or its client where the address needs it.

    >>> checked_workers(None), checked_workers(lambda engine: ...) is None
    (None, False)
    """
    found: Any = plain_scalar(workers)
    if found is None:
        return None
    if callable(found) and not isinstance(found, type):
        return cast("Hire", found)
    number = isinstance(found, int) and not isinstance(found, bool) and found >= 1
    if not number and not (isinstance(found, str) and found.strip()):
        raise SettingsError(
            f"workers={workers!r}: give a whole number of at least 1, 'auto', the address of a Ray cluster (such as "
            "'ray://head:10001'), or None for this process alone."
        )
    from dspy_greater.workers.cluster import refuse_without_ray

    refuse_without_ray(found)
    return found


def checked_shards(shards: Any, workers: Workers | Hire | None) -> int:
    """`shards=` of an optimizer: over how many processes each worker divides the weights; None: one.

    Args:
        shards: what was given.
        workers: as `checked_workers` returns it.

    Raises:
        SettingsError: it is no number, or there are no workers, or they come from a function of one's own.

    >>> checked_shards(None, None), checked_shards(2, "auto")
    (1, 2)
    """
    found: Any = plain_scalar(shards)
    if found is None:
        return 1
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise SettingsError(
            f"shards={shards!r}: give a whole number of at least 1, the processes over which each worker divides the "
            "weights."
        )
    if found > 1 and workers is None:
        raise SettingsError(f"shards={found} divides the weights of workers, and there are none: write workers=1, too.")
    if found > 1 and callable(workers):
        raise SettingsError(
            f"shards={found}, and workers= is a function, which hires what it likes: write workers=1 or 'auto', or "
            "leave shards out."
        )
    return found


class Crews:
    """The workers of one run: a pool at a time, over the weights that are asked for.

    Args:
        workers: as `checked_workers` returns it.
        shards: as `checked_shards` returns it.

    >>> with Crews(None) as crews:
    ...     crews.model("an engine")
    'an engine'
    """

    def __init__(self, workers: Workers | Hire | None, shards: int = 1) -> None:
        self._workers, self._shards = workers, shards
        self._engine: Engine | None = None
        self._pool: Pool | None = None

    def model(self, engine: Engine) -> Model:
        """The model over these weights; workers over others are closed first.

        Raises:
            WorkerError: the workers could not be started.
            WeightsError: they found other weights.
        """
        if self._workers is None:
            return engine
        from dspy_greater.workers.sharded import ShardedModel

        if self._pool is None or self._engine is not engine:
            self.close()
            self._pool, self._engine = self._hired(engine, self._workers), engine
        return ShardedModel(engine, self._pool)

    def close(self) -> None:
        """End the workers."""
        pool, self._pool, self._engine = self._pool, None, None
        if pool is not None:
            pool.close()

    def __enter__(self) -> Crews:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hired(self, engine: Engine, workers: Workers | Hire) -> Pool:
        if callable(workers):
            return workers(engine)
        if self._shards > 1:
            from dspy_greater.workers.groups import hire as hire_groups

            return hire_groups(engine, workers, self._shards)
        from dspy_greater.workers.ray_actors import hire

        return hire(engine, workers)
