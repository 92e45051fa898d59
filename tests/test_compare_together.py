"""Cells of the comparison that run at the same time: one model, answered and charged as if each were alone."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from dspy import lm15

from benchmarks.harness import config, models, shared_model
from benchmarks.harness.budget import Budget, BudgetSpent
from benchmarks.harness.cells import FILE, CellKey, read
from benchmarks.harness.models import prompt_model, remote_task_model
from benchmarks.harness.run import run_all
from benchmarks.harness.shared_model import Door, RemoteEngine, SharedModel
from benchmarks.harness.together import run_together
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.optimizers.optimizer import needs_weights
from benchmarks.tasks.registry import load
from dspy_greater.errors import GreaterError
from dspy_greater.lm.batcher import Batcher
from dspy_greater.lm.local import LocalEngine
from dspy_greater.model import generate
from dspy_greater.model.engine import Engine

ROWS = 12
SYSTEM = "Answer the question. Say where everything is after each of the moves, and give the answer at the end alone."


@pytest.fixture(scope="module")
def engine() -> Engine:
    return models.task_model("pocket", {}).engine  # pyright: ignore[reportReturnType]


@pytest.fixture
def door(engine: Engine) -> Iterator[Door]:
    with SharedModel(engine).opened() as door:
        yield door


@pytest.fixture
def slow(engine: Engine) -> Iterator[None]:
    """Every step of the model takes a while."""
    hook = engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    yield
    hook.remove()


def request(text: str, **settings: object) -> lm15.Request:
    settings = {"temperature": 0.0, "max_tokens": 24, **settings}
    message = lm15.Message.user(text)
    return lm15.Request("local/pocket", (message,), system=SYSTEM, config=lm15.Config(**settings))  # pyright: ignore[reportArgumentType]


def requests() -> list[lm15.Request]:
    rows = load("pocket:navigate", data_dir=None, seed=0, limit=ROWS).train
    return [request(row.question) for row in rows]


def answers(engine: LocalEngine | RemoteEngine, asked: list[lm15.Request]) -> list[str]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return [str(response.message) for response in pool.map(engine.complete, asked)]


def test_cells_that_share_a_model_get_the_answers_and_the_charge_that_each_would_have_had_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_model, "SILENCE", 2.0)
    asked = requests()
    before = engine.counters
    local = LocalEngine(engine)
    local.batcher = Batcher(engine.generate, window=0.5)
    alone = answers(local, asked)
    cost = engine.counters - before
    with SharedModel(engine).opened() as door:
        lanes = [RemoteEngine(door, name) for name in ("a", "b")]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda lane: answers(lane, asked), lanes))
    assert together == [alone, alone]
    for lane in lanes:
        assert lane.counters.generated_tokens == cost.generated_tokens
        assert lane.counters.prefilled_tokens == cost.prefilled_tokens


def test_a_beginning_is_charged_once_to_the_rows_that_are_under_way_whenever_they_came(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_model, "SILENCE", 2.0)
    monkeypatch.setattr(generate, "_JOIN_EVERY", 1)  # none of those under way has ended by then
    asked = [request(f"Tell me of number {number}.") for number in range(4)]
    shared, left, under_way = SharedModel(engine), list(asked), queue.Queue[Future[Any]]()
    forwards = itertools.count()

    def another_comes(*_: object) -> None:
        """While those before it are written, and before the model goes on."""
        if next(forwards) and left:
            under_way.put(coming := pool.submit(remote.complete, left.pop()))
            while not shared._waiting and not coming.done():
                time.sleep(0.01)

    with shared.opened() as door, ThreadPoolExecutor(len(asked)) as pool:
        remote, together = RemoteEngine(door, "a"), RemoteEngine(door, "b")
        with engine.model.register_forward_pre_hook(another_comes):
            under_way.put(pool.submit(remote.complete, left.pop()))
            for _ in asked:
                under_way.get(timeout=60).result()
        answers(together, asked)
    prompts = sum(len(LocalEngine(engine).prompt_ids(one)) for one in asked)
    assert remote.counters.prefilled_tokens < 0.75 * prompts
    assert remote.counters.prefilled_tokens == pytest.approx(together.counters.prefilled_tokens, rel=0.15)


def test_a_request_joins_those_under_way_and_is_answered_before_they_end(
    engine: Engine, door: Door, slow: None
) -> None:
    long = [
        request(f"Tell me of number {number}.", max_tokens=120, temperature=2.0, seed=number) for number in range(ROWS)
    ]
    ended: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: (answers(RemoteEngine(door, "a"), long), ended.append("long")))
        time.sleep(0.6)
        short = request("Where is the cup?", max_tokens=3)
        joined = pool.submit(lambda: (RemoteEngine(door, "b").complete(short), ended.append("short"))).result()[0]
        first.result()
    assert ended == ["short", "long"]
    assert str(joined.message) == str(LocalEngine(engine).complete(short).message)


def test_a_request_that_is_made_again_draws_anew_as_it_does_in_one_process(engine: Engine, door: Door) -> None:
    sampled = request("Where is the cup?", temperature=1.5, seed=3)
    local, remote = LocalEngine(engine), RemoteEngine(door, "a")
    expected = [str(local.complete(sampled).message) for _ in range(3)]
    assert [str(remote.complete(sampled).message) for _ in range(3)] == expected
    assert len(set(expected)) > 1


def test_errors_of_the_model_are_raised_where_it_was_asked(engine: Engine, door: Door) -> None:
    too_long = request("word " * 3000)
    with pytest.raises(lm15.ContextLengthError) as local:
        LocalEngine(engine).complete(too_long)
    remote = RemoteEngine(door, "a")
    with pytest.raises(lm15.ContextLengthError) as raised:
        remote.complete(too_long)
    assert str(raised.value) == str(local.value)
    assert remote.complete(request("Go on.")).message  # the connection has outlived it


def test_a_model_that_is_gone_is_said_to_be(engine: Engine) -> None:
    with SharedModel(engine).opened() as door:
        known = RemoteEngine(door, "a")
        known.complete(request("Is anybody there?"))
    for remote, message in ((RemoteEngine(door, "b"), "does not answer"), (known, "was closed")):
        with pytest.raises(lm15.ServerError, match=f"{message}.* run the same command again"):
            remote.complete(request("Is anybody there?"))


def test_the_end_does_not_wait_for_rows_that_are_under_way(engine: Engine, slow: None) -> None:
    with ThreadPoolExecutor(1) as pool:
        with SharedModel(engine).opened() as door:
            remote = RemoteEngine(door, "a")
            endless = request("Go on.", max_tokens=900, temperature=2.0, seed=1)
            waiting = pool.submit(remote.complete, endless)
            time.sleep(1.0)
            closing = time.monotonic()
        assert time.monotonic() - closing < 5
        waiting.exception(timeout=10)


def test_an_interrupted_call_leaves_no_answer_for_the_next_one(engine: Engine, door: Door, slow: None) -> None:
    remote, asked = RemoteEngine(door, "a"), request("Where is the cup?", max_tokens=3)
    expected = str(remote.complete(asked).message)
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            remote.complete(request("Tell me of number 1.", max_tokens=120, temperature=2.0, seed=1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert str(remote.complete(asked).message) == expected


def test_a_caller_without_the_key_is_not_answered_and_keeps_nobody_else_out(door: Door) -> None:
    with pytest.raises(lm15.ServerError):
        RemoteEngine(Door(door.address, b"another"), "a").complete(request("Let me in."))
    assert RemoteEngine(door, "a").complete(request("Let me in.")).message


def test_a_budget_ends_the_calls_of_task_model_and_proposer_alike(engine: Engine, door: Door) -> None:
    remote = RemoteEngine(door, "a")
    model = remote_task_model("pocket", engine.identity, "local/pocket", remote, {"max_tokens": 24})
    budget = Budget(5, counters=model.counters)
    lm, proposer = model.metered(budget), prompt_model("self", 0, budget, model, {"max_tokens": 9})
    proposer("Write an instruction.")
    assert budget.proposer.completion_tokens <= 9
    assert budget.spent.charged == budget.proposer.prompt_tokens + budget.proposer.completion_tokens
    for spent in (lm, proposer):
        with pytest.raises(BudgetSpent):
            spent("And 3 + 3?")
    assert model.judge("And 3 + 3?")  # judging is charged to nobody


def test_optimizers_that_read_likelihoods_say_that_they_need_the_weights() -> None:
    own = {name for name in OPTIMIZERS if needs_weights(name)}
    assert own == {"greater", "greater-paper", "greater-no-reasoning", "random-search"}


@pytest.mark.slow
def test_cells_run_in_processes_of_their_own_and_finish_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: set[BaseProcess] = set()

    def seen() -> list[BaseProcess]:
        children = active_children()
        processes.update(children)
        return children

    active_children = multiprocessing.active_children
    monkeypatch.setattr(multiprocessing, "active_children", seen)
    asked = {"tasks": ("pocket:navigate",), "optimizers": ("seed", "ape", "random-search"), "limit": 4, "budget": 4000}
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run_all(config.RunConfig(out=alone, **asked), lambda line: None) == 0  # pyright: ignore[reportArgumentType]
    lines: list[str] = []
    assert run_all(config.RunConfig(out=together, together=3, **asked), lines.append) == 0  # pyright: ignore[reportArgumentType]
    expected = {cell.key: cell for cell in read(alone / FILE)}
    found = {cell.key: cell for cell in read(together / FILE)}
    assert found.keys() == expected.keys()
    assert {process.exitcode for process in processes} == {0}, "a process was not left to clean up after itself"
    for key, cell in found.items():
        assert cell.error is None and cell.test is not None, key.text
        assert cell.seed_test == expected[key].seed_test, key.text
        assert cell.tokens["charged"] == pytest.approx(expected[key].tokens["charged"], rel=0.2), key.text
        assert (cell.together, expected[key].together) == (1 if needs_weights(key.optimizer) else 2, 1)
    assert run_all(config.RunConfig(out=together, together=3, **asked), lines.append) == 0  # pyright: ignore[reportArgumentType]
    assert lines[-1].endswith("finished before")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_with_what_to_do_and_leaves_no_other(tmp_path: Path) -> None:
    keys = [CellKey("pocket:navigate", "ape", seed, "pocket", "", "phrasebook", 10**6, 20) for seed in range(2)]
    asked = config.RunConfig(("pocket:navigate",), ("ape",), out=tmp_path, together=2, limit=20)
    before = set(multiprocessing.active_children())

    def kill_one() -> None:
        while not (tmp_path / "logs").is_dir():  # a cell has begun
            time.sleep(0.1)
        victim = (set(multiprocessing.active_children()) - before).pop()
        os.kill(victim.pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(GreaterError, match="was killed, often for memory; the same command goes on"):
        list(run_together(asked, keys, lambda key: None, lambda key: None))
    killer.join()
    for process in set(multiprocessing.active_children()) - before:
        process.join(timeout=10)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "run", "--tasks", "pocket:navigate", "--optimizers", "ape,opro"]
    command += ["--model", "pocket", "--budget", "1M", "--limit", "20", "--together", "2", "--out", str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "logs").is_dir():
        assert parent.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.kill()
    parent.wait()
    for _ in range(100):
        left = [
            pid
            for pid in children
            if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text()
        ]
        if not left:
            break
        time.sleep(0.1)
    assert children and not left
