"""A search on the packaged model behind `transformers serve`, with faults in between, finds what it finds without."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import dspy
import pytest
from any_event import bits
from fault_proxy import FAULTS, Fault, FaultProxy
from golden_runs import exact_match, rows
from scripted_engine import instruction_of
from serving import Served, free_port, needs_serving, transformers_serve
from test_outages import KINDS

from dspy_greater import GReaTer, local_lm, pocket

pytestmark = [pytest.mark.slow, needs_serving]
ROWS = rows("navigate", 8)
SETTINGS = {"steps": 2, "train_rows": 4, "validation_rows": 4, "written": 0, "phrases": 0, "progress": False}


MAX_TOKENS = 60  # of a run of the program, and of nothing else that a server is asked


def of_the_runs(fault: Callable[[int], Fault | None]) -> Callable[[int, str], Fault | None]:
    """What the runs of the program meet, by their number; how a server is compared before a search is left alone."""
    number = itertools.count()

    def met(_: int, body: str) -> Fault | None:
        return fault(next(number)) if MAX_TOKENS in json.loads(body).values() else None

    return met


class Restartable:
    """`transformers serve` on one port, which can be ended and started again."""

    def __init__(self) -> None:
        self.port, self._running = free_port(), ExitStack()
        self.served: Served = self.start()

    def start(self) -> Served:
        return self._running.enter_context(transformers_serve(pocket.path(), port=self.port))

    def stop(self) -> None:
        self._running.close()

    def restart(self) -> None:
        self.stop()
        self.start()


@pytest.fixture(scope="module")
def server() -> Iterator[Restartable]:
    running = Restartable()
    yield running
    running.stop()


def searched(lm: Any, **settings: Any) -> Any:
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(lm)
    weights = local_lm("pocket", dtype="float32")
    optimizer = GReaTer(metric=exact_match, auto=None, weights=weights, **{**SETTINGS, **settings})
    return optimizer.compile(program, ROWS[:4], valset=ROWS[4:])


def behind(url: str, served: Served) -> Any:
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "cache": False, "num_retries": 0}
    return dspy.LM(served.lm, api_base=url, api_key="none", **settings)


@pytest.fixture(scope="module")
def undisturbed(server: Restartable) -> Any:
    return searched(behind(server.served.url, server.served))


def same(found: Any, undisturbed: Any) -> bool:
    one, other = found.detailed_results, undisturbed.detailed_results
    assert one.stopped_by is None and instruction_of(found) == instruction_of(undisturbed)
    assert [each.validation for each in one.predictors] == [each.validation for each in other.predictors]
    return bits(one.steps) == bits(other.steps)


def test_a_served_search_finds_what_the_one_in_this_process_finds(undisturbed: Any) -> None:
    alone = searched(local_lm("pocket", dtype="float32", temperature=0.0, max_tokens=60))
    assert instruction_of(alone) == instruction_of(undisturbed)
    steps = [each.detailed_results.steps for each in (alone, undisturbed)]
    assert [each.chosen.instruction for each in steps[0]] == [each.chosen.instruction for each in steps[1]]
    spent = undisturbed.detailed_results.spent
    assert spent["prompt_tokens"] > spent["generated_tokens"] > 0


@pytest.mark.parametrize("faults", [FAULTS[::2], FAULTS[1::2]], ids=["+".join(FAULTS[::2]), "+".join(FAULTS[1::2])])
def test_a_fault_every_fourth_call_changes_nothing(
    faults: tuple[Fault, ...], server: Restartable, undisturbed: Any
) -> None:
    def in_turn(number: int, _: str) -> Fault | None:  # while the server is compared, too
        return faults[number // 4 % len(faults)] if number % 4 == 3 else None

    with FaultProxy(server.served.url, in_turn, hang=20.0).serving() as proxy:
        found = searched(behind(proxy.url, server.served), request_timeout=10.0)
    assert same(found, undisturbed)
    assert set(filter(None, proxy.seen)) == set(faults)
    assert found.detailed_results.faults == Counter(KINDS[each] for each in proxy.seen if each)


def test_a_restart_of_the_server_in_the_middle_of_a_step_changes_nothing(server: Restartable, undisturbed: Any) -> None:
    restarting = threading.Thread(target=server.restart)

    def faults(number: int) -> None:
        if number == 5:  # the second row of the first candidate
            restarting.start()

    with FaultProxy(server.served.url, of_the_runs(faults)).serving() as proxy:
        found = searched(behind(proxy.url, server.served))
    restarting.join()
    assert same(found, undisturbed)
    assert found.detailed_results.faults
