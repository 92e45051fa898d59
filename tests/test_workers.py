"""Workers change where a batch is computed and nothing else: not the numbers, not the search, not what is counted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_runs import exact_match

from dspy_greater import GReaTer
from dspy_greater.errors import MissingExtraError, SettingsError, WorkerError, WorkerLostError
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import GenerationRequest, Leaf, TokenQuery
from dspy_greater.model.plain import PlainModel
from dspy_greater.workers import crews, ray_actors
from dspy_greater.workers.in_process import InProcessWorker, in_process
from dspy_greater.workers.jobs import Answer, Job
from dspy_greater.workers.plan import even_batches
from dspy_greater.workers.pool import Pool
from dspy_greater.workers.sharded import ShardedModel
from tests.short_search import short_search
from tests.tiny_models import InDouble, numbered_tokenizer, tiny_model

VOCABULARY = 64
KINDS = ["llama", "qwen2", "gemma2"]


def engine_of(kind: Any = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Engine:
    return Engine(tiny_model(kind, VOCABULARY, dtype), numbered_tokenizer(VOCABULARY), name=kind, **options)


def sequences_of(count: int = 9, *, common: int = 50, seed: int = 0) -> list[tuple[int, ...]]:
    """Sequences that begin alike and end at different lengths, in no order of length."""
    drawn = random.Random(seed)
    alike = [drawn.randrange(3, VOCABULARY) for _ in range(common)]
    lengths = drawn.sample(range(6, 6 + 3 * count, 3), count)
    return [tuple(alike + [drawn.randrange(3, VOCABULARY) for _ in range(length)]) for length in lengths]


def queries_of(sequences: list[tuple[int, ...]]) -> list[TokenQuery]:
    found: list[TokenQuery] = []
    for row, tokens in enumerate(sequences):
        found += [TokenQuery(row, at, 1.0, 0.3) for at in range(30, 34)]
        found += [TokenQuery(row, at, 0.2, -0.5 - row) for at in range(len(tokens) - 3, len(tokens))]
    return random.Random(1).sample(found, len(found))


class Mortal(InProcessWorker):
    """Dies of those jobs for which `dies` says so."""

    def __init__(self, engine: Engine, dies: Callable[[Job], bool], device: str = "cpu") -> None:
        super().__init__(engine)
        self._dies, self.device = dies, device

    def submit(self, job: Job) -> Future[Answer]:
        if not self._dies(job):
            return super().submit(job)
        future: Future[Answer] = Future()
        future.set_exception(WorkerLostError("killed."))
        return future


def at_turn(turn: int, kind: str) -> Callable[[Job], bool]:
    """Dies at one job of a kind, once."""
    seen: list[Job] = []

    def dies(job: Job) -> bool:
        seen.extend([job] if job.kind == kind else [])
        return job.kind == kind and len(seen) == turn + 1

    return dies


def mortal_pool(engine: Engine, count: int, dies: Callable[[Job], bool]) -> Pool:
    return Pool([Mortal(engine, dies) for _ in range(count)], lambda: Mortal(engine, dies))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 9])
def test_workers_come_to_the_numbers_of_reading_each_sequence_alone(kind: Any, count: int) -> None:
    engine = engine_of(kind, max_batch_tokens=300)
    model, slow = ShardedModel(engine, in_process(engine, 2)), PlainModel(engine)
    sequences = sequences_of(count)
    asked = queries_of(sequences)
    close: dict[str, float] = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(model.token_logprobs(sequences, asked), slow.token_logprobs(sequences, asked), **close)
    torch.testing.assert_close(model.next_token_logprobs(sequences), slow.next_token_logprobs(sequences), **close)
    with InDouble():
        for value in (engine.embed([each[20] for each in sequences]), engine.embed([5])):
            leaf = Leaf((20,) * count, value)
            found = model.logprob_gradient(sequences, asked, leaf)
            torch.testing.assert_close(found, slow.logprob_gradient(sequences, asked, leaf), rtol=1e-7, atol=1e-9)


def test_sequences_that_share_nothing_and_questions_that_need_no_leaf_are_answered() -> None:
    engine = engine_of()
    model, slow = ShardedModel(engine, in_process(engine, 2)), PlainModel(engine)
    apart = [tuple(random.Random(row).choices(range(3, VOCABULARY), k=20 + row)) for row in range(4)]
    asked = [TokenQuery(row, at) for row in (2, 0) for at in (1, 7)]
    torch.testing.assert_close(model.token_logprobs(apart, asked), slow.token_logprobs(apart, asked))
    assert model.token_logprobs(apart, []).shape == (0,)
    late = Leaf((10,) * 4, engine.embed([5]))
    assert not bool(model.logprob_gradient(apart, asked, late).any())


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_workers_gives_the_same_bits_and_the_same_counters(count: int) -> None:
    def computed(workers: int) -> tuple[Any, ...]:
        engine = engine_of(dtype=torch.float32, max_batch_tokens=300)
        with ShardedModel(engine, in_process(engine, workers)).session() as model:
            values = (
                model.token_logprobs(sequences, asked),
                model.token_logprobs(sequences, asked[:5]),
                model.logprob_gradient(sequences, asked, Leaf((20,) * 9, engine.embed([5]))),
                model.logprob_gradient(sequences, asked, Leaf((20,) * 9, engine.embed([5] * 9))),
                model.next_token_logprobs(sequences),
            )
        return (*(each.numpy().tobytes() for each in values), engine.counters)

    sequences = sequences_of()
    asked = queries_of(sequences)
    assert computed(count) == computed(3)


def test_a_beginning_is_read_once_by_each_worker_and_counted_once() -> None:
    engine, sequences = engine_of(max_batch_tokens=300), sequences_of()
    asked = [TokenQuery(row, len(each) - 1) for row, each in enumerate(sequences)]
    with ShardedModel(engine, in_process(engine, 2)).session() as model:
        before = engine.counters
        model.token_logprobs(sequences, asked)
        read = (engine.counters - before).prefilled_tokens
    assert read == 50 + sum(len(each) - 50 for each in sequences)


def test_rows_that_were_generated_in_a_session_are_read_on_from_their_states() -> None:
    engine, prompts = engine_of(dtype=torch.float32), sequences_of(4)
    asked: list[Job] = []
    model = ShardedModel(engine, mortal_pool(engine, 1, lambda job: bool(asked.append(job))))
    requests = [GenerationRequest(each, 6, stop_token_ids=(7,)) for each in prompts[:3]]
    with model.session() as session:
        written = [each.token_ids for each in session.generate(requests)]
        rest = [(*prompt, *text, 5, 6) for prompt, text in zip(prompts, written, strict=False)] + [prompts[3]]
        queries = [TokenQuery(row, len(each) - 1) for row, each in enumerate(rest)]
        found = session.token_logprobs(rest, queries)
    torch.testing.assert_close(found, PlainModel(engine).token_logprobs(rest, queries), rtol=1e-4, atol=1e-4)
    assert [each.sequences for each in asked] == [(prompts[3],)]


def test_batches_are_even_and_follow_from_the_rows_alone() -> None:
    lengths = [random.Random(row).randrange(20, 200) for row in range(40)]
    batches = even_batches(lengths, 2048)
    assert sorted(row for batch in batches for row in batch) == list(range(40))
    sizes = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert max(sizes) <= 512 and min(sizes) > 0.5 * max(sizes)
    assert even_batches([], 2048) == [] and even_batches([900], 2048) == [[0]]


# --- workers that die


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["logprobs", "gradient", "next"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_batch_of_a_worker_that_died_is_done_by_another(kind: str, count: int) -> None:
    engine, sequences = engine_of(dtype=torch.float32, max_batch_tokens=300), sequences_of()
    asked, leaf = queries_of(sequences), Leaf((20,) * 9, engine.embed([5]))

    def all_of(pool: Pool) -> list[bytes]:
        model = ShardedModel(engine, pool)
        found = (
            model.token_logprobs(sequences, asked),
            model.logprob_gradient(sequences, asked, leaf),
            model.next_token_logprobs(sequences),
        )
        return [each.numpy().tobytes() for each in found]

    died = at_turn(1, kind)
    assert all_of(mortal_pool(engine, count, died)) == all_of(in_process(engine, 2))


def test_a_batch_that_ends_every_worker_is_an_error_that_says_its_size() -> None:
    engine = engine_of()
    pool = mortal_pool(engine, 2, lambda job: True)
    with pytest.raises(WorkerError, match="3 workers died .* of the same batch, 1 rows of at most 3 tokens; .*killed."):
        ShardedModel(engine, pool).next_token_logprobs([(3, 4, 5)])


def test_where_no_other_worker_is_to_be_had_those_that_are_left_go_on() -> None:
    engine, sequences = engine_of(max_batch_tokens=300), sequences_of()

    def refuse() -> Mortal:
        raise WorkerError("The cluster is full.")

    died = at_turn(0, "next")
    pool = Pool([Mortal(engine, died), Mortal(engine, died)], refuse)
    with pytest.warns(RuntimeWarning, match="could not be replaced; 1 go on. The cluster is full."):
        found = ShardedModel(engine, pool).next_token_logprobs(sequences)
    torch.testing.assert_close(found, PlainModel(engine).next_token_logprobs(sequences))
    alone = Pool([Mortal(engine, at_turn(0, "next"))], refuse)
    with pytest.raises(WorkerError, match="The cluster is full."):
        ShardedModel(engine, alone).next_token_logprobs(sequences)


def test_what_a_job_raises_is_raised() -> None:
    engine = engine_of()
    with pytest.raises(IndexError):
        ShardedModel(engine, in_process(engine, 2)).next_token_logprobs([(3, VOCABULARY + 7)])


def test_unlike_devices_are_said() -> None:
    engine = engine_of()
    workers = [Mortal(engine, lambda job: False, device) for device in ("cpu", "NVIDIA H200", "cpu")]
    with pytest.warns(RuntimeWarning, match="unlike devices: 1 on NVIDIA H200, 2 on cpu"):
        Pool(workers, lambda: workers[0])


# --- a search


def searched(workers: Any, log_dir: Path | None = None, **settings: Any) -> list[str]:
    """Every event of a search, but for seconds."""
    events: list[Any] = []
    short_search(callbacks=[events.append], log_dir=log_dir, workers=workers, **settings)
    return [repr(each) for each in events]


def lines_of(journal: Path) -> list[Any]:
    """The events of a journal, without seconds and checksums."""
    found = [json.loads(line) for line in (journal / "journal.jsonl").read_text().splitlines()]
    return [without_times(each) for each in found]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in ("seconds", "crc32")}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def hiring(count: int, dies: Callable[[Job], bool] = lambda job: False) -> Callable[[Engine], Pool]:
    return lambda engine: mortal_pool(engine, count, dies)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_searches_with_one_two_and_three_workers_write_the_same_journal(tmp_path: Path, variant: Any) -> None:
    for count in (1, 2, 3):
        searched(hiring(count), tmp_path / str(count), variant=variant)
    journals = [lines_of(tmp_path / str(count)) for count in (1, 2, 3)]
    assert len(journals[0]) >= 4
    assert journals[0] == journals[1] == journals[2]


@pytest.mark.slow
def test_a_search_in_which_a_worker_dies_within_a_gradient_finds_the_same(tmp_path: Path) -> None:
    killed: list[Job] = []
    died = at_turn(1, "gradient")

    def dies(job: Job) -> bool:
        killed.extend([job] if (now := died(job)) else [])
        return now

    searched(hiring(2), tmp_path / "alive", forecast_share=0)  # whatever it costs beside so few rows
    searched(hiring(2, dies), tmp_path / "killed", forecast_share=0)
    assert len(killed) == 1
    assert lines_of(tmp_path / "alive") == lines_of(tmp_path / "killed")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    searched(hiring(3), tmp_path / "whole", steps=2)

    def stop_after_one(event: Any) -> Any:
        return False if type(event).__name__ == "StepTaken" else None

    parts: dict[str, Any] = {"steps": 2, "log_dir": tmp_path / "parts"}
    short_search(**parts, workers=hiring(1), callbacks=[stop_after_one])
    short_search(**parts, workers=hiring(2))
    steps = [each for each in lines_of(tmp_path / "whole") if "candidates" in json.dumps(each)]
    assert steps == [each for each in lines_of(tmp_path / "parts") if "candidates" in json.dumps(each)]


# --- what workers= may be


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "", " ", [2], int])
def test_what_is_no_number_of_workers_is_refused_when_the_optimizer_is_built(value: Any) -> None:
    with pytest.raises(SettingsError, match="workers=.*give a whole number of at least 1, 'auto', the address"):
        GReaTer(metric=exact_match, workers=value)


@pytest.mark.parametrize("value", [2, "auto", "ray://head:10001"])
def test_without_ray_the_line_that_installs_it_is_said(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspy_greater.workers.cluster.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"workers= needs Ray: pip install 'dspy-greater\[ray\]'"):
        GReaTer(metric=exact_match, workers=value)
    assert GReaTer(metric=exact_match).workers is None


@pytest.mark.parametrize("number", [1, 3], ids=["one of the first", "one in the place of another"])
@pytest.mark.parametrize("moment", ["start", "ready"])
def test_workers_that_were_begun_are_ended_where_one_of_them_fails(
    moment: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cluster of the caller's own, which is not ended with them, they would keep its room."""
    monkeypatch.setattr(ray_actors, "refuse_without_ray", lambda workers: None)
    monkeypatch.setattr(ray_actors, "joined", lambda address, count: lambda: None)
    monkeypatch.setattr(ray_actors, "_share", lambda engine, count, shards: ray_actors.Share(3, 1, 0))
    monkeypatch.setattr(ray_actors.Plan, "of", lambda engine: None)
    begun: list[Any] = []
    closed: list[Any] = []

    class Begun(Mortal):
        def close(self) -> None:
            closed.append(self)

    def start(plan: Any, share: Any) -> Begun:
        if moment == "start" and len(begun) == number:
            raise KeyboardInterrupt
        begun.append(Begun(engine, dies=lambda job: True))
        return begun[-1]

    def ready(worker: Begun, share: Any, engine: Any) -> Begun:
        if moment == "ready" and begun.index(worker) == number:
            raise KeyboardInterrupt
        return worker

    engine = engine_of()
    with pytest.raises(KeyboardInterrupt):
        ray_actors.hired(engine, 3, 1, start, ready).do([Job("next", ((1, 5),))])
    assert len(begun) == (number if moment == "start" else max(3, number + 1))
    assert closed == (begun if number == 1 else [begun[0], *begun[3:]])  # the first died


def test_workers_over_other_weights_are_closed_before_new_ones_start() -> None:
    closed: list[str] = []

    def hire(engine: Engine) -> Pool:
        return Pool([InProcessWorker(engine)], lambda: InProcessWorker(engine), lambda: closed.append(engine.name))

    one, other = engine_of("llama"), engine_of("qwen2")
    with crews.Crews(hire) as held:
        assert isinstance(held.model(one), ShardedModel)
        held.model(one)
        assert closed == []
        held.model(other)
        assert closed == ["llama"]
    assert closed == ["llama", "qwen2"]
