"""Workers that are Ray actors: on this machine, or on those of a cluster.

Each loads the weights as this process did (or is sent them, where they were handed in as objects) and has to come to
the same identity. An actor takes one GPU where there are enough, and else one CPU and one thread: what a worker
computes must not depend on how many there are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from dspy_greater.errors import GreaterError, WeightsError, WorkerError, WorkerLostError
from dspy_greater.model.engine import Engine
from dspy_greater.workers.cluster import cut_off, first_line, joined, refuse_without_ray
from dspy_greater.workers.jobs import Answer, Job, JobRunner
from dspy_greater.workers.pool import Pool, Worker

START_SECONDS = 900.0  # for loading weights, and for a cluster that is busy
_MOST_ON_CPUS = 8  # that "auto" starts where there is no GPU: each holds the weights
_LOG = logging.getLogger(__name__)
Started = TypeVar("Started", bound=Worker)


def hire(engine: Engine, workers: int | str) -> Pool:
    """A pool of actors over the weights of an engine.

    Args:
        engine: the weights in this process.
        workers: how many; "auto" for one a GPU, or one a CPU (at most 8) where there is none; or the address of
            a cluster, which is taken up in the same way. The cluster is the one that this process is connected to,
            or `RAY_ADDRESS` names; without either Ray is started here, and ended with the pool.

    Raises:
        MissingExtraError: Ray is not installed, or its client where the address needs it.
        WorkerError: the cluster does not answer, or has no room for them.
        WeightsError: an actor found other weights.
    """
    return hired(engine, workers, 1, _started, _ready)


def hired(
    engine: Engine,
    workers: int | str,
    shards: int,
    start: Callable[[Plan, Share], Started],
    ready: Callable[[Started, Share, Engine], Worker],
) -> Pool:
    """See `hire`; a worker takes `shards` processes, `start` begins one and `ready` waits for it.

    One that was begun is ended where it, or another, does not become ready: the cluster may be the caller's.
    """

    def crew(count: int) -> Sequence[Worker]:
        begun: list[Started] = []
        try:
            for _ in range(count):
                begun.append(start(plan, share))
            return [ready(handle, share, engine) for handle in begun]
        except BaseException:
            for handle in begun:
                handle.close()
            raise

    refuse_without_ray(workers)
    address = workers if isinstance(workers, str) and workers != "auto" else None
    leave = joined(address, workers if isinstance(workers, int) else 1)
    try:
        share = _share(engine, workers if isinstance(workers, int) else None, shards)
        plan = Plan.of(engine)
        found = crew(share.count)
    except BaseException:
        leave()
        raise
    _LOG.info("%d workers on %s", len(found), ", ".join(sorted({worker.device for worker in found})))
    return Pool(found, lambda: crew(1)[0], leave)


class RayWorker:
    """A `Worker` that is an actor; `pid` is its process on its machine."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.device, self.pid = actor, "", 0

    def joined(self, device: str, pid: int) -> RayWorker:
        """Itself, once its actor is ready."""
        self.device, self.pid = device, pid
        return self

    def submit(self, job: Job) -> Future[Answer]:
        """See `Worker`."""
        future: Future[Answer] = Future()

        def settle(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(meant(error))

        asked(self.actor, job).add_done_callback(settle)
        return future

    def close(self) -> None:
        """End the actor; it may be dead already."""
        end(self.actor)


@dataclass(frozen=True)
class Share:
    """How many workers, and what each of a worker's processes takes of the cluster."""

    count: int
    cpus: float
    gpus: int
    shards: int = 1  # processes of a worker


@dataclass(frozen=True)
class Plan:
    """How a process comes by the weights: as they were loaded here, or as objects."""

    name: str
    max_batch_rows: int
    max_batch_tokens: int
    loaded: dict[str, Any] | None
    objects: Any = None  # a reference to (model, tokenizer)
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, engine: Engine) -> Plan:
        import ray

        sizes = (engine.name, engine.max_batch_rows, engine.max_batch_tokens)
        if engine.origin is not None:
            return cls(*sizes, dict(engine.origin), None, dict(engine.load_options))
        return cls(*sizes, None, ray.put((engine.model, engine.tokenizer)))

    def build(self, device: str) -> Engine:
        """The engine; called where the actor lives."""
        if self.loaded is None:
            import ray

            model, tokenizer = ray.get(self.objects)
            engine = Engine(model.to(device), tokenizer, name=self.name, max_batch_rows=self.max_batch_rows)
        else:
            engine = Engine.from_pretrained(
                self.loaded["name_or_path"],
                device=device,
                dtype=self.loaded["dtype"],
                revision=self.loaded["revision"],
                max_batch_rows=self.max_batch_rows,
                **self.options,
            )
        engine.max_batch_tokens = self.max_batch_tokens
        return engine


class _Actor:
    """What runs in a process of its own."""

    def __init__(self, plan: Plan, gpus: int) -> None:
        torch.set_num_threads(1)  # the same for any number of workers
        self._runner = JobRunner(plan.build("cuda" if gpus else "cpu"))

    def about(self) -> tuple[str, str, int]:
        """The identity of the weights, the device, and the process."""
        engine = self._runner.engine
        device = engine.weights.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return engine.identity, name, os.getpid()

    def run(self, job: Job) -> Answer:
        return self._runner.run(job)


def _share(engine: Engine, count: int | None, shards: int) -> Share:
    """What each process takes of the cluster; `count` None: as many workers as there is room for."""
    import ray

    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), there.get("CPU", 0)
    if gpus >= (count or 1) * shards:
        return Share(count or gpus // shards, 0, 1, shards)
    on_gpus = engine.weights.device.type != "cpu" and (count is not None or shards > 1)
    if on_gpus or (shards > 1 and cpus < shards):
        asked = [f"workers={count}"] * (count is not None) + [f"shards={shards}"] * (shards > 1)
        room = f"{gpus} GPUs" if on_gpus else f"{cpus:g} CPUs"
        raise WorkerError(
            f"{', '.join(asked)}, and the cluster has {room}; each worker takes {'one' if shards == 1 else shards}. "
            "Give at most so many, or add machines."
        )
    if count is None:
        return Share(max(1, min(int(cpus), _MOST_ON_CPUS) // shards), min(1, cpus), 0, shards)
    processes = count * shards
    return Share(count, 1 if cpus >= processes else int(100 * cpus / processes) / 100, 0, shards)


def asked(actor: Any, job: Job) -> Future[Any]:
    """An actor's answer to a job, in Ray's own words."""
    try:
        return actor.run.remote(job).future()
    except ConnectionError as error:  # of Ray's client, which knows already that it was cut off
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed


def end(actor: Any) -> None:
    """End an actor; it may be dead already, or the cluster gone."""
    import ray

    if ray.is_initialized():
        with suppress(ConnectionError):
            ray.kill(actor)


def _started(plan: Plan, share: Share) -> RayWorker:
    """A worker whose actor begins to load the weights."""
    import ray

    kind = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0)(_Actor)
    return RayWorker(kind.remote(plan, share.gpus))


def _ready(worker: RayWorker, share: Share, engine: Engine) -> RayWorker:
    """The worker, once its weights are loaded and are the same."""
    import ray
    from ray.exceptions import RayError

    try:
        identity, device, pid = ray.get(worker.actor.about.remote(), timeout=START_SECONDS)
    except (RayError, ConnectionError) as error:
        raise not_started(error, share, engine) from error
    refuse_others(identity, engine)
    return worker.joined(device, pid)


def not_started(error: BaseException, share: Share, engine: Engine) -> GreaterError:
    """What is to be raised where Ray says that a worker could not start."""
    from ray.exceptions import GetTimeoutError

    if isinstance(error, GetTimeoutError):
        cpus, gpus = share.cpus * share.shards, share.gpus * share.shards
        return WorkerError(
            f"A worker did not start within {START_SECONDS * share.shards:.0f} seconds: the cluster has no room for "
            f"one with {cpus:g} CPUs and {gpus} GPUs, or loading the weights takes longer. `ray status` says which."
        )
    found = meant(error)
    if isinstance(found, GreaterError) and not isinstance(found, WorkerLostError):
        return found
    return WorkerError(
        f"A worker could not start: {found} It needs dspy-greater and the weights of {engine.name!r} on its machine."
    )


def refuse_others(identity: str, engine: Engine) -> None:
    """Raise `WeightsError` where a worker's weights are not those of this process."""
    if engine.origin is None or identity == engine.identity:
        return
    raise WeightsError(
        f"A worker loaded {identity!r}, and this process has {engine.identity!r}: the weights were changed since "
        "they were loaded, or its machine has others under that name. Pass weights=(model, tokenizer), which are "
        "sent as they are."
    )


def meant(error: BaseException) -> BaseException:
    """What an error of Ray's stands for: the job's own, or that the actor or the cluster is gone."""
    from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error
    if isinstance(error, (RayActorError, ObjectLostError)):
        return WorkerLostError(f"{first_line(error).rstrip('.')}.")
    return cut_off(error) if isinstance(error, ConnectionError) else error
