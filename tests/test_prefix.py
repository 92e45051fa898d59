"""What prompts begin with is read once, and nothing else changes by it: losses, gradients, texts, the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dspy_greater.estimators.paper_gradient import embedding_gradient
from dspy_greater.model.engine import Counters, Engine
from dspy_greater.model.fast.prefix_cache import LEAST_SHARED, PrefixStore, shared_length
from dspy_greater.model.teacher_forcing import teacher_forced_losses
from tests.tiny_models import tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY = 512
SYSTEM, INSTRUCTION, TAIL = 21, 5, 4  # tokens that all rows begin with
COMMON = SYSTEM + INSTRUCTION + TAIL
POSITIONS = [0, 2, INSTRUCTION - 1]


@dataclass(frozen=True)
class Span:
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    token_ids: tuple[int, ...]
    instruction: Span
    answer: Span


def rows(lengths: Sequence[int] = (9, 1, 14, 3), *, answer: int = 2, seed: int = 0) -> list[Row]:
    """Rows that begin alike up to `COMMON`, then read and reason for so many tokens, then answer."""
    generator = torch.Generator().manual_seed(seed)

    def some(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, VOCABULARY, (length,), generator=generator).tolist())

    common = (1, *some(COMMON - 1))
    found = []
    for number, length in enumerate(lengths):
        ids = (*common, 5 + number, *some(length - 1), *some(answer))
        found.append(Row(ids, Span(SYSTEM, SYSTEM + INSTRUCTION), Span(len(ids) - answer, len(ids))))
    return found


def build(kind: Any = "llama", dtype: torch.dtype = torch.float32, *, shares: bool = True, **settings: Any) -> Engine:
    engine = Engine(tiny_model(kind, VOCABULARY, dtype, **settings), tiny_tokenizer(), name="tiny", max_batch_rows=8)
    if not shares:
        engine.prefixes.reach = 0  # the slow and obvious way: every row is read from its first token
    return engine


def spent_on(engine: Engine, work: Callable[[], Any]) -> Counters:
    before = engine.counters
    work()
    return engine.counters - before


def prompts_of(examples: Sequence[Row]) -> list[tuple[int, ...]]:
    return [each.token_ids[: each.answer.start] for each in examples]


def assert_same_losses(found: Any, expected: Any, bound: float) -> None:
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=bound)
    assert found.fluency_nll == pytest.approx(expected.fluency_nll, rel=bound)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


# --- the same numbers ---

PRECISIONS = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = {
    "odd lengths": rows(),
    "a single row": rows([7]),
    "identical rows": [rows([6])[0]] * 3,
    "an answer that all begin with": [
        Row(each.token_ids, each.instruction, Span(SYSTEM + INSTRUCTION, SYSTEM + INSTRUCTION + 2)) for each in rows()
    ],
    "an answer that ends where rows begin to differ": [
        Row(each.token_ids, each.instruction, Span(COMMON - 1, COMMON + 1)) for each in rows()
    ],
    "an instruction that ends where rows begin to differ": [
        Row(each.token_ids, Span(COMMON - 3, COMMON), each.answer) for each in rows()
    ],
}


@pytest.mark.parametrize("dtype, bound", PRECISIONS)
@pytest.mark.parametrize(
    "kind, attention",
    [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa"), ("qwen2", "eager"), ("gemma2", "eager")],
)
def test_losses_and_gradients_are_those_of_rows_read_in_full(
    kind: Any, dtype: Any, bound: float, attention: str
) -> None:
    settings: dict[str, Any] = {
        "attn_implementation": attention,
        "sharpness": 0.03,
    }  # mild: in float32 a sharp model rounds coarser
    engine, twin = (build(kind, dtype, shares=shares, **settings) for shares in (True, False))
    for examples in SHAPES.values():
        found, expected = (embedding_gradient(each, examples, position=1) for each in (engine, twin))
        assert relative_error(found.per_example, expected.per_example) < bound
        assert_same_losses(teacher_forced_losses(engine, examples), teacher_forced_losses(twin, examples), bound)
    for position in POSITIONS:
        found, expected = (embedding_gradient(each, rows(), position=position) for each in (engine, twin))
        assert relative_error(found.per_example, expected.per_example) < bound
        assert_same_losses(found.losses, expected.losses, bound)


def test_a_token_that_stands_after_all_that_is_scored_has_no_gradient() -> None:
    examples = [Row(each.token_ids, each.instruction, Span(3, 5)) for each in rows()]
    found = embedding_gradient(build(), examples, position=INSTRUCTION - 1)
    assert not found.per_example.any() and all(found.losses.finite)


@pytest.mark.parametrize("shared", [True, False])
def test_a_sliding_window_is_shared_up_to_its_end_and_not_beyond(shared: bool) -> None:
    examples = rows()
    longest = max(len(each.token_ids) for each in examples)
    window = longest if shared else longest - 1
    engine, twin = (build("gemma2", shares=shares, sliding_window=window) for shares in (True, False))
    tokens = sum(len(each.token_ids) for each in examples)
    spent = spent_on(engine, lambda: teacher_forced_losses(engine, examples))
    assert spent.prefilled_tokens == (tokens - 3 * COMMON if shared else tokens)
    assert_same_losses(teacher_forced_losses(engine, examples), teacher_forced_losses(twin, examples), 1e-5)
    found, expected = (embedding_gradient(each, examples, position=4) for each in (engine, twin))
    assert relative_error(found.per_example, expected.per_example) < 1e-5


def test_rows_beyond_the_sliding_window_have_the_losses_of_each_alone() -> None:
    engine, examples = build("gemma2", sliding_window=16), rows((40, 3, 75))
    together = teacher_forced_losses(engine, examples)
    alone = [teacher_forced_losses(engine, [each]) for each in examples]
    assert together.cross_entropy == pytest.approx([each.cross_entropy[0] for each in alone], rel=1e-5)
    assert together.fluency_nll == pytest.approx([each.fluency_nll[0] for each in alone], rel=1e-5)


@pytest.mark.parametrize("window", [59, 58, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_one_row_at_a_time(kind: Any, window: int) -> None:
    settings: dict[str, Any] = {"sliding_window": window} if kind == "gemma2" else {}
    engine, twin = (build(kind, shares=shares, **settings) for shares in (True, False))
    prompts = prompts_of(rows())
    with engine.shared_prefixes():
        first, second = (engine.generate(prompts, max_new_tokens=15, stop_token_ids=[]) for _ in range(2))
    one_by_one = [twin.generate([each], max_new_tokens=15, stop_token_ids=[])[0] for each in prompts]
    assert first == second == one_by_one
    shares = kind != "gemma2" or window == 59  # 44 read and 15 written
    assert (engine.counters.prefilled_tokens < 2 * sum(map(len, prompts))) == shares


# --- what it costs ---


def step(engine: Engine, examples: Sequence[Row], position: int = INSTRUCTION - 1) -> list[Any]:
    """What a step does with prompts that begin alike: gradient, texts, scores."""
    return [
        embedding_gradient(engine, examples, position=position),
        engine.generate(prompts_of(examples), max_new_tokens=5, stop_token_ids=[]),
        teacher_forced_losses(engine, examples),
    ]


def test_only_what_follows_the_shared_tokens_is_read_for_each_row() -> None:
    engine, examples = build(), rows()
    own = [len(each.token_ids) - COMMON for each in examples]
    spent = spent_on(engine, lambda: teacher_forced_losses(engine, examples))
    assert spent == Counters(
        forwards=2,
        prefilled_tokens=COMMON + sum(own),
        padded_tokens=len(own) * max(own) - sum(own),
        lm_head_rows=1 + INSTRUCTION + 4 * 2,  # the prefix needs none, and the model writes one; answers of 2
    )
    position = 2
    own = [length + COMMON - SYSTEM - position for length in own]
    spent = spent_on(engine, lambda: embedding_gradient(engine, examples, position=position))
    assert (spent.forwards, spent.prefilled_tokens) == (2, SYSTEM + position + sum(own))
    assert spent.backward_tokens == sum(own)
    inside = position + 1  # the token at the position is predicted by the prefix, too
    assert spent.lm_head_rows == 1 + inside + 4 * (INSTRUCTION - inside + 2)


def test_the_prefix_is_read_once_for_all_batches() -> None:
    engine, examples = build(), rows()
    own = [len(each.token_ids) - COMMON for each in examples]
    spent = spent_on(engine, lambda: teacher_forced_losses(engine, examples, max_batch_tokens=1))
    assert (spent.forwards, spent.prefilled_tokens) == (5, COMMON + sum(own))
    assert spent.lm_head_rows == 1 + INSTRUCTION + 4 * 2


def test_inside_a_block_gradient_texts_and_scores_read_the_prefix_once_and_outside_three_times() -> None:
    last = INSTRUCTION - 1  # what follows the token is too short to be read apart
    examples, engine = rows(), build()
    outside = spent_on(engine, lambda: step(engine, examples))
    with engine.shared_prefixes():
        inside = spent_on(engine, lambda: step(engine, examples))
    prompts = sum(map(len, prompts_of(examples)))
    tokens = sum(len(each.token_ids) for each in examples)
    prefix = SYSTEM + last
    assert inside.prefilled_tokens == prefix + (tokens - 4 * prefix) + (prompts - 4 * prefix) + (tokens - 4 * prefix)
    assert outside.prefilled_tokens == prefix + tokens - 4 * prefix + prompts + tokens - 6 * COMMON
    assert (outside.forwards, inside.forwards) == (3 + 3 + 4, 1 + 3 + 4)


def test_a_longer_prefix_continues_the_one_that_is_kept_and_serves_shorter_ones() -> None:
    engine, ids = build(), tuple(range(5, 105))
    with engine.exclusive(), engine.shared_prefixes():
        for length, read in (
            (40, 40),
            (80, 40),
            (60, 0),
            (80 + LEAST_SHARED - 1, 0),
            (80 + LEAST_SHARED, LEAST_SHARED),
        ):
            spent = spent_on(engine, lambda length=length: engine.prefixes.read(ids[:length], rows=2, longest=120))
            assert spent.prefilled_tokens == read
        other = (*ids[:30], 300, *ids[31:70])  # shares 30 tokens with what is kept, and is shorter
        assert spent_on(engine, lambda: engine.prefixes.read(other, rows=2, longest=120)).prefilled_tokens == 40
        kept = engine.prefixes.kept
        assert kept is not None and kept.token_ids == ids[: 80 + LEAST_SHARED]


def test_a_row_alone_uses_what_is_kept_and_reads_nothing_ahead() -> None:
    engine, examples = build(), rows()
    alone = spent_on(engine, lambda: teacher_forced_losses(engine, examples[:1]))
    assert (alone.forwards, alone.prefilled_tokens) == (1, len(examples[0].token_ids))
    with engine.shared_prefixes():
        teacher_forced_losses(engine, examples)
        found = embedding_gradient(engine, examples[:1], position=2)
        spent = spent_on(engine, lambda: teacher_forced_losses(engine, examples[:1]))
    expected = embedding_gradient(build(shares=False), examples[:1], position=2)
    assert relative_error(found.per_example, expected.per_example) < 1e-5
    assert (spent.forwards, spent.prefilled_tokens) == (1, len(examples[0].token_ids) - COMMON)


def test_a_short_prefix_is_read_with_every_row() -> None:
    engine = build()
    beginning = tuple(range(10, 10 + LEAST_SHARED - 1))
    prompts = [(*beginning, 100), (*beginning, 101)]
    engine.generate(prompts, max_new_tokens=1)
    assert (engine.counters.forwards, engine.counters.prefilled_tokens) == (1, 2 * LEAST_SHARED)


# --- what it keeps ---


def same_bits(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return torch.equal(one[0].per_example, other[0].per_example) and [one[0].losses, *one[1:]] == [
        other[0].losses,
        *other[1:],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_not_changed_by_use(kind: Any) -> None:
    engine, examples = build(kind), rows()
    with engine.shared_prefixes():
        first = step(engine, examples)
        kept = engine.prefixes.kept
        assert kept is not None and kept.hidden is not None
        held = [each.clone() for layer in kept.layers for each in layer]
        assert same_bits(step(engine, examples), first)
        assert engine.prefixes.kept is kept
        assert all(map(torch.equal, held, [each for layer in kept.layers for each in layer]))
        assert not any(each.requires_grad for layer in kept.layers for each in layer)
    with engine.shared_prefixes():
        assert same_bits(step(engine, examples), first)


def test_nothing_is_kept_after_the_outermost_block_or_without_one() -> None:
    engine, examples = build(), rows()
    step(engine, examples)
    assert engine.prefixes.kept is None
    with engine.shared_prefixes():
        with engine.shared_prefixes():
            step(engine, examples)
        assert engine.prefixes.kept is not None
    assert engine.prefixes.kept is None
    beyond = [Row((*each.token_ids, VOCABULARY), each.instruction, each.answer) for each in examples]
    with pytest.raises(IndexError), engine.shared_prefixes():
        teacher_forced_losses(engine, beyond)
    assert engine.prefixes.kept is None


def test_threads_that_carry_the_blocks_context_share_what_is_kept_and_others_do_not() -> None:
    engine, examples = build(), rows()
    expected = engine.generate(prompts_of(examples), max_new_tokens=5, stop_token_ids=[])
    found: list[Any] = [None] * 4

    def write(index: int) -> None:
        found[index] = engine.generate([prompts_of(examples)[index]], max_new_tokens=5, stop_token_ids=[])[0]

    def work(carry: bool) -> None:
        targets = [partial(copy_context().run, write) if carry else write for _ in range(4)]
        threads = [threading.Thread(target=target, args=[index]) for index, target in enumerate(targets)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with engine.shared_prefixes():
        teacher_forced_losses(engine, examples)
        spent = spent_on(engine, lambda: work(True))
        assert engine.prefixes.kept is not None and found == expected
        assert spent.prefilled_tokens == sum(map(len, prompts_of(examples))) - 4 * COMMON
        elsewhere = spent_on(engine, lambda: work(False))
    assert found == expected
    assert elsewhere.prefilled_tokens == sum(map(len, prompts_of(examples)))
    assert engine.prefixes.kept is None


def test_texts_written_in_inference_mode_leave_a_prefix_that_a_gradient_can_use() -> None:
    engine, examples = build(), rows()
    expected = embedding_gradient(engine, examples, position=4)
    with engine.shared_prefixes():
        with torch.inference_mode():
            engine.generate(prompts_of(examples), max_new_tokens=3)
        spent = spent_on(engine, lambda: embedding_gradient(engine, examples, position=4))
        found = embedding_gradient(engine, examples, position=4)
    assert spent.forwards == 1
    assert relative_error(found.per_example, expected.per_example) < 1e-5


# --- what it leaves alone ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind: Any) -> None:
    engine = build(kind)
    model = engine.model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    with engine.shared_prefixes():
        step(engine, rows())
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@contextmanager
def memory_runs_out(engine: Engine, when: Callable[[Tensor], bool]) -> Iterator[list[torch.Size]]:
    """Inside, a forward pass over input ids of which `when` is true fails; yields the shapes of those that did."""
    forward, failed = engine.model.forward, []

    def starved(*args: Any, logits_to_keep: int = 0, **options: Any) -> Any:
        ids = options["input_ids"]
        if when(ids):
            failed.append(ids.shape)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, logits_to_keep=logits_to_keep, **options)

    engine.model.forward = starved
    try:
        yield failed
    finally:
        del engine.model.forward


def test_a_batch_that_does_not_fit_beside_the_prefix_is_tried_again_in_halves() -> None:
    examples, engine = rows(), build()
    expected = step(build(), examples)
    with engine.shared_prefixes(), memory_runs_out(engine, lambda ids: ids.shape[0] > 2) as failed:
        found = step(engine, examples)
    assert len(failed) == 3
    assert relative_error(found[0].per_example, expected[0].per_example) < 1e-5
    assert found[1] == expected[1]
    assert_same_losses(found[2], expected[2], 1e-5)


def test_a_lack_of_memory_gives_back_what_is_kept() -> None:
    engine, examples = build(), rows()
    kept_at_failure = []

    def fails(ids: Tensor) -> bool:
        kept_at_failure.append(engine.prefixes.kept)
        return ids.shape[0] > 3

    with engine.shared_prefixes():
        teacher_forced_losses(engine, examples)
        with memory_runs_out(engine, fails):
            spent = spent_on(engine, lambda: teacher_forced_losses(engine, examples))
    assert [kept is None for kept in kept_at_failure] == [False, True, False, False]  # read again, then two halves
    assert spent.prefilled_tokens == COMMON + sum(len(each.token_ids) - COMMON for each in examples)


def test_rows_are_read_in_full_where_there_is_no_memory_for_the_prefix() -> None:
    examples, engine = rows(), build()
    expected = step(build(), examples)
    with memory_runs_out(engine, lambda ids: ids.shape[0] == 1) as failed:
        found = step(engine, examples)
    assert len(failed) == 3
    assert relative_error(found[0].per_example, expected[0].per_example) < 1e-5
    assert found[1] == expected[1]
    assert_same_losses(found[2], expected[2], 1e-5)


# --- models that cannot share ---


def test_a_model_that_leaves_the_cache_empty_is_asked_once_and_then_read_in_full() -> None:
    engine, examples = build(), rows()
    expected = teacher_forced_losses(build(shares=False), examples)
    forward = engine.model.forward

    def forgetful(*args: Any, past_key_values: Any = None, use_cache: bool = False, **options: Any) -> Any:
        return forward(*args, use_cache=False, **options)

    engine.model.forward = forgetful
    first, second = (teacher_forced_losses(engine, examples) for _ in range(2))
    assert first == second
    assert_same_losses(first, expected, 1e-5)
    assert engine.counters.forwards == 3


def test_a_model_that_hides_what_its_output_layer_reads_shares_in_decoding_only() -> None:
    engine, examples = build(), rows()
    engine.model.get_output_embeddings = lambda: None
    engine.prefixes = PrefixStore(engine.model, engine.tally)
    full = sum(len(each.token_ids) for each in examples)
    assert spent_on(engine, lambda: teacher_forced_losses(engine, examples)).prefilled_tokens == full
    prompts = prompts_of(examples)
    spent = spent_on(engine, lambda: engine.generate(prompts, max_new_tokens=1))
    assert (spent.prefilled_tokens, spent.lm_head_rows) == (sum(map(len, prompts)) - 3 * COMMON, 1 + 4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_adapt_to_the_length_are_shared_only_where_they_do_not_yet(kind: str) -> None:
    more = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {"factor": 2.0}
    original = 64
    parameters = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": original, **more}
    context = original if kind == "dynamic" else 2 * original
    engine, twin = (build(shares=shares, context=context, rope_parameters=parameters) for shares in (True, False))
    assert engine.prefixes.reach == original
    examples = rows((20, 60))
    tokens = sum(len(each.token_ids) for each in examples)
    assert spent_on(engine, lambda: teacher_forced_losses(engine, examples)).prefilled_tokens == tokens
    assert_same_losses(teacher_forced_losses(engine, examples), teacher_forced_losses(twin, examples), 1e-5)


def test_what_sequences_begin_with() -> None:
    assert shared_length([(1, 2, 3), (1, 2, 4), (1, 2)]) == 2
    assert shared_length([(1,), (2,)]) == 0
    assert shared_length([(1, 2)]) == 2
