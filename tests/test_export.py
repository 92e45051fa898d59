"""Out of DSPy: the messages of a result are what the model gets, and a template with its gaps filled is the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM
from scripted_engine import optimizer, planted_engine, planted_rows, program_on

from dspy_greater.__main__ import main
from dspy_greater.errors import DataError, ProgramError
from dspy_greater.program.export import ADAPTERS, template_of
from dspy_greater.program.rendering import ProgramPrompts, gap
from dspy_greater.program.traced_run import trace_calls

EXAMPLE = dspy.Example(question="Is it {late}?\n\n  {{now}} <b>", answer="yes").with_inputs("question")


def cot(demos: int = 0) -> Any:
    program = dspy.ChainOfThought("question -> answer")
    program.predict.signature = program.predict.signature.with_instructions("Count.\nThen say {it}.")
    program.predict.demos = [
        dspy.Example(question=f"Q{number}?", reasoning="Because.", answer="no") for number in range(demos)
    ]
    return program


def sent(program: Any, example: Any, adapter: Any) -> list[list[dict[str, Any]]]:
    """The messages that a run of the program really sends, call by call."""
    answers = [{"reasoning": "r", "answer": "a", "steps": "s"}] * 4
    with dspy.context(lm=DummyLM(answers, adapter=adapter), adapter=adapter):
        trace = trace_calls(program, example)
    assert trace.error is None
    return [[dict(message) for message in call.sent.messages or ()] for call in trace.calls if call.sent is not None]


def filled(messages: list[dict[str, Any]], example: Any) -> list[dict[str, Any]]:
    found = []
    for message in messages:
        text = message["content"]
        for name, value in example.inputs().items():
            text = text.replace(gap(name), value)
        found.append({**message, "content": text})
    return found


@pytest.mark.parametrize("demos", [0, 2])
@pytest.mark.parametrize("name", ADAPTERS)
def test_messages_and_filled_template_are_what_the_model_gets(name: str, demos: int, tmp_path: Path) -> None:
    adapter, program = ADAPTERS[name](), cot(demos)
    [real] = sent(program, EXAMPLE, adapter)
    with dspy.context(adapter=adapter):
        prompts = ProgramPrompts.of(program)
    assert prompts.prompt(EXAMPLE) == real
    assert filled(prompts.prompt(None), EXAMPLE) == real
    program.save(tmp_path / "program.json")
    saved = template_of(tmp_path / "program.json", adapter=name)
    assert list(saved) == ["predict"]
    assert saved["predict"]["inputs"] == ["question"] and saved["predict"]["outputs"] == ["reasoning", "answer"]
    assert filled(saved["predict"]["messages"], EXAMPLE) == real


def test_a_result_gives_the_messages_of_the_program_that_was_returned() -> None:
    rows = planted_rows(24)
    better = optimizer(steps=2).compile(program_on(planted_engine()), rows[:4], valset=rows[8:12])
    details = better.detailed_results
    messages = details.prompt(rows[0])
    assert details.predictors[0].instruction in messages[0]["content"]
    trace = trace_calls(better, rows[0])
    assert [dict(each) for each in trace.calls[0].sent.messages] == messages  # pyright: ignore
    assert gap("question") in details.prompt()[-1]["content"]
    assert "rendering" not in details.to_dict() and "rendering" not in repr(details)


class Two(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.draft = dspy.Predict("question, day -> steps")
        self.answer = dspy.Predict("question, steps -> answer: bool")

    def forward(self, question: str) -> Any:
        return self.answer(question=question, steps=self.draft(question=question, day="Monday").steps)


def test_of_several_predictors_one_is_named_and_its_inputs_are_given() -> None:
    prompts = ProgramPrompts.of(Two())
    with pytest.raises(ProgramError, match=r"several predictors: `draft`, `answer`. Say which: prompt\(example, pred"):
        prompts.prompt(EXAMPLE)
    with pytest.raises(ProgramError, match=r"no predictor `other`; it has `draft`, `answer`."):
        prompts.prompt(EXAMPLE, "other")
    with pytest.raises(
        DataError, match=r"has no `steps`, which predictor `answer` reads \(its inputs: question, steps\)"
    ):
        prompts.prompt(EXAMPLE, "answer")
    assert "[[ ## steps ## ]]\nTwo." in prompts.prompt({**EXAMPLE, "steps": "Two."}, "answer")[-1]["content"]


def test_a_predictor_whose_calls_bring_their_own_says_so() -> None:
    prompts = ProgramPrompts.of(cot(), {"predict": "JSONAdapter; question -> answer"})
    with pytest.raises(
        ProgramError, match=r"`predict` is called with .* \(JSONAdapter; question -> answer\), which only"
    ):
        prompts.prompt(EXAMPLE)


def test_a_prompt_that_has_the_text_of_a_gap_is_refused() -> None:
    program = cot()
    program.predict.signature = program.predict.signature.with_instructions("Fill in {{question}}.")
    with pytest.raises(ProgramError, match=r"holds the text \{\{question\}\} itself"):
        ProgramPrompts.of(program).prompt(None)


# --- saved programs ---


def test_fields_that_a_file_does_not_tell_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    Two().save(path)
    with pytest.raises(ProgramError) as caught:
        template_of(path)
    assert str(caught.value) == (
        f"{path} does not tell which of the fields of predictor `draft` are inputs, and how they are called: question, "
        "day, steps. Say so: --signature 'draft=question -> answer'."
    )
    told = {"draft": "question, day -> steps", "answer": "question, steps -> answer: bool"}
    found = template_of(path, signatures=told)
    prompts = ProgramPrompts.of(Two())
    assert {name: each["messages"] for name, each in found.items()} == {
        name: prompts.prompt(None, name) for name in told
    }
    with pytest.raises(ProgramError, match=r"'question -> steps' of predictor `draft` has 2 fields, and .* has 3: Q"):
        template_of(path, signatures={**told, "draft": "question -> steps"})
    with pytest.raises(ProgramError, match=r"The signature 'nonsense' of predictor `draft` is none: .*Write it as in"):
        template_of(path, signatures={**told, "draft": "nonsense"})
    with pytest.raises(ProgramError, match=r"has no predictor `other`; it has `draft`, `answer`."):
        template_of(path, signatures={"other": "a -> b"})


def test_descriptions_and_names_of_several_words_come_back(tmp_path: Path) -> None:
    class Asked(dspy.Signature):
        """Answer."""

        user_question: str = dspy.InputField(desc="what is asked")
        short_answer: str = dspy.OutputField(desc="one word")

    program = dspy.Predict(Asked)
    program.save(tmp_path / "asked.json")
    template = template_of(tmp_path / "asked.json")
    assert list(template) == [name for name, _ in program.named_predictors()]
    [found] = template.values()
    assert found["messages"] == ProgramPrompts.of(program).prompt(None)
    assert gap("user_question") in found["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x80\x04\x95pickle", "is no JSON file"),
        (b"[" * 100_000, "is no JSON file"),
        (b"[]", "holds no predictor"),
        (b'{"metadata": {}}', "holds no predictor"),
        (
            b'{"predict": {"signature": {"instructions": 3, "fields": []}}}',
            "`predict` in .* has not the form",
        ),
        (b'{"predict": {"signature": {"instructions": "x", "fields": [3]}}}', "has not the form in which DSPy 3.4"),
        (b'{"p": {"signature": {"instructions": "x", "fields": []}, "demos": [1]}}', "has not the form"),
        (b'{"p": {"signature": {"instructions": "x", "fields": []}}}', "does not tell which of the fields"),
    ],
)
def test_what_is_no_saved_program_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ProgramError, match=told):
        template_of(tmp_path / "x.json")


# --- the command line ---


def test_the_commands_write_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, log_dir = planted_rows(24), tmp_path / "run"
    better = optimizer(steps=1, log_dir=log_dir).compile(program_on(planted_engine()), rows[:4], valset=rows[8:12])
    written = (log_dir / "report.html").read_bytes()
    assert main(["report", str(log_dir), "--out", str(tmp_path / "copy.html")]) == 0
    assert (tmp_path / "copy.html").read_bytes() == written
    (log_dir / "report.html").unlink()
    assert main(["report", str(log_dir)]) == 0
    assert (log_dir / "report.html").read_bytes() == written
    assert capsys.readouterr().out == f"{tmp_path / 'copy.html'}\n{log_dir / 'report.html'}\n"
    better.save(tmp_path / "better.json")
    assert main(["export", str(tmp_path / "better.json")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["predict"]["messages"] == better.detailed_results.prompt()
    out = tmp_path / "template.json"
    assert main(["export", str(tmp_path / "better.json"), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == told
    signature = "predict=question -> reasoning, answer: bool"
    assert main(["export", str(tmp_path / "better.json"), "--signature", signature]) == 0


def test_the_commands_fail_with_a_message_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert main(["export", str(tmp_path / "none.json")]) == 1
    assert main(["export", str(tmp_path / "none.json"), "--signature", "predict"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second, third = captured.err.splitlines()
    assert first.startswith(f"There is no journal in {tmp_path}: journal.jsonl is missing.")
    assert second.startswith(f"{tmp_path / 'none.json'} cannot be read: No such file or directory. Give a file that")
    assert third == "--signature 'predict' names no predictor. Write NAME=SIGNATURE."
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])


@pytest.mark.parametrize("out", ["", ".", "/", "folder"])
def test_an_output_that_is_no_name_of_a_file_is_refused_with_what_to_do(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    cot().save(tmp_path / "x.json")
    optimizer(steps=0, log_dir="run").compile(program_on(planted_engine()), planted_rows(8)[:4])
    for command in (["export", "x.json"], ["report", "run"]):
        assert main([*command, "--out", out]) == 1
        why = "Is a directory. Give another" if out == "folder" else "it names no file. Give a"
        assert capsys.readouterr().err == f"{Path(out)} cannot be written: {why} file with --out.\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_standard_output_cannot_hold_is_escaped_and_still_the_same_json(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Count é, ↑, 😀 and \ud800."
    cot().save(tmp_path / "x.json")
    state = json.loads((tmp_path / "x.json").read_text())
    state["predict"]["signature"]["instructions"] = text
    (tmp_path / "x.json").write_text(json.dumps(state))
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    assert main(["export", str(tmp_path / "x.json")]) == 0
    told = json.loads(written.getvalue().decode(encoding))
    assert text in told["predict"]["messages"][0]["content"]
