"""Algorithm 1 on models whose best instruction is known, and against a slow, obvious twin."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dspy
import pytest
import torch
from scripted_engine import (
    BEST,
    PlantedModel,
    exact_match,
    instruction_of,
    planted_engine,
    planted_rows,
    program_on,
    shared_tokenizer,
    worth_of,
)
from scripted_engine import optimizer as optimizer_of

from dspy_greater import GReaTerTeleprompter
from dspy_greater.errors import LossError
from dspy_greater.estimators.paper_gradient import TokenGradient, gradient_over_reasoning
from dspy_greater.model.engine import Engine
from dspy_greater.model.teacher_forcing import Losses
from dspy_greater.objective.types import Evaluation
from dspy_greater.pocket.tasks import generate, work_out
from dspy_greater.prompt.chat_template import render_chat
from dspy_greater.search.state import ends_sentence
from dspy_greater.search.state import loop as algorithm
from dspy_greater.settings import Settings

SEEDS = range(6)
ROWS = planted_rows(24)


def optimizer(**settings: Any) -> GReaTerTeleprompter:
    return optimizer_of(variant="paper", **settings)


def compiled(seed: int = 0, engine: Any = None, **settings: Any) -> Any:
    program = program_on(engine or planted_engine())
    chosen = {"train_rows": 8, "validation_rows": 8, "seed": seed, **settings}
    return optimizer(**chosen).compile(program, ROWS[:8], valset=ROWS[8:16])


def tried(program: Any) -> list[int]:
    """How many candidates got reasoning of their own at each step; the current token is not one."""
    details = program.detailed_results
    before = [instruction_of_step(details, index - 1) for index in range(len(details.steps))]
    return [
        sum(each.evaluation is not None and each.evaluation.instruction != current for each in step.candidates)
        for step, current in zip(details.steps, before, strict=True)
    ]


def instruction_of_step(details: Any, index: int) -> str:
    return details.steps[index].chosen.instruction if index >= 0 else details.predictors[0].seed_instruction


# ---- a planted optimum


@pytest.mark.parametrize("seed", SEEDS)
def test_the_planted_word_is_found_within_one_round(seed: int) -> None:
    better = compiled(seed, steps=4)
    assert BEST in instruction_of(better).split()
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


def test_the_gradient_ranks_the_words_as_the_model_obeys_them() -> None:
    [first] = compiled(steps=1).detailed_results.steps
    slopes = {each.text.strip(): each.gradient for each in first.candidates}
    told = [word for word in sorted(slopes, key=lambda word: slopes[word]) if worth_of(word)]
    assert told == sorted(told, key=lambda word: -worth_of(word))
    assert len(told) >= 4


def random_gradient(
    engine: Any, supervised: Any, *, position: int, candidates: Sequence[int], **settings: Any
) -> TokenGradient:
    """The twin without a gradient: the same candidates in a random order."""
    rng = random.Random(f"{position}{candidates}{supervised[0].token_ids}")
    guess = tuple(rng.random() for _ in candidates)
    behind = 2.0  # the current token, so that each step tries one
    return TokenGradient(position, -1, tuple(candidates), (guess,), (behind,), Losses((0.0,), (0.0,)))


def test_at_equal_budget_the_gradient_beats_random_choices_among_the_same_proposals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = {"steps": 3, "selections": 1, "train_rows": 4}
    guided = [compiled(seed, **budget) for seed in SEEDS]
    monkeypatch.setattr(algorithm, "gradient_over_reasoning", random_gradient)
    blind = [compiled(seed, **budget) for seed in SEEDS]

    assert [tried(each) for each in guided] == [tried(each) for each in blind] == [[1, 1, 1]] * len(SEEDS)
    first = [[step.candidates[0].token for step in each.detailed_results.steps[:1]] for each in guided]
    assert first == [[step.candidates[0].token for step in each.detailed_results.steps[:1]] for each in blind]
    guided_scores, blind_scores = [each.score for each in guided], [each.score for each in blind]
    assert all(better >= worse for better, worse in zip(guided_scores, blind_scores, strict=True))
    assert sum(guided_scores) > sum(blind_scores) + 2.0  # of 6


# ---- lines 14 to 18: p moves on, p* is the best that was seen


def upside_down(*arguments: Any, **options: Any) -> TokenGradient:
    """The worst tokens look best."""
    found = gradient_over_reasoning(*arguments, **options)
    return replace(
        found,
        per_example=tuple(tuple(-each for each in row) for row in found.per_example),
        per_example_current=tuple(-each for each in found.per_example_current),
    )


def test_the_instruction_moves_to_the_best_of_those_selected_and_the_best_that_was_seen_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(algorithm, "gradient_over_reasoning", upside_down)
    better = compiled(steps=8, engine=planted_engine(seed=1))
    details = better.detailed_results
    objectives = [step.chosen.objective for step in details.steps]
    downhill = [index for index, (a, b) in enumerate(itertools.pairwise(objectives)) if b > a]
    assert downhill, "no step was selected that made it worse, so this test shows nothing"
    seen = [each.evaluation.objective for step in details.steps for each in step.candidates if each.evaluation]
    assert details.predictors[0].finalists[0].objective == min(seen)


def test_a_step_whose_best_token_is_the_current_one_runs_nothing_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stay(*arguments: Any, **options: Any) -> TokenGradient:
        found = gradient_over_reasoning(*arguments, **options)
        return replace(found, per_example_current=tuple(-1e9 for _ in found.per_example_current))

    monkeypatch.setattr(algorithm, "gradient_over_reasoning", stay)
    better = compiled(steps=4, selections=1, max_failed_steps=2)
    assert tried(better) == [0, 0, 0, 0]
    assert [step.spent["generated_tokens"] for step in better.detailed_results.steps] == [0, 0, 0, 0]


# ---- positions, growth and failure


def positions(program: Any) -> list[int]:
    return [step.position for step in program.detailed_results.steps]


def test_no_step_is_spent_on_a_position_that_cannot_be_edited() -> None:
    program = program_on(planted_engine(), instruction="Look\n  here now.")
    better = optimizer(steps=6, train_rows=4).compile(program, ROWS[:4], valset=ROWS[4:8])
    steps = better.detailed_results.steps
    assert len(steps) == 6
    assert all(step.candidates for step in steps)
    assert all("\n" in step.chosen.instruction for step in steps)
    assert BEST in instruction_of(better).lower()


def test_an_open_instruction_grows_by_one_token_until_its_sentence_ends() -> None:
    program = program_on(planted_engine(), instruction="count")
    better = optimizer(steps=7, train_rows=4).compile(program, ROWS[:4], valset=ROWS[4:8])
    lengths = [len(step.chosen.token_ids) for step in better.detailed_results.steps]
    assert lengths[0] == 1 and lengths[-1] > 2
    for step, longer in itertools.pairwise(better.detailed_results.steps):
        grown = len(longer.chosen.token_ids) - len(step.chosen.token_ids)
        appended = longer.position == len(step.chosen.token_ids)
        assert grown == appended
        if ends_sentence(step.chosen.instruction) and step.position + 1 >= len(step.chosen.token_ids):
            assert longer.position == 0


def test_an_instruction_at_its_longest_starts_over_instead_of_growing() -> None:
    program = program_on(planted_engine(), instruction="count")
    better = optimizer(steps=5, train_rows=4, max_instruction_tokens=2).compile(program, ROWS[:4], valset=ROWS[4:8])
    assert max(len(step.chosen.token_ids) for step in better.detailed_results.steps) == 2
    assert positions(better) == [0, 1, 0, 1, 0]


def test_every_step_that_has_candidates_records_what_it_cost() -> None:
    for step in compiled(steps=3).detailed_results.steps:
        assert step.spent["forwards"] > 0
        assert step.spent["backward_tokens"] > 0
        assert step.spent["generated_tokens"] > 0


class BrokenModel(PlantedModel):
    """Writes as it should, but every loss is not a number."""

    def forward(self, *args: Any, past_key_values: Any = None, **options: Any) -> Any:
        found = super().forward(*args, past_key_values=past_key_values, **options)
        if past_key_values is None:
            reads = (options["input_ids"] == self._mark).any()
            found.logits = found.logits * (math.nan if reads else 1.0)
        return found


def test_a_model_without_one_finite_loss_ends_the_search_and_says_what_to_do() -> None:
    tokenizer = shared_tokenizer()
    engine = Engine(BrokenModel(tokenizer), tokenizer, name="broken")
    with pytest.raises(LossError, match="`predict`: no candidate had a finite loss in 2 steps in a row. .*float32"):
        compiled(engine=engine, steps=6, max_failed_steps=2)


# ---- the twin: one thing at a time, nothing remembered


@dataclass(frozen=True)
class Slow:
    """Algorithm 1 as one would first write it down."""

    engine: Engine
    program: Any
    rows: Sequence[Any]
    settings: Settings
    seed: int

    def search(self) -> Iterator[tuple[dict[str, Any], Evaluation]]:
        current = self.evaluate(instruction_of(self.program))
        position = 0
        for step in range(self.settings.steps):
            proposed = self.propose(current, position, step)
            if position == len(current.token_ids) and proposed:
                current = self.evaluate(next(iter(proposed)))
            edits = {text: ids[position] for text, (ids, _) in proposed.items() if text != current.instruction}
            slopes = self.slopes(current, position, list(edits.values())) if edits else {}
            indicator = {current.instruction: 0.0, **{text: slopes[token] for text, token in edits.items()}}
            order = sorted(indicator, key=lambda text: indicator[text])[: self.settings.most_tried] if edits else []
            evaluated = [self.evaluate(text) for text in order if text != current.instruction]
            selected = [current, *evaluated] if current.instruction in order else evaluated
            for index, each in enumerate(selected):
                if index == 0 or each.objective < current.objective:
                    current = each
            yield (
                {
                    "position": position,
                    "proposed": {text: value for text, (_, value) in proposed.items()},
                    "slopes": slopes,
                    "tried": {each.instruction: each.objective for each in evaluated},
                },
                current,
            )
            position += 1
            if position >= len(current.token_ids):
                is_open = not ends_sentence(current.instruction)
                position = len(current.token_ids) if is_open else 0

    def render(self, instruction: str, row: Any, written: str = "") -> str:
        signature = self.program.predictors()[0].signature.with_instructions(instruction)
        messages = dspy.ChatAdapter().format(signature, [], dict(row.inputs()))
        return render_chat(self.engine.tokenizer, messages) + written

    def tokens(self, text: str, start: int, stop: int) -> tuple[list[int], list[int]]:
        """All token ids, and the indices of those that touch characters start to stop."""
        encoded = self.engine.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = enumerate(encoded["offset_mapping"])
        return encoded["input_ids"], [index for index, (a, b) in pairs if a < stop and b > start]

    def instruction_ids(self, instruction: str) -> tuple[int, ...]:
        text = self.render(instruction, self.rows[0])
        start = text.index(instruction)
        ids, places = self.tokens(text, start, start + len(instruction))
        return tuple(ids[place] for place in places)

    def forward(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.engine.model(input_ids=torch.tensor([ids])).logits[0]

    def evaluate(self, instruction: str) -> Evaluation:
        program = self.program.deepcopy()
        predictor = program.predictors()[0]
        predictor.signature = predictor.signature.with_instructions(instruction)
        scores, losses, fluency, written = [], [], [], []
        for row in self.rows:
            with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
                prediction = program(**row.inputs())
            scores.append(float(exact_match(row, prediction)))
            written.append({"reasoning": prediction.reasoning})
            ids, asked, answer = self.supervised(instruction, row, prediction.reasoning)
            answer_nll, instruction_nll = self.losses(self.forward(ids), ids, asked, answer)
            losses.append(float(answer_nll))
            fluency.append(float(instruction_nll))
        mean = [sum(values) / len(values) for values in (scores, losses, fluency)]
        objective = (1 - mean[0] + self.settings.score_fluency_weight * mean[2], mean[1])
        outcomes: Any = tuple(zip(self.rows, written, strict=True))
        return Evaluation(
            self.instruction_ids(instruction), instruction, outcomes, mean[0], mean[1], mean[2], objective
        )

    def supervised(self, instruction: str, row: Any, reasoning: str) -> tuple[list[int], list[int], list[int]]:
        prompt = self.render(instruction, row)
        text = f"{prompt}[[ ## reasoning ## ]]\n{reasoning}\n\n[[ ## answer ## ]]\n{row.answer}"
        start = text.index(instruction)
        ids, asked = self.tokens(text, start, start + len(instruction))
        _, answer = self.tokens(text, len(text) - len(row.answer), len(text))
        return ids, asked, answer

    def losses(self, logits: torch.Tensor, ids: list[int], asked: list[int], answer: list[int]) -> Any:
        heat = self.settings.answer_temperature
        answer_nll = sum(-(logits[at - 1] / heat).log_softmax(-1)[ids[at]] for at in answer) / len(answer)
        instruction_nll = sum(-logits[at - 1].log_softmax(-1)[ids[at]] for at in asked) / len(asked)
        return answer_nll, instruction_nll

    def propose(self, current: Evaluation, position: int, step: int) -> dict[str, tuple[tuple[int, ...], float]]:
        prefix = current.token_ids[:position]
        contexts = [(*self.prefix(row), *prefix) for row in self.rows]
        rng = random.Random(f"{self.seed}/predict/{step}")
        size = min(self.settings.proposal_rows, len(contexts))
        draws = [rng.sample(contexts, size) for _ in range(self.settings.proposal_draws)]
        distinct = {context: self.forward(list(context))[-1].log_softmax(-1) for draw in draws for context in draw}
        k = self.settings.top_k
        while True:
            legal: dict[str, tuple[tuple[int, ...], float]] = {}
            proposed = set()
            for draw in draws:
                tops = [
                    set(distinct[context].sort(descending=True, stable=True).indices[:k].tolist()) for context in draw
                ]
                proposed |= set.intersection(*tops)
            survivors = 0
            for token in sorted(proposed):
                found = self.legal(current.token_ids, position, token)
                if found is None:
                    continue
                survivors += 1
                ids, text = found
                value = float(sum(each[token] for each in distinct.values()) / len(distinct))
                if text not in legal or value > legal[text][1]:
                    legal[text] = (ids, value)
            if survivors >= self.settings.minimum_candidates or k >= 16 * self.settings.top_k:
                return dict(sorted(legal.items(), key=lambda item: -item[1][1]))
            k = min(2 * k, 16 * self.settings.top_k)

    def prefix(self, row: Any) -> tuple[int, ...]:
        """The question as a user's turn that waits for an instruction."""
        signature = self.program.predictors()[0].signature
        content = dspy.ChatAdapter().format_user_message_content(signature, dict(row.inputs()), main_request=False)
        text = self.engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": content + "\n\nZQZ"}], tokenize=False, add_generation_prompt=False
        )
        return tuple(self.engine.tokenizer(text[: text.index("ZQZ")], add_special_tokens=False)["input_ids"])

    def legal(self, old: tuple[int, ...], position: int, token: int) -> tuple[tuple[int, ...], str] | None:
        new = (*old[:position], token, *old[position + 1 :])
        text = self.engine.tokenizer.decode(new, skip_special_tokens=False).strip()
        if not text.isprintable() or "\ufffd" in text or not any(map(str.isalnum, text)) or "<|" in text:
            return None
        ids = self.instruction_ids(text)
        ends = {position} & {0, len(new) - 1} | ({position - 1} if position == len(old) else set())
        same = len(ids) == len(new) and all(a == b or i in ends for i, (a, b) in enumerate(zip(ids, new, strict=True)))
        return (ids, text) if same else None

    def slopes(self, current: Evaluation, position: int, candidates: list[int]) -> dict[int, float]:
        """Equation 7, literally: the indicator ε over the candidates, one example at a time."""
        table = self.engine.model.get_input_embeddings()
        at_hand = [*candidates, current.token_ids[position]]
        total = torch.zeros(len(at_hand), dtype=torch.float64)
        for row, outcome in current.rows:
            ids, asked, answer = self.supervised(current.instruction, row, outcome["reasoning"])
            epsilon = torch.zeros(len(at_hand), dtype=table.weight.dtype)
            epsilon[-1] = 1.0
            epsilon.requires_grad_()
            embedded = table(torch.tensor(ids)).detach()
            embedded[asked[position]] = 0.0
            place = torch.nn.functional.one_hot(torch.tensor(asked[position]), len(ids)).to(embedded.dtype)
            embedded = embedded + place[:, None] * (epsilon @ table(torch.tensor(at_hand)).detach())
            logits = self.engine.model(inputs_embeds=embedded[None]).logits[0]
            answer_nll, instruction_nll = self.losses(logits, ids, asked, answer)
            (answer_nll + self.settings.fluency_weight * instruction_nll.exp()).backward()
            total += epsilon.grad.double()
        return {token: float(value - total[-1]) for token, value in zip(candidates, total, strict=False)}


def assert_same_search(
    engine: Engine, program: Any, rows: Sequence[Any], seed: int, tolerance: float, **knobs: Any
) -> None:
    settings = {"train_rows": len(rows), "validation_rows": 1, "seed": seed, **knobs}
    steps = optimizer(**settings).compile(program, rows, valset=planted_rows(24)[-1:]).detailed_results.steps
    rng = random.Random(f"{seed}/rows")
    drawn = rng.sample(list(rows), len(rows))
    chosen = Settings.of(None, variant="paper", train_rows=len(rows), validation_rows=1, **knobs)
    close = {"rel": tolerance, "abs": tolerance}
    slow = list(Slow(engine, program, drawn, chosen, seed).search())
    assert len(slow) == len(steps) == chosen.steps
    for step, (told, current) in zip(steps, slow, strict=True):
        assert step.position == told["position"]
        texts = [each.evaluation.instruction for each in step.candidates if each.evaluation]
        assert set(told["tried"]) <= set(texts)
        assert [each.log_probability for each in step.candidates] == pytest.approx(
            list(told["proposed"].values()), **close
        )
        slopes = {each.token: each.gradient for each in step.candidates if each.gradient is not None}
        assert slopes == pytest.approx(told["slopes"], **close)
        for each in step.candidates:
            if each.evaluation and each.evaluation.instruction in told["tried"]:
                objective = told["tried"][each.evaluation.instruction]
                if each.evaluation.complete:
                    assert each.evaluation.objective == pytest.approx(objective, **close)
                else:  # given up: it could not have been chosen
                    assert objective > current.objective
        assert step.chosen.instruction == current.instruction
        assert step.chosen.token_ids == current.token_ids
        assert step.chosen.objective == pytest.approx(current.objective, **close)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_equals_its_slow_and_obvious_twin_on_the_planted_model(seed: int) -> None:
    tokenizer = shared_tokenizer()
    engine = Engine(PlantedModel(tokenizer, seed=seed).double(), tokenizer, name="planted64")
    program = program_on(engine)
    assert_same_search(engine, program, ROWS[:4], seed, 1e-8, steps=7, proposal_rows=3, proposal_draws=2)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_equals_its_slow_and_obvious_twin_on_the_pocket_model(seed: int) -> None:
    engine = Engine.from_pretrained("pocket")
    rng = random.Random(seed)
    questions = [generate("web_of_lies", rng) for _ in range(3)]
    rows = [
        dspy.Example(question=each, answer=work_out("web_of_lies", each).answer).with_inputs("question")
        for each in questions
    ]
    program = program_on(engine, instruction="Answer the question.", max_tokens=300)
    assert_same_search(engine, program, rows, seed, 1e-4, steps=2, selections=2, top_k=6, minimum_candidates=4)
