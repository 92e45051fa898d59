"""The how-tos do what they say: their Python runs, their messages are the package's, their tables are its settings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_greater import Settings, errors, settings

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "how-to"
PAGES = sorted(page.stem for page in FOLDER.glob("*.md"))
LEFT_OUT = "# Not tested: "
GAP = "\0"
TINY = {"steps": 1, "train_rows": 3, "validation_rows": 2, "written": 0, "phrases": 0}  # instead of auto="light"
# What users do not meet: two ends of a loop, and a journal's own check of what it is given.
INTERNAL = {"BudgetSpent", "MalformedAnswer", "EventFormatError"}


def text_of(page: str) -> str:
    return (FOLDER / f"{page}.md").read_text(encoding="utf-8")


def snippets(page: str) -> list[tuple[int, str]]:
    """Line and code of each block of Python."""
    text = text_of(page)
    return [(text[: found.start(1)].count("\n"), found[1]) for found in re.finditer(r"```python\n(.*?)```", text, re.S)]


def run(page: str, names: dict[str, Any]) -> int:
    """Run what of a page can be run, in one namespace; a traceback names the page and its line."""
    done = 0
    for line, code in snippets(page):
        if not code.startswith(LEFT_OUT):
            exec(compile("\n" * line + code, str(FOLDER / f"{page}.md"), "exec"), names)
            done += 1
    return done


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_PRESETS", {**settings._PRESETS, "light": TINY})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    before = dspy.settings.lm
    try:
        assert run("index", names) == 1
        if page not in ("index", "vllm", "sglang", "ollama", "ray"):  # the last four need servers, all through
            assert run(page, names) >= 1
        else:
            assert all(code.startswith(LEFT_OUT) for _, code in snippets(page)) or page == "index"
    finally:
        dspy.configure(lm=before)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_is_python_and_says_what_it_would_need(page: str) -> None:
    for line, code in snippets(page):
        compile(code, f"{page}.md, line {line}", "exec")
        if "Not tested" in code:
            assert re.match(r"# Not tested: .+\.\n", code), f"{page}.md, line {line}"


def messages() -> Iterator[str]:
    """Every text of the package's source as one string, with a gap for each value that is filled in."""
    for path in (ROOT / "dspy_greater").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def is_said(quoted: str, said: list[str]) -> bool:
    """Whether one text of the package has all parts of a quoted message, in their order."""
    parts = [part.strip(" `'") for part in quoted.split("...") if part.strip(" `'.:,")]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
    return any(pattern.search(each) for each in said)


def test_every_quoted_message_is_one_of_the_packages() -> None:
    said = list(messages())
    quoted = re.findall(r"^> (.+)$", text_of("troubleshooting"), re.M)
    assert len(quoted) > 30
    assert [each for each in quoted if not is_said(each, said)] == []
    assert not is_said("The trainset is full of ... rows.", said)


def test_every_error_that_users_meet_is_on_the_page() -> None:
    names = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert {name for name in names - INTERNAL if name not in text_of("troubleshooting")} == set()
    assert names >= INTERNAL


def test_the_table_of_presets_is_that_of_the_settings() -> None:
    rows = re.findall(r'^\| `("\w+"|None)` \| (\d+) \| (\d+) \| (\d+) \|', text_of("choosing-a-budget"), re.M)
    assert {name for name, *_ in rows} == {*(f'"{name}"' for name in settings._PRESETS), "None"}
    for name, *numbers in rows:
        found = Settings.of(ast.literal_eval(name))
        assert (found.steps, found.train_rows, found.validation_rows) == tuple(map(int, numbers))


def test_the_memory_of_the_scaling_page_is_that_of_the_configs() -> None:
    yaml = pytest.importorskip("yaml", reason="the benchmarks' configs need it: pip install 'dspy-greater[bench]'")
    from benchmarks.harness.plan import Plan

    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \S+ \| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \| (\d+) GB \|", text, re.M)
    configs = re.findall(r"--config (\S+)", text)
    assert len(rows) == len(configs) == 4
    for (threads, *parts, whole), config in zip(rows, configs, strict=True):
        stated = yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))
        found = [size / 1e9 for size in Plan.of(stated["plan"]).memory(stated["threads"]).values()]
        assert stated["threads"] == int(threads)
        assert parts == [f"{size:.1f}" for size in found] and whole == f"{sum(found):.0f}"
