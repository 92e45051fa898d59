"""The tasks of the comparison: splits as published, and answers that are compared and not their spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from benchmarks.tasks import answers, bbh, folio, gsm8k, registry, task, two_step
from dspy_greater.errors import DataError, SettingsError

NAVIGATE = (
    "If you follow these instructions, do you return to the starting point? Take 1 step. Take 2 steps. Take 3 steps. "
    "Turn around. Take 6 steps. Turn left.\nOptions:\n- Yes\n- No"
)
SHAPES = 'This SVG path element <path d="M 9,8 L 7,6"/> draws a\nOptions:\n(A) circle\n(B) heptagon\n(C) line'


def write_bbh(directory: Path, name: str, rows: int, answer: str = "Yes") -> None:
    (directory / "bbh").mkdir(exist_ok=True)
    examples = [{"input": f"{NAVIGATE} {number}", "target": answer} for number in range(rows)]
    (directory / "bbh" / f"{name}.json").write_text(json.dumps({"canary": "", "examples": examples}))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(rows: tuple[dspy.Example, ...]) -> set[str]:
    return {row.question for row in rows}


def scored(metric: Any, question: str, gold: str, given: str) -> float:
    return metric(task.row(question, gold), dspy.Prediction(answer=given))


# --- names ---


def test_all_twenty_seven_tasks_of_the_benchmark_are_listed() -> None:
    assert sum(name.startswith("bbh:") for name in registry.names()) == 27


def test_every_task_says_in_one_line_what_it_is() -> None:
    assert all(about and "\n" not in about for about in registry.about_all().values())


def test_an_unknown_task_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="There is no task 'bbh:navigat'. Did you mean 'bbh:navigate'?"):
        registry.load("bbh:navigat", data_dir=None, seed=0)


def test_any_of_several_acceptable_answers_is_right() -> None:
    metric = answers.metric_of(answers.number)
    row = dspy.Example(question="2 + 2", answer=["4", "four", "4.0"]).with_inputs("question")
    given = [metric(row, dspy.Prediction(answer=text)) for text in ("It is 4.", "5", "none")]
    assert given == [1.0, 0.0, 0.0]


# --- splits ---


def test_big_bench_hard_is_split_as_in_the_paper(tmp_path: Path) -> None:
    write_bbh(tmp_path, "navigate", 250)
    loaded = registry.load("bbh:navigate", data_dir=tmp_path, seed=0)
    assert [len(loaded.train), len(loaded.dev), len(loaded.test)] == [50, 100, 100]
    assert len(texts(loaded.train) | texts(loaded.dev) | texts(loaded.test)) == 250


@pytest.mark.parametrize(
    ("rows", "sizes"), [(146, (29, 58, 59)), (178, (35, 71, 72)), (187, (37, 74, 76)), (249, (49, 99, 100))]
)
def test_a_smaller_task_is_cut_in_the_same_proportion(tmp_path: Path, rows: int, sizes: tuple[int, ...]) -> None:
    write_bbh(tmp_path, "snarks", rows)
    loaded = registry.load("bbh:snarks", data_dir=tmp_path, seed=0)
    assert (len(loaded.train), len(loaded.dev), len(loaded.test)) == sizes


def test_the_seed_decides_the_splits_and_a_limit_cuts_each(tmp_path: Path) -> None:
    write_bbh(tmp_path, "navigate", 250)
    first, again, other = (registry.load("bbh:navigate", data_dir=tmp_path, seed=seed) for seed in (1, 1, 2))
    assert texts(first.test) == texts(again.test) != texts(other.test)
    short = registry.load("bbh:navigate", data_dir=tmp_path, seed=1, limit=7)
    assert [len(short.train), len(short.dev), len(short.test)] == [7, 7, 7]
    assert short.test == first.test[:7]


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="limit=0 leaves no rows"):
        registry.load("pocket:navigate", data_dir=tmp_path, seed=0, limit=0)


def test_arithmetic_keeps_the_benchmarks_own_test_split(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>\n#### {i + 1:,}"} for i in range(1319)]
    write_lines(tmp_path / "gsm8k" / "train.jsonl", rows[:300])
    write_lines(tmp_path / "gsm8k" / "test.jsonl", rows)
    loaded = registry.load("gsm8k", data_dir=tmp_path, seed=3)
    assert [len(loaded.train), len(loaded.dev), len(loaded.test)] == [100, 100, 1319]
    assert not texts(loaded.train) & texts(loaded.dev)
    assert {row.answer for row in loaded.test} >= {"1,319", "2"}


def test_no_story_is_in_both_train_and_dev(tmp_path: Path) -> None:
    rows = [
        {"premises": [f"Story {i // 3}."], "conclusion": f"C{i}.", "label": ("True", "False", "Unknown")[i % 3]}
        for i in range(300)
    ]
    write_lines(tmp_path / "folio" / "train.jsonl", rows)
    write_lines(tmp_path / "folio" / "validation.jsonl", rows[:204])
    loaded = registry.load("folio", data_dir=tmp_path, seed=0)
    stories = [{row.question.split("\n")[1] for row in rows} for rows in (loaded.train, loaded.dev)]
    assert not stories[0] & stories[1]
    assert [len(loaded.train), len(loaded.dev), len(loaded.test)] == [50, 100, 204]
    assert {row.answer for row in loaded.train} == {"True", "False", "Uncertain"}


def test_the_hubs_form_of_the_premises_makes_the_same_question() -> None:
    as_list = {"premises": ["A.", "B."], "conclusion": "C.", "label": "True"}
    assert folio._row(as_list) == folio._row({**as_list, "premises": "A.\nB."})


def test_generated_rows_need_neither_files_nor_a_network() -> None:
    loaded = registry.load("pocket:object_counting", data_dir=None, seed=5)
    assert [len(loaded.train), len(loaded.dev), len(loaded.test)] == [50, 100, 300]
    assert len(texts(loaded.train) | texts(loaded.dev) | texts(loaded.test)) == 450
    assert loaded.source == "the pocket model's generator"


# --- where rows come from ---


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no .*snarks.json. --data-dir names the directory that holds bbh/"):
        registry.load("bbh:snarks", data_dir=tmp_path, seed=0)


def test_without_a_directory_rows_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        assert (name, config, split) == ("lukaemon/bbh", "navigate", "test")
        return [{"input": f"{NAVIGATE} {i}", "target": "No"} for i in range(250)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = registry.load("bbh:navigate", data_dir=None, seed=0)
    assert len(loaded.test) == 100 and "lukaemon/bbh" in loaded.source


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"openai/gsm8k could not be read .*Couldn't reach.*--data-dir DIR"):
        registry.load("gsm8k", data_dir=None, seed=0)


# --- answers, on rows of the benchmarks ---


@pytest.mark.parametrize("given", ["(C)", "C", "c.", "C)", "The answer is (C).", "(C) line", "line", '"Line."'])
def test_an_option_may_be_named_by_letter_or_by_text(given: str) -> None:
    assert scored(answers.metric_of(answers.choice), SHAPES, "(C)", given) == 1.0


@pytest.mark.parametrize("given", ["(A)", "(A) or (C)", "neither (A) nor (C)", "", "hexagon", "A line"])
def test_another_option_or_two_of_them_are_wrong(given: str) -> None:
    assert scored(answers.metric_of(answers.choice), SHAPES, "(C)", given) == 0.0


def test_an_option_that_is_named_first_and_then_explained_counts() -> None:
    assert scored(answers.metric_of(answers.choice), SHAPES, "(C)", "(C), because (A) is round") == 1.0


def test_a_gold_answer_without_a_letter_is_compared_as_text() -> None:
    metric = answers.metric_of(answers.choice)
    asked = "Find a movie similar to Shrek:\nOptions:\nMonsters, Inc\n(A) Cars"
    assert scored(metric, asked, "Monsters, Inc", "Monsters, Inc.") == 1.0
    assert scored(metric, asked, "Monsters, Inc", "(A)") == 0.0


@pytest.mark.parametrize(
    ("gold", "given", "score"),
    [
        ("1,080", "1080", 1.0),
        ("1,080", "$1,080.00", 1.0),
        ("72", "48 + 24 = 72 clips.", 1.0),
        ("-10", "\N{MINUS SIGN}10", 1.0),
        ("-10", "10", 0.0),
        ("10", "10.5", 0.0),
        ("2,520,000", "2520000 dollars", 1.0),
        ("5", "", 0.0),
        ("5", "five", 0.0),
    ],
)
def test_numbers_are_compared_by_value(gold: str, given: str, score: float) -> None:
    assert scored(answers.metric_of(answers.number), "How many?", gold, given) == score


@pytest.mark.parametrize(
    ("gold", "given", "score"),
    [
        ("Yes", "yes.", 1.0),
        ("No", "No, it does not.", 1.0),
        ("No", "Yes", 0.0),
        ("Yes", "Yes or no", 0.0),
        ("No", "", 0.0),
    ],
)
def test_yes_and_no_are_found_in_a_sentence(gold: str, given: str, score: float) -> None:
    assert scored(answers.metric_of(bbh.normaliser("bbh:navigate")), NAVIGATE, gold, given) == score


@pytest.mark.parametrize(
    ("gold", "given", "score"), [("valid", "Invalid.", 0.0), ("invalid", "deductively invalid", 1.0)]
)
def test_valid_is_not_found_inside_invalid(gold: str, given: str, score: float) -> None:
    assert scored(answers.metric_of(bbh.normaliser("bbh:formal_fallacies")), "?", gold, given) == score


def test_unknown_and_uncertain_are_one_class() -> None:
    metric = answers.metric_of(folio._LABEL)
    assert scored(metric, "?", "Uncertain", "Unknown") == scored(metric, "?", "Uncertain", "uncertain.") == 1.0
    assert scored(metric, "?", "Uncertain", "False") == 0.0


def test_brackets_are_compared_without_what_stands_between() -> None:
    metric = answers.metric_of(bbh.normaliser("bbh:dyck_languages"))
    assert scored(metric, "( [ <", "> ] )", ">])") == 1.0
    assert scored(metric, "( [ <", "> ] )", "> )") == 0.0


@pytest.mark.parametrize(
    "given", ["barn, damp, it&t", "1. barn 2. damp 3. it&t", "Barn damp it&t.", "- barn\n- damp\n- it&t"]
)
def test_a_list_of_words_may_be_written_in_any_way(given: str) -> None:
    metric = answers.metric_of(bbh.normaliser("bbh:word_sorting"))
    assert scored(metric, "Sort", "barn damp it&t", given) == 1.0
    assert scored(metric, "Sort", "barn damp it&t", "damp barn it&t") == 0.0


def test_a_prediction_without_an_answer_is_wrong() -> None:
    assert answers.metric_of(answers.number)(task.row("1 + 1", "2"), dspy.Prediction()) == 0.0


def test_the_number_of_a_solution_is_what_follows_its_last_mark() -> None:
    assert gsm8k.final_number("He has 2*540 = $<<2*540=1080>>1080.\n#### 1,080") == "1,080"


# --- programs ---


@pytest.mark.parametrize("name", ["pocket:navigate", "two-step:pocket:navigate"])
def test_every_program_is_fresh_and_holds_the_seed_instruction(name: str) -> None:
    loaded = registry.load(name, data_dir=None, seed=0, limit=1)
    first, second = loaded.make_program(), loaded.make_program()
    assert first is not second
    instructions = [predictor.signature.instructions for _, predictor in first.named_predictors()]
    assert loaded.seed_instruction in instructions


def test_two_predictors_share_the_work_and_steps_that_do_not_parse_are_left_out() -> None:
    program = two_step.DecomposeThenAnswer()
    assert [name for name, _ in program.named_predictors()] == ["decompose", "answer.predict"]
    answers_given = [
        {"steps": "1. Walk."},
        {"reasoning": "r", "answer": "Yes"},
        {"nothing": "x"},
        {"reasoning": "r", "answer": "No"},
    ]
    lm = dspy.utils.DummyLM(answers_given)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        with_steps, without = program(question="Q"), program(question="Q")
    assert (with_steps.answer, with_steps.steps) == ("Yes", "1. Walk.")
    assert (without.answer, without.steps) == ("No", "")
