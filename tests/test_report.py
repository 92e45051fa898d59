"""A report says what the journal says, the same from a run as from its journal, and nothing in it is more than text."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from any_event import events as any_events
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_reading import Node, read, table
from scripted_engine import optimizer, planted_engine, planted_rows, program_on
from scripted_gradsum import ROWS, program
from scripted_gradsum import optimizer as gradsum

from dspy_greater.errors import RunDirectoryError
from dspy_greater.objective.types import Candidate, Evaluation, Trial
from dspy_greater.report import file as report_file
from dspy_greater.report.data import report_of
from dspy_greater.report.diff import word_diff
from dspy_greater.report.file import ReportFile
from dspy_greater.report.html import element, escaped
from dspy_greater.report.page import page
from dspy_greater.report.style import STYLE
from dspy_greater.run import lines
from dspy_greater.run.events import SearchStarted, StepTaken, Validated, Warned
from dspy_greater.run.files import replace_text
from dspy_greater.run.record import Record, read_record
from dspy_greater.run.serialise import from_json, to_json
from dspy_greater.stats import spearman

SEED, BETTER = (
    Evaluation((1, 2), text, (), score, loss, 1.0, (1 - score, loss))
    for text, score, loss in (("Think hard.", 0.5, 0.25), ("Count hard.", 0.75, 0.125))
)
STARTED = SearchStarted("predict", SEED, 4, {"generated_tokens": 120, "runs": 4})
STEP = StepTaken(
    "predict",
    0,
    7,
    1,
    (Candidate(3, "Count", -1.0, 0.5, BETTER, realised=(-0.25, -0.125)), Candidate(4, " Look", -2.0, None, None)),
    BETTER,
    "gain 0.25",
    {"generated_tokens": 410, "prefilled_tokens": 900},
    "Think",
)
HAPPENED = (STARTED, STEP, Validated("predict", {"Think hard.": 0.5, "Count hard.": 1.0}, "Count hard."))
TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:14]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished run's directory, and what it returned."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"steps": 3, "validation_rows": 6, "log_dir": folder, "seed": 1}
    return folder, optimizer(**settings).compile(program_on(planted_engine()), TRAIN, valset=VALIDATION)


def page_of(folder: Path) -> Node:
    return read((folder / "report.html").read_text(encoding="utf-8"))


def event_of(folder: Path, kind: type) -> Any:
    return next(event for event in read_record(folder).events if isinstance(event, kind))


# --- what is said is what was recorded ---


def test_the_report_of_a_run_and_the_one_from_its_journal_are_the_same(run: tuple[Path, Any]) -> None:
    folder, _ = run
    assert page(report_of(read_record(folder))) == (folder / "report.html").read_text(encoding="utf-8")


def test_the_first_thing_that_is_said_is_what_changed(run: tuple[Path, Any]) -> None:
    folder, better = run
    root, details = page_of(folder), better.detailed_results
    [headline] = root.all("div", "headline")
    assert headline.text == f"{details.seed_score:.3g}→{details.score:.3g}"
    diff = root.all("div", "diff")[0]
    gone, came = {id(each) for each in diff.all("del")}, {id(each) for each in diff.all("ins")}
    texts = [(id(each), each if isinstance(each, str) else each.text) for each in diff.children]
    assert "".join(text for key, text in texts if key not in came) == details.predictors[0].seed_instruction
    assert "".join(text for key, text in texts if key not in gone) == details.predictors[0].instruction
    stats = {each.all("dt")[0].text: each.all("dd")[0].text for each in root.all("dl", "stats")[0].all("div")}
    assert stats["before"].startswith(f"{details.seed_score:.3g}95 % interval ")
    assert stats["difference, row by row"].startswith(f"{details.score - details.seed_score:+.3g}95 % interval ")
    rows = details.predictors[0].subscores
    pairs = list(
        zip(rows[details.predictors[0].seed_instruction], rows[details.predictors[0].instruction], strict=True)
    )
    fixed, broken = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    assert fixed > 0
    assert stats["rows"] == f"{fixed} fixed, {broken} broken" + "of 6 validation rows"


def test_a_changed_row_is_shown_with_what_the_model_wrote_before_and_after(run: tuple[Path, Any]) -> None:
    folder, better = run
    changed = event_of(folder, Validated).changed
    assert changed
    for row in changed:
        [given] = [each for each in VALIDATION if each.question == row.inputs["question"]]
        assert row.inputs == dict(given.inputs()) and row.expected == dict(given.labels())
        [(name, written)] = row.after
        again = better(**given.inputs())
        assert name == "predict" and again.reasoning in written and again.answer in written
        assert row.before != row.after and row.errors == (None, None)
    shown = [each for each in page_of(folder).all("details") if "validation row" in each.text]
    for row in changed:
        texts = next([each.text for each in one.all("div", "text")] for one in shown if f"row {row.row}" in one.text)
        for _, text in (*row.before, *row.after):
            assert text.strip() in [each.strip() for each in texts]


def test_every_step_and_candidate_is_told_with_the_numbers_of_the_journal(run: tuple[Path, Any]) -> None:
    folder, better = run
    root, steps = page_of(folder), better.detailed_results.steps
    told = [
        each for each in root.all("details") if "Rank correlation within" in each.text or "tokens written" in each.text
    ]
    assert len(told) == len(steps) == 3
    for step, node in zip(steps, told, strict=True):
        assert step.reason in node.text and f"{step.spent['generated_tokens']:,} tokens written" in node.text
        _, *rows = table(node.all("table")[0])
        tried = [each for each in step.candidates if each.evaluation is not None]
        for candidate, row in zip(tried, rows, strict=False):
            assert row[0].endswith(candidate.text.replace(" ", "␣") or "nothing")
            assert row[1] == f"{candidate.log_probability:.3g}"
            forecast = "–" if candidate.forecast is None else f"{candidate.forecast:+.3g}"
            assert row[3] == forecast
            assert row[4:6] == [f"{part:+.3g}" for part in candidate.realised]
            assert row[6] == f"{candidate.evaluation.score:.3g}"


def test_an_edit_is_compared_with_what_it_was_made_from_and_going_back_to_the_best_is_none() -> None:
    kept = replace(STEP, step=2, candidates=(), chosen=SEED, reason="kept", began=SEED.instruction)
    away = replace(BETTER, instruction="Tell us.")
    steps = (
        replace(STEP, step=0, began=SEED.instruction, chosen=away),
        replace(STEP, step=1, began=away.instruction, chosen=replace(away, instruction="Tell me.")),
        kept,  # after the search has returned to the seed
        replace(STEP, step=3, began=SEED.instruction),
    )
    shown = report_of(Record({}, {}, (STARTED, *steps)))
    assert shown.searches[0].progress.accepted == (1, 2, 4)
    [edits] = [each for each in read(page(shown)).all("table") if each.attributes.get("class") == "edits"]
    _, *rows = table(edits)
    assert [row[-1] for row in rows][-1] == "ThinkCount hard."
    of_before = [replace(step, began="") for step in steps[:2]]  # from a journal that does not tell
    assert report_of(Record({}, {}, (STARTED, *of_before))).searches[0].progress.accepted == (1, 2)


def test_whole_instructions_that_reasoned_on_a_few_rows_are_shown_with_what_they_came_to() -> None:
    tried = [
        Candidate(5, text, math.nan, None, None, edit="rewrite", trial=Trial(8, score), origin="written")
        for text, score in (("List them.", 0.25), ("Add them.", 0.125))
    ]
    step = replace(STEP, candidates=tuple(tried), chosen=SEED, reason="kept the instruction", asked=True)
    written = read(page(report_of(Record({}, {}, (STARTED, step)))))
    [told] = [each for each in written.all("details") if "tokens written" in each.text]
    _, *rows = table(told.all("table")[0])
    assert [row[-1] for row in rows] == ["0.25 on 8 rows", "0.125 on 8 rows"]
    assert "List them." in rows[0][0] and "more were proposed" not in told.text


def test_the_costs_are_the_sums_of_the_journal(run: tuple[Path, Any]) -> None:
    folder, better = run
    phases = better.detailed_results.spent_by_phase
    names = ("prefilled_tokens", "backward_tokens", "generated_tokens", "runs")
    rows = {row[0]: row[1:] for row in table(page_of(folder).all("table")[-1])}
    for phase, spent in phases.items():
        assert rows[phase] == [f"{spent.get(name, 0):,}" for name in names]
    assert rows["in all"] == [f"{sum(spent.get(name, 0) for spent in phases.values()):,}" for name in names]
    assert phases["search"]["backward_tokens"] > 0


def test_the_rank_correlation_is_that_of_the_result(run: tuple[Path, Any]) -> None:
    folder, better = run
    rho = better.detailed_results.predictors[0].fidelity
    pairs = [pair for step in better.detailed_results.steps for pair in step.predictions]
    assert (len(pairs) < 3 and math.isnan(rho)) or rho == spearman([a for a, _ in pairs], [b for _, b in pairs])
    told = (
        "No rank correlation: too few, or none changed anything." if math.isnan(rho) else f"Rank correlation {rho:.2f}."
    )
    assert any(told in each.text for each in page_of(folder).all("figure"))


def test_settings_and_versions_are_those_of_the_header(run: tuple[Path, Any]) -> None:
    folder, _ = run
    record, root = read_record(folder), page_of(folder)
    told = {
        name.text: value.text
        for each in root.all("dl", "settings")
        for name, value in zip(each.all("dt"), each.all("dd"), strict=True)
    }
    assert told["settings · steps"] == "3" and told["seed"] == "1"
    assert record.versions["dspy_greater"] == told["dspy_greater"] and told["torch"] and told["python"]
    assert told["weights"] == record.identity["predictors"]["predict"]["weights"]


def test_several_predictors_have_a_section_each() -> None:
    record = Record(events=(*HAPPENED, replace(STARTED, predictor="second")))
    root = read(page(report_of(record)))
    assert [each.text for each in root.all("h2")][:3] == [
        "Predictor predict",
        "The search of predict",
        "Predictor second",
    ]
    assert [row[0] for row in table(root.all("table")[-1])][-3:] == ["of which predict", "of which second", "in all"]


# --- runs that are not finished ---


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_run_that_was_killed_is_reported_as_far_as_it_went(run: tuple[Path, Any], tmp_path: Path, count: int) -> None:
    content = (run[0] / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(content[: 1 + count]) + content[1 + count][:50])
    root = read(page(report_of(read_record(tmp_path))))
    if count == 0:
        assert "No predictor's search has begun yet." in root.text and "Not searched yet: predict." in root.text
    else:
        assert f"{count - 1} of 3 steps taken, not validated yet: under way, or interrupted." in root.text
        assert "training rows" in root.all("p", "soft")[0].text


def test_a_search_that_went_on_after_its_validation_is_under_way_until_it_is_validated_again() -> None:
    went_on = replace(STEP, step=1, chosen=replace(BETTER, instruction="Count twice.", objective=(0.0, 0.0), score=1.0))
    root = read(page(report_of(Record(events=(*HAPPENED, went_on)))))
    assert "2 of 4 steps taken, not validated yet: under way, or interrupted." in root.text
    assert root.all("p", "soft")[0].text == "So far, mean of the metric on the training rows"
    again = Validated("predict", {"Think hard.": 0.5, "Count twice.": 0.75}, "Count twice.")
    root = read(page(report_of(Record(events=(*HAPPENED, went_on, again)))))
    assert "ended after 2 of 4 steps, and validated." in root.text
    assert root.all("div", "headline")[0].text == "0.5→0.75"


def test_damage_in_the_middle_is_told_and_what_stands_before_it_is_shown(run: tuple[Path, Any], tmp_path: Path) -> None:
    content = (run[0] / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join([*content[:3], b"{}\n", *content[4:]]))
    root = read(page(report_of(read_record(tmp_path))))
    assert "Line 4 of the journal is damaged: shown is what stands before it." in root.text
    assert "1 of 3 steps taken" in root.text


def test_a_journal_of_before_rows_were_kept_can_be_read(run: tuple[Path, Any]) -> None:
    event = event_of(run[0], Validated)
    old: Any = to_json(event)
    del old["changed"]
    assert from_json(old) == replace(event, changed=())
    assert "fixed" not in read(page(report_of(Record(events=(STARTED, from_json(old)))))).all("dl", "stats")[0].text


def test_a_run_of_grad_sum_has_a_report_too(tmp_path: Path) -> None:
    gradsum(iterations=1, log_dir=tmp_path).compile(program(), ROWS)
    written = (tmp_path / "report.html").read_text()
    assert written == page(report_of(read_record(tmp_path))), "the run writes what the journal tells"
    root = read(page(report_of(read_record(tmp_path))))
    assert "1 of 1 iterations" in root.text and root.all("div", "diff")


# --- nothing leaves the page, and nothing gets into it ---

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></title></svg></summary><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' autofocus onfocus='alert(1)",
    "]]><!-- --><![CDATA[ {{x}} {% y %}",
    "&lt;b&gt; &amp; &#60;i&#62; javascript:alert(1)",
    "<a href='https://example.org/x'>http://127.0.0.1/</a>@import url(//x)",
    "\x00\x1b[31m\ud800\u202etxt.exe\u2066\u200b\ufeff",
    "w" * 5000,
    "",
)
KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "footer", "h1", "h2", "h3", "p", "div"),
    *("span", "b", "small", "del", "ins", "br", "details", "summary", "dl", "dt", "dd", "table", "thead", "tbody"),
    *("tr", "th", "td", "figure", "figcaption", "svg", "path", "line", "circle", "rect", "text"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "dir", "aria-label", "aria-hidden", "role", "scope"),
    *("tabindex", "viewbox", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "d", "width", "height", "text-anchor"),
}


def harmless(root: Node) -> None:
    """Only what a report is made of, and a style sheet that is ours to the byte."""
    nodes = root.everything()
    assert {each.tag for each in nodes} <= KNOWN
    assert {name for each in nodes for name in each.attributes} <= ATTRIBUTES
    assert [each.text for each in root.all("style")] == [STYLE]
    assert root.all("meta")[1].attributes["content"] == report_policy()


def report_policy() -> str:
    return "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def poisoned(value: Any, text: str) -> Any:
    """A value in which every text, and every key that is one, is this one."""
    if isinstance(value, str):
        return text
    if is_dataclass(value) and not isinstance(value, type):
        kept = ("edit",) if hasattr(value, "edit") else ()
        return replace(
            value,
            **{each.name: poisoned(getattr(value, each.name), text) for each in fields(value) if each.name not in kept},
        )
    if isinstance(value, dict):
        return {key if key in COUNTERS else poisoned(key, text): poisoned(each, text) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(poisoned(each, text) for each in value)
    return value


COUNTERS = ("prefilled_tokens", "backward_tokens", "generated_tokens", "runs", "predictors")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_of_a_run_is_text_on_the_page_whatever_it_says(run: tuple[Path, Any], text: str) -> None:
    record = read_record(run[0])
    identity = {"predictors": {text: {text: text, "weights": text}}, "metric": text, text: [text, {text: text}]}
    events = tuple(poisoned(event, text) for event in record.events)
    written = page(report_of(Record(identity, {text: text}, events)))
    root = read(written)
    harmless(root)
    written.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", written)
    if text:
        shown = re.sub("‹U\\+[0-9A-F]+›", lambda found: chr(int(found.group()[3:-1], 16)), root.all("main")[0].text)
        assert shown.count(text) > 10


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(any_events, max_size=6), st.dictionaries(st.text(), st.text() | st.none(), max_size=3))
def test_any_journal_makes_a_page(happened: list[Any], identity: dict[str, Any]) -> None:
    harmless(read(page(report_of(Record(identity, {}, tuple(happened))))))


def test_no_address_stands_in_the_file(run: tuple[Path, Any]) -> None:
    written = (run[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|url\(|@import|src=|href=|xmlns|<script|<link|<iframe", written)


def test_an_element_is_made_of_markup_and_text() -> None:
    assert (
        element("p", ["a", ("<b>", None)], element("b", 1), class_="x", hidden=False)
        == '<p class="x">a&lt;b&gt;<b>1</b></p>'
    )
    assert escaped(escaped("<")) == "&lt;"


@settings(max_examples=200, deadline=None)
@given(st.text("ab .\n", max_size=40), st.text("ab .\n", max_size=40))
def test_the_pieces_of_a_diff_make_up_both_texts(before: str, after: str) -> None:
    pieces = word_diff(before, after)
    assert "".join(each.text for each in pieces if each.kind != "added") == before
    assert "".join(each.text for each in pieces if each.kind != "removed") == after
    assert all(each.text for each in pieces)
    assert {each.kind for each in word_diff(before, before)} <= {"same"}


def test_long_instructions_are_compared_as_a_whole() -> None:
    before, after = "one " * 5000, "two " * 5000
    assert [each.text for each in word_diff(before, after)] == [before, after]


# --- the directory ---


def refused(folder: Path) -> str:
    with pytest.raises(RunDirectoryError) as caught:
        read_record(folder)
    return str(caught.value)


def test_what_is_no_journal_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").startswith(
        f"There is no journal in {tmp_path / 'none'}: journal.jsonl is missing."
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "journal.jsonl").write_bytes(b"")
    assert "is empty or no journal. Give the log_dir of a run that has begun." in refused(tmp_path / "a")
    for header, told in [
        ({"format": "other"}, "is not a journal of dspy_greater"),
        ([1], "is not a journal of dspy_greater"),
        (
            {"format": "dspy_greater journal", "version": 1},
            "has format version 1, and this dspy_greater reads version 2",
        ),
    ]:
        (tmp_path / "a" / "journal.jsonl").write_bytes(lines.frame(json.dumps(header).encode(), 0))
        assert told in refused(tmp_path / "a")
    (tmp_path / "a" / "journal.jsonl").write_bytes(lines.frame(b"[" * 100_000, 0))
    assert "cannot be read" in refused(tmp_path / "a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no links and pipes to try it with")
def test_no_link_is_followed_and_nothing_that_is_no_file_is_read(run: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "journal.jsonl").symlink_to(run[0] / "journal.jsonl")
    assert "is a link, which is not followed." in refused(tmp_path / "link")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "journal.jsonl")
    assert "is not a regular file." in refused(tmp_path / "pipe")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "report.html").symlink_to(victim)
    replace_text(tmp_path / "report.html", "new")
    assert victim.read_text() == "mine" and (tmp_path / "report.html").read_text() == "new"
    assert not (tmp_path / "report.html").is_symlink()


# --- while the run goes on ---


def test_writing_takes_at_most_a_hundredth_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, spent = [0.0], [0.0]

    def slow(path: Path, text: str) -> None:
        now[0] += 2.0
        spent[0] += 2.0

    monkeypatch.setattr(report_file, "replace_text", slow)
    monkeypatch.setattr(report_file.time, "monotonic", lambda: now[0])
    with ReportFile(tmp_path, {}, {}) as report:
        report(STARTED)
        for number in range(190):
            now[0] += 5.0
            report(replace(STEP, step=number))
        assert 4.0 <= spent[0] <= 2.0 + now[0] / 100
        before = spent[0]
    assert spent[0] == before + 2.0  # what was missing


def test_a_report_that_cannot_be_written_is_a_warning_and_the_program_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_file, "replace_text", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        better = optimizer(steps=1, log_dir=tmp_path).compile(program_on(planted_engine()), TRAIN, valset=VALIDATION)
    assert len(better.detailed_results.steps) == 1
    report = ReportFile(tmp_path, {}, {})
    monkeypatch.setattr(report_file.time, "monotonic", lambda: -1.0)
    report(STEP)
    with pytest.warns(RuntimeWarning, match=r"report.html could not be written: OSError: .* `python -m dspy_greater"):
        report.close()


def test_a_report_that_could_not_be_written_is_written_at_a_later_event_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, held = [0.0], [True]

    def elsewhere(path: Path, text: str) -> None:
        now[0] += 1.0
        if held[0]:
            raise PermissionError(13, "open elsewhere")
        replace_text(path, text)

    monkeypatch.setattr(report_file, "replace_text", elsewhere)
    monkeypatch.setattr(report_file.time, "monotonic", lambda: now[0])
    told_again = r"report\.html could not be written: PermissionError: .* It is tried again as the run goes on\."
    with ReportFile(tmp_path, {}, {}) as report:
        with pytest.warns(RuntimeWarning, match=told_again):
            report(STARTED)
        report(STEP)
        assert now[0] == 1.0, "a hundredth of the run's time, as ever"
        now[0], held[0] = 200.0, False
        report(replace(STEP, step=1))
        assert page_of(tmp_path).text.count("2 of 4 steps") and now[0] == 201.0
        now[0], held[0] = 400.0, True
        report(replace(STEP, step=2))  # and this is not told again
        held[0] = False
    assert "3 of 4 steps" in page_of(tmp_path).text


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ReportFile(None, {}, {}) as report:
        report(STARTED)
    assert not list(tmp_path.iterdir())


def test_what_only_listeners_hear_is_not_in_the_report(tmp_path: Path) -> None:
    with ReportFile(tmp_path, {}, {}) as report:
        report(STARTED)
        report(Warned("careful"))
    assert page(report_of(Record({}, {}, (STARTED,)))) == (tmp_path / "report.html").read_text(encoding="utf-8")
