"""A run that goes on under edited code says so, and only then."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted_engine import exact_match, planted_engine, planted_rows, program_on

from dspy_greater import GReaTer
from dspy_greater.program.code import code_digest, code_of_run

ROWS = planted_rows(8)


def made(source: str, name: str = "metric") -> Any:
    """What a module of its own with this source calls by that name."""
    module: dict[str, Any] = {"__name__": "of_a_user"}
    exec(compile(textwrap.dedent(source), "/home/user/metrics.py", "exec"), module)
    return module[name]


PLAIN = "def metric(row, prediction):\n    return row == prediction"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PLAIN, "def metric(row, prediction):\n\n    # compare\n    return row == prediction"),
        (PLAIN, 'def metric(row, prediction):\n    "Whether it is right."\n    return row == prediction'),
        (
            'def metric(row, prediction):\n    "One."\n    return 1',
            'def metric(row, prediction):\n    "Two."\n    return 1',
        ),
        (f"calls = 0\n{PLAIN}", f"calls = 7\n{PLAIN}"),  # a metric may count
        (f"def other():\n    return 1\n{PLAIN}", f"def other():\n    return 2\n{PLAIN}"),  # which it does not name
    ],
)
def test_comments_docstrings_and_what_a_metric_does_not_use_are_no_other_code(before: str, after: str) -> None:
    assert code_digest(made(before)) == code_digest(made(after))


HELPED = """
def help(text):
    return text.{}()

def metric(row, prediction):
    return help(row) == help(prediction)
"""
CALLED = """
class Metric:
    def __call__(self, row, prediction):
        return self.part(row)

    def part(self, row):
        return {}

metric = Metric()
"""
CLOSED = """
def make(compare):
    return lambda row, prediction: compare(row, prediction)

metric = make(lambda row, prediction: row {} prediction)
"""
DEFAULTS = "def metric(row, prediction, threshold={}):\n    return prediction > threshold"
PARTIAL = """
import functools

def scored(row, prediction, least):
    return prediction > least

metric = functools.partial(scored, least={})
"""
CACHED = "import functools\n@functools.lru_cache\ndef metric(row, prediction):\n    return {}"
METHOD = CALLED + "\nbound = metric.part"


@pytest.mark.parametrize(
    ("source", "before", "after", "name"),
    [
        (PLAIN.replace("==", "{}"), "==", "!=", "metric"),
        (HELPED, "lower", "strip", "metric"),
        (CALLED, "1.0", "0.5", "metric"),
        (CLOSED, "==", "in", "metric"),
        (DEFAULTS, "0.5", "0.7", "metric"),
        (PARTIAL, "0.5", "0.7", "metric"),
        (CACHED, "1.0", "0.5", "metric"),
        (METHOD, "1.0", "0.5", "bound"),
    ],
)
def test_an_edit_of_the_metric_or_of_what_it_calls_is_other_code(
    source: str, before: str, after: str, name: str
) -> None:
    then, again, now = (made(source.format(part), name) for part in (before, before, after))
    assert code_digest(then) == code_digest(again) != code_digest(now)


def test_code_that_names_itself_and_long_chains_of_it_come_to_an_end() -> None:
    chain = "\n".join(f"def f{at}(row):\n    return f{at + 1}(row)" for at in range(3000))
    source = f"{chain}\ndef f3000(row):\n    return f0(row)\ndef metric(row, prediction):\n    return f0(row)"
    assert len(code_digest(made(source))) == 16


def test_the_digest_is_the_same_in_every_process() -> None:
    source = "def metric(row, prediction):\n    return row in {'a', 'b', 'c', 'd'} or (lambda one: one in {1, 2})(2)"
    script = (
        "from dspy_greater.program.code import code_digest\n"
        f"module = {{'__name__': 'of_a_user'}}\nexec({source!r}, module)\nprint(code_digest(module['metric']))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


class Twice(dspy.Module):
    """A program of a user's own, which holds a function."""

    def __init__(self, reward: Callable[..., float]) -> None:
        super().__init__()
        self.answer, self.reward = dspy.ChainOfThought("question -> answer"), reward

    def forward(self, question: str) -> Any:
        return self.answer(question=question)


def test_modules_what_they_hold_and_adapters_of_ones_own_are_told_and_those_of_packages_are_not() -> None:
    class Louder(dspy.ChatAdapter):
        pass

    program = Twice(lambda row, prediction: 1.0)
    predictors = [type("Found", (), {"adapter": adapter}) for adapter in (Louder(), dspy.ChatAdapter())]
    told = code_of_run(functools.partial(exact_match), program, predictors)  # pyright: ignore[reportArgumentType]
    here = "test_modules_what_they_hold_and_adapters_of_ones_own_are_told_and_those_of_packages_are_not.<locals>."
    assert list(told) == ["Python", "metric `partial`", "module `Twice`", "module `reward`", f"adapter `{here}Louder`"]
    assert list(code_of_run(None, dspy.ChainOfThought("question -> answer"), ())) == ["Python"]


def compiled(folder: Path, metric: Any) -> Any:
    settings = {"auto": None, "steps": 1, "train_rows": 4, "validation_rows": 4, "progress": False, "written": 0}
    optimizer = GReaTer(metric, log_dir=folder, **settings)
    return optimizer.compile(program_on(planted_engine()), ROWS[:4], valset=ROWS[4:]).detailed_results


def test_a_run_under_an_edited_metric_goes_on_and_says_that_recorded_scores_stay(tmp_path: Path) -> None:
    source = "def metric(row, prediction):\n    return 0.5 + {} * (row.answer == prediction.answer)"
    first = compiled(tmp_path, made(source.format(0.25)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(tmp_path, made(source.format(0.25)))
    with pytest.warns(
        UserWarning, match=r"goes on with other code than it was begun with: metric `metric`\. What"
    ) as told:
        again = compiled(tmp_path, made(source.format(0.5)))
    assert "use another log_dir, or delete" in str(told[0].message)
    assert again.predictors[0].seed == first.predictors[0].seed
