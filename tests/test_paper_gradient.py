"""The paper's gradient against finite differences and the paper's one-hot indicator, spelled out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.estimators.paper_gradient import TokenGradient, paper_gradient
from dspy_greater.model.engine import Engine
from dspy_greater.objective.loss import losses
from dspy_greater.prompt.spans import Span, Supervised
from tests.model_calls import example, spent_on
from tests.model_calls import ragged_rows as rows
from tests.tiny_models import InDouble, tiny_model, tokenizer_for

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY = 512
CANDIDATES = (17, 300, 42, 9, 511)
POSITION = 2


def engine_for(model: Any, **options: Any) -> Engine:
    return Engine(model, tokenizer_for(model), name="tiny", **options)


# --- the slow, obvious twin: the paper's indicator, one example at a time ---


def obvious_loss(model: Any, row: Supervised, tokens: Sequence[int], epsilon: Tensor, weight: float) -> Tensor:
    """L = L_CE + λ L_perpl with ε · E as the embedding at POSITION; temperature 0.2 on the answer."""
    embed = model.get_input_embeddings()
    E = embed(torch.tensor(tokens))  # [C, d], the subset of the embedding table
    embedded = embed(torch.tensor(row.token_ids)).clone()  # [T, d]
    embedded[row.instruction.start + POSITION] = epsilon @ E
    logits = model(inputs_embeds=embedded[None]).logits[0]  # [T, V]

    def mean_nll(span: Span, temperature: float) -> Tensor:
        total = logits.new_zeros(())
        for at in range(span.start, span.stop):
            total = total - (logits[at - 1] / temperature).log_softmax(-1)[row.token_ids[at]]
        return total / (span.stop - span.start)

    return mean_nll(row.answer, 0.2) + weight * mean_nll(row.instruction, 1.0).exp()


def one_hot(tokens: Sequence[int], current: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([float(token == current) for token in tokens], dtype=dtype)  # [C]


def obvious_gradient(model: Any, row: Supervised, weight: float) -> list[float]:
    current = row.token_ids[row.instruction.start + POSITION]
    tokens = (*CANDIDATES, current)
    epsilon = one_hot(tokens, current, model.dtype).requires_grad_()
    obvious_loss(model, row, tokens, epsilon, weight).backward()
    model.zero_grad(set_to_none=True)
    assert epsilon.grad is not None
    return epsilon.grad.tolist()


def finite_differences(model: Any, row: Supervised, weight: float, step: float = 1e-4) -> list[float]:
    current = row.token_ids[row.instruction.start + POSITION]
    tokens = (*CANDIDATES, current)
    epsilon = one_hot(tokens, current, model.dtype)
    slopes = []
    with torch.no_grad():
        for column in range(len(tokens)):
            ahead, behind = epsilon.clone(), epsilon.clone()
            ahead[column] += step
            behind[column] -= step
            rise = obvious_loss(model, row, tokens, ahead, weight) - obvious_loss(model, row, tokens, behind, weight)
            slopes.append(rise.item() / (2 * step))
    return slopes


def gradient_rows(model: Any, weight: float, **settings: Any) -> list[list[float]]:
    engine = engine_for(model, **settings)
    found = paper_gradient(engine, rows(), position=POSITION, candidates=CANDIDATES, fluency_weight=weight)
    pairs = zip(found.per_example, found.per_example_current, strict=True)
    return [[*candidates, current] for candidates, current in pairs]


def relative_error(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    first, second = torch.tensor(found).double(), torch.tensor(expected).double()
    return ((first - second).norm(dim=1) / second.norm(dim=1)).max().item()


@pytest.mark.parametrize("weight", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_equals_finite_differences_of_the_one_hot_indicator(kind: Any, weight: float) -> None:
    model = tiny_model(kind, VOCABULARY, torch.float64)
    with InDouble():
        expected = [finite_differences(model, row, weight) for row in rows()]
        assert relative_error(gradient_rows(model, weight), expected) < 1e-6


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_equals_the_one_hot_indicator_spelled_out(kind: Any, dtype: Any, bound: float) -> None:
    model = tiny_model(kind, VOCABULARY, dtype)
    with InDouble() if dtype == torch.float64 else torch.no_grad():  # a caller without gradients is fine
        found = gradient_rows(model, 0.2)
    with InDouble() if dtype == torch.float64 else torch.enable_grad():
        expected = [obvious_gradient(model, row, 0.2) for row in rows()]
    assert relative_error(found, expected) < bound


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 100_000])
def test_the_gradient_does_not_depend_on_how_rows_are_batched_or_padded(max_batch_tokens: int) -> None:
    model = tiny_model("gemma2", VOCABULARY)
    expected = [obvious_gradient(model, row, 0.2) for row in rows()]
    assert relative_error(gradient_rows(model, 0.2, max_batch_tokens=max_batch_tokens), expected) < 1e-5


def test_the_gradient_of_a_token_does_not_depend_on_the_other_candidates() -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY))
    together = paper_gradient(engine, rows(), position=POSITION, candidates=CANDIDATES)
    for column, token in enumerate(CANDIDATES):
        alone = paper_gradient(engine, rows(), position=POSITION, candidates=[token])
        assert alone.total[0] == pytest.approx(together.total[column], rel=1e-5)


def test_an_answer_that_stands_before_the_token_gives_no_gradient() -> None:
    """What the token cannot reach, it cannot change: the answer stands before it."""
    row = example((1, 5, 6, 7, 8, 9), Span(3, 5), Span(1, 2))
    engine = engine_for(tiny_model("llama", VOCABULARY))
    found = paper_gradient(engine, [row], position=1, candidates=CANDIDATES, fluency_weight=0.0)
    assert found.total == (0.0,) * len(CANDIDATES)


def test_low_precision_models_have_gradients_in_float32() -> None:
    model = tiny_model("llama", VOCABULARY, torch.bfloat16)
    candidates = range(5, 405)
    found = paper_gradient(engine_for(model), rows(), position=POSITION, candidates=candidates)
    assert len(set(found.total)) > 390  # of 400; bfloat16 has some 256 numbers in a range that spans a factor of 4
    exact = paper_gradient(engine_for(model.float()), rows(), position=POSITION, candidates=candidates)
    assert relative_error(found.per_example, exact.per_example) < 0.1


# --- what it costs ---


@pytest.mark.parametrize("count", [1, 400])
def test_cost_is_one_pass_over_each_example_whatever_the_number_of_candidates(count: int) -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY))
    candidates = range(count)
    spent = spent_on(
        engine, lambda: paper_gradient(engine, rows(), position=2, candidates=candidates, fluency_weight=0.0)
    )
    tokens = sum(len(row.token_ids) for row in rows())
    assert (spent.forwards, spent.prefilled_tokens, spent.backward_tokens) == (1, tokens, tokens)
    answers = sum(len(row.answer) for row in rows())
    assert spent.lm_head_rows == answers
    assert spent.generated_tokens == 0
    # λ takes another pass, over what ends with the instruction.
    spent = spent_on(engine, lambda: paper_gradient(engine, rows(), position=2, candidates=candidates))
    beginnings = sum(row.instruction.stop for row in rows())
    assert (spent.forwards, spent.prefilled_tokens, spent.backward_tokens) == (2, beginnings + tokens, tokens)
    assert spent.lm_head_rows == 4 * 4 + 4 * 1 + answers  # one token of the instruction follows the position


# --- what it leaves alone ---


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", VOCABULARY).train()
    flags = {name: index % 2 == 0 for index, (name, _) in enumerate(model.named_parameters())}
    for name, weight in model.named_parameters():
        weight.requires_grad_(flags[name])
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_state = torch.get_rng_state()
    paper_gradient(engine_for(model), rows(), position=POSITION, candidates=CANDIDATES)
    assert model.training
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_when_the_pass_fails() -> None:
    model = tiny_model("llama", VOCABULARY)
    beyond = replace(rows()[0], token_ids=(*rows()[0].token_ids[:-1], VOCABULARY))
    with pytest.raises(IndexError):
        paper_gradient(engine_for(model), [beyond], position=POSITION, candidates=CANDIDATES)
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_caller_in_inference_mode_gets_a_gradient() -> None:
    engine = engine_for(tiny_model("llama", VOCABULARY))
    expected = paper_gradient(engine, rows(), position=POSITION, candidates=CANDIDATES)
    with torch.inference_mode():
        found = paper_gradient(engine, rows(), position=POSITION, candidates=CANDIDATES)
    assert found == expected


# --- numbers that are none ---


def poisoned(row: Supervised, poison: int) -> Supervised:
    ids = list(row.token_ids)
    ids[row.instruction.stop] = poison
    return replace(row, token_ids=tuple(ids))


def test_an_example_that_is_not_a_number_takes_no_part_and_spoils_no_other() -> None:
    model = tiny_model("llama", VOCABULARY, tie_word_embeddings=False)
    poison = 100
    good = [poisoned(row, 101) for row in rows()]
    expected = paper_gradient(engine_for(model), good[:-1], position=POSITION, candidates=CANDIDATES)
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    mixed = [*good[:-1], poisoned(good[-1], poison)]
    found = paper_gradient(engine_for(model), mixed, position=POSITION, candidates=CANDIDATES)
    assert all(math.isfinite(each) for row in found.per_example[:-1] for each in row)
    assert all(map(math.isnan, (*found.per_example[-1], found.per_example_current[-1])))
    assert found.total == pytest.approx(expected.total, rel=1e-4)
    assert found.most_negative(3) == expected.most_negative(3)

    alone = paper_gradient(engine_for(model), mixed[-1:], position=POSITION, candidates=CANDIDATES)
    assert all(map(math.isnan, alone.total))
    assert alone.most_negative(3) == ()


def test_a_candidate_whose_embedding_is_not_a_number_is_never_picked() -> None:
    model = tiny_model("llama", VOCABULARY, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[CANDIDATES[1]] = torch.nan
    found = paper_gradient(engine_for(model), rows(), position=POSITION, candidates=CANDIDATES)
    assert math.isnan(found.total[1])
    assert set(found.most_negative(10)) == {*CANDIDATES, found.current} - {CANDIDATES[1]}


# --- which tokens it picks ---


def gradient_of(*totals: float, current: int = 99) -> TokenGradient:
    return TokenGradient(
        current=current,
        candidates=tuple(range(len(totals))),
        per_example=(totals,),
        per_example_current=(0.5,),
    )


def test_the_most_negative_come_first_and_the_current_token_in_its_place_among_them() -> None:
    assert gradient_of(3.0, -1.0, -7.0, 0.0).most_negative(3) == (2, 1, 3)  # the current token's is 0.5
    assert gradient_of(3.0, -1.0, 0.75, 1.0).most_negative(3) == (1, 99, 2)
    assert gradient_of(3.0, -1.0).most_negative(0) == ()


def test_ties_go_to_the_current_token_and_then_to_the_one_that_was_proposed_first() -> None:
    assert gradient_of(1.0, 0.0, 1.0, 0.0, 0.5).most_negative(6) == (1, 3, 99, 4, 0, 2)


def test_the_predicted_change_is_measured_from_the_current_token() -> None:
    assert gradient_of(3.0, -1.0).predicted_change == (2.5, -1.5)


TOLD = range(24, 34)  # what the model can be told; the later, the more it obeys
BEST = TOLD[-1]


def question(told: int, given: int) -> Supervised:
    """begin, one of eight inputs, an instruction of two tokens, a separator, the same input as the answer."""
    return example((1, 16 + given, 2, told, 3, 8 + given), Span(2, 4), Span(5, 6))


@pytest.fixture(scope="module")
def obedient() -> Any:
    """A model taught to repeat its input more often, the further its instruction lies in one direction."""
    model = tiny_model("llama", 40, sharpness=0.1, layers=1, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(1)
    obedience = torch.cat([torch.linspace(0.0, 0.7, len(TOLD) - 1), torch.ones(1)])
    table = model.get_input_embeddings().weight
    noise = 0.1 * torch.randn(len(TOLD), 32, generator=generator)
    planted = obedience[:, None] * torch.randn(32, generator=generator) + noise  # [told, d]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        with torch.no_grad():
            table[TOLD.start : TOLD.stop] = planted
        given, guess = torch.randint(8, (2, 64), generator=generator)
        told = torch.randint(len(TOLD), (64,), generator=generator)
        answer = torch.where(torch.rand(64, generator=generator) < obedience[told], given, guess)
        ids = torch.tensor([1, 16, 2, 24, 3]).repeat(64, 1)  # [64, 5]
        ids[:, 1] += given
        ids[:, 3] += told
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, -1], 8 + answer)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        table[TOLD.start : TOLD.stop] = planted
    return model


@pytest.mark.slow
def test_the_gradient_finds_the_instruction_that_the_model_obeys_best(obedient: Any) -> None:
    engine = engine_for(obedient)
    mistakes = {}
    for token in TOLD:
        examples = [question(token, given) for given in range(8)]
        mistakes[token] = sum(losses(engine, examples, answer_temperature=1.0).cross_entropy)
    assert min(mistakes, key=mistakes.__getitem__) == BEST
    for current in TOLD[:-1]:
        examples = [question(current, given) for given in range(8)]
        found = paper_gradient(
            engine, examples, position=1, candidates=TOLD, answer_temperature=1.0, fluency_weight=0.0
        )
        assert found.most_negative(1) == (BEST,), current


# --- what it refuses ---


def test_a_position_outside_the_instruction_is_refused() -> None:
    engine = engine_for(tiny_model())
    for position in (-1, 4):
        with pytest.raises(SettingsError, match=f"Position {position} is not in the instruction, which has 4"):
            paper_gradient(engine, rows(), position=position, candidates=CANDIDATES)


def test_examples_with_different_instructions_are_refused() -> None:
    other = replace(rows()[1], instruction=Span(rows()[1].instruction.start, rows()[1].instruction.stop - 1))
    with pytest.raises(LayoutError, match="Example 1 has the instruction tokens .* with the same instruction"):
        paper_gradient(engine_for(tiny_model()), [rows()[0], other], position=0, candidates=CANDIDATES)


def test_no_examples_are_refused() -> None:
    with pytest.raises(LayoutError, match="no example to take the gradient of; give at least one"):
        paper_gradient(engine_for(tiny_model()), [], position=0, candidates=CANDIDATES)


def test_a_candidate_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(SettingsError, match="Candidate token 512 is outside the model's vocabulary of 512"):
        paper_gradient(engine_for(tiny_model()), rows(), position=0, candidates=[512])
