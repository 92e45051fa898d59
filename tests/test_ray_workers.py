"""Workers that are real Ray actors find what workers in this process find; skipped, visibly, where Ray is missing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_workers import hiring, lines_of, queries_of, searched, sequences_of

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster on this machine, for all tests of this module."""
    leave = ray_actors._joined(None, 2)
    yield
    leave()


def bits(model: Any, engine: Engine) -> list[bytes]:
    sequences = sequences_of()
    asked = queries_of(sequences)
    found = (
        model.token_logprobs(sequences, asked),
        model.logprob_gradient(sequences, asked, Leaf((20,) * 9, engine.embed([5]))),
        model.next_token_logprobs(sequences),
    )
    return [each.numpy().tobytes() for each in found]


def test_two_actors_with_weights_that_were_handed_in_come_to_the_bits_of_one_in_process(cluster: None) -> None:
    model = tiny_model("llama", 64, torch.float32)
    engine = Engine(model, numbered_tokenizer(64), name="tiny", max_batch_tokens=300)
    pool = ray_actors.hire(engine, 2)
    try:
        assert bits(ShardedModel(engine, pool), engine) == bits(ShardedModel(engine, in_process(engine, 1)), engine)
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

    searched(hire_and_kill, tmp_path / "ray", steps=1)
    searched(hiring(1), tmp_path / "here", steps=1)
    assert len(killed) == 1
    assert lines_of(tmp_path / "ray") == lines_of(tmp_path / "here")


def test_actors_that_find_other_weights_are_refused(cluster: None) -> None:
    engine = Engine.from_pretrained("pocket", device="cpu")
    with torch.no_grad():
        next(engine.model.parameters()).mul_(1.5)
    with pytest.raises(WeightsError, match="A worker loaded 'pocket@.*and this process has 'pocket@"):
        ray_actors.hire(engine, 1)


def test_a_cluster_that_does_not_answer_is_an_error_that_says_the_address() -> None:
    if ray.is_initialized():
        pytest.skip("this process is in a cluster already")
    engine = Engine(tiny_model("llama", 64), numbered_tokenizer(64), name="tiny")
    with pytest.raises(WorkerError, match="No Ray cluster answers at '127.0.0.1:1'"):
        ray_actors.hire(engine, "127.0.0.1:1")
