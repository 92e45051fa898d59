"""What prompts begin with is read once, and nothing else changes by it: losses, gradients, texts, the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dspy_greater.estimators.paper_gradient import TokenGradient, paper_gradient
from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import LEAST_SHARED, PrefixCache
from dspy_greater.model.fast.session import Session
from dspy_greater.model.interface import Model
from dspy_greater.model.kv_cache import shared_length
from dspy_greater.objective.loss import Losses, losses
from dspy_greater.prompt.spans import Span, Supervised
from tests.model_calls import generated, memory_runs_out, spent_on
from tests.tiny_models import InDouble, tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY = 512
SYSTEM, INSTRUCTION, TAIL = 21, 5, 4  # tokens that all rows begin with
COMMON = SYSTEM + INSTRUCTION + TAIL
POSITIONS = [0, 2, INSTRUCTION - 1]
# Read once for all rows: the instruction's tokens, whose likelihood is asked for, and what predicts the first of them.
OF_INSTRUCTION = INSTRUCTION + 1


def row(token_ids: tuple[int, ...], instruction: Span, answer: Span) -> Supervised:
    return Supervised(token_ids, instruction, Span(instruction.stop, instruction.stop), answer)


def rows(lengths: Sequence[int] = (9, 1, 14, 3), *, answer: int = 2, seed: int = 0) -> list[Supervised]:
    """Rows that begin alike up to `COMMON`, then read and reason for so many tokens, then answer."""
    generator = torch.Generator().manual_seed(seed)

    def some(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, VOCABULARY, (length,), generator=generator).tolist())

    common = (1, *some(COMMON - 1))
    found = []
    for number, length in enumerate(lengths):
        ids = (*common, 5 + number, *some(length - 1), *some(answer))
        found.append(row(ids, Span(SYSTEM, SYSTEM + INSTRUCTION), Span(len(ids) - answer, len(ids))))
    return found


def build(
    kind: Any = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    shares: bool = True,
    max_batch_tokens: int = 2048,
    **settings: Any,
) -> Engine:
    model = tiny_model(kind, VOCABULARY, dtype, **settings)
    engine = Engine(model, tiny_tokenizer(), name="tiny", max_batch_rows=8, max_batch_tokens=max_batch_tokens)
    if not shares:
        engine.checks.cache_reach = 0  # the slow and obvious way: every row is read from its first token
    return engine


def prompts_of(examples: Sequence[Supervised]) -> list[tuple[int, ...]]:
    return [each.token_ids[: each.answer.start] for each in examples]


def gradient(model: Model, examples: Sequence[Supervised], position: int, fluency_weight: float = 0.2) -> TokenGradient:
    """As many candidates as an embedding has numbers, so that no part of the gradient stays unseen."""
    return paper_gradient(model, examples, position=position, candidates=range(100, 132), fluency_weight=fluency_weight)


def texts(model: Model, prompts: Sequence[Sequence[int]], most: int = 5) -> list[tuple[int, ...]]:
    return [each.token_ids for each in generated(model, prompts, most, stop_token_ids=())]


def assert_same_losses(found: Any, expected: Any, bound: float) -> None:
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=bound)
    assert found.fluency_nll == pytest.approx(expected.fluency_nll, rel=bound)


def relative_error(found: TokenGradient, expected: TokenGradient) -> float:
    one, other = (torch.tensor(each.per_example, dtype=torch.float64) for each in (found, expected))  # [N, C]
    return ((one - other).norm(dim=1) / other.norm(dim=1)).max().item()


# --- the same numbers ---

PRECISIONS = [(torch.float32, 3e-6), (torch.float64, 1e-12)]
SHAPES = {
    "odd lengths": rows(),
    "a single row": rows([7]),
    "identical rows": [rows([6])[0]] * 3,
    "an answer that all begin with": [
        row(each.token_ids, each.instruction, Span(SYSTEM + INSTRUCTION, SYSTEM + INSTRUCTION + 2)) for each in rows()
    ],
    "an answer that ends where rows begin to differ": [
        row(each.token_ids, each.instruction, Span(COMMON - 1, COMMON + 1)) for each in rows()
    ],
    "an instruction that ends where rows begin to differ": [
        row(each.token_ids, Span(COMMON - 3, COMMON), each.answer) for each in rows()
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
    with InDouble() if dtype == torch.float64 else nullcontext():
        for examples in SHAPES.values():
            assert relative_error(gradient(engine, examples, 1), gradient(twin, examples, 1)) < bound
            assert_same_losses(losses(engine, examples), losses(twin, examples), bound)
        for position in POSITIONS:
            assert relative_error(gradient(engine, rows(), position), gradient(twin, rows(), position)) < bound


def test_a_token_that_stands_after_all_that_is_scored_has_no_gradient() -> None:
    examples = [row(each.token_ids, each.instruction, Span(3, 5)) for each in rows()]
    found = gradient(build(), examples, INSTRUCTION - 1)
    assert found.total == (0.0,) * len(found.candidates)


@pytest.mark.parametrize("shared", [True, False])
def test_a_sliding_window_is_shared_up_to_its_end_and_not_beyond(shared: bool) -> None:
    examples = rows()
    longest = max(len(each.token_ids) for each in examples)
    window = longest if shared else longest - 1
    engine, twin = (build("gemma2", shares=shares, sliding_window=window) for shares in (True, False))
    tokens = sum(len(each.token_ids) for each in examples)
    spent = spent_on(engine, lambda: losses(engine, examples))
    assert spent.prefilled_tokens == (tokens - 3 * COMMON + OF_INSTRUCTION if shared else tokens)
    assert_same_losses(losses(engine, examples), losses(twin, examples), 1e-5)
    assert relative_error(gradient(engine, examples, 4), gradient(twin, examples, 4)) < 1e-5


def test_rows_beyond_the_sliding_window_have_the_losses_of_each_alone() -> None:
    engine, examples = build("gemma2", sliding_window=16), rows((40, 3, 75))
    together = losses(engine, examples)
    alone = [losses(engine, [each]) for each in examples]
    assert together.cross_entropy == pytest.approx([each.cross_entropy[0] for each in alone], rel=1e-5)
    assert together.fluency_nll == pytest.approx([each.fluency_nll[0] for each in alone], rel=1e-5)


@pytest.mark.parametrize("window", [59, 58, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_one_row_at_a_time(kind: Any, window: int) -> None:
    settings: dict[str, Any] = {"sliding_window": window} if kind == "gemma2" else {}
    engine, twin = (build(kind, shares=shares, **settings) for shares in (True, False))
    prompts = prompts_of(rows())
    with engine.session() as session:
        first, second = (texts(session, prompts, 15) for _ in range(2))
    one_by_one = [texts(twin, [each], 15)[0] for each in prompts]
    assert first == second == one_by_one
    shares = kind != "gemma2" or window == 59  # 44 read and 15 generated
    assert (engine.counters.prefilled_tokens < 2 * sum(map(len, prompts))) == shares


# --- what it costs ---


def step(
    model: Model, examples: Sequence[Supervised], position: int = INSTRUCTION - 1
) -> tuple[TokenGradient, Losses, list[tuple[int, ...]]]:
    """What a step does with prompts that begin alike: gradient, losses, texts."""
    found = gradient(model, examples, position, fluency_weight=0.0), losses(model, examples)
    return *found, texts(model, prompts_of(examples))


def test_only_what_follows_the_shared_tokens_is_read_for_each_row() -> None:
    engine, examples = build(), rows()
    own = [len(each.token_ids) - COMMON for each in examples]
    spent = spent_on(engine, lambda: losses(engine, examples))
    assert spent == Counters(
        forwards=3,
        prefilled_tokens=COMMON + sum(own) + OF_INSTRUCTION,
        padded_tokens=len(own) * max(own) - sum(own),
        lm_head_rows=1 + INSTRUCTION + 4 * 2,  # the prefix needs none, and the model writes one; answers of 2
    )
    position = 2
    own = [length + COMMON - SYSTEM - position for length in own]
    spent = spent_on(engine, lambda: gradient(engine, examples, position, fluency_weight=0.0))
    assert (spent.forwards, spent.prefilled_tokens) == (2, SYSTEM + position + sum(own))
    assert (spent.backward_tokens, spent.lm_head_rows) == (sum(own), 1 + 4 * 2)
    beginning = SYSTEM + INSTRUCTION  # how likely the instruction is, read once for all rows
    spent = spent_on(engine, lambda: gradient(engine, examples, position))
    assert (spent.forwards, spent.prefilled_tokens) == (3, beginning + SYSTEM + position + sum(own))
    behind = INSTRUCTION - 1 - position  # tokens that the one at the position predicts
    assert (spent.backward_tokens, spent.lm_head_rows) == (sum(own), INSTRUCTION + 1 + 4 * (behind + 2))


def test_the_prefix_is_read_once_for_all_batches() -> None:
    engine, examples = build(max_batch_tokens=1), rows()
    own = [len(each.token_ids) - COMMON for each in examples]
    spent = spent_on(engine, lambda: losses(engine, examples))
    assert (spent.forwards, spent.prefilled_tokens) == (1 + 4 + 1, COMMON + sum(own) + OF_INSTRUCTION)
    assert spent.lm_head_rows == 1 + INSTRUCTION + 4 * 2


def test_in_a_session_gradient_texts_and_losses_read_the_prefix_once_and_outside_three_times() -> None:
    last = INSTRUCTION - 1  # what follows the token is too short to be read apart
    examples, engine = rows(), build()
    outside = spent_on(engine, lambda: step(engine, examples))
    with engine.session() as session:
        inside = spent_on(engine, lambda: step(session, examples))
    prompts = sum(map(len, prompts_of(examples)))
    tokens = sum(len(each.token_ids) for each in examples)
    prefix = SYSTEM + last
    assert inside.prefilled_tokens == prefix + tokens + prompts + tokens - 3 * 4 * prefix + OF_INSTRUCTION
    assert outside.prefilled_tokens == tokens - 3 * prefix + prompts + tokens - 2 * 3 * COMMON + OF_INSTRUCTION
    assert (outside.forwards, inside.forwards) == (2 + 3 + 6, 2 + 2 + 5)


def test_a_longer_prefix_continues_the_one_that_is_kept_and_serves_shorter_ones() -> None:
    engine, ids = build(), tuple(range(5, 105))
    prefixes = PrefixCache(engine)
    with engine.exclusive():
        for length, read in (
            (40, 40),
            (80, 40),
            (60, 0),
            (80 + LEAST_SHARED - 1, 0),
            (80 + LEAST_SHARED, LEAST_SHARED),
        ):
            spent = spent_on(engine, lambda length=length: prefixes.read(ids[:length], rows=2, longest=120))
            assert spent.prefilled_tokens == read
        other = (*ids[:30], 300, *ids[31:70])  # shares 30 tokens with what is kept, and is shorter
        assert spent_on(engine, lambda: prefixes.read(other, rows=2, longest=120)).prefilled_tokens == 40
        kept = prefixes.kept
        assert kept is not None and kept.token_ids == ids[: 80 + LEAST_SHARED]


def test_a_row_alone_uses_what_is_kept_and_reads_nothing_ahead() -> None:
    engine, examples = build(), rows()
    alone = spent_on(engine, lambda: losses(engine, examples[:1]))
    assert (alone.forwards, alone.prefilled_tokens) == (1, len(examples[0].token_ids))
    with engine.session() as session:
        losses(session, examples)
        found = gradient(session, examples[:1], 2)
        spent = spent_on(engine, lambda: losses(session, examples[:1]))
    assert relative_error(found, gradient(build(shares=False), examples[:1], 2)) < 1e-5
    before = SYSTEM - 1  # what predicts the instruction's first token is read anew
    assert (spent.forwards, spent.prefilled_tokens) == (1, len(examples[0].token_ids) - before)


def test_a_short_prefix_is_read_with_every_row() -> None:
    engine = build()
    beginning = tuple(range(10, 10 + LEAST_SHARED - 1))
    generated(engine, [(*beginning, 100), (*beginning, 101)], 1)
    assert (engine.counters.forwards, engine.counters.prefilled_tokens) == (1, 2 * LEAST_SHARED)


# --- what it keeps ---


def kept_by(session: Session) -> Any:
    return session._prefixes.kept


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_not_changed_by_use(kind: Any) -> None:
    engine, examples = build(kind), rows()
    with engine.session() as session:
        first = step(session, examples)
        kept = kept_by(session)
        held = [each.clone() for layer in kept.layers for each in layer]
        again = step(session, examples)
        assert (again[0], again[2]) == (first[0], first[2])
        assert_same_losses(again[1], first[1], 1e-5)  # from where the generated rows end
        assert kept_by(session) is kept
        assert all(map(torch.equal, held, [each for layer in kept.layers for each in layer]))
        assert not any(each.requires_grad for layer in kept.layers for each in layer)
    with engine.session() as session:
        assert step(session, examples) == first


def test_nothing_is_kept_after_a_session_even_if_it_fails_or_without_one() -> None:
    engine, examples = build(), rows()
    with engine.session() as session:
        with session.session() as inner:
            assert inner is session
            step(inner, examples)
        assert kept_by(session) is not None
    assert kept_by(session) is None
    beyond = [row((*each.token_ids[:-1], VOCABULARY), each.instruction, each.answer) for each in examples]
    sessions = []

    def failing() -> None:
        with engine.session() as session:
            sessions.append(session)
            losses(session, examples)
            assert kept_by(session) is not None
            losses(session, beyond)

    with pytest.raises(IndexError):
        failing()
    assert kept_by(sessions[0]) is None
    spent = [spent_on(engine, lambda: losses(engine, examples)) for _ in range(2)]
    assert spent[0] == spent[1]  # read again


def test_threads_with_the_session_share_what_is_kept_and_others_do_not() -> None:
    engine, examples = build(), rows()
    prompts = prompts_of(examples)
    expected = texts(engine, prompts)
    found: list[Any] = [None] * 4

    def work(model: Model) -> None:
        def write(index: int) -> None:
            found[index] = texts(model, [prompts[index]])[0]

        threads = [threading.Thread(target=write, args=[index]) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with engine.session() as session:
        losses(session, examples)
        spent = spent_on(engine, lambda: work(session))
        assert kept_by(session) is not None and found == expected
        assert spent.prefilled_tokens == sum(map(len, prompts)) - 4 * COMMON
        found[:] = [None] * 4
        outside = spent_on(engine, lambda: work(engine))
    assert found == expected
    assert outside.prefilled_tokens == sum(map(len, prompts))


def test_texts_generated_in_inference_mode_leave_a_prefix_that_a_gradient_can_use() -> None:
    engine, examples = build(), rows()
    expected = gradient(engine, examples, 4)
    with engine.session() as session:
        with torch.inference_mode():
            texts(session, prompts_of(examples), 3)
        spent = spent_on(engine, lambda: gradient(session, examples, 4, fluency_weight=0.0))
        found = gradient(session, examples, 4)
    assert spent.forwards == 1
    assert relative_error(found, expected) < 1e-5


# --- what it leaves alone ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind: Any) -> None:
    engine = build(kind)
    model = engine.model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    with engine.session() as session:
        step(session, rows())
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def assert_same_step(found: tuple[Any, Any, Any], expected: tuple[Any, Any, Any]) -> None:
    assert relative_error(found[0], expected[0]) < 1e-5
    assert_same_losses(found[1], expected[1], 1e-5)
    assert found[2] == expected[2]


def test_a_batch_that_does_not_fit_beside_the_prefix_is_tried_again_in_halves() -> None:
    examples, engine = rows(), build()
    expected = step(build(), examples)
    with engine.session() as session, memory_runs_out(engine, lambda ids: ids.shape[0] > 2) as failed:
        found = step(session, examples)
    assert [shape[0] for shape in failed] == [4, 4, 4]
    assert_same_step(found, expected)


@pytest.mark.parametrize("work", [losses, lambda model, examples: gradient(model, examples, 2, fluency_weight=0.0)])
def test_a_lack_of_memory_gives_back_what_is_kept_and_it_is_read_again(work: Any) -> None:
    engine, examples = build(), rows()
    kept_at_failure = []

    with engine.session() as session:

        def fails(ids: Tensor) -> bool:
            kept_at_failure.append(kept_by(session))
            return ids.shape[0] > 3

        first = spent_on(engine, lambda: work(session, examples))
        with memory_runs_out(engine, fails):
            spent = spent_on(engine, lambda: work(session, examples))
    # The whole batch; the prefix again and two halves.
    assert [kept is None for kept in kept_at_failure[:4]] == [False, True, False, False]
    assert spent.prefilled_tokens == first.prefilled_tokens


def test_rows_are_read_in_full_where_there_is_no_memory_for_the_prefix() -> None:
    examples, engine = rows(), build()
    expected = step(build(), examples)
    # The instruction's own likelihood is asked of one row, too, and of fewer tokens.
    with memory_runs_out(engine, lambda ids: ids.shape[0] == 1 and ids.shape[1] != SYSTEM + INSTRUCTION) as failed:
        found = step(engine, examples, position=INSTRUCTION - 2)
    assert len(failed) == 3
    assert relative_error(found[0], gradient(build(), examples, INSTRUCTION - 2, fluency_weight=0.0)) < 1e-5
    assert_same_losses(found[1], expected[1], 1e-5)
    assert found[2] == expected[2]


# --- models that cannot share ---


def test_a_model_that_leaves_the_cache_empty_is_asked_once_and_then_read_in_full() -> None:
    engine, examples = build(), rows()
    expected = losses(build(shares=False), examples)
    forward = engine.model.forward

    def forgetful(*args: Any, past_key_values: Any = None, use_cache: bool = False, **options: Any) -> Any:
        return forward(*args, use_cache=False, **options)

    engine.model.forward = forgetful
    first, second = (losses(engine, examples) for _ in range(2))
    assert_same_losses(first, expected, 1e-5)
    assert_same_losses(second, expected, 1e-5)
    assert engine.checks.cache_reach == 0


def test_a_model_that_hides_its_output_layer_shares_what_prompts_begin_with_all_the_same() -> None:
    engine, examples = build(), rows()
    expected = losses(engine, examples)
    engine.model.get_output_embeddings = lambda: None
    own = [len(each.token_ids) - COMMON for each in examples]
    spent = spent_on(engine, lambda: losses(engine, examples))
    assert spent.prefilled_tokens == COMMON + sum(own) + OF_INSTRUCTION
    assert spent.lm_head_rows == COMMON + 4 * max(own) + OF_INSTRUCTION  # logits everywhere
    assert_same_losses(losses(engine, examples), expected, 1e-5)
    prompts = prompts_of(examples)
    spent = spent_on(engine, lambda: texts(engine, prompts, 1))
    assert spent.prefilled_tokens == sum(map(len, prompts)) - 3 * COMMON


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_adapt_to_the_length_are_shared_only_where_they_do_not_yet(kind: str) -> None:
    more = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {"factor": 2.0}
    original = 64
    parameters = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": original, **more}
    context = original if kind == "dynamic" else 2 * original
    engine, twin = (build(shares=shares, context=context, rope_parameters=parameters) for shares in (True, False))
    assert engine.checks.cache_reach == original
    examples = rows((20, 60))
    tokens = sum(len(each.token_ids) for each in examples)
    assert spent_on(engine, lambda: losses(engine, examples)).prefilled_tokens == tokens
    assert_same_losses(losses(engine, examples), losses(twin, examples), 1e-5)
    short = rows()
    tokens = sum(len(each.token_ids) for each in short)
    assert spent_on(engine, lambda: losses(engine, short)).prefilled_tokens < tokens


def test_what_sequences_begin_with() -> None:
    assert shared_length([(1, 2, 3), (1, 2, 4), (1, 2)]) == 2
    assert shared_length([(1,), (2,)]) == 0
    assert shared_length([(1, 2)]) == 2
