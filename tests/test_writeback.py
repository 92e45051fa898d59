"""Written instructions deploy the tokens that were scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from chat_families import TEMPLATES, family_tokenizer

from dspy_greater.errors import LayoutError, ProgramError
from dspy_greater.program.predictors import predictors_of
from dspy_greater.program.roundtrip import round_trip, write_back
from dspy_greater.prompt.layout import Layout

ROW = {"question": "2 + 2?"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_written_program_sends_the_scored_tokens(template: str) -> None:
    program = dspy.ChainOfThought("question -> answer")
    predictor = predictors_of(program)[0]
    layout = Layout(family_tokenizer("merging", template), predictor.adapter, predictor.signature)
    ids = layout.edits.instruction_ids("Answer the question.")
    edit = layout.edits.append(ids, layout.tokenizer.convert_tokens_to_ids("!"))
    assert edit is not None
    scored, text = edit
    round_trip(layout, text, scored)
    round_trip(layout, text, scored, inputs=ROW)
    written = predictors_of(write_back(program, {predictor.name: text}))[0]
    messages = written.adapter.format(written.signature, list(written.demos), ROW)
    assert layout.encoder.chat_ids(messages) == layout.prompt(text, ROW).token_ids


def test_an_instruction_with_other_tokens_is_refused() -> None:
    layout = Layout(family_tokenizer(), dspy.ChatAdapter(), dspy.Signature("question -> answer"))
    ids = layout.edits.instruction_ids("Answer the question.")
    with pytest.raises(
        LayoutError,
        match=r"not tokenised to the ids that were scored: \d+ tokens against \d+, the "
        r"first difference at token 0 .*Keep the previous instruction",
    ):
        round_trip(layout, "List the question.", ids)


def test_an_adapter_that_sends_something_else_is_refused() -> None:
    class Shouting(dspy.ChatAdapter):
        shouts = False

        def format_task_description(self, signature: Any) -> str:
            text = super().format_task_description(signature)
            return text.replace("question", "QUESTION") if self.shouts else text

    adapter = Shouting()
    layout = Layout(family_tokenizer(), adapter, dspy.Signature("question -> answer"))
    ids = layout.edits.instruction_ids("Answer the question.")
    adapter.shouts = True
    with pytest.raises(LayoutError, match="is not the one that was scored"):
        round_trip(layout, "Answer the question.", ids)


def test_an_adapter_that_rewrites_instructions_is_rendered_the_long_way() -> None:
    class Shouting(dspy.ChatAdapter):
        def format_task_description(self, signature: Any) -> str:
            return super().format_task_description(signature).replace("&", "&amp;")

    layout = Layout(family_tokenizer("byte-level"), Shouting(), dspy.Signature("question -> answer"))
    round_trip(layout, "Say a & b.", layout.edits.instruction_ids("Say a & b."))
    with pytest.raises(LayoutError, match="do not survive"):
        layout.edits.text_of(layout.edits.instruction_ids("Say a & b."))


def test_several_predictors_are_written_into_one_copy(tmp_path: Path) -> None:
    class Two(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = dspy.Predict("question -> query")
            self.two = dspy.ChainOfThought("query -> answer")

    student = Two()
    before = json.dumps(student.dump_state())
    better = write_back(student, {"one": "Find words.", "two.predict": "Add\n\n- a\n- b"})
    assert json.dumps(student.dump_state()) == before
    assert better.one.signature.instructions == "Find words."
    better.save(tmp_path / "program.json")
    loaded = Two()
    loaded.load(tmp_path / "program.json")
    assert loaded.two.predict.signature.instructions == "Add\n\n- a\n- b"
    with pytest.raises(ProgramError, match="no predictor `three`"):
        write_back(student, {"three": "x"})


def test_writing_nothing_gives_an_equal_copy() -> None:
    student = dspy.Predict("question -> answer")
    copied = write_back(student, {})
    assert copied is not student
    assert copied.dump_state() == student.dump_state()


def test_a_predictor_that_is_used_twice_is_written_once_for_both(tmp_path: Path) -> None:
    class Twice(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.draft = dspy.Predict("question -> answer")
            self.inner = dspy.ChainOfThought("question -> answer")
            self.steps = [self.draft, self.inner]
            self.inner.predict = self.draft

    student = Twice()
    before = student.draft.signature.instructions
    better = write_back(student, {"draft": "Count them."})
    assert [name for name, _ in better.named_predictors()] == ["draft"]
    assert better.draft is better.steps[0] is better.inner.predict is better.steps[1].predict
    assert better.steps[1].predict.signature.instructions == "Count them."
    assert student.draft.signature.instructions == before
    better.save(tmp_path / "program.json")
    loaded = Twice()
    loaded.load(tmp_path / "program.json")
    assert loaded.inner.predict.signature.instructions == "Count them."
