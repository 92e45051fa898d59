"""The engine: batches that equal one row at a time, counters, memory, and a model left as it was."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspy_greater.errors import ContextLengthError, EngineMemoryError, LayoutError, SettingsError, WeightsError
from dspy_greater.lm.local import LocalEngine
from dspy_greater.model import sampling
from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.greedy import greedy_tokens
from dspy_greater.model.interface import GenerationRequest, Leaf, TokenQuery
from dspy_greater.model.kv_cache import InPlaceLayer
from dspy_greater.model.plain import PlainModel
from dspy_greater.model.registry import shared_engine
from tests.model_calls import generated, memory_runs_out, spent_on
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]


def build(kind: Any = "llama", *, max_batch_rows: int | None = None, **settings: Any) -> Engine:
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, len(tokenizer), **settings)
    return Engine(model, tokenizer, name=f"tiny-{kind}", max_batch_rows=max_batch_rows)


def random_prompts(count: int, *, shared: int = 0, seed: int = 0) -> list[tuple[int, ...]]:
    source = random.Random(seed)
    prefix = [source.randrange(5, 500) for _ in range(shared)]
    lengths = [source.randrange(1, 90) for _ in range(count)]
    return [(*prefix, *(source.randrange(5, 500) for _ in range(length))) for length in lengths]


def slow_twin(model: Any, prompt: tuple[int, ...], stop: frozenset[int], most: int) -> tuple[int, ...]:
    """One row, no cache, no padding, no batch: the obvious way to decode greedily."""
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_generates_what_one_row_at_a_time_would(kind: str, shared: int) -> None:
    engine = build(kind)
    prompts = random_prompts(12, shared=shared)
    stop = frozenset({*range(200, 230), 2, 4})
    found = generated(engine, prompts, 24, stop_token_ids=tuple(stop))
    assert [row.token_ids for row in found] == [slow_twin(engine.model, p, stop, 24) for p in prompts]


def test_a_stop_token_ends_a_row_and_is_not_part_of_it() -> None:
    engine = build()
    [whole] = generated(engine, [(5, 6)], 8, stop_token_ids=())
    last = whole.token_ids[5]
    [cut] = generated(engine, [(5, 6)], 8, stop_token_ids=(last,))
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(last)]
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")


def test_a_row_near_the_end_of_a_window_that_slides_writes_what_it_writes_alone_whatever_room_others_have() -> None:
    # Each row fits into the window of 64 tokens, and both do not: the shared beginning slides out of a common cache.
    head, long, short = ([*range(start, start + count)] for start, count in ((5, 20), (100, 40), (200, 2)))
    for seed in range(2):
        engine = build("gemma2", seed=seed)
        requests = [
            GenerationRequest((*head, *long), 4, stop_token_ids=()),
            GenerationRequest((*head, *short), 42, stop_token_ids=(), temperature=1.0, seed=seed),
        ]
        assert engine.generate(requests) == [engine.generate([request])[0] for request in requests]


@pytest.mark.slow
def test_rows_that_go_on_after_a_lack_of_memory_beside_fresh_ones_stay_in_a_window_that_slides() -> None:
    engine = build("gemma2", max_batch_rows=5)
    prompt = tuple(range(5, 27))
    requests = [GenerationRequest(prompt, 42, temperature=1.0, seed=seed, stop_token_ids=()) for seed in range(10)]
    alone = [engine.generate([request])[0] for request in requests]
    calls = itertools.count()
    with memory_runs_out(engine, lambda ids: next(calls) == 20) as failed:
        assert engine.generate(requests) == alone
    assert len(failed) == 1


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 48,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}


def of_two_rotations(**options: Any) -> Engine:
    """A model that embeds positions in another way where a row has more than 48 tokens."""
    return build(context=384, rope_parameters=LONGROPE, **options)


@pytest.mark.parametrize("most_rows", [2, 64])
@pytest.mark.parametrize("drafts", [False, True])
def test_rows_that_are_or_become_long_leave_the_positions_of_the_others_as_they_are(
    most_rows: int, drafts: bool
) -> None:
    engine, ended, told = of_two_rotations(max_batch_rows=most_rows), list[Any](), list[int]()
    shared = tuple(range(5, 25))
    lengths = [(20, 8), (10, 40), (27, 1), (28, 1), (28, 9), (29, 9), (60, 9), (30, 30), (80, 4), (5, 80)]
    requests = [
        GenerationRequest(
            (*shared, *range(100, 100 + length)), most, float(row % 2), seed=row, stop_token_ids=(), on_end=ended.append
        )
        for row, (length, most) in enumerate(lengths)
    ]
    requests[1] = replace(requests[1], on_token=told.append)
    expected = PlainModel(engine).generate([replace(request, on_end=None, on_token=None) for request in requests])
    drafted = (
        [(request.prompt, row.token_ids) for request, row in zip(requests, expected, strict=True)] if drafts else ()
    )
    with engine.session(drafted) as session:
        assert session.generate(requests) == expected
    assert sorted(map(repr, ended)) == sorted(map(repr, expected))  # each once, in its end
    assert tuple(told) == expected[1].token_ids


def test_a_lack_of_memory_changes_no_row_that_becomes_long() -> None:
    engine = of_two_rotations(max_batch_rows=8)
    requests = [GenerationRequest(tuple(range(5 + row, 35 + row)), 30, stop_token_ids=()) for row in range(6)]
    expected = PlainModel(engine).generate(requests)
    for at in (10, 25):
        calls = itertools.count()
        with memory_runs_out(engine, lambda ids, at=at, calls=calls: next(calls) == at) as failed:
            assert engine.generate(requests) == expected
        assert len(failed) == 1


def test_long_rows_are_not_read_together_with_short_ones_whose_positions_they_would_change() -> None:
    engine = of_two_rotations()
    plain, rows = PlainModel(engine), [tuple(range(5, 5 + length)) for length in (60, 10, 48, 49, 30)]
    queries = [TokenQuery(row, at) for row, tokens in enumerate(rows) for at in (7, len(tokens) - 1)]
    for leaf in (Leaf((5,) * 5, engine.embed([7])), Leaf((5,) * 5, engine.embed([7, 8, 9, 10, 11]))):
        found, expected = (model.logprob_gradient(rows, queries, leaf) for model in (engine, plain))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        engine.token_logprobs(rows, queries), plain.token_logprobs(rows, queries), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(engine.next_token_logprobs(rows), plain.next_token_logprobs(rows), rtol=1e-4, atol=1e-4)
    written = plain.generate([GenerationRequest(tokens, 3, stop_token_ids=()) for tokens in rows])
    whole = [((*tokens, *text.token_ids), len(tokens)) for tokens, text in zip(rows, written, strict=True)]
    assert greedy_tokens(engine, whole)[1:2] == [[True] * 3]


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_batch_or_the_order() -> None:
    prompts = random_prompts(20, shared=30)
    whole = generated(build(), prompts, 16)
    assert generated(build(max_batch_rows=3), prompts, 16) == whole
    assert generated(build(), prompts[::-1], 16) == whole[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_sampled_row_is_the_same_alone_and_in_a_batch(top_p: float) -> None:
    engine = build()
    prompts = random_prompts(6)
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": top_p}
    batch = generated(engine, prompts, 20, seed=7, **settings)
    assert generated(build(max_batch_rows=1), prompts, 20, seed=7, **settings) == batch
    assert generated(engine, prompts, 20, seed=8, **settings) != batch
    first, second, again = engine.generate(
        [GenerationRequest(prompts[0], 20, seed=seed, **settings) for seed in (1, 2, 1)]
    )
    assert first == again != second


def test_sampled_tokens_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    rows = [sampling.Row((1,), 1, frozenset(), temperature=1.0, seed=i) for i in range(4000)]
    counts = torch.bincount(torch.tensor(sampling.choose(logits, rows)), minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    for row in rows:
        row.top_p = 0.6
    assert set(sampling.choose(logits, rows)) == {0, 1}  # 0.5 alone does not reach 0.6


def test_sampling_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    generated(build(), random_prompts(3), 5, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_counters_count_tokens_without_padding() -> None:
    engine = build()
    spent = spent_on(engine, lambda: generated(engine, [(5, 6, 7), (8,)], 4, stop_token_ids=()))
    assert spent == Counters(forwards=4, prefilled_tokens=4, generated_tokens=8, padded_tokens=2, lm_head_rows=8)
    engine.tally.add(backward_tokens=3)
    assert engine.counters.backward_tokens == 3


def test_a_shared_prefix_is_read_once() -> None:
    engine = build()
    prefix = tuple(range(10, 50))
    generated(engine, [(*prefix, 60), (*prefix, 61, 62)], 1)
    assert engine.counters.prefilled_tokens == 43


def test_finished_rows_leave_the_batch() -> None:
    engine = build()
    rows = [GenerationRequest((5, 6, i), 2 if i < 18 else 12, stop_token_ids=()) for i in range(10, 20)]
    engine.generate(rows)
    assert engine.counters.padded_tokens == 0
    assert engine.counters.lm_head_rows == 8 * 2 + 2 * 12


@given(
    rows=st.integers(1, 7),
    keep=st.sets(st.integers(0, 6), min_size=1),
    first=st.integers(0, 3),
    buffered=st.booleans(),
)
def test_rows_that_stay_keep_their_states_wherever_they_move(
    rows: int, keep: set[int], first: int, buffered: bool
) -> None:
    keep = {row % rows for row in keep}
    states = torch.arange(rows * 2 * 5 * 3, dtype=torch.float32).reshape(rows, 2, 5, 3)
    layer = InPlaceLayer(limit=9)
    if buffered:
        layer.update(states.clone(), -states)
    else:
        layer.lazy_initialization(states, states)
        layer.keys, layer.values = states.clone(), -states
    order = sorted(keep, key=lambda row: (row >= len(keep), row))
    holes = iter([row for row in order if row >= len(keep)])
    order = [row if row in keep else next(holes) for row in range(len(keep))]
    layer.select(order, first)
    new = torch.full((len(keep), 2, 1, 3), 7.0)
    keys, values = layer.update(new, new)
    assert torch.equal(keys, torch.cat([states[order, :, first:], new], 2))
    assert torch.equal(values, torch.cat([-states[order, :, first:], new], 2))


def test_out_of_memory_halves_the_batch_keeps_what_was_generated_and_remembers(monkeypatch: Any) -> None:
    prompts = random_prompts(10)
    expected = generated(build(), prompts, 12)
    engine = build(max_batch_rows=10)
    forward, calls = engine.model.forward, []

    def starved(*args: Any, **options: Any) -> Any:
        calls.append(options["input_ids"].shape)
        if options["input_ids"].shape[0] > 4 and len(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, **options)

    starved.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(engine.model, "forward", starved)
    seen: list[list[int]] = [[] for _ in prompts]
    requests = [GenerationRequest(prompt, 12, on_token=seen[row].append) for row, prompt in enumerate(prompts)]
    assert engine.generate(requests) == expected
    assert engine.max_batch_rows <= 4
    assert [tuple(each) for each in seen] == [row.token_ids for row in expected]  # no token was reported twice


def test_a_single_row_that_does_not_fit_says_what_to_do(monkeypatch: Any) -> None:
    engine = build()

    def starved(*args: Any, logits_to_keep: int = 0, **options: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 TB")

    monkeypatch.setattr(engine.model, "forward", starved)
    with pytest.raises(EngineMemoryError, match=r"One row alone .* 'tiny-llama' .*smaller dtype"):
        generated(engine, [(5, 6)], 2)


def test_a_row_that_does_not_fit_spoils_neither_the_other_rows_nor_the_size_of_the_batches(monkeypatch: Any) -> None:
    prompts = random_prompts(6)
    expected = generated(build(), prompts, 4)
    engine = build(max_batch_rows=6)
    forward = engine.model.forward

    def starved(*args: Any, **options: Any) -> Any:
        if options["input_ids"].shape[1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, **options)

    starved.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(engine.model, "forward", starved)
    with pytest.raises(EngineMemoryError, match="One row alone") as found:
        generated(engine, [*prompts[:3], [7] * 120, *prompts[3:]], 4)
    assert [found.value.finished.get(place) for place in range(7)] == [*expected[:3], None, *expected[3:]]
    assert engine.max_batch_rows == 6

    local = LocalEngine(engine)
    with ThreadPoolExecutor(3) as pool, local.lockstep(3) as group:

        def asked(prompt: Any) -> Any:
            with group.worker():
                return local.batcher.submit(GenerationRequest(tuple(prompt), 4))

        futures = [pool.submit(asked, prompt) for prompt in (prompts[0], [7] * 120, prompts[1])]
        errors = [future.exception() for future in futures]
    assert [type(error) for error in errors] == [type(None), EngineMemoryError, type(None)]
    assert [futures[place].result() for place in (0, 2)] == expected[:2]


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: Any) -> None:
    engine = build()

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine.model, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generated(engine, [(5, 6)], 2)


def test_a_prompt_without_room_names_its_length_the_limit_and_the_remedy() -> None:
    engine = build(context=32)
    with pytest.raises(ContextLengthError, match=r"40 tokens .* context of 32 tokens .*shorten the input"):
        generated(engine, [range(10, 50)], 5)
    [full] = generated(engine, [range(10, 40)], 50, stop_token_ids=())
    assert (len(full.token_ids), full.finish_reason) == (2, "length")
    with pytest.raises(LayoutError, match="no tokens"):
        generated(engine, [()], 5)


def test_a_request_that_cannot_work_is_refused_with_a_reason() -> None:
    engine = build()
    with pytest.raises(SettingsError, match="max_new_tokens is 0; it has to be at least 1"):
        generated(engine, [(5, 6)], 0)
    for options in ({"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(SettingsError, match="temperature is .* and top_p is .*; they have to be at least 0"):
            generated(engine, [(5, 6)], 2, **options)
    with pytest.raises(SettingsError, match="max_batch_rows is 0; it has to be at least 1"):
        build(max_batch_rows=0)
    assert engine.counters == Counters()


def test_on_token_ends_a_row() -> None:
    engine = build()
    endings = ((5, 6), lambda token: None), ((7, 8), lambda token: True)
    found = engine.generate(
        [GenerationRequest(prompt, 9, stop_token_ids=(), on_token=ends) for prompt, ends in endings]
    )
    assert [len(row.token_ids) for row in found] == [9, 1]
    assert found[1].finish_reason == "stop"


def test_the_end_of_turn_token_of_the_chat_template_stops_a_row() -> None:
    tokenizer = tiny_tokenizer()
    engine = Engine(tiny_model(vocab_size=len(tokenizer), eos_token_id=2), tokenizer, name="tiny")
    assert engine.weights.stop_token_ids == {2, 4}


def test_a_model_that_was_handed_in_is_left_as_it_was() -> None:
    engine = build()
    engine.model.train()
    engine.model.model.layers[0].eval()
    engine.model.get_input_embeddings().weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in engine.model.parameters()]
    modes = [module.training for module in engine.model.modules()]
    with engine.exclusive(), engine.exclusive():
        assert not any(parameter.requires_grad for parameter in engine.model.parameters())
        assert not any(module.training for module in engine.model.modules())
    with pytest.raises(ContextLengthError):
        generated(engine, [(5,) * 2000], 1)
    assert [parameter.requires_grad for parameter in engine.model.parameters()] == flags
    assert [module.training for module in engine.model.modules()] == modes


def test_weights_are_never_copied() -> None:
    engine = build()
    assert copy.deepcopy({"engine": engine})["engine"] is engine
    assert copy.copy(engine) is engine


def test_the_identity_names_weights_version_and_type(tmp_path: Any) -> None:
    one, other = build(), build(seed=1)
    assert one.identity == build().identity
    assert one.identity.startswith("tiny-llama@") and one.identity.endswith(":float32")
    assert other.identity != one.identity
    half = build(dtype=torch.bfloat16)
    assert half.identity.endswith(":bfloat16") and half.weights.dtype == torch.bfloat16


def test_a_directory_is_loaded_frozen_and_once(tmp_path: Any) -> None:
    path = save_tiny(tmp_path / "model")
    engine = shared_engine(path)
    assert shared_engine(path) is engine
    assert engine.weights.embedding_matrix.shape == (512, 32) and engine.context_length == 1024
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())
    assert engine.identity == f"{path}@{engine.checks.revision}:float32"
    built = build()
    prompts = random_prompts(3)
    assert generated(engine, prompts, 6) == generated(built, prompts, 6)


def test_pickled_weights_and_missing_files_are_refused(tmp_path: Any) -> None:
    path = save_tiny(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(WeightsError, match=r"not be loaded .*safetensors.*pickled weights are not read"):
        Engine.from_pretrained(path)
    with pytest.raises(WeightsError, match="not a transformers causal language model"):
        Engine(object(), tiny_tokenizer(), name="nothing")


def test_random_parameters_are_refused(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = save_tiny(tmp_path / "model")
    weights = load_file(f"{path}/model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lack 1 parameters .*model\.norm\.weight"):
        Engine.from_pretrained(path)
