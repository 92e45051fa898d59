"""What each of two processes does that divide tiny models among themselves; results go into files."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dspy_greater.errors import WorkerLostError
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Leaf, TokenQuery
from dspy_greater.workers.fsdp import LockstepRunner, join
from dspy_greater.workers.jobs import Job, JobRunner, Opening
from tests.tiny_models import numbered_tokenizer, tiny_model

CPU, VOCABULARY, SECONDS = torch.device("cpu"), 64, 120.0
KINDS: tuple[Any, ...] = ("llama", "gemma2")


def engine_of(kind: Any) -> Engine:
    model = tiny_model(kind, VOCABULARY, layers=3, intermediate_size=65)  # 65 rows do not halve
    return Engine(model, numbered_tokenizer(VOCABULARY), name=kind, max_batch_tokens=300)


def jobs_of(engine: Engine) -> list[Job]:
    """Every kind of job, with and without an opening, with one leaf and with a leaf a row."""
    draw = torch.Generator().manual_seed(0)
    alike = torch.randint(3, VOCABULARY, (80,), generator=draw).tolist()
    rows = tuple((*alike, *torch.randint(3, VOCABULARY, (4 + 3 * n,), generator=draw).tolist()) for n in range(8))
    asked = tuple(TokenQuery(row, at, 1.0, 0.3 - row) for row in range(8) for at in (70, 81, len(rows[row]) - 1))
    opening = Opening(tuple(alike[:20]), 8, max(map(len, rows)))
    one, each = engine.embed([5]), engine.embed([5, 6, 7, 8, 9, 10, 11, 12])
    return [
        Job("next", rows),
        Job("logprobs", rows, asked),
        Job("logprobs", rows, asked, opening=opening),
        Job("gradient", rows, asked, Leaf((10,) * 8, one)),  # through the keys and values of what the rows share
        Job("gradient", rows, asked, Leaf((22,) * 8, one), opening),
        Job("gradient", rows, asked, Leaf((22,) * 8, each), opening),
    ]


def short_of_memory(engine: Engine) -> None:
    """From now on no pass of more than two rows fits, forwards in one layer and backwards in another."""

    def refuse(*given: Any) -> None:
        if given[-1][0].shape[0] > 2:
            raise torch.OutOfMemoryError("out of memory")

    def refuse_gradient(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: refuse((gradient,)))

    layers = engine.model.model.layers
    layers[1].mlp.register_forward_pre_hook(lambda module, inputs: None if inputs[0].requires_grad else refuse(inputs))
    layers[1].mlp.register_forward_hook(refuse_gradient)


def answers_of(runner: Any, jobs: list[Job]) -> list[Any]:
    """The bits of each answer, and what it took."""
    found = [runner.run(job) for job in jobs]
    return [(each.values.numpy().tobytes(), each.spent, each.opened) for each in found]


def divided(kind: Any, control: Any) -> dict[str, Any]:
    """What the whole weights come to, and then their parts."""
    engine, starved = engine_of(kind), engine_of(kind)
    jobs = jobs_of(engine)
    whole, counts = answers_of(JobRunner(engine), jobs), sizes_of(engine)
    short_of_memory(starved)
    halved = answers_of(JobRunner(starved), jobs)
    runner = LockstepRunner(engine, CPU, control)
    runner.check()
    found = {"whole": whole, "counts": counts, "halved": halved, "here": sizes_of(engine)}
    found |= {"divided": answers_of(runner, jobs), "backwards": answers_of(runner, jobs[::-1])[::-1]}
    short_of_memory(engine)
    return found | {"starved": answers_of(runner, jobs), "identities": {engine_of(kind).identity, runner.identity}}


def sizes_of(engine: Engine) -> dict[str, int]:
    """How many numbers of each parameter are in this process."""
    named = engine.model.named_parameters()
    return {name: (each.to_local() if hasattr(each, "to_local") else each).numel() for name, each in named}


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    control = join(store, rank, 2, device=CPU, seconds=SECONDS)
    found: dict[str, Any] = {kind: divided(kind, control) for kind in KINDS}
    impatient = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    runner = LockstepRunner(engine_of("llama"), CPU, impatient)
    found["apart"] = said_of(runner, Job("next", ((3, 4, 5 + rank),)))
    if rank == 0:
        found["alone"] = said_of(runner, Job("next", ((3, 4, 5),)))
        store.set("done", "")
    store.wait(["done"])
    torch.save(found, folder / f"{rank}.pt")


def said_of(runner: LockstepRunner, job: Job) -> str:
    try:
        return repr(runner.run(job))
    except WorkerLostError as error:
        return str(error)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
