"""A report in a real browser: nothing is asked of the network, nothing sticks out, and it is there in light and dark.

The variable CHROMIUM names a browser; without it `chromium` and the like are looked for.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_report import HAPPENED, HOSTILE, poisoned

from dspy_greater.report.data import report_of
from dspy_greater.report.page import page
from dspy_greater.run.record import Record

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: the variable CHROMIUM names one")
WIDTHS = (390, 1400)


def browse(source: Path, folder: Path, *arguments: str) -> str:
    """What the browser prints of a page that it opens."""
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
    command = [str(CHROMIUM), *fixed, f"--user-data-dir={folder / 'profile'}", *arguments, source.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def picture(source: Path, target: Path, *, width: int, dark: bool) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The size of a screenshot, and the colour of its first pixel, which is the page's own."""
    browse(
        source,
        target.parent,
        f"--window-size={width},1200",
        f"--screenshot={target}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )
    png = target.read_bytes()
    wide, high, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) in {(8, 2), (8, 6)}
    data, at = b"", 8
    while at < len(png):
        length, name = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += length + 12
    return (wide, high), tuple(zlib.decompress(data)[1:4])  # no filter changes the first pixel


@contextmanager
def counting_server() -> Iterator[tuple[int, list[bytes]]]:
    """A port of this machine, and what was sent to it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        going = True

        def listen() -> None:
            while going:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    heard.append(connection.recv(200))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield server.getsockname()[1], heard
        finally:
            going = False
            thread.join()


def hostile(port: int) -> str:
    attacks = "".join(
        [
            f"<img src=http://127.0.0.1:{port}/a><link rel=stylesheet href=http://127.0.0.1:{port}/b>",
            f"<style>@import url(http://127.0.0.1:{port}/c);</style>",
            f"<script src=http://127.0.0.1:{port}/d></script>",
            f'" style="background:url(http://127.0.0.1:{port}/e)',
        ]
    )
    events = tuple(poisoned(event, attacks + HOSTILE[1] + "w" * 3000) for event in HAPPENED)
    return page(report_of(Record({"metric": attacks, "predictors": {attacks: {"weights": attacks}}}, {}, events)))


@pytest.mark.slow
def test_no_request_leaves_the_page(tmp_path: Path) -> None:
    with counting_server() as (port, heard):
        source = tmp_path / "hostile.html"
        source.write_text(hostile(port), encoding="utf-8")
        assert "Prompt search" in browse(source, tmp_path, "--dump-dom")
        assert heard == []
        # The server does hear of a page that asks.
        source.write_text(f"<!doctype html><img src=http://127.0.0.1:{port}/x>", encoding="utf-8")
        browse(source, tmp_path, "--dump-dom")
        assert heard and heard[0].startswith(b"GET /x ")


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_at_any_width_whatever_is_on_the_page(width: int, tmp_path: Path) -> None:
    opened = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", hostile(1))
    inner = html.escape(opened.replace("<details>", "<details open>"), quote=True)
    measure = "t=e.contentDocument.documentElement;document.title=[t.clientWidth,t.scrollWidth].join('/')"
    source = tmp_path / "measured.html"
    source.write_text(
        f'<!doctype html><iframe style="width:{width}px;height:900px;border:0" srcdoc="{inner}"></iframe>'
        f"<script>e=document.querySelector('iframe');e.onload=()=>{{{measure}}}</script>",
        encoding="utf-8",
    )
    found = re.search(r"<title>(\d+)/(\d+)</title>", browse(source, tmp_path, "--dump-dom", "--window-size=1600,1000"))
    assert found is not None and found.group(1) == found.group(2)
    assert width - 20 <= int(found.group(1)) <= width


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_follows_the_readers_choice_of_light_and_dark(width: int, tmp_path: Path) -> None:
    source = tmp_path / "report.html"
    source.write_text(page(report_of(Record({"metric": "exact_match"}, {}, HAPPENED))), encoding="utf-8")
    size, light = picture(source, tmp_path / "light.png", width=width, dark=False)
    assert size == (width, 1200) and light == (255, 255, 255)
    _, dark = picture(source, tmp_path / "dark.png", width=width, dark=True)
    assert max(dark) < 40
