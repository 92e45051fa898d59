"""Both variants' searches are the plain reference, candidate for candidate and number for number."""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
import torch
from scripted_engine import (
    SEED,
    PlantedModel,
    ScriptedEngine,
    chat_answer,
    exact_match,
    instruction_in,
    obedient_script,
    planted_rows,
    program_on,
    shared_tokenizer,
    value_in,
)
from test_programs import TwoHops, answer_is_label, hop_script, unlabelled

from dspy_greater import GReaTerTeleprompter, local_lm, reference
from dspy_greater.model.engine import Engine
from dspy_greater.pocket.tasks import generate, work_out
from dspy_greater.program.copies import with_instructions
from dspy_greater.search.problem import Options, Problem, prepare
from dspy_greater.stats import spearman

DOCUMENTATION = Path(__file__).resolve().parent.parent / "docs" / "algorithm.md"
ROWS = planted_rows(24)
PAPER, DEFAULT = "paper", "default"
CLOSE = {"rel": 1e-5, "abs": 1e-5, "nan_ok": True}
BRIEF = {"positions_ahead": 2, "forecasts": 4}  # fewer of the reference's passes, which take a row each


# --- the comparison


@dataclass(frozen=True)
class Searched:
    """A problem, and what the search of one of its predictors did."""

    problem: Problem
    predictor: Any
    at: int = 0


def searched(program: Any, rows: Sequence[Any], *, metric: Any = exact_match, seed: int = 0, **options: Any) -> Any:
    """What the search does on all rows but the last, for each predictor."""
    posing = {name: options.pop(name) for name in ("extractor", "mode") if name in options}
    plain = {"phrases": 0, "written": 0, "forecast_share": 0}  # which the reference leaves out
    knobs = {"train_rows": len(rows) - 1, "validation_rows": 1, **plain, **options}
    optimizer = GReaTerTeleprompter(metric=metric, auto=None, seed=seed, progress=False, **posing, **knobs)
    details = optimizer.compile(program, rows[:-1], valset=rows[-1:]).detailed_results
    problem = prepare(
        program,
        rows[:-1],
        metric,
        rows[-1:],
        Options(settings=optimizer.settings, step=optimizer.step, seed=seed, **posing),
    )
    found = {each.name: each for each in details.predictors}
    program, result = problem.program, list[Searched]()
    for at, target in enumerate(problem.targets):
        name = target.predictor.name
        result.append(Searched(replace(problem, program=program), found[name], at))
        program = with_instructions(program, {name: found[name].instruction})
    return result


def assert_is_the_reference(run: Searched) -> set[str]:
    """Hold every step to the reference; what happened in them comes back."""
    task = reference.Task(run.problem, run.problem.targets[run.at])
    followed = list(reference.search(task))
    assert len(run.predictor.steps) == len(followed) == run.problem.settings.steps
    p = run.predictor.seed.token_ids
    for taken, (step, state) in zip(run.predictor.steps, followed, strict=True):
        where = f"step {taken.step} of {run.predictor.name}"
        assert taken.position == step.position, where
        assert said(taken) == pytest.approx(said_by_reference(step, p), **CLOSE), where
        assert_evaluation(taken.chosen, step.chosen, where)
        for candidate, plain in zip(taken.candidates, step.candidates, strict=True):
            if plain.text in step.outcomes:
                assert_evaluation(candidate.evaluation, step.outcomes[plain.text], where)
        p = state.current.token_ids
    for one, other in zip(run.predictor.finalists, followed[-1][1].best, strict=True):
        assert_evaluation(one, other, "finalists")
    return {what for (step, state) in followed for what in happened(task, step, state)}


def assert_evaluation(one: Any, other: Any, where: str) -> None:
    assert (one.instruction, one.token_ids) == (other.instruction, other.token_ids), where
    numbers = [[*each.objective, each.score, each.cross_entropy, each.fluency_nll] for each in (one, other)]
    assert numbers[0] == pytest.approx(numbers[1], **CLOSE), where
    assert [replace(row, cross_entropy=0.0) for row in one.rows] == [
        replace(row, cross_entropy=0.0) for row in other.rows
    ]


def said(step: Any) -> list[tuple[str, int, list[float]]]:
    """Of each candidate of a step of the search: its edit and token, and what the stages said."""
    return flat(
        [
            (each.edit, each.token, [each.log_probability, each.gradient, each.forecast, each.effective_samples])
            for each in step.candidates
        ]
    )


def said_by_reference(step: reference.Step, p: Sequence[int]) -> list[tuple[str, int, list[float]]]:
    at = step.position
    return flat(
        [
            (
                each.edit,
                p[at] if each.edit == "delete" else each.token_ids[at],
                [each.log_probability, step.slopes.get(each.text), *step.forecasts.get(each.text, (None, None))],
            )
            for each in step.candidates
        ]
    )


def flat(candidates: Any) -> dict[str, float]:
    """By name; a number that is not finite is as good as another."""
    names = ("log f", "slope", "forecast", "effective sample size")
    return {
        f"{place}: {edit} {token}, {name}": value if math.isfinite(value) else math.inf
        for place, (edit, token, numbers) in enumerate(candidates)
        for name, value in zip(names, numbers, strict=True)
        if value is not None
    }


def happened(task: reference.Task, step: reference.Step, state: reference.State) -> list[str]:
    edits = {each.edit for each in step.candidates if each.text in step.outcomes}
    what = {
        "deleted": "delete" in edits,
        "inserted": "insert" in edits,
        "by chance": not task.paper and bool(step.outcomes) and not step.slopes,
        "fewer than asked for": 0 < len(step.outcomes) < task.mu <= len(step.candidates),
        "returned": state.current is not step.chosen,
        "worse": state.best[0].objective < step.chosen.objective,
        "another round": step.position > state.position,
        "no answer": any(row.unparsed for row in step.chosen.rows),
        "thought": any(row.preamble for row in step.chosen.rows),
    }
    return [name for name, is_so in what.items() if is_so]


# --- models and programs


def double(seed: int) -> PlantedModel:
    return PlantedModel(shared_tokenizer(), seed=seed, sharpness=0.5).double()


def planted(seed: int, instruction: str = SEED) -> Any:
    return program_on(Engine(double(seed), shared_tokenizer(), name="planted64"), instruction=instruction)


def scripted(script: Any, seed: int = 0) -> ScriptedEngine:
    return ScriptedEngine(script, model=double(seed))


def pocket_rows(task: str, count: int, seed: int) -> list[Any]:
    questions = [generate(task, drawn) for drawn in [random.Random(seed)] for _ in range(count)]
    return [
        dspy.Example(question=each, answer=work_out(task, each).answer).with_inputs("question") for each in questions
    ]


def fickle(prompt: str) -> str:
    """Right as often as the instruction happens to be worth."""
    instruction, question = instruction_in(prompt), value_in(prompt)
    right = random.Random(instruction + question).random() < random.Random(instruction).random()
    mood = random.Random(question + instruction[::2]).choice(["carefully", "quickly", "it now", "maybe"])
    gold = "yes" if "apples" in question else "no"
    return chat_answer(reasoning=f"read {mood}", answer=gold if right else "never")


def halting(prompt: str) -> str:
    """Thinks first, stops early, or forgets the format, as the instruction and the question happen to be."""
    question = value_in(prompt)
    chance, gold = random.Random(instruction_in(prompt) + question).random(), "yes" if "apples" in question else "no"
    full = chat_answer(reasoning="read carefully", answer=gold if chance < 0.8 else "never")
    forms = {0.2: f"I read it {gold}", 0.3: "", 0.5: f"<think>read it</think>{full}", 0.6: full.split("\n\n")[0]}
    return next((form for bound, form in forms.items() if chance < bound), full)


# --- what is compared


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", [PAPER, DEFAULT])
def test_on_the_pocket_model_the_search_is_the_reference(variant: str, seed: int) -> None:
    engine = Engine.from_pretrained("pocket", dtype=torch.float64)  # so that rounding hides nothing
    program = program_on(engine, instruction="Answer the question.", max_tokens=120)
    rows = pocket_rows("web_of_lies", 3, seed)
    fewer = {"selections": 2} if variant == PAPER else {"positions_ahead": 2, "forecasts": 3}
    [run] = searched(program, rows, seed=seed, variant=variant, steps=2, **fewer)
    assert_is_the_reference(run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", [PAPER, DEFAULT])
def test_on_the_planted_model_the_search_is_the_reference(variant: str, seed: int) -> None:
    [run] = searched(planted(seed), ROWS[:3], seed=seed, variant=variant, steps=6 if variant == PAPER else 3)
    assert_is_the_reference(run)


@pytest.mark.slow
def test_an_open_instruction_grows_as_in_the_reference_and_starts_over_at_its_longest() -> None:
    [run] = searched(planted(1, "count"), ROWS[:3], variant=PAPER, steps=5, max_instruction_tokens=3, finalists=5)
    assert assert_is_the_reference(run) >= {"inserted", "another round", "worse"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "instruction", "seen"),
    [
        (fickle, SEED, {"by chance", "deleted", "inserted", "worse"}),
        (halting, "count", {"by chance", "no answer", "thought"}),
        (obedient_script, "count", {"fewer than asked for", "inserted", "returned", "another round"}),
    ],
)
def test_where_forecasts_fail_or_come_true_and_a_walk_returns_the_search_is_the_reference(
    script: Any, instruction: str, seen: set[str]
) -> None:
    program = program_on(scripted(script), instruction=instruction)
    [run] = searched(program, ROWS[:4], steps=7, selections=4, **BRIEF)
    assert assert_is_the_reference(run) >= seen


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rewrite", "append"])
def test_without_gold_values_the_search_is_the_reference(mode: str) -> None:
    rows = unlabelled(4)
    [run] = searched(program_on(scripted(fickle)), rows, metric=answer_is_label, mode=mode, steps=4, **BRIEF)
    assert_is_the_reference(run)
    assert (run.problem.targets[0].field, run.predictor.steps[0].position > 0) == (None, mode == "append")


@pytest.mark.slow
def test_where_nothing_is_reasoned_the_search_is_the_reference() -> None:
    program = dspy.Predict(dspy.Signature("question -> answer", SEED))
    program.set_lm(local_lm(scripted(fickle), cache=False, max_tokens=64))
    [run] = searched(program, ROWS[:4], steps=3, selections=2, **BRIEF)
    assert_is_the_reference(run)


@pytest.mark.slow
def test_two_predictors_in_turn_are_searched_as_by_the_reference() -> None:
    runs = searched(TwoHops(scripted(hop_script)), planted_rows(4), steps=2, selections=3, **BRIEF)
    assert [run.predictor.name for run in runs] == ["hint", "answer.predict"]
    for run in runs:
        assert_is_the_reference(run)


NUMBERS: list[dict[str, Any]] = [
    {"baseline_scale": 0.0, "answer_weight": 0.3, "uncertainty_weight": 1.0, "answer_temperature": 1.0, "replayed": 2},
    {"forecasts": 0, "explore_every": 0, "finalists": 1, "max_instruction_tokens": 6, "score_fluency_weight": 0.2},
    {"variant": PAPER, "fluency_weight": 0.0, "top_k": 3, "minimum_candidates": 12, "extractor": "So it is "},
    {"positions_ahead": 1, "forecasts": 2, "proposal_rows": 2, "proposal_draws": 1, "extractor": "So it is "},
]


@pytest.mark.slow
@pytest.mark.parametrize("numbers", NUMBERS)
def test_every_number_that_can_be_set_means_what_it_means_in_the_reference(numbers: dict[str, Any]) -> None:
    [run] = searched(program_on(scripted(fickle, 1)), ROWS[:4], **{"steps": 3, "selections": 2, **BRIEF, **numbers})
    assert_is_the_reference(run)


# --- the comparison sees what it should


@pytest.mark.parametrize("name", ["fluency_weight", "answer_temperature", "score_fluency_weight", "selections"])
def test_a_search_with_another_number_is_not_the_reference(name: str) -> None:
    [run] = searched(planted(0), ROWS[:2], variant=PAPER, steps=1)
    settings = replace(run.problem.settings, **{name: {"selections": 1}.get(name, 0.5)})
    with pytest.raises(AssertionError):
        assert_is_the_reference(replace(run, problem=replace(run.problem, settings=settings)))


@pytest.mark.parametrize("score", [0.0, 0.25, 1 / 3, 0.7])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_at_the_seeds_score_the_references_baseline_is_exactly_as_optimistic_as_asked_for(
    scale: float, score: float
) -> None:
    """Off by a rounding error, it would give weight to reasonings that have none."""
    task: Any = SimpleNamespace(settings=SimpleNamespace(baseline_scale=scale))
    state: Any = SimpleNamespace(seed=SimpleNamespace(score=score), current=SimpleNamespace(score=score))
    assert reference.baseline_scale(task, state) == scale


def test_the_references_rank_correlation_is_the_packages() -> None:
    draw = random.Random(0)
    for count in (3, 6, 12):
        pairs = [(float(draw.randrange(4)), (float(draw.randrange(2)), draw.random())) for _ in range(count)]
        assert reference.rank_correlation(pairs) == pytest.approx(spearman(*zip(*pairs, strict=True)))
    assert math.isnan(reference.rank_correlation([(0.0, (0.0, 1.0)), (0.0, (1.0, 0.0)), (0.0, (0.5, 0.5))]))


# --- the way to it; `python tests/test_reference.py` writes the lines anew


def with_lines(text: str) -> str:
    """The documentation with the lines on which the reference defines what is pointed to."""
    return re.sub(
        r"\[`(\w+)`\]\(\.\./dspy_greater/reference\.py#L\d+\)",
        lambda found: f"[`{found[1]}`](../dspy_greater/reference.py#L{defined()[found[1]]})",
        text,
    )


def defined() -> dict[str, int]:
    nodes = ast.parse(Path(reference.__file__).read_text()).body
    return {node.name: node.lineno for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_the_documentation_points_to_everything_in_the_reference_by_its_line() -> None:
    text = DOCUMENTATION.read_text()
    assert text == with_lines(text), "python tests/test_reference.py writes the lines anew"
    assert set(re.findall(r"`(\w+)`\]\([^)]*#L\d+\)", text)) == set(defined())


if __name__ == "__main__":
    DOCUMENTATION.write_text(with_lines(DOCUMENTATION.read_text()))
