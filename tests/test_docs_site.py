"""The site: it is built strictly and without a network, asks no other host for anything, and has every public name."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import dspy_greater

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("mkdocs", "mkdocstrings")),
        reason="the site needs mkdocs: pip install 'dspy-greater[docs]'",
    ),
]
# mkdocs, in a process that has no network.
OFFLINE = """
import socket, sys
def refused(*arguments, **keywords):
    raise OSError("the site was to be built without a network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
from mkdocs.__main__ import cli
cli(sys.argv[1:], prog_name="mkdocs")
"""
LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
ELSEWHERE = re.compile(r"^\s*(?:\w+:)?//")


def built(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        OFFLINE,
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    surroundings = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = built(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Loads(HTMLParser):
    """What a page loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.anchors.add(known.get("id", ""))
        if tag in LOADED and known.get(LOADED[tag]) and known.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(known[LOADED[tag]])


def pages(site: Path) -> dict[str, Loads]:
    found = sorted(site.rglob("*.html"))
    return {str(page.relative_to(site)): Loads(page.read_text(encoding="utf-8")) for page in found}


def test_no_page_asks_another_host_for_a_script_a_style_a_font_or_a_picture(site: Path) -> None:
    found = pages(site)
    assert len(found) > 25
    assert {name: each.loaded for name, each in found.items() if any(map(ELSEWHERE.match, each.loaded))} == {}
    assert any(each.loaded for each in found.values())


def test_no_style_asks_another_host_for_anything(site: Path) -> None:
    styles = sorted(site.rglob("*.css"))
    asked = [
        found
        for each in styles
        for found in re.findall(r"url\(['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", each.read_text())
    ]
    assert styles
    assert [each for pair in asked for each in pair if ELSEWHERE.match(each)] == []


def test_every_public_name_is_on_a_page_of_the_reference(site: Path) -> None:
    anchors = {anchor for name, each in pages(site).items() if name.startswith("reference") for anchor in each.anchors}
    assert {name for name in dspy_greater.__all__ if f"dspy_greater.{name}" not in anchors} == set()
    assert "dspy_greater.Settings.max_seconds" in anchors  # a field, by the comment behind it


def test_doctests_are_shown_as_code(site: Path) -> None:
    text = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    assert "&gt;&gt;&gt;" in text and "<blockquote>" not in text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("[gone](gone.md)", "contains a link 'gone.md'"),
        ("[gone](../gone.py)", "which does not exist"),
        ("[gone](index.md#gone)", "contains a link 'index.md#gone'"),
        ("::: dspy_greater.gone", "dspy_greater.gone"),
    ],
)
def test_a_wrong_link_or_name_ends_the_build(wrong: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n{wrong}\n", encoding="utf-8")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    head, _, rest = settings.partition("nav:\n")
    rest = rest[rest.index("plugins:") :]
    settings = (head + rest).replace("docs/site/", f"{ROOT}/docs/site/").replace("[.]", f"[{ROOT}]")
    config = tmp_path / "mkdocs.yml"
    config.write_text(settings.replace("extra_css: [site/code.css]\n", ""), encoding="utf-8")
    done = built(config, tmp_path / "site")
    assert done.returncode != 0
    assert told in done.stderr
