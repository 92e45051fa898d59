"""Continuous batching: the same tokens as padded batches, and a model left as it was.

The twin tests run it on the CPU with plain attention. There it is slower, so `suits` never asks for it; what
only a flash attention kernel does (pages of its own, captured graphs) is left to the last test, which needs CUDA.
"""

from __future__ import annotations

import functools
import gc
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import transformers
from tiny_models import tiny_model, tiny_tokenizer

from dspy_greater import continuous
from dspy_greater.continuous import ContinuousBatchingError, generate_rows, suits
from dspy_greater.engine import Engine, GenerationRequest
from dspy_greater.prefix import is_out_of_memory
from dspy_greater.sampling import Row

PAGED = "page_size" in getattr(getattr(transformers, "ContinuousBatchingConfig", None), "__dataclass_fields__", ())
needs_pages = pytest.mark.skipif(not PAGED, reason="this release of transformers has no pages of a chosen size")
STOP = frozenset({*range(200, 230), 2, 4})
PAGES = "transformers.generation.continuous_batching.cache"


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Every manager collects garbage twice; what the test run holds by now need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A gigabyte of free memory and small batches, whatever the machine: prompts are read in several pieces."""
    if PAGED:
        memory = (torch.device("cpu"), 1 << 30, 0, 0)
        monkeypatch.setattr(f"{PAGES}.get_device_and_memory_breakdown", lambda: memory)
        monkeypatch.setattr(f"{PAGES}.PagedAttentionMemoryHandler._default_max_batch_tokens", 256)
    monkeypatch.setattr(continuous, "_PATIENCE", 0.02)
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def some_rows(count: int, *, shared: int = 0, stop: frozenset[int] = STOP, seed: int = 0) -> list[Row]:
    """Rows of all lengths and limits."""
    source = random.Random(seed)
    prefix = [source.randrange(5, 500) for _ in range(shared)]
    return [
        Row(
            (*prefix, *(source.randrange(5, 500) for _ in range(source.randrange(1, 90)))),
            source.randrange(1, 25),
            stop,
        )
        for _ in range(count)
    ]


def padded(model: Any, rows: list[Row]) -> list[tuple[list[int], str | None]]:
    """The twin: what the engine writes on a CPU, in padded batches."""
    engine = Engine(model, tiny_tokenizer(), name="tiny")
    requests = [
        GenerationRequest(row.prompt, row.max_new_tokens, stop_token_ids=tuple(row.stop_token_ids)) for row in rows
    ]
    return [(list(done.token_ids), done.finish_reason) for done in engine.complete(requests)]


def results(rows: list[Row]) -> list[tuple[list[int], str | None]]:
    return [(row.written, row.finish_reason) for row in rows]


def generate(model: Any, rows: list[Row]) -> Counter[str]:
    """Write the rows; returns the counters."""
    counts: Counter[str] = Counter()
    assert generate_rows(model, rows, tally=lambda **spent: counts.update(spent))
    return counts


@needs_pages
@pytest.mark.parametrize("kind, attention", [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa")])
def test_rows_are_written_as_in_padded_batches(kind: Literal["llama", "qwen2"], attention: str) -> None:
    model = tiny_model(kind, attn_implementation=attention)
    rows = some_rows(24)
    generate(model, rows)
    assert results(rows) == padded(model, rows)
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    assert len({len(row.written) for row in rows}) > 5


@needs_pages
def test_one_row_and_a_row_without_stop_tokens_are_written_too() -> None:
    model = tiny_model()
    rows = some_rows(1, stop=frozenset())
    generate(model, rows)
    assert results(rows) == padded(model, rows)
    assert rows[0].finish_reason == "length"


@needs_pages
def test_rows_that_do_not_fit_into_the_pages_together_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rows = some_rows(20)
    monkeypatch.setattr(continuous, "_pages", lambda rows, size: 6)  # 192 tokens, of the 900 they need
    counts = generate(model, rows)
    assert counts["forwards"] > 2 * max(row.max_new_tokens for row in rows)
    assert counts["prefilled_tokens"] > sum(len(row.prompt) for row in rows)  # some were put off and read again
    assert results(rows) == padded(model, rows)


@needs_pages
def test_where_memory_is_short_there_are_as_many_pages_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rows = some_rows(20)
    asked: list[int | None] = []
    manager = continuous._new_manager
    monkeypatch.setattr(
        continuous, "_new_manager", lambda model, pages: (asked.append(pages), manager(model, pages))[1]
    )
    monkeypatch.setattr(continuous, "_pages", lambda rows, size: 10**9)
    monkeypatch.setattr(f"{PAGES}.get_device_and_memory_breakdown", lambda: (torch.device("cpu"), 1 << 23, 0, 0))
    generate(model, rows)
    assert asked == [10**9, None]
    assert results(rows) == padded(model, rows)


@needs_pages
def test_an_interrupted_row_goes_on_from_what_it_has_written() -> None:
    model = tiny_model()
    rows = some_rows(8, stop=frozenset())
    expected = padded(model, rows)
    for row, (tokens, _) in zip(rows, expected, strict=True):
        row.written.extend(tokens[: len(tokens) // 2])
    started = sum(len(row.written) for row in rows)
    counts = generate(model, rows)
    assert results(rows) == expected
    assert counts["generated_tokens"] == sum(len(row.written) for row in rows) - started


@needs_pages
def test_counters_say_what_was_computed() -> None:
    rows = [Row((5, 6, 7), 4, frozenset()), Row((8,), 4, frozenset()), Row((9, 10), 2, frozenset())]
    counts = generate(tiny_model(), rows)
    assert counts == {
        "forwards": 4,
        "prefilled_tokens": 6,
        "padded_tokens": 0,
        "lm_head_rows": 10,
        "generated_tokens": 10,
    }


@needs_pages
def test_whole_pages_that_prompts_have_in_common_are_read_once() -> None:
    model = tiny_model()
    rows = some_rows(20, shared=70)
    counts = generate(model, rows)
    # Two whole pages; the rows of the first batch, which holds 256 tokens, cannot know of each other.
    assert counts["prefilled_tokens"] <= sum(len(row.prompt) for row in rows) - 64 * (len(rows) - 4)
    assert results(rows) == padded(model, rows)


@needs_pages
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_and_the_random_state_are_left_as_they_were(attention: str) -> None:
    model = tiny_model(attn_implementation=attention)
    settings, held = model.generation_config.to_dict(), set(vars(model))
    state = torch.get_rng_state()
    generate(model, some_rows(4))
    assert model.config._attn_implementation == attention
    assert model.generation_config.to_dict() == settings and set(vars(model)) == held
    assert torch.equal(torch.get_rng_state(), state)


def failing(model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int) -> list[int]:
    """Let the model raise after some forward passes, once."""
    forward, calls = model.forward, []

    @functools.wraps(forward)
    def fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == after + 1:
            raise error
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", fails)
    return calls


@needs_pages
def test_an_error_in_the_thread_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(attn_implementation="eager")
    failing(model, monkeypatch, RuntimeError("shapes do not match"), after=6)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate(model, some_rows(6))
    assert model.config._attn_implementation == "eager"


@needs_pages
def test_when_memory_runs_out_what_was_written_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rows = some_rows(6, stop=frozenset())
    expected = padded(model, rows)
    failing(model, monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), after=6)
    counts: Counter[str] = Counter()
    with pytest.raises(ContinuousBatchingError, match=r"ran out of memory \(CUDA out of memory") as raised:
        generate_rows(model, rows, tally=lambda **spent: counts.update(spent))
    assert is_out_of_memory(raised.value)
    assert 0 < counts["generated_tokens"] == sum(len(row.written) for row in rows)
    assert any(row.finish_reason is None for row in rows)
    generate(model, rows)
    assert results(rows) == expected


@needs_pages
def test_a_row_longer_than_all_pages_is_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "_pages", lambda rows, size: 1)
    with pytest.raises(ContinuousBatchingError, match="ran out of memory") as raised:
        generate(tiny_model(), [Row(tuple(range(5, 105)), 4, frozenset())])
    assert is_out_of_memory(raised.value)


@needs_pages
def test_no_room_for_a_single_page_is_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{PAGES}.get_device_and_memory_breakdown", lambda: (torch.device("cpu"), 0, 0, 0))
    with pytest.raises(ContinuousBatchingError, match="ran out of memory") as raised:
        generate(tiny_model(), some_rows(2))
    assert is_out_of_memory(raised.value)


@needs_pages
def test_a_row_given_up_without_a_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "_take", lambda row, tokens: row.written.extend(tokens))
    with pytest.raises(ContinuousBatchingError, match=r"gave up 2 of 2 rows .*padded batches"):
        generate(tiny_model(), some_rows(2))


@needs_pages
def test_an_interrupt_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(attn_implementation="eager")

    def interrupted(manager: Any, timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.ContinuousBatchingManager, "get_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, some_rows(3))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("where", ["setup", "first forward"])
def test_a_model_it_does_not_work_with_is_warned_about_once(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rows = some_rows(40)
    monkeypatch.setattr(continuous, "_flash_attention", lambda model: "sdpa")
    assert suits(model, rows)
    if where == "setup":
        monkeypatch.setattr(model, "init_continuous_batching", lambda **settings: model.no_such_kernel)
    else:
        failing(model, monkeypatch, RuntimeError("no such kernel"), after=0)
    with pytest.warns(UserWarning, match=r"does not work with this LlamaForCausalLM here .*padded batches instead"):
        assert not generate_rows(model, rows, tally=lambda **spent: None)
    assert not any(row.written for row in rows)
    assert not suits(model, rows)
    assert suits(tiny_model(), rows)
    continuous._refuse(model, RuntimeError("again"))  # no second warning, which would be an error here


Change = Callable[[list[Row]], Any]
CHANGES: dict[str, Change] = {
    "a sampled row": lambda rows: setattr(rows[3], "temperature", 0.7),
    "a row watched while it is written": lambda rows: setattr(rows[3], "on_token", lambda token: None),
    "few rows": lambda rows: rows.__delitem__(slice(4, None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_does_not_suit(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "_flash_attention", lambda model: "flash_attention_2")
    model, rows = tiny_model(), some_rows(40)
    assert suits(model, rows)
    CHANGES[change](rows)
    assert not suits(model, rows)


@pytest.mark.parametrize("kind, suited", [("llama", True), ("qwen2", True), ("gemma2", False)])
def test_it_suits_models_that_keep_everything_and_do_not_cap_their_scores(
    kind: Literal["llama", "qwen2", "gemma2"], suited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "_flash_attention", lambda model: "flash_attention_2")
    assert suits(tiny_model(kind), some_rows(40)) is suited
    if kind == "gemma2":  # for either reason
        assert not suits(tiny_model(kind, layer_types=["full_attention"] * 2), some_rows(40))
        uncapped = tiny_model(kind, attn_logit_softcapping=None)
        assert not suits(uncapped, some_rows(40))


def test_it_does_not_suit_a_cpu() -> None:
    assert not suits(tiny_model(dtype=torch.bfloat16), some_rows(200))


def on_cuda(chosen: str, *, dtype: torch.dtype = torch.bfloat16, supported: bool = True, second: str = "cuda") -> Any:
    """What is asked of a model before it is used, as if it were on a GPU."""
    weights = [SimpleNamespace(device=torch.device(device), dtype=dtype) for device in ("cuda", second)]
    return SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=chosen),
        parameters=lambda: iter(weights),
        get_input_embeddings=lambda: SimpleNamespace(weight=weights[0]),
        _supports_flash_attn=supported,
    )


@pytest.mark.parametrize(
    "model, installed, expected",
    [
        (on_cuda("sdpa"), (), None),
        (on_cuda("sdpa"), (2,), "flash_attention_2"),
        (on_cuda("sdpa"), (2, 3), "flash_attention_3"),
        (on_cuda("sdpa", supported=False), (2, 3), None),
        (on_cuda("sdpa", dtype=torch.float32), (2, 3), None),
        (on_cuda("sdpa", second="cpu"), (2, 3), None),
        (on_cuda("flash_attention_2"), (2, 3), "flash_attention_2"),
        (on_cuda("kernels-community/flash-attn2"), (), "kernels-community/flash-attn2"),
    ],
)
def test_an_installed_flash_attention_is_found(
    model: Any, installed: tuple[int, ...], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "is_flash_attn_2_available", lambda: 2 in installed)
    monkeypatch.setattr(continuous, "_flash_3_available", lambda: 3 in installed)
    assert continuous._flash_attention(model) == expected


@pytest.mark.parametrize(
    "chosen, size",
    [("sdpa", 32), ("flash_attention_3", 32), ("flash_attention_2", 256), ("kernels-community/flash-attn2", 256)],
)
def test_pages_are_small_where_the_kernel_reads_small_ones(chosen: str, size: int) -> None:
    assert continuous._page_size(on_cuda(chosen)) == size


@needs_pages
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and an installed flash attention")
def test_on_a_gpu_nearly_all_rows_begin_as_in_padded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16, hidden_size=256).cuda()
    if continuous._flash_attention(model) is None:
        pytest.skip("needs an installed flash attention")
    own = model.config._attn_implementation
    rows = some_rows(64, shared=70)
    assert suits(model, rows)
    generate(model, rows)
    assert model.config._attn_implementation == own
    assert all(row.finish_reason for row in rows)
    monkeypatch.setattr(continuous, "suits", lambda model, rows: False)  # for the twin
    pairs = list(zip(results(rows), padded(model, rows), strict=True))  # two kernels in bfloat16: ties fall either way
    assert sum(ours[0][:1] == theirs[0][:1] for ours, theirs in pairs) >= 0.9 * len(pairs)


def served_by_pages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the engine take the CPU for a device with a kernel; returns how many rows it hands in, each time."""
    handed: list[int] = []

    def counted(model: Any, rows: list[Row], *, tally: Any) -> bool:
        handed.append(len(rows))
        return generate_rows(model, rows, tally=tally)

    monkeypatch.setattr(continuous, "_flash_attention", lambda model: "sdpa")
    monkeypatch.setattr(continuous, "generate_rows", counted)
    return handed


@needs_pages
def test_the_engine_uses_it_where_it_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), some_rows(40)
    expected = padded(model, rows)
    handed = served_by_pages(monkeypatch)
    assert padded(model, rows) == expected
    assert handed == [40]


@needs_pages
def test_when_memory_runs_out_the_engine_goes_on_with_half_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), some_rows(70)
    expected = padded(model, rows)
    handed = served_by_pages(monkeypatch)
    engine = Engine(model, tiny_tokenizer(), name="tiny", max_batch_rows=70)
    failing(model, monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), after=6)
    requests = [
        GenerationRequest(row.prompt, row.max_new_tokens, stop_token_ids=tuple(row.stop_token_ids)) for row in rows
    ]
    assert [(list(done.token_ids), done.finish_reason) for done in engine.complete(requests)] == expected
    assert handed[0] == 70 and engine.max_batch_rows == 35


@needs_pages
def test_the_engine_goes_back_to_padded_batches_where_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), some_rows(40)
    expected = padded(model, rows)
    handed = served_by_pages(monkeypatch)
    monkeypatch.setattr(model, "init_continuous_batching", lambda **settings: model.no_such_kernel)
    with pytest.warns(UserWarning, match="does not work with this LlamaForCausalLM here"):
        assert padded(model, rows) == expected
    assert padded(model, rows) == expected
    assert handed == [40]
