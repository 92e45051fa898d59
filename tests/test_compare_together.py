"""Cells of the comparison that run at the same time: one model, answered and charged as if each were alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dspy import lm15

from benchmarks.harness import config, models
from benchmarks.harness.budget import Budget, BudgetSpent
from benchmarks.harness.cells import FILE, CellKey, read
from benchmarks.harness.models import prompt_model, remote_task_model
from benchmarks.harness.run import run_all
from benchmarks.harness.shared_model import Door, RemoteEngine, SharedModel
from benchmarks.harness.together import run_together
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.optimizers.optimizer import ON_WEIGHTS
from benchmarks.tasks.registry import load
from dspy_greater.errors import GreaterError
from dspy_greater.lm.batcher import Batcher
from dspy_greater.lm.local import LocalEngine
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
    engine: Engine, door: Door
) -> None:
    asked = requests()
    before = engine.counters
    local = LocalEngine(engine)
    local.batcher = Batcher(engine.generate, window=0.2)
    alone = answers(local, asked)
    cost = engine.counters - before
    lanes = [RemoteEngine(door, name) for name in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda lane: answers(lane, asked), lanes))
    assert together == [alone, alone]
    for lane in lanes:
        assert lane.counters.generated_tokens == cost.generated_tokens
        assert lane.counters.prefilled_tokens == pytest.approx(cost.prefilled_tokens, rel=0.03)


def test_a_request_joins_those_under_way_and_is_answered_before_they_end(engine: Engine, door: Door) -> None:
    slow = engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    long = [request(f"Tell me of number {number}.", max_tokens=120, temperature=2.0) for number in range(ROWS)]
    ended: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: (answers(RemoteEngine(door, "a"), long), ended.append("long")))
        time.sleep(0.6)
        short = request("Where is the cup?", max_tokens=3)
        joined = pool.submit(lambda: (RemoteEngine(door, "b").complete(short), ended.append("short"))).result()[0]
        first.result()
    slow.remove()
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
        pass
    with pytest.raises(lm15.ServerError, match="process that holds the weights does not answer"):
        RemoteEngine(door, "a").complete(request("Is anybody there?"))


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


def test_what_needs_the_weights_in_its_process_is_on_the_list_of_those() -> None:
    assert {name for name in OPTIMIZERS if name.startswith(("greater", "random"))} == ON_WEIGHTS


@pytest.mark.slow
def test_cells_run_in_processes_of_their_own_and_finish_as_alone(tmp_path: Path) -> None:
    asked = {"tasks": ("pocket:navigate",), "optimizers": ("seed", "evoprompt", "opro"), "limit": 6, "budget": 6000}
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run_all(config.RunConfig(out=alone, **asked), lambda line: None) == 0  # pyright: ignore[reportArgumentType]
    lines: list[str] = []
    assert run_all(config.RunConfig(out=together, together=3, **asked), lines.append) == 0  # pyright: ignore[reportArgumentType]
    expected = {cell.key: cell for cell in read(alone / FILE)}
    found = {cell.key: cell for cell in read(together / FILE)}
    assert found.keys() == expected.keys()
    for key, cell in found.items():
        assert (cell.instructions, cell.test) == (expected[key].instructions, expected[key].test), key.text
        assert cell.tokens["charged"] == pytest.approx(expected[key].tokens["charged"], rel=0.1), key.text
        assert (cell.together, expected[key].together) == (3, 1)
    assert run_all(config.RunConfig(out=together, together=3, **asked), lines.append) == 0  # pyright: ignore[reportArgumentType]
    assert lines[-1].endswith("finished before")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_with_what_to_do() -> None:
    keys = [CellKey("pocket:navigate", "seed", seed, "pocket", "", "phrasebook", 5000, 4) for seed in range(2)]
    asked = config.RunConfig(("pocket:navigate",), ("seed",), together=2, limit=4)

    def begun(key: CellKey) -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)

    with pytest.raises(GreaterError, match="was killed, often for memory; the same command goes on"):
        list(run_together(asked, keys, lambda key: None, begun))
