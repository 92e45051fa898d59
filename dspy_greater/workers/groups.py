"""Workers that are groups of Ray actors, among which the weights are divided: for a model that fits no single device.

Every actor of a group is given the same jobs in the same order; the first one's answers are the group's. No actor can
go on without the others, so that a group lives and dies as one.

Shapes: K processes of a group.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from dspy_greater.errors import WeightsError, WorkerLostError
from dspy_greater.model.engine import Engine
from dspy_greater.workers.fsdp import LockstepRunner, join, refuse_indivisible
from dspy_greater.workers.jobs import Answer, Job
from dspy_greater.workers.pool import Pool
from dspy_greater.workers.ray_actors import (
    START_SECONDS,
    Plan,
    Share,
    asked,
    end,
    hired,
    meant,
    not_started,
    refuse_others,
)

_COLLECTIVE_SECONDS = 300.0  # for a process to come to where the others are
_PLACING = ("device_map", "max_memory", "offload_buffers", "offload_folder")  # the group's own business


def hire(engine: Engine, workers: int | str, shards: int) -> Pool:
    """A pool of groups over the weights of an engine.

    Args:
        engine: the weights in this process.
        workers: how many groups; or as `ray_actors.hire` takes it.
        shards: processes of a group, K.

    Raises:
        MissingExtraError: Ray is not installed.
        WorkerError: the cluster does not answer, or has no room for them.
        WeightsError: an actor found other weights, or they cannot be divided.
    """
    refuse_indivisible(engine)
    if engine.origin is None and getattr(engine.model, "hf_device_map", None):
        raise WeightsError(
            f"The weights of {engine.name!r} were handed in as objects that are spread over devices, which cannot be "
            "sent to a group of processes. Pass weights=(name or path, options), which each of them loads."
        )
    return hired(engine, workers, shards, _started, _ready)


class RayGroup:
    """A `Worker` that is a group of actors; `pids` are their processes on their machines."""

    def __init__(self, actors: Sequence[Any], room: Any) -> None:
        self.actors, self._room = list(actors), room
        self.device, self.pids = "", ()

    def joined(self, devices: Sequence[str], pids: Sequence[int]) -> RayGroup:
        """Itself, once its actors are ready."""
        self.device, self.pids = "+".join(sorted(set(devices))), tuple(pids)
        return self

    def submit(self, job: Job) -> Future[Answer]:
        """See `Worker`."""
        future: Future[Answer] = Future()
        verdict = _Verdict(future, len(self.actors))
        for rank, actor in enumerate(self.actors):
            asked(actor, job).add_done_callback(partial(verdict.hear, rank))
        return future

    def close(self) -> None:
        """End all actors; they may be dead already."""
        import ray
        from ray.util import remove_placement_group

        room, self._room = self._room, None
        if room is None or not ray.is_initialized():
            return
        for actor in self.actors:
            end(actor)
        with suppress(ConnectionError):
            remove_placement_group(room)


class _Verdict:
    """What the actors of a group say of one job, put together; the answer is the first actor's."""

    def __init__(self, future: Future[Answer], count: int) -> None:
        self._future, self._count = future, count
        self._said: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()  # actors are heard in threads of Ray's

    def hear(self, rank: int, done: Future[Any]) -> None:
        """One of them is done. A lost one decides at once: the others would wait for it."""
        with self._lock:
            self._said[rank] = done
            if self._future.done():
                return
            error = done.exception()
            found = None if error is None else meant(error)
            if isinstance(found, WorkerLostError):
                self._future.set_exception(found)
            elif len(self._said) == self._count:
                self._settle([self._said[number].exception() for number in range(self._count)])

    def _settle(self, errors: Sequence[BaseException | None]) -> None:
        if not any(errors):
            self._future.set_result(self._said[0].result())
        elif errors[0] is not None and all(errors):
            self._future.set_exception(meant(errors[0]))
        else:
            first = next(error for error in errors if error is not None)
            self._future.set_exception(
                WorkerLostError(f"A process of a group failed, and others did not: {meant(first)}")
            )


class _Member:
    """What runs in each process of a group."""

    def __init__(self, plan: Plan, rank: int, share: Share) -> None:
        torch.set_num_threads(1)  # the same for any number of workers
        self._plan, self._rank, self._count = plan, rank, share.shards
        self._device = torch.device("cuda" if share.gpus else "cpu")
        self._store: TCPStore | None = None

    def open(self) -> tuple[str, int]:
        """Where the others find this one: the address of its machine, and a free port."""
        from ray.util import get_node_ip_address

        host = get_node_ip_address()
        self._store = store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, store.port

    def join(self, host: str, port: int) -> tuple[str, str, int]:
        """Load and divide the weights; their identity, the device, and the process.

        One after the other: at no time are the weights whole in more than one process.
        """
        patience = timedelta(seconds=START_SECONDS * self._count)
        store = self._store or TCPStore(host, port, is_master=False, timeout=patience)
        control = join(store, self._rank, self._count, device=self._device, seconds=_COLLECTIVE_SECONDS)
        if self._rank:
            store.wait([f"divided {self._rank - 1}"], patience)
        self._runner = LockstepRunner(self._plan.build("cpu"), self._device, control)
        store.set(f"divided {self._rank}", "")
        store.wait([f"divided {self._count - 1}"], patience)
        self._runner.check()
        on_gpu = self._device.type == "cuda"
        name = torch.cuda.get_device_name(self._device) if on_gpu else self._device.type
        return self._runner.identity, name, os.getpid()

    def run(self, job: Job) -> Answer | None:
        answer = self._runner.run(job)
        return answer if self._rank == 0 else None


def _started(plan: Plan, share: Share) -> RayGroup:
    """A group for which room is asked, and whose actors begin as soon as there is room for all of them."""
    import ray
    from ray.util import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    own = replace(plan, options={key: value for key, value in plan.options.items() if key not in _PLACING})
    taken = {"CPU": share.cpus, "GPU": share.gpus}
    room = placement_group([{key: value for key, value in taken.items() if value}] * share.shards, strategy="PACK")
    kind: Any = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0)(_Member)
    group = RayGroup([], room)
    try:
        for rank in range(share.shards):
            place = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=rank)
            group.actors.append(kind.options(scheduling_strategy=place).remote(own, rank, share))
    except BaseException:
        group.close()
        raise
    return group


def _ready(group: RayGroup, share: Share, engine: Engine) -> RayGroup:
    """The group, once its actors hold their parts of the same weights."""
    import ray
    from ray.exceptions import RayError

    actors, until = group.actors, time.monotonic() + START_SECONDS * share.shards
    try:
        address = ray.get(actors[0].open.remote(), timeout=START_SECONDS * share.shards)
        asked = [actor.join.remote(*address) for actor in actors]
        waiting = list(asked)
        while waiting:  # whoever fails is heard at once: the others would wait for it
            done, waiting = ray.wait(waiting, timeout=max(0.0, until - time.monotonic()))
            ray.get(done or waiting, timeout=0)
        found = ray.get(asked)
    except (RayError, ConnectionError) as error:
        raise not_started(error, share, engine) from error
    for identity, _, _ in found:
        refuse_others(identity, engine)
    return group.joined([device for _, device, _ in found], [pid for *_, pid in found])
