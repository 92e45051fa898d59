"""One LM over several servers: the least busy is asked, a dead one left out and taken back."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy import lm15
from fault_proxy import Fault, FaultProxy, StandIn, between
from stand_ins import stand_in
from test_outages import compiled, obedient, same_steps, student

from dspy_greater import served_lm
from dspy_greater.errors import SettingsError


def slowly(messages: Any) -> str:
    time.sleep(0.03)
    return "yes"


@pytest.fixture
def one() -> Iterator[StandIn]:
    with StandIn(slowly).serving() as server:
        yield server


@pytest.fixture
def other() -> Iterator[StandIn]:
    with StandIn(slowly).serving() as server:
        yield server


def pooled(*urls: str, **settings: Any) -> dspy.LM:
    return served_lm("openai/model", urls, **{"cache": False, "num_retries": 0, **settings})


def ask(lm: dspy.LM, count: int = 24) -> None:
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(lm, map(str, range(count)))) == [["yes"]] * count


def asked(text: str) -> lm15.Request:
    return lm15.Request(model="openai/model", messages=(lm15.Message.user(text),))


def test_calls_go_to_the_least_busy_server(one: StandIn, other: StandIn) -> None:
    lm = pooled(one.url, other.url)
    ask(lm)
    assert len(one.asked) == len(other.asked) == 12 and set(lm.engine.under_way().values()) == {0}
    other.answer = lambda messages: (time.sleep(0.3), "yes")[1]
    ask(lm)
    assert len(one.asked) > len(other.asked) + 8


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die", "500", "429", "html", "garbage"])
def test_a_server_that_fails_is_left_out_and_taken_back(fault: Fault, one: StandIn, other: StandIn) -> None:
    with FaultProxy(other.url, between(0, 6, fault)).serving() as proxy:
        lm = pooled(one.url, proxy.url, rest=0.4)
        ask(lm)  # nobody hears of it
        met = len(proxy.seen)
        assert 1 <= met <= 6 and not other.asked
        proxy.faults = between(0, 0, fault)
        time.sleep(0.5)
        ask(lm)
        assert len(other.asked) >= 8


def test_what_a_server_refuses_of_a_prompt_is_not_asked_elsewhere(one: StandIn, other: StandIn) -> None:
    class TooLong(StandIn):
        def reply(self, request: Any) -> tuple[int, Any]:
            self.asked.append(request)
            return 400, {"error": {"message": "the prompt is too long"}}

    with TooLong(slowly).serving() as picky:
        lm = pooled(picky.url, one.url)
        with pytest.raises(dspy.utils.exceptions.LMInvalidRequestError, match="too long"):
            lm("?")
    assert not one.asked and len(picky.asked) == 1


def test_where_all_servers_fail_the_call_fails_and_dspy_tries_again(one: StandIn, other: StandIn) -> None:
    with (
        FaultProxy(one.url, between(0, 1, "503")).serving() as left,
        FaultProxy(other.url, between(0, 1, "503")).serving() as right,
    ):
        lm = pooled(left.url, right.url)
        with pytest.raises(dspy.utils.exceptions.LMServerError):
            lm("?")
        assert lm("?") == ["yes"]  # those that rest are asked where no other is left


def test_asynchronous_calls_are_dealt_out_too(one: StandIn, other: StandIn) -> None:
    lm = pooled(one.url, other.url)

    async def several() -> list[Any]:
        return await asyncio.gather(*[lm.acall(str(number)) for number in range(6)])

    assert asyncio.run(several()) == [["yes"]] * 6
    assert len(one.asked) == len(other.asked) == 3


def streamed(text: str, *, whole: bool = True) -> Any:
    """A chat API's answer in pieces; broken off behind the first where it is not whole."""
    pieces = text.split("|")
    events = [
        {"id": "1", "object": "chat.completion.chunk", "model": "model", "choices": [{"index": 0, "delta": delta}]}
        for delta in ({"role": "assistant", "content": pieces[0]}, *({"content": piece} for piece in pieces[1:]))
    ]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    body = [json.dumps({**events[0], **each}) for each in (*events, end)] + ["[DONE]"]
    lines = body if whole else [body[0], "{broken"]
    return "".join(f"data: {line}\n\n" for line in lines)


def heard_of(lm: dspy.LM) -> str:
    return "".join(event.delta.text for event in lm.engine.stream(asked("?")) if event.type == "delta")


@pytest.mark.parametrize(
    "refusal",
    [(503, {"error": {"message": "busy"}}), (429, "<html>"), "<html>Welcome</html>", "data: {broken\n\n", None],
)
def test_a_stream_that_has_not_begun_is_passed_on_to_the_next_server(refusal: Any) -> None:
    heard: list[Any] = []
    said = {} if refusal is None else {"POST /v1/chat/completions": refusal}
    with stand_in(said, heard) as bad, stand_in({"POST /v1/chat/completions": streamed("y|es")}) as good:
        lm = pooled("http://127.0.0.1:9/v1" if refusal is None else f"{bad}/v1", f"{good}/v1")
        assert [heard_of(lm), heard_of(lm)] == ["yes", "yes"]
        assert len(heard) <= 1 and set(lm.engine.under_way().values()) == {0}  # which is left out the second time


def test_a_stream_goes_on_nowhere_else_once_it_has_begun_or_the_request_is_refused() -> None:
    heard: list[Any] = []
    with stand_in({"POST /v1/chat/completions": streamed("y|es")}, heard) as good:
        for answer, error in (
            (streamed("n|o", whole=False), lm15.LM15Error),
            ((400, {"error": {"message": "the prompt is too long"}}), lm15.InvalidRequestError),
        ):
            with stand_in({"POST /v1/chat/completions": answer}) as bad, pytest.raises(error):
                heard_of(pooled(f"{bad}/v1", f"{good}/v1"))
    assert not heard


def test_where_all_servers_refuse_a_stream_the_last_error_is_raised() -> None:
    busy = {"POST /v1/chat/completions": (503, {"error": {"message": "busy"}})}
    with stand_in(busy) as one, stand_in(busy) as other, pytest.raises(lm15.ServerError, match="busy"):
        heard_of(pooled(f"{one}/v1", f"{other}/v1"))


def test_an_asynchronous_stream_that_is_cancelled_waits_for_no_server(one: StandIn) -> None:
    ended = threading.Event()
    one.answer = lambda messages: (ended.wait(10), "yes")[1]
    lm = pooled(one.url)

    async def hear() -> None:
        async for _ in lm._async_engine_spec.stream(asked("?")):
            pass

    async def in_time() -> float:
        began = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(hear(), 0.1)
        return time.monotonic() - began

    try:
        assert asyncio.run(in_time()) < 5
    finally:
        ended.set()


def test_a_program_with_such_an_lm_is_saved_without_its_key(one: StandIn, tmp_path: Path) -> None:
    program = dspy.Predict("question -> answer")
    program.set_lm(served_lm("openai/model", [one.url], api_key="very-secret", rest=7.0))
    program.save(tmp_path / "program.json")
    assert "very-secret" not in (tmp_path / "program.json").read_text()
    loaded = dspy.Predict("question -> answer")
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert (loaded.lm.engine.api_bases, loaded.lm.engine.rest) == ((one.url,), 7.0)
    assert program.deepcopy().lm.engine is program.lm.engine


@pytest.mark.parametrize("addresses", [[], "", ["localhost:8000"], [None]], ids=repr)
def test_what_is_no_address_is_refused(addresses: Any) -> None:
    with pytest.raises(SettingsError, match="give the addresses of the servers' APIs"):
        served_lm("openai/model", addresses)


@pytest.mark.slow
def test_a_search_over_two_servers_finds_what_it_finds_on_one_whichever_dies(
    one: StandIn, other: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.answer = other.answer = obedient
    alone = compiled(student(one.url))
    with FaultProxy(other.url, between(3, 10**6, "die")).serving() as proxy:
        program = student(one.url)
        program.set_lm(pooled(one.url, proxy.url))
        asked = len(one.asked)
        found = compiled(program)
    assert same_steps(found, alone) and other.asked and len(one.asked) > asked
    assert found.detailed_results.faults == {}
