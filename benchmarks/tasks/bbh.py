"""BIG-Bench Hard: 27 tasks of 250 rows, three of them smaller.

Splits as in the GReaTer paper: 50 rows to search on, 100 to choose on, 100 to test. The three smaller tasks (penguins
146 rows, snarks 178, causal_judgement 187) are cut in the same proportion: a fifth, two fifths, and the rest.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.tasks import answers
from benchmarks.tasks.task import SEED_INSTRUCTION, Task, from_hub, question_program, read_lines, row, shuffled
from dspy_greater.errors import DataError

HUB = "lukaemon/bbh"
TRAIN, DEV, TEST = 50, 100, 100

_YES_NO = answers.label(("Yes", "No"))
_NORMALISE: dict[str, answers.Normalise] = {
    "boolean_expressions": answers.label(("True", "False")),
    "causal_judgement": _YES_NO,
    "date_understanding": answers.choice,
    "disambiguation_qa": answers.choice,
    "dyck_languages": answers.brackets,
    "formal_fallacies": answers.label(("valid", "invalid")),
    "geometric_shapes": answers.choice,
    "hyperbaton": answers.choice,
    "logical_deduction_three_objects": answers.choice,
    "logical_deduction_five_objects": answers.choice,
    "logical_deduction_seven_objects": answers.choice,
    "movie_recommendation": answers.choice,
    "multistep_arithmetic_two": answers.number,
    "navigate": _YES_NO,
    "object_counting": answers.number,
    "penguins_in_a_table": answers.choice,
    "reasoning_about_colored_objects": answers.choice,
    "ruin_names": answers.choice,
    "salient_translation_error_detection": answers.choice,
    "snarks": answers.choice,
    "sports_understanding": _YES_NO,
    "temporal_sequences": answers.choice,
    "tracking_shuffled_objects_three_objects": answers.choice,
    "tracking_shuffled_objects_five_objects": answers.choice,
    "tracking_shuffled_objects_seven_objects": answers.choice,
    "web_of_lies": _YES_NO,
    "word_sorting": answers.words,
}
ABOUT = {f"bbh:{name}": f"BIG-Bench Hard, {name.replace('_', ' ')}" for name in _NORMALISE}


def normaliser(name: str) -> answers.Normalise:
    """What counts as the same answer in `bbh:NAME` or `pocket:NAME`."""
    return _NORMALISE[name.partition(":")[2]]


def load(name: str, data_dir: Path | None, seed: int) -> Task:
    """`bbh:NAME` from `data_dir/bbh/NAME.json` or the hub; raises `DataError` where neither can be read."""
    short = name.removeprefix("bbh:")
    if data_dir is None:
        raw, source = from_hub(HUB, short, "test"), f"{HUB} on the Hugging Face hub"
    else:
        path = data_dir / "bbh" / f"{short}.json"
        raw, source = json.loads(read_lines(path))["examples"], f"bbh/{short}.json"
    if len(raw) < 5:
        raise DataError(f"{source} has {len(raw)} rows, too few for three splits.")
    rows = shuffled([row(str(each["input"]), str(each["target"])) for each in raw], name, seed)
    train, dev = split_sizes(len(rows))
    return Task(
        name=name,
        about=ABOUT[name],
        make_program=question_program,
        metric=answers.metric_of(normaliser(name)),
        train=tuple(rows[:train]),
        dev=tuple(rows[train : train + dev]),
        test=tuple(rows[train + dev :][:TEST]),
        seed_instruction=SEED_INSTRUCTION,
        source=f"BIG-Bench Hard, {source}",
    )


def split_sizes(rows: int) -> tuple[int, int]:
    """How many rows go to train and to dev; what is left is the test, 100 rows at most.

    Example:
        >>> split_sizes(250), split_sizes(146)
        ((50, 100), (29, 58))
    """
    return (TRAIN, DEV) if rows >= TRAIN + DEV + TEST else (rows // 5, 2 * rows // 5)
