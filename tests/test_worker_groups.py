"""Processes that divide the weights among themselves find what one with all of them finds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_runs import exact_match
from ray_marks import with_ray
from test_workers import lines_of, queries_of, searched, sequences_of
from torch.nn import Linear, ModuleDict, ModuleList

from dspy_greater import GReaTer
from dspy_greater.errors import SettingsError, WeightsError, WorkerError, WorkerLostError
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Leaf
from dspy_greater.workers.fsdp import refuse_indivisible, repeated_blocks
from dspy_greater.workers.in_process import in_process
from dspy_greater.workers.jobs import Job
from dspy_greater.workers.sharded import ShardedModel
from tests.tiny_models import numbered_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("llama", "gemma2")

# --- without Ray: two processes, each with a part of the weights


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, see `members_of_a_group.py`."""
    folder = tmp_path_factory.mktemp("members")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.members_of_a_group"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [each.communicate(timeout=300)[1] for each in started]
    finally:
        for each in started:
            each.kill()
    assert [each.returncode for each in started] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_weights_come_to_the_bits_of_the_whole_in_any_order_of_jobs(members: Any, kind: str) -> None:
    for each in members:
        assert each[kind]["divided"] == each[kind]["whole"] == each[kind]["backwards"]
        assert len(each[kind]["whole"]) == 6
        assert len(each[kind]["identities"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_process_holds_half_of_the_layers_and_all_of_the_embeddings(members: Any, kind: str) -> None:
    for name, count in members[0][kind]["counts"].items():
        here = [each[kind]["here"][name] for each in members]
        if ".layers." in name:
            assert sum(here) == count and max(here) <= count / 2 + 32  # a row more where rows do not halve
        else:
            assert here == [count, count]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_do_not_fit_are_halved_by_all_processes_alike(members: Any, kind: str) -> None:
    for each in members:
        assert each[kind]["starved"] == each[kind]["halved"] != each[kind]["whole"]


@pytest.mark.slow
def test_processes_that_are_about_to_read_unlike_tokens_stop(members: Any) -> None:
    assert {each["apart"] for each in members} == {"The processes of a group were about to read unlike tokens."}


@pytest.mark.slow
def test_a_process_that_waits_for_the_others_in_vain_is_lost(members: Any) -> None:
    assert members[0]["alone"].startswith("A process of a group could not go on: Timed out waiting 1000ms")


def test_the_blocks_to_divide_are_found_by_what_they_hold() -> None:
    layers = ModuleList([ModuleDict({"experts": ModuleList([Linear(8, 8), Linear(8, 8)])}) for _ in range(3)])
    small, alone = ModuleList([Linear(1, 1), Linear(1, 1)]), ModuleList([Linear(8, 8)])
    model = ModuleDict({"embed": Linear(8, 4), "decoder": ModuleDict({"layers": layers}), "small": small, "one": alone})
    assert repeated_blocks(model) == [expert for layer in layers for expert in layer["experts"]]
    called = ModuleList([Linear(8, 8) for _ in range(3)])
    assert repeated_blocks(ModuleDict({"embed": Linear(8, 4), "tower": called, "layers": layers})) == [
        *called,
        *(expert for layer in layers for expert in layer["experts"]),
    ]
    assert repeated_blocks(Linear(8, 8)) == []


# --- what shards= may be


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2", [2]])
def test_what_is_no_number_of_shards_is_refused_when_the_optimizer_is_built(value: Any) -> None:
    with pytest.raises(SettingsError, match="shards=.*: give a whole number of at least 1, the processes over which"):
        GReaTer(metric=exact_match, shards=value)


def test_shards_without_workers_of_ours_are_refused_with_what_to_write() -> None:
    with pytest.raises(SettingsError, match="shards=2 divides the weights of workers, .*: write workers=1, too."):
        GReaTer(metric=exact_match, shards=2)
    with pytest.raises(SettingsError, match="shards=2, and workers= is a function.*: write workers=1 or 'auto'"):
        GReaTer(metric=exact_match, shards=2, workers=lambda engine: in_process(engine, 1))
    assert GReaTer(metric=exact_match, shards=1).shards == GReaTer(metric=exact_match).shards == 1


def test_weights_that_cannot_be_divided_are_refused_before_a_process_starts() -> None:
    one_layer = Engine(tiny_model("llama", 64, layers=1), numbered_tokenizer(64), name="tiny")
    with pytest.raises(WeightsError, match="'tiny' cannot be divided among processes. The model has no list of layers"):
        refuse_indivisible(one_layer)
    packed = Engine(tiny_model("llama", 64), numbered_tokenizer(64), name="tiny")
    packed.model.model.norm.register_parameter("packed", torch.nn.Parameter(torch.ones(1, dtype=torch.int8), False))
    with pytest.raises(WeightsError, match="They are quantised, or parts of others already. Leave shards= out."):
        refuse_indivisible(packed)


# --- with Ray


@pytest.mark.parametrize(
    ("gpus", "cpus", "device", "count", "shards", "expected"),
    [
        (8, 16, "cuda", 2, 4, (2, 0, 1, 4)),
        (8, 16, "cpu", None, 3, (2, 0, 1, 3)),
        (0, 16, "cpu", None, 3, (2, 1, 0, 3)),
        (0, 2, "cpu", 2, 2, (2, 0.5, 0, 2)),
        (3, 16, "cpu", 2, 2, (2, 1, 0, 2)),
        (0, 2, "cpu", 1, 3, "workers=1, shards=3, and the cluster has 2 CPUs; each worker takes 3. Give at most so"),
        (1, 2, "cpu", None, 3, "shards=3, and the cluster has 2 CPUs; each worker takes 3."),
        (3, 16, "cuda", 2, 2, "workers=2, shards=2, and the cluster has 3 GPUs; each worker takes 2."),
        (1, 16, "cuda", None, 2, "shards=2, and the cluster has 1 GPUs; each worker takes 2."),
        (3, 16, "cuda", 4, 1, "workers=4, and the cluster has 3 GPUs; each worker takes one."),
    ],
)
def test_a_worker_of_several_processes_takes_as_many_devices(
    gpus: int, cpus: int, device: str, count: int | None, shards: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    from dspy_greater.workers.ray_actors import Share, _share

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus), **({"GPU": gpus} if gpus else {})})
    engine: Any = SimpleNamespace(weights=SimpleNamespace(device=torch.device(device)))
    if isinstance(expected, str):
        with pytest.raises(WorkerError, match=f"^{expected}"):
            _share(engine, count, shards)
    else:
        assert _share(engine, count, shards) == Share(*expected)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["an answer", None], None),
        ([IndexError("token 71"), IndexError("token 71")], IndexError),
        (["an answer", IndexError("token 71")], WorkerLostError),
        ([WorkerLostError("gone.")], WorkerLostError),  # at once: the other one may never say a word
    ],
)
def test_what_a_group_says_is_what_all_of_it_says(said: list[Any], expected: Any) -> None:
    pytest.importorskip("ray")
    from dspy_greater.workers.groups import _Verdict

    future: Future[Any] = Future()
    verdict = _Verdict(future, 2)
    for rank, each in enumerate(said):
        assert not future.done()
        done: Future[Any] = Future()
        done.set_exception(each) if isinstance(each, Exception) else done.set_result(each)
        verdict.hear(rank, done)
    assert type(future.exception(timeout=0)) is (expected or type(None))
    assert expected or future.result() == "an answer"


def bits(model: Any, engine: Engine) -> list[bytes]:
    sequences = sequences_of(4)
    asked = queries_of(sequences)
    found = (
        model.logprob_gradient(sequences, asked, Leaf((20,) * 4, engine.embed([5]))),
        model.next_token_logprobs(sequences),
    )
    return [each.numpy().tobytes() for each in found]


@with_ray
def test_groups_that_cannot_start_say_why(cluster: None) -> None:
    from dspy_greater.workers.groups import hire

    engine = Engine.from_pretrained("pocket", device="cpu")
    loaded = engine.origin
    engine.origin = {**(loaded or {}), "name_or_path": "/nowhere/at/all"}
    with pytest.raises(WeightsError, match="The weights of '/nowhere/at/all' could not be loaded"):
        hire(engine, 1, 2)
    engine.origin = loaded
    with torch.no_grad():
        next(engine.model.parameters()).mul_(1.5)
    with pytest.raises(WeightsError, match="A worker loaded 'pocket@.*and this process has 'pocket@"):
        hire(engine, 1, 2)


@with_ray
def test_a_group_of_which_one_is_killed_in_a_gradient_is_replaced_and_comes_to_the_same_bits(cluster: None) -> None:
    from dspy_greater.workers.groups import hire

    engine = Engine(tiny_model("llama", 64), numbered_tokenizer(64), name="tiny", max_batch_tokens=300)
    pool = hire(engine, 1, 2)
    try:
        before = bits(ShardedModel(engine, pool), engine)
        victim: Any = pool._workers[0]
        submit, killed = victim.submit, list[int]()

        def murderous(job: Any) -> Any:
            future = submit(job)
            if job.kind == "gradient":
                killed.append(victim.pids[1])
                os.kill(victim.pids[1], signal.SIGKILL)
            return future

        victim.submit = murderous
        assert bits(ShardedModel(engine, pool), engine) == before
        assert len(killed) == 1 and pool._workers != [victim]
        with pytest.raises(IndexError):  # what all of a group raise alike is the job's own
            pool.do([Job("next", ((3, 71),))])
        assert bits(ShardedModel(engine, pool), engine) == before
    finally:
        pool.close()


@with_ray
def test_searches_with_a_worker_and_with_a_group_of_two_write_the_same_journal(cluster: None, tmp_path: Path) -> None:
    searched(1, tmp_path / "one")
    searched(1, tmp_path / "group", shards=2)
    journals = [lines_of(tmp_path / each) for each in ("one", "group")]
    assert len(journals[0]) >= 4
    assert journals[0] == journals[1]
