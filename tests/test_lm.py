"""`local_lm` under real DSPy: batching, lockstep, errors, streaming and saving."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import numpy as np
import pytest
from dspy import lm15

from dspy_greater.errors import GreaterError, WeightsError
from dspy_greater.lm.batcher import Batcher
from dspy_greater.lm.local import LocalEngine, local_lm
from dspy_greater.model.engine import Engine
from dspy_greater.program.fingerprint import described_lm
from dspy_greater.prompt.chat_template import render_chat
from tests.model_calls import generated
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


def pair(template: str | None = None, **settings: Any) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer() if template is None else tiny_tokenizer(template)
    return tiny_model(vocab_size=len(tokenizer), **settings), tokenizer


def tiny_lm(**settings: Any) -> Any:
    return local_lm(pair(), **{"max_tokens": 12, "cache": False, **settings})


def engine_of(lm: Any) -> LocalEngine:
    return lm.engine


def ask(lm: Any, *content: Any, system: str | None = None, **config: Any) -> lm15.Response:
    message = lm15.Message.user(list(content))
    return lm(lm15.Request(model=lm.model, messages=(message,), system=system, config=lm15.Config(**config)))


# ---- the chat template


@pytest.mark.slow
def test_both_rendering_paths_give_the_same_text() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": " Be\n brief. "}, {"role": "user", "content": "Hi\n"}]
    text = render_chat(tokenizer, messages)
    assert text == "<|begin|><|turn|>system\n Be\n brief. <|eot|><|turn|>user\nHi\n<|eot|><|turn|>assistant\n"
    lm = tiny_lm()
    response = ask(lm, "Hi\n", system=" Be\n brief. ")
    assert response.usage.input_tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- one call


def test_greedy_text_is_what_the_engine_writes_and_usage_counts_real_tokens() -> None:
    lm = tiny_lm()
    engine = engine_of(lm).engine
    [text] = lm("Take 4 steps.")
    rendered = render_chat(engine.tokenizer, [{"role": "user", "content": "Take 4 steps."}])
    prompt = engine.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    [alone] = generated(engine, [prompt], 12)
    assert text == engine.tokenizer.decode(alone.token_ids, skip_special_tokens=True)
    usage = lm.history[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(alone.token_ids))


def test_the_model_string_carries_version_and_type() -> None:
    lm = tiny_lm()
    assert lm.model == f"local/{engine_of(lm).engine.identity}"


def test_samples_differ_and_a_seed_repeats_them() -> None:
    lm = tiny_lm(temperature=1.0)
    samples = lm("Hi", n=4, seed=5)
    assert len(set(samples)) == 4
    assert lm("Hi", n=4, seed=5) == samples
    assert lm("Hi", n=4, seed=6) != samples
    assert lm("Hi") != lm("Hi")


def test_the_answer_ends_before_a_stop_string() -> None:
    lm = tiny_lm()
    [whole] = lm("Hi")
    stop = whole[4:7]
    [cut] = lm("Hi", stop=[stop])
    assert cut == whole[: whole.index(stop)]
    assert engine_of(lm).engine.counters.generated_tokens < 24


def test_an_answer_that_is_cut_off_says_so() -> None:
    lm = tiny_lm()
    assert ask(lm, "Hi", max_tokens=2).finish_reason == "length"


# ---- errors


def test_a_prompt_that_is_too_long_is_dspys_context_error_and_is_not_retried() -> None:
    lm = tiny_lm(num_retries=3)
    started = time.monotonic()
    with pytest.raises(dspy.ContextWindowExceededError, match=r"leaves no room .* context of 1024 tokens"):
        lm("apples " * 2000)
    assert time.monotonic() - started < 1


def test_a_lack_of_memory_is_retried(monkeypatch: Any) -> None:
    lm = tiny_lm(num_retries=1)
    local = engine_of(lm)
    real, calls = local.batcher._compute, []

    def flaky(requests: Any) -> Any:
        calls.append(len(requests))
        if len(calls) == 1:
            raise GreaterError("out of memory")
        return real(requests)

    monkeypatch.setattr(local.batcher, "_compute", flaky)
    monkeypatch.setattr("dspy.clients.execution._delay", lambda *_: 0)
    assert lm("Hi") and len(calls) == 2


def test_images_tools_and_unknown_settings_are_refused_by_name() -> None:
    lm = tiny_lm()
    with pytest.raises(dspy.LMUnsupportedFeatureError, match="part of type 'image'"):
        ask(lm, lm15.ImagePart(url="https://example.org/cat.png", media_type="image/png"))
    with pytest.raises(dspy.LMUnsupportedFeatureError, match="does not support frequency_penalty"):
        lm("Hi", frequency_penalty=1.0)


def test_text_parts_are_joined() -> None:
    lm = tiny_lm()
    assert ask(lm, "a", "b", max_tokens=12).message.text == lm("a\nb")[0]


# ---- real DSPy modules


class Scripted:
    """Stands in for the engine's computation: always the same well-formed tokens."""

    def __init__(self, engine: Any, text: str) -> None:
        self.ids = tuple(engine.tokenizer(text, add_special_tokens=False)["input_ids"])

    def __call__(self, requests: Any) -> Any:
        for request in requests:
            if request.on_token is not None:
                for token in self.ids:
                    request.on_token(token)
        return [SimpleNamespace(token_ids=self.ids, finish_reason="stop") for _ in requests]


WELL_FORMED = "[[ ## reasoning ## ]]\nTwo and two.\n\n[[ ## answer ## ]]\nfour\n\n[[ ## completed ## ]]"


def test_chain_of_thought_runs_and_an_unparsable_answer_is_dspys_own_error(monkeypatch: Any) -> None:
    lm = tiny_lm()
    program = dspy.ChainOfThought("question -> answer")
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm, adapter=adapter):
        with pytest.raises(dspy.AdapterParseError):
            program(question="2 + 2?")
        monkeypatch.setattr(engine_of(lm).batcher, "_compute", Scripted(engine_of(lm).engine, WELL_FORMED))
        answer = program(question="2 + 2?")
    assert (answer.reasoning, answer.answer) == ("Two and two.", "four")


def test_a_program_streams_through_streamify(monkeypatch: Any) -> None:
    lm = tiny_lm()
    monkeypatch.setattr(engine_of(lm).batcher, "_compute", Scripted(engine_of(lm).engine, WELL_FORMED))
    program = dspy.streamify(
        dspy.ChainOfThought("question -> answer"),
        stream_listeners=[dspy.streaming.StreamListener(signature_field_name="reasoning")],
    )

    async def collect() -> list[Any]:
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
            return [piece async for piece in program(question="2 + 2?")]

    pieces = asyncio.run(collect())
    streamed = "".join(p.chunk for p in pieces if isinstance(p, dspy.streaming.StreamResponse))
    assert streamed.strip() == "Two and two."
    assert pieces[-1].answer == "four"


@pytest.mark.slow
def test_streamed_pieces_add_up_to_the_answer_and_closing_early_stops_the_engine() -> None:
    local = LocalEngine.over(Engine(*pair(), name="tiny"))
    request = lm15.Request(model="m", messages=(lm15.Message.user("Hi"),), config=lm15.Config(max_tokens=400))
    whole = local.complete(request)
    events = list(local.stream(request))
    assert [events[0].type, events[-1].type] == ["start", "end"] and len(events) > 10
    assert "".join(e.delta.text for e in events if e.type == "delta") == whole.message.text
    assert events[-1].usage == whole.usage
    before = local.engine.counters.generated_tokens
    stream = local.stream(request)
    next(stream)
    next(stream)
    stream.close()
    assert local.engine.counters.generated_tokens - before < 400


@pytest.mark.slow
def test_a_cancelled_asynchronous_stream_is_cancelled_and_ends_the_generation() -> None:
    lm = tiny_lm()
    engine = engine_of(lm).engine
    engine.weights.__dict__["stop_token_ids"] = frozenset()
    config = lm15.Config(max_tokens=900)
    request = lm15.Request(model="m", messages=(lm15.Message.user("Hi"),), config=config)

    async def hears(pieces: int) -> None:
        stream, heard = lm._async_engine_spec.stream(request), 0
        async for _ in stream:
            heard += 1
            if heard == pieces:
                asyncio.current_task().cancel()  # pyright: ignore[reportOptionalMemberAccess]

    async def in_time() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(hears(0), 0.2)

    before = engine.counters.generated_tokens
    for pieces in (1, 2, 5):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(hears(pieces))
    asyncio.run(in_time())
    deadline = time.monotonic() + 20
    while any(thread.name == "local-lm-stream" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.counters.generated_tokens - before < 4 * 900


def test_a_stream_that_its_own_writer_collects_ends_without_an_error(monkeypatch: Any) -> None:
    local = LocalEngine.over(Engine(*pair(), name="tiny"))
    request = lm15.Request(model="m", messages=(lm15.Message.user("Hi"),), config=lm15.Config(max_tokens=4))
    written, streams = threading.Event(), list[Any]()
    failed: list[Any] = []

    def write(call: Any, put: Any) -> None:
        put("piece")
        written.wait(10)
        try:
            streams.pop().close()  # as the collector would, in whatever thread it runs
        except RuntimeError as error:
            failed.append(error)

    monkeypatch.setattr(local, "_write", write)
    streams.append(local.stream(request))
    next(streams[0]), next(streams[0])
    [writer] = [thread for thread in threading.enumerate() if thread.name == "local-lm-stream"]
    written.set()
    writer.join(10)
    assert not writer.is_alive() and not failed and not streams


def test_asynchronous_calls_share_a_batch(monkeypatch: Any) -> None:
    lm = tiny_lm()

    async def ask() -> list[Any]:
        return await asyncio.gather(*(lm.acall(f"Question {i}") for i in range(12)))

    alone = [lm(f"Question {i}") for i in range(12)]
    monkeypatch.setattr(engine_of(lm).batcher, "_window", 0.3)  # however slow the machine
    assert asyncio.run(ask()) == alone
    assert max(engine_of(lm).batcher.batch_sizes) > 6


# ---- batches


@pytest.mark.slow
def test_concurrent_calls_share_a_batch_and_change_no_answer(monkeypatch: Any) -> None:
    lm = tiny_lm()
    questions = [f"Question {i} " * (1 + i % 5) for i in range(24)]
    alone = [lm(question) for question in questions]
    before = len(engine_of(lm).batcher.batch_sizes)
    monkeypatch.setattr(engine_of(lm).batcher, "_window", 0.3)  # however slow the machine
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(lm, questions)) == alone
    assert len(engine_of(lm).batcher.batch_sizes) - before < 8


def run_lockstep(lm: Any, workers: int, calls: int, pause: float = 0.0) -> tuple[list[Any], tuple[int, ...]]:
    local = engine_of(lm)
    before = len(local.batcher.batch_sizes)
    with local.lockstep(workers) as group, ThreadPoolExecutor(workers) as pool:

        def work(index: int) -> list[str]:
            with group.worker():
                texts = [f"Row {index}"]
                for _ in range(calls):
                    time.sleep(pause * (index % 7))
                    texts.extend(lm(texts[-1]))
                return texts

        # Threads that are busy do not take a second task: every worker gets a thread of its own.
        results = list(pool.map(work, range(workers)))
    return results, local.batcher.batch_sizes[before:]


def test_forty_threads_in_lockstep_give_exactly_one_batch_per_call() -> None:
    lm = tiny_lm()
    first, batches = run_lockstep(lm, 40, 2)
    assert batches == (40, 40)
    again, batches = run_lockstep(lm, 40, 2, pause=0.004)
    assert batches == (40, 40) and again == first


def test_a_worker_that_leaves_is_not_waited_for_and_other_threads_go_the_ordinary_way() -> None:
    lm = tiny_lm()
    local = engine_of(lm)
    with local.lockstep(3) as group, ThreadPoolExecutor(3) as pool:

        def work(index: int) -> int:
            with group.worker():
                return len([lm(f"Row {index} call {call}") for call in range(index)])

        outcome = pool.map(work, range(3))
        assert lm("not a worker")
        assert list(outcome) == [0, 1, 2]
    assert sorted(local.batcher.batch_sizes) == [1, 1, 2]
    assert group.stalls == 0


def test_lockstep_refuses_more_threads_than_announced_and_a_second_group() -> None:
    batcher = Batcher(lambda requests: requests)
    with batcher.lockstep(1) as group:
        with group.worker(), pytest.raises(GreaterError, match="takes 1 threads"), group.worker():
            pass
        with pytest.raises(GreaterError, match="in lockstep already"), batcher.lockstep(1):
            pass
    assert batcher.submit(3) == 3


def test_a_second_thread_waits_for_the_first_to_leave_lockstep() -> None:
    batcher = Batcher(lambda requests: requests)
    entered: list[str] = []

    def second() -> int:
        with batcher.lockstep(1) as group, group.worker():
            entered.append("second")
            return batcher.submit(2)

    with ThreadPoolExecutor(1) as pool:
        with batcher.lockstep(1):
            waiting = pool.submit(second)
            time.sleep(0.1)
            assert batcher.submit(1) == 1  # this thread is no worker: it goes the ordinary way
            entered.append("first leaves")
        assert waiting.result(20) == 2
    assert entered == ["first leaves", "second"]


def test_a_worker_that_would_wait_for_its_own_group_is_refused() -> None:
    batcher = Batcher(lambda requests: requests)

    def nested() -> None:
        with group.worker(), batcher.lockstep(1):
            pass

    with batcher.lockstep(1) as group, ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(nested).exception(20), GreaterError)


def test_lockstep_can_be_entered_again_after_an_error() -> None:
    batcher = Batcher(lambda requests: requests)
    with pytest.raises(KeyboardInterrupt), batcher.lockstep(1):
        raise KeyboardInterrupt
    with batcher.lockstep(1) as group, group.worker():
        assert batcher.submit(1) == 1


def test_a_worker_that_waits_for_something_else_does_not_hold_the_others_for_ever() -> None:
    batcher = Batcher(lambda requests: requests)
    release = threading.Event()
    with batcher.lockstep(2, stall_seconds=0.05) as group, ThreadPoolExecutor(2) as pool:

        def wait_elsewhere() -> bool:
            with group.worker():
                return release.wait(20)

        def ask() -> int:
            with group.worker():
                return batcher.submit(3)

        blocked = pool.submit(wait_elsewhere)
        assert pool.submit(ask).result(20) == 3
        release.set()
        assert blocked.result(20) and group.stalls == 1


def test_a_failing_batch_fails_every_caller_and_the_next_one_works() -> None:
    def compute(requests: Any) -> Any:
        if "bad" in requests:
            raise GreaterError("bad batch")
        return requests

    batcher = Batcher(compute, window=30, most_rows=4)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(batcher.submit, word) for word in ("bad", "a", "b", "c")]
        assert {type(future.exception()) for future in futures} == {GreaterError}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(batcher.submit, "abcd")) == list("abcd")


# ---- copies and saved programs


def test_copies_share_weights_and_batches() -> None:
    lm = tiny_lm()
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    copied = copy.deepcopy(program)
    assert copied.get_lm().engine is lm.engine and program.deepcopy().get_lm().engine is lm.engine
    assert local_lm(engine_of(lm).engine).engine is lm.engine
    assert lm.copy(temperature=0.5).engine is lm.engine


def test_a_saved_program_finds_its_weights_again_in_this_process(tmp_path: Path) -> None:
    lm: Any = local_lm(pair(seed=11), max_tokens=12)
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    program.save(str(tmp_path / "program.json"))
    loaded = dspy.Predict("question -> answer")
    loaded.load(str(tmp_path / "program.json"), allow_unsafe_lm_state=True)
    assert loaded.get_lm().engine is lm.engine
    state = engine_of(lm).dump_state()
    with pytest.raises(WeightsError, match="passed as an object"):
        LocalEngine.load_state({**state, "identity": "gone@1:float32"})


def test_a_program_on_an_engine_that_the_caller_built_is_loaded_in_the_same_process(tmp_path: Path) -> None:
    lm: Any = local_lm(Engine(*pair(seed=12), name="mine"), max_tokens=12)
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    program.save(str(tmp_path / "program.json"))
    loaded = dspy.Predict("question -> answer")
    loaded.load(str(tmp_path / "program.json"), allow_unsafe_lm_state=True)
    assert loaded.get_lm().engine is lm.engine


FRESH = """
import sys, dspy
program = dspy.Predict("question -> answer")
program.load(sys.argv[1], allow_unsafe_lm_state=True)
lm = program.get_lm()
print(lm.model)
print(repr(lm("Hi", cache=False)))
import asyncio
print(repr(asyncio.run(lm.acall("Hi", cache=False))))
"""


@pytest.mark.slow
def test_a_saved_program_loads_its_weights_in_a_fresh_process(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    lm: Any = local_lm(path, max_tokens=12)
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    program.save(str(tmp_path / "program.json"))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "program.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer = repr(lm("Hi", cache=False))
    assert done.stdout.splitlines() == [lm.model, answer, answer]


def test_weights_that_changed_since_saving_are_an_error(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    state = engine_of(local_lm(path)).dump_state()
    save_tiny(tmp_path / "model", seed=1)
    with pytest.raises(WeightsError, match="found in its place"):
        LocalEngine.load_state({**state, "origin": {**state["origin"], "revision": "other"}})


@pytest.mark.slow
def test_with_one_seed_different_prompts_draw_differently_and_the_same_prompt_draws_again() -> None:
    lm = local_lm((tiny_model("llama"), tiny_tokenizer()), temperature=1.0, seed=7, cache=False, max_tokens=12)
    questions = [f"Question number {number}?" for number in range(6)]
    seeds = {lm.engine._call(_request_of(lm, question)).request.seed for question in questions}
    assert len(seeds) == len(questions)
    assert [lm(question) for question in questions] == [lm(question) for question in questions]


def _request_of(lm: Any, question: str) -> Any:
    config = lm15.Config(temperature=1.0, max_tokens=12, seed=7)
    return lm15.Request(model=lm.model, messages=(lm15.Message.user(question),), config=config)


def test_numbers_of_numpy_are_numbers() -> None:
    lm = tiny_lm(max_tokens=np.int64(5), temperature=np.float32(0.5), seed=np.int32(3))
    assert lm("one two") == tiny_lm(max_tokens=5, temperature=0.5, seed=3)("one two")
    assert described_lm(lm)["sampling"] == {"temperature": 0.5, "max_tokens": 5, "seed": 3}
    other = SimpleNamespace(model="m", kwargs={"temperature": np.float32(0.5), "max_tokens": np.int64(7)})
    assert json.dumps(described_lm(other)["sampling"]) == '{"temperature": 0.5, "max_tokens": 7}'
