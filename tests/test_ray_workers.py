"""Workers that are real Ray actors find what workers in this process find; skipped, visibly, where Ray is missing."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_marks import MARKS
from test_workers import lines_of, queries_of, searched, sequences_of

from dspy_greater.errors import WeightsError, WorkerError
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Leaf
from dspy_greater.workers import ray_actors
from dspy_greater.workers.in_process import in_process
from dspy_greater.workers.jobs import Job
from dspy_greater.workers.pool import Pool
from dspy_greater.workers.sharded import ShardedModel
from tests.tiny_models import numbered_tokenizer, tiny_model

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'dspy-greater[ray]'")

pytestmark = MARKS


def bits(model: Any, engine: Engine) -> list[bytes]:
    sequences = sequences_of()
    asked = queries_of(sequences)
    found = (
        model.token_logprobs(sequences, asked),
        model.logprob_gradient(sequences, asked, Leaf((20,) * 9, engine.embed([5]))),
        model.next_token_logprobs(sequences),
    )
    return [each.numpy().tobytes() for each in found]


# Before the fixture starts a cluster, which this process would be in.
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
def test_a_cluster_that_does_not_answer_is_an_error_that_says_the_address(address: str) -> None:
    engine = Engine(tiny_model("llama", 64), numbered_tokenizer(64), name="tiny")
    with pytest.raises(WorkerError, match=f"No Ray cluster answers at '{re.escape(address)}'"):
        ray_actors.hire(engine, address)


def test_two_actors_with_weights_that_were_handed_in_come_to_the_bits_of_one(cluster: None) -> None:
    model = tiny_model("llama", 64, torch.float32)
    engine = Engine(model, numbered_tokenizer(64), name="tiny", max_batch_tokens=300)
    found: list[list[bytes]] = []
    for count in (1, 2):
        pool = ray_actors.hire(engine, count)
        try:
            found.append(bits(ShardedModel(engine, pool), engine))
        finally:
            pool.close()
    assert found[0] == found[1]
    here = bits(ShardedModel(engine, in_process(engine, 1)), engine)  # with as many threads as this process has
    for one, other in zip(found[0], here, strict=True):
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(
            *(torch.frombuffer(bytearray(each), dtype=torch.float32) for each in (one, other)), **close
        )


def test_what_a_job_raises_in_an_actor_is_raised_here(cluster: None) -> None:
    engine = Engine(tiny_model("llama", 64, torch.float32), numbered_tokenizer(64), name="tiny")
    pool = ray_actors.hire(engine, 1)
    try:
        with pytest.raises(IndexError):
            pool.do([Job("next", ((3, 71),))])
    finally:
        pool.close()


def test_a_search_on_two_actors_of_which_one_is_killed_in_a_gradient_writes_the_same_journal(
    cluster: None, tmp_path: Path
) -> None:
    killed: list[int] = []

    def hire_and_kill(engine: Engine) -> Pool:
        pool = ray_actors.hire(engine, 2)
        victim: Any = pool._workers[0]
        submit = victim.submit

        def murderous(job: Job) -> Any:
            future = submit(job)
            if job.kind == "gradient" and not killed:
                killed.append(victim.pid)
                os.kill(victim.pid, signal.SIGKILL)
            return future

        victim.submit = murderous
        return pool

    searched(hire_and_kill, tmp_path / "ray", steps=1, forecast_share=0)
    searched(lambda engine: ray_actors.hire(engine, 1), tmp_path / "one", steps=1, forecast_share=0)
    assert len(killed) == 1
    assert lines_of(tmp_path / "ray") == lines_of(tmp_path / "one")


def test_actors_that_find_other_weights_are_refused(cluster: None) -> None:
    engine = Engine.from_pretrained("pocket", device="cpu")
    with torch.no_grad():
        next(engine.model.parameters()).mul_(1.5)
    with pytest.raises(WeightsError, match="A worker loaded 'pocket@.*and this process has 'pocket@"):
        ray_actors.hire(engine, 1)
