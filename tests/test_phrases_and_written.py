"""Phrases and whole instructions as candidates: legal, new, drawn the same again, and judged like any other."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from enum import Enum
from random import Random
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import (
    BEST,
    SEED,
    ScriptedEngine,
    exact_match,
    instruction_of,
    obedient_script,
    planted_engine,
    planted_rows,
    program_on,
    word_tokenizer,
)
from tokenizers import AddedToken

from dspy_greater import GReaTerTeleprompter
from dspy_greater.metric import RowMetric
from dspy_greater.model.plain import PlainModel
from dspy_greater.objective.evaluator import Evaluator, Instruction, Objective
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.predictors import predictors_of
from dspy_greater.prompt.layout import Layout
from dspy_greater.run.log import edit_of
from dspy_greater.search.answer_form import answer_forms
from dspy_greater.search.edits import Edit
from dspy_greater.search.payoff import Payoff
from dspy_greater.search.phrases import mean_likelihoods, propose_phrases
from dspy_greater.search.state import SearchState, advance, begin
from dspy_greater.search.step import StepContext
from dspy_greater.search.written import instruction_in, propose_written, writes
from dspy_greater.settings import Settings

ROWS = planted_rows(8)
ANSWERS_ONLY = "Write the instruction for this task."  # how a request that says nothing of mistakes ends


class Writer(ScriptedEngine):
    """The planted script, which answers a request for an instruction with the next of these texts."""

    def __init__(self, *texts: str) -> None:
        self.asked: list[str] = []

        def write(prompt: str) -> str:
            if "Write a better one" not in prompt and ANSWERS_ONLY not in prompt:
                return obedient_script(prompt)
            self.asked.append(prompt)
            return texts[(len(self.asked) - 1) % len(texts)]

        super().__init__(write, model=planted_engine().model)


def before_a_step(
    engine: Any = None,
    instruction: str = SEED,
    *,
    position: int = 0,
    step: int = 2,  # a later one, in which the model alone is asked: the forms were tried
    fixed: str = "",
    objective: tuple[str, list[Any], Any] = ("answer", ROWS, exact_match),
    **knobs: Any,
) -> StepContext:
    program = program_on(engine or planted_engine(), instruction=instruction)
    [predictor] = predictors_of(program)
    settings = Settings(**knobs)
    field, rows, metric = objective
    evaluator = Evaluator(
        Objective(program, predictor, field or None, rows, RowMetric(metric), fixed=fixed),
        engine=predictor.lm.engine.engine,
        settings=settings,
    )
    [seed] = evaluator.evaluate([evaluator.seed()])
    state = begin(seed, settings, editable=evaluator.layout.edits.positions(seed.token_ids), fixed=fixed)
    state = replace(state, position=position or state.position, step=step, formed=seed.instruction if step else None)
    return StepContext(evaluator, evaluator.engine, state, settings, "predict", 0)


def assert_deployed_as_scored(at: StepContext, edits: tuple[Edit, ...]) -> None:
    for each in edits:
        assert at.evaluator.layout.edits.instruction_ids(each.instruction.text) == each.instruction.token_ids
        assert not at.evaluator.knows(each.instruction.text)


# --- phrases


def test_a_phrase_is_put_in_at_the_position_or_in_the_place_of_as_many_tokens() -> None:
    at = before_a_step(position=2, phrases=8)
    found, ids = propose_phrases(at), at.current.token_ids
    assert {each.kind for each in found} == {"insert", "replace"}
    for each in found:
        assert 2 <= len(each.tokens) <= 8 and each.origin == "phrase"
        behind = ids[2:] if each.kind == "insert" else ids[2 + len(each.tokens) :]
        # At both ends of an instruction a token may take in a blank; in the middle all are as proposed.
        made = each.instruction.token_ids
        assert len(made) == 2 + len(each.tokens) + len(behind) and made[:2] == ids[:2]
        assert made[len(made) - len(behind) :] == behind
    assert_deployed_as_scored(at, found)


def test_the_phrase_that_is_likelier_on_other_rows_comes_first() -> None:
    at = before_a_step(position=1, phrases=8)
    likelihoods = [each.log_probability for each in propose_phrases(at)]
    assert len(set(likelihoods)) > 2 and likelihoods == sorted(likelihoods, reverse=True)


def test_the_likelihood_of_a_phrase_is_the_mean_over_contexts_and_tokens() -> None:
    at = before_a_step()
    contexts, phrases = at.evaluator.proposal_contexts(at.current, 2)[:3], [(7, 9), (11, 5, 6)]
    plain = PlainModel(at.evaluator.engine)
    expected = []
    for phrase in phrases:
        steps = [
            float(plain.next_token_logprobs([(*context, *phrase[:at_])])[0, phrase[at_]])
            for context in contexts
            for at_ in range(len(phrase))
        ]
        expected.append(sum(steps) / len(steps))
    assert mean_likelihoods(at, contexts, phrases) == pytest.approx(expected, rel=1e-4)


def test_phrases_are_the_same_again_and_others_with_another_seed() -> None:
    at = before_a_step(phrases=6)
    texts = [each.instruction.text for each in propose_phrases(at)]
    assert texts and [each.instruction.text for each in propose_phrases(at)] == texts
    assert [each.instruction.text for each in propose_phrases(replace(at, random_seed=1))] != texts


def test_a_phrase_leaves_the_fixed_text_and_the_longest_length() -> None:
    fixed = "Please say"
    at = before_a_step(instruction=fixed, position=2, fixed=fixed, phrases=8, max_instruction_tokens=3)
    found = propose_phrases(at)
    assert found and all(each.instruction.text.startswith(fixed) for each in found)
    assert all(len(at.evaluator.layout.edits.positions(each.instruction.token_ids)) <= 3 for each in found)
    assert propose_phrases(replace(at, settings=replace(at.settings, phrases=0))) == ()


# --- whole instructions


def test_of_three_requests_one_shows_the_instruction_and_rows_that_went_wrong_first() -> None:
    engine = Writer("List and count.")
    at = before_a_step(engine, written=6)
    propose_written(at)
    wrong = [row for row in at.current.rows if row.score < 1.0]
    assert wrong
    about_mistakes = [each for each in engine.asked if ANSWERS_ONLY not in each]
    assert len(engine.asked) == 9 and about_mistakes == engine.asked[2::3]  # some to spare
    for prompt in about_mistakes:
        assert f"Instruction: {SEED}" in prompt and prompt.count("Right answer: ") == 3
        assert any(str(row.inputs["question"]) in prompt for row in wrong)
    assert len(set(engine.asked)) == 9


def test_the_others_show_right_answers_alone_behind_other_tasks_with_their_instructions() -> None:
    engine = Writer("List and count.")
    at = before_a_step(engine, written=4)
    propose_written(at)
    about_answers = [each for each in engine.asked if ANSWERS_ONLY in each]
    assert about_answers == [engine.asked[at] for at in (0, 1, 3, 4)] and len(set(about_answers)) == 4
    for prompt in about_answers:
        *lessons, own = prompt.split(ANSWERS_ONLY)[:-1]
        assert len(lessons) == 3 and "such as (B)." in prompt and "positive or negative." in prompt
        shown = [row for row in at.current.rows if str(row.inputs["question"]) in own]
        assert len(shown) == 4 and all(f"Right answer: {ROWS[row.row].answer}" in own for row in shown)
        assert SEED not in prompt and "It wrote: " not in prompt


def test_where_the_field_of_the_reasoning_stays_empty_what_was_written_before_it_is_shown() -> None:
    at = before_a_step(engine := Writer("List and count."), written=4)
    rows = [replace(row, written={"reasoning": " "}, preamble="First I look.") for row in at.current.rows]
    propose_written(replace(at, state=replace(at.state, current=replace(at.current, rows=tuple(rows)))))
    about_mistakes = [prompt for prompt in engine.asked if ANSWERS_ONLY not in prompt]
    assert about_mistakes and all(prompt.count("It wrote: First I look.") == 3 for prompt in about_mistakes)


def test_without_right_answers_every_request_is_about_mistakes() -> None:
    engine = Writer("List and count.")
    rows = [dspy.Example(question=row.question).with_inputs("question") for row in ROWS]
    at = before_a_step(engine, written=4, objective=("", rows, lambda example, prediction, trace=None: 0.5))
    propose_written(at)
    assert len(engine.asked) == 6 and not any(ANSWERS_ONLY in each for each in engine.asked)


@pytest.mark.parametrize(("alone", "shown"), [(True, 4), (False, 0)])
def test_of_another_predictors_right_answers_alone_nobody_is_asked_what_this_one_is_for(
    alone: bool, shown: int
) -> None:
    engine = Writer("List and count.")  # the labels' name is that of no output field of the predictor
    rows = [dspy.Example(question=row.question, verdict=row.answer).with_inputs("question") for row in ROWS]
    at = before_a_step(engine, written=4, objective=("", rows, lambda example, prediction, trace=None: 0.5))
    at.evaluator.alone = alone
    propose_written(at)
    assert sum(ANSWERS_ONLY in prompt for prompt in engine.asked) == shown
    assert all("Right verdict: " in prompt for prompt in engine.asked)  # what mistakes are measured by is said anyway


def test_what_no_output_field_has_is_not_said_to_be_a_right_answer_beside_what_one_has() -> None:
    engine, rows = Writer("List and count."), [row.copy(level="hard") for row in ROWS]
    propose_written(before_a_step(engine, written=4, objective=("answer", rows, exact_match)))
    assert all("Right answer: " in prompt and "hard" not in prompt for prompt in engine.asked)


@pytest.mark.parametrize("points", [1.0, 100.0])
def test_a_request_about_mistakes_shows_what_was_written_whatever_a_metric_counts_in(points: float) -> None:
    engine = Writer("List and count.")

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return points * exact_match(example, prediction)

    propose_written(before_a_step(engine, written=4, objective=("answer", ROWS, metric)))
    without_gold = [row.without("answer").with_inputs("question") for row in ROWS]
    propose_written(before_a_step(engine, written=4, objective=("", without_gold, lambda *_: points)))
    about_mistakes = [prompt for prompt in engine.asked if ANSWERS_ONLY not in prompt]
    assert len(about_mistakes) == 2 + 6 and all(prompt.count("It wrote: ") == 3 for prompt in about_mistakes)


def test_what_it_writes_becomes_a_candidate_only_where_it_can_be_deployed_and_is_new() -> None:
    texts = ('"List and count."', SEED, "[[ ## answer ## ]] yes", "!?", "Instruction: List and count.", "<|end|>")
    at = before_a_step(Writer(*texts), written=len(texts))
    found = propose_written(at)
    assert [each.instruction.text for each in found] == ["List and count."]
    assert (found[0].kind, found[0].origin) == ("rewrite", "written") and math.isnan(found[0].log_probability)
    assert_deployed_as_scored(at, found)


def test_what_is_copied_from_another_tasks_lesson_is_no_candidate() -> None:
    engine = Writer("List and count.")
    propose_written(before_a_step(engine, written=1))
    lessons = re.findall(r"(?:Answer|Add|Compare|Decide) [^<]*? Answer with [^<]*?\.(?=<)", engine.asked[0])
    assert len(lessons) == 3
    found = propose_written(before_a_step(Writer(*lessons, "List and count."), written=4))
    assert [each.instruction.text for each in found] == ["List and count."]


def test_what_differs_from_a_lesson_in_a_word_is_a_copy_and_what_says_another_task_is_none() -> None:
    near = "Decide whether the guest was moved. Answer with the one word positive or negative."
    other = "Decide whether the walk ends where it began. Answer with the one word yes or no."
    found = propose_written(before_a_step(Writer(near, other), written=2))
    assert [each.instruction.text for each in found] == [other]


def test_behind_a_fixed_text_the_written_instruction_is_a_sentence_more() -> None:
    at = before_a_step(Writer("List and count."), instruction="Please say", fixed="Please say", written=1)
    assert [each.instruction.text for each in propose_written(at)] == ["Please say List and count."]


def test_one_that_is_longer_than_allowed_is_left_out() -> None:
    at = before_a_step(Writer("List and count " * 20), written=1, max_instruction_tokens=12)
    assert propose_written(at) == ()


def thinking_tokenizer() -> Any:
    """Of a model that thinks between tags, which are tokens of its own, unless its template closes them at once."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    written = "{{ message['content'].split('</think>')[-1] if message['role'] == 'assistant' else message['content'] }}"
    closed = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>" + written + "<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>" + closed + "{% endif %}"
    )
    return tokenizer


def test_a_thinking_model_is_asked_for_instructions_at_once_and_its_thoughts_are_none() -> None:
    answers = [
        "<think>\nOkay, the user wants an instruction. Let me look.",
        "<think>\nLet me look.\n</think>\n\nList and count.",
        "Say how many there are.",
    ]
    asked: list[str] = []

    def write(prompt: str) -> str:
        if "Write a better one" not in prompt and ANSWERS_ONLY not in prompt:
            return obedient_script(prompt)
        asked.append(prompt)
        return answers[(len(asked) - 1) % len(answers)]

    at = before_a_step(ScriptedEngine(write, tokenizer=thinking_tokenizer()), written=3)
    assert {each.instruction.text for each in propose_written(at)} == {"List and count.", "Say how many there are."}
    assert all(prompt.endswith("<|assistant|><think>\n\n</think>\n\n") for prompt in asked)


def test_tokens_of_the_models_own_are_not_spelt_in_an_instruction() -> None:
    edits = Layout(thinking_tokenizer(), dspy.ChatAdapter(), dspy.Signature("question -> answer", SEED)).edits
    assert edits.rewrite("Think <think> twice.") is None and edits.rewrite("Think <thrice> of [it].") is not None


@pytest.mark.parametrize(
    ("rewrites", "edits", "expected"),
    [
        ((), (), True),
        ((), (True,), True),  # the first time without a record
        ((True,), (), True),  # an edit that was not tried counts as paying every other time
        ((False,), (), False),
        ((False,), (False,), False),
        ((False,), (False, False), True),
        ((True, False), (False,), True),
        ((False, False), (True, False, False), False),
    ],
)
def test_it_is_asked_at_the_first_step_and_then_while_that_pays_more_often_than_edits(
    rewrites: tuple[bool, ...], edits: tuple[bool, ...], expected: bool
) -> None:
    at = before_a_step(step=3)
    state = replace(at.state, rewrites=Payoff(len(rewrites), sum(rewrites)), edits=Payoff(len(edits), sum(edits)))
    assert writes(replace(at, state=state)) is expected
    assert not writes(replace(at, state=state, settings=Settings(written=0)))


# --- the form of a right answer


def test_behind_a_new_instruction_the_first_candidates_say_what_the_gold_values_look_like() -> None:
    engine = Writer("List and count.")
    found = propose_written(before_a_step(engine, step=0, written=4))
    assert [(each.instruction.text, each.origin) for each in found[:2]] == [
        (f"{SEED} Answer with one word: no or yes.", "form"),
        (f"{SEED} The answer is no or yes.", "form"),
    ]
    assert len(engine.asked) == 3 and {each.kind for each in found} == {"rewrite"}
    assert_deployed_as_scored(before_a_step(step=0), found)


def test_forms_are_tried_behind_a_new_best_whatever_kind_of_step_found_it_and_once_behind_each() -> None:
    at = before_a_step(Writer("List and count."), written=4)  # those behind the seed were tried
    [found] = at.evaluator.evaluate([Instruction(*(at.evaluator.layout.edits.rewrite("Count them.") or ((), "")))])
    better = replace(at, state=replace(at.state, best=(found, *at.state.best)))
    forms = [each.instruction.text for each in propose_written(better) if each.origin == "form"]
    assert forms == ["Count them. Answer with one word: no or yes.", "Count them. The answer is no or yes."]
    assert "form" not in {each.origin for each in propose_written(at)}


def test_answers_to_spare_take_the_places_of_those_that_cannot_be_tried_and_no_others() -> None:
    texts = ("!?", "List and count.", "Look twice.", "Add them up.", "Name each thing.", "Never tried.")
    found = propose_written(before_a_step(Writer(*texts), written=4))
    assert [each.instruction.text for each in found] == list(texts[1:5])


def test_an_open_sentence_is_ended_before_the_form_and_a_fixed_text_stays_in_front() -> None:
    at = before_a_step(instruction="Please say it", fixed="Please", step=0, written=1)
    [found] = propose_written(at)
    assert found.instruction.text == "Please say it. Answer with one word: no or yes."


def test_the_form_stands_behind_an_instruction_of_several_lines() -> None:
    lines = "You are given a question.\n\nSay whether any are left"
    at = before_a_step(instruction=lines, step=0, written=1)
    [found] = propose_written(at)
    assert found.instruction.text == f"{lines}. Answer with one word: no or yes."
    assert_deployed_as_scored(at, (found,))
    assert at.evaluator.layout.edits.rewrite("One line.\nAnd another.") is None


def test_the_form_has_the_values_of_an_enumeration_as_adapters_read_them() -> None:
    answer = Enum("Answer", {"NO": "not any", "YES": "some"}, type=str)
    assert answer_forms([answer.NO, answer.YES] * 2, SEED, Random(0))[1] == "The answer is not any or some."


def test_the_form_is_said_of_the_best_instruction_though_the_search_has_walked_on() -> None:
    at = before_a_step(step=0, written=1)
    walked = replace(at, state=replace(at.state, current=replace(at.current, instruction="Elsewhere.")))
    [found] = propose_written(walked)
    assert found.instruction.text.startswith(f"{SEED} ")


def test_a_form_that_is_too_long_or_was_tried_is_left_out() -> None:
    assert propose_written(before_a_step(Writer("!?"), step=0, written=3, max_instruction_tokens=6)) == ()
    at = before_a_step(Writer("!?"), step=0, written=3)
    first, second = propose_written(at)
    at.evaluator.evaluate([first.instruction])
    assert propose_written(at) == (second,)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Say yes or no.", False),
        ("Answer with NO or Yes.", False),
        ("Say yes if you know.", True),  # not all of them
        ("Nothing but yesterday counts.", True),  # not words of their own
    ],
)
def test_a_form_that_the_instruction_has_already_is_not_said_again(instruction: str, expected: bool) -> None:
    found = propose_written(before_a_step(Writer("!?"), instruction=instruction, step=0, written=3))
    assert bool(found) is expected


@given(st.lists(st.one_of(st.text(max_size=50), st.integers(), st.none(), st.lists(st.text())), max_size=9))
def test_whatever_gold_values_are_a_form_is_one_line_or_nothing(golds: list[object]) -> None:
    for each in answer_forms(golds, "Count.", Random(0)):
        assert len(each.splitlines()) == 1 and each == each.strip()


@pytest.mark.parametrize(
    ("answer", "ended", "expected"),
    [
        ('Answer with "yes" or "no"', True, 'Answer with "yes" or "no"'),
        ("Round to two decimals, such as 3.14", True, "Round to two decimals, such as 3.14"),
        ("Use the form 3.14 for numbers. Then wri", False, "Use the form 3.14 for numbers."),
        ("Count the items, e.g. apples and pea", False, "Count the items, e.g. apples and pea"),
        ("1. List the items\n2. Count th", False, "1. List the items 2. Count th"),
        ("1. List the items.\n2. Count them.\n3. Ad", False, "1. List the items. 2. Count them."),
        ("Sure! Here is a better one: Count the items.", True, "Count the items."),
        ("Here is the new text:\n\nCount the items.", True, "Count the items."),
        ("Look at the map: north is up.", True, "Look at the map: north is up."),
        ("**Instruction:** Count the items.", True, "Count the items."),
        ('Better instruction: "Count the items. The', False, "Count the items."),
        ("“Count the items.”", True, "Count the items."),
        ("数一数。然后相", False, "数一数。"),
    ],
)
def test_an_instruction_is_taken_from_an_answer_as_it_was_meant(answer: str, ended: bool, expected: str) -> None:
    assert instruction_in(answer, ended=ended) == expected


@given(st.text(max_size=60), st.booleans())
def test_whatever_is_written_is_one_line_or_nothing(answer: str, ended: bool) -> None:
    found = instruction_in(answer, ended=ended)
    assert found == found.strip() and len(found.splitlines()) <= 1


# --- in a search


def compiled(engine: Any, **knobs: Any) -> Any:
    settings = {"auto": None, "train_rows": 4, "validation_rows": 4, "progress": False, **knobs}
    return GReaTerTeleprompter(exact_match, **settings).compile(program_on(engine), ROWS[:4], valset=ROWS[4:])


def test_a_written_instruction_that_is_better_is_taken_and_the_search_goes_on_from_its_beginning() -> None:
    better = compiled(Writer("Maybe look here.", f"Now {BEST} and add."), steps=2)
    [result] = better.detailed_results.predictors
    first, second = result.steps
    assert first.chosen.instruction == f"Now {BEST} and add." and second.position == 0
    assert [each.origin for each in first.candidates] == ["form", "form", "written", "written"]
    assert all(each.gradient is None for each in first.candidates)
    assert all(each.forecast is None for each in first.candidates)
    assert first.chosen.score > result.seed.score
    assert edit_of(first) == f"{SEED!r} -> 'Now {BEST} and add.'"
    assert result.origin == "written" or instruction_of(better) != first.chosen.instruction


def test_while_it_makes_mistakes_fewer_the_next_step_asks_again_from_where_that_led() -> None:
    engine = Writer("Maybe look here.", f"Now {BEST} and add.", "Hurry and guess.", "Guess.", "Look.", "See.")
    first, second, third = compiled(engine, steps=3, written=5).detailed_results.predictors[0].steps
    assert first.chosen.instruction == f"Now {BEST} and add."
    assert [each.origin for each in second.candidates] == ["form", "form", "written", "written", "written"]
    assert all(each.text.startswith(f"Now {BEST} and add. ") for each in second.candidates[:2])
    about_it = [at for at, prompt in enumerate(engine.asked) if f"Instruction: Now {BEST} and add." in prompt]
    assert about_it == [7] and len(engine.asked) == 10
    assert second.chosen.instruction == first.chosen.instruction
    assert "written" not in {each.origin for each in third.candidates}


def test_a_lower_loss_alone_does_not_pay() -> None:
    [result] = compiled(Writer(f"Now {BEST} and add."), steps=1).detailed_results.predictors
    state, [step] = begin(result.seed, Settings()), result.steps

    def after(chosen: Evaluation) -> SearchState:
        return advance(state, replace(step, chosen=chosen), [chosen], Settings(), lambda ids: range(len(ids)))

    assert after(step.chosen).rewrites == Payoff(1, 1) and after(step.chosen).formed == SEED
    alike = replace(step.chosen, score=result.seed.score, objective=result.seed.objective)
    assert after(alike).current.instruction == step.chosen.instruction
    assert after(alike).rewrites == Payoff(1, 0)
    edited = advance(state, replace(step, asked=False), [step.chosen], Settings(), lambda ids: range(len(ids)))
    assert (edited.edits, edited.rewrites, edited.formed) == (Payoff(1, 1), Payoff(), None)
    walked = replace(state, current=replace(result.seed, score=-1.0, instruction="Elsewhere."))  # worse than the best
    chosen = replace(step.chosen, score=result.seed.score)
    back = advance(walked, replace(step, chosen=chosen), [chosen], Settings(), lambda ids: range(len(ids)))
    assert chosen.score > walked.current.score and back.rewrites == Payoff(1, 0)


def test_a_step_that_keeps_an_instruction_with_fewer_mistakes_than_the_best_has_found_nothing() -> None:
    [result] = compiled(Writer(f"Now {BEST} and add."), steps=1).detailed_results.predictors
    [step], settings = result.steps, Settings()
    dear = replace(step.chosen, objective=(9.0, 9.0))  # more rows right, and a worse objective: the walk goes there
    walked = advance(
        begin(result.seed, settings), replace(step, chosen=dear, asked=False), [dear], settings, lambda ids: range(1)
    )
    assert walked.best[0].instruction == SEED and walked.edits == Payoff(1, 1)
    kept = advance(walked, replace(step, chosen=dear), [], settings, lambda ids: range(1))
    assert kept.rewrites == Payoff(1, 0)


def runs_by_instruction(step: Any) -> dict[str, int]:
    return {each.text: len(each.evaluation.rows) if each.evaluation else 0 for each in step.candidates}


def test_whole_instructions_run_on_a_few_rows_and_the_best_of_them_alone_on_the_others() -> None:
    rows, texts = planted_rows(24), ("Maybe look here.", f"Now {BEST} and add.", "Hurry and guess.")
    settings = {"auto": None, "train_rows": 20, "validation_rows": 4, "progress": False, "steps": 1, "written": 5}
    optimizer = GReaTerTeleprompter(exact_match, **settings)
    found = optimizer.compile(program_on(Writer(*texts)), rows[:20], valset=rows[20:]).detailed_results
    [step] = found.predictors[0].steps
    forms = [each.text for each in step.candidates if each.origin == "form"]
    assert runs_by_instruction(step) == {**dict.fromkeys(forms, 0), texts[0]: 0, texts[1]: 20, texts[2]: 0}
    assert len(forms) == 2 and step.spent["runs"] == 5 * 8 + (20 - 8)
    assert step.chosen.instruction == texts[1] and [each.row for each in step.chosen.rows] == list(range(20))


def test_where_the_current_instruction_is_better_on_the_few_rows_none_runs_on_the_others() -> None:
    rows, settings = planted_rows(24), {"auto": None, "train_rows": 20, "validation_rows": 4, "progress": False}
    optimizer = GReaTerTeleprompter(exact_match, **settings, steps=1, written=4)
    program = program_on(Writer("Hurry and guess.", "Guess."), instruction=f"Now {BEST} and add.")
    [step] = optimizer.compile(program, rows[:20], valset=rows[20:]).detailed_results.predictors[0].steps
    assert step.spent["runs"] == 4 * 8 and not any(each.evaluation for each in step.candidates)
    assert step.chosen.instruction == f"Now {BEST} and add."
    assert step.reason == "kept the instruction: on 8 rows it is the best"


def test_runs_that_were_tried_out_are_taken_over_and_give_the_same_evaluation() -> None:
    first, second = before_a_step(), before_a_step()
    instruction = first.evaluator.layout.edits.rewrite("List and count.")
    assert instruction is not None
    found = [Instruction(*instruction)]
    [plain] = first.evaluator.evaluate(found)
    before = second.evaluator.spent()
    tried = second.evaluator.try_out(found, [1, 4], second.model)
    assert [row for each in tried for row in each.rows] == [plain.rows[1], plain.rows[4]]
    assert tried == [first.evaluator.on_rows(plain, [1, 4])] and not second.evaluator.knows("List and count.")
    assert second.evaluator.spent(before)["runs"] == 2
    assert second.evaluator.evaluate(found, second.model, tried) == [plain]
    assert second.evaluator.spent(before)["runs"] == 8


def test_where_the_written_ones_are_worse_the_search_stays_at_its_position() -> None:
    better = compiled(Writer("Hurry and guess."), steps=2)
    [result] = better.detailed_results.predictors
    first, second = result.steps
    assert first.chosen.instruction == SEED and second.position == result.steps[0].position == 0
    assert "written" not in {each.origin for each in second.candidates}


def test_where_nothing_that_is_written_can_be_used_the_instruction_stays_and_the_next_step_is_one_of_tokens() -> None:
    objective = {"train_rows": 4, "validation_rows": 4, "steps": 2, "auto": None, "progress": False}
    rows = [dspy.Example(question=row.question).with_inputs("question") for row in ROWS]
    optimizer = GReaTerTeleprompter(lambda example, prediction, trace=None: len(prediction.answer) / 9, **objective)
    better = optimizer.compile(program_on(Writer("!?")), rows[:4], valset=rows[4:])
    [result] = better.detailed_results.predictors
    asked, step = result.steps
    assert asked.asked and not asked.candidates and asked.chosen == result.seed
    assert asked.reason == "kept the instruction: no other was written"
    assert not step.asked and "token" in {each.origin for each in step.candidates}


def test_the_papers_variant_knows_neither() -> None:
    better = compiled(Writer("List and count."), steps=1, variant="paper")
    [step] = better.detailed_results.predictors[0].steps
    assert {each.origin for each in step.candidates} == {"token"}


@pytest.mark.slow
def test_a_run_with_phrases_and_written_instructions_is_resumed_bit_by_bit(tmp_path: Any) -> None:
    def steps(log_dir: Any, count: int) -> list[Any]:
        found = compiled(planted_engine(), steps=count, log_dir=log_dir).detailed_results
        return json.loads(json.dumps([each["candidates"] for each in found.to_dict()["predictors"][0]["steps"]]))

    whole = steps(tmp_path / "whole", 4)
    journal = tmp_path / "whole" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "journal.jsonl").write_text("".join(lines[:4]))
    assert steps(tmp_path / "cut", 4) == whole
