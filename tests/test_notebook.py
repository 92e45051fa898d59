"""The notebook of the quickstart is its script, run: the same cells, all of them executed, with the plots in it."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = {"STEPS = 10": "STEPS = 1", "TRAIN, VALIDATION, TEST = 24, 50, 100": "TRAIN, VALIDATION, TEST = 3, 2, 3"}


def builder() -> Any:
    spec = importlib.util.spec_from_file_location("build_notebook", EXAMPLES / "build_notebook.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script() -> str:
    return (EXAMPLES / "quickstart_notebook.py").read_text(encoding="utf-8")


def notebook() -> dict[str, Any]:
    return json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))


def pictures(cells: list[dict[str, Any]]) -> list[bytes]:
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


def test_the_notebook_has_the_cells_of_its_script() -> None:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook()["cells"]]
    assert cells == [(cell.kind, cell.text) for cell in builder().cells_of(script())]
    assert len(cells) > 15


def test_every_cell_was_run_in_order_and_the_plots_are_there() -> None:
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for cell in cells for output in cell["outputs"]} == {"stream", "execute_result"}
    assert len(pictures(cells)) == 3
    assert all(each.startswith(b"\x89PNG") and len(each) > 5000 for each in pictures(cells))


def test_the_notebook_shows_a_gain_and_no_folder_of_the_machine_that_made_it() -> None:
    text = "".join(
        line for cell in notebook()["cells"] for out in cell.get("outputs", ()) for line in out.get("text", ())
    )
    before, after = map(int, re.findall(r"^(\d+) -> (\d+) %, under", text, re.M)[0])
    assert after > before + 10
    assert not re.search(r"/(?:tmp|home|root|work|Users)/|0x[0-9a-f]{6}|Traceback", text)


@pytest.mark.slow
def test_the_cells_run_with_small_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the notebook draws: pip install 'dspy-greater[plots]'")
    monkeypatch.chdir(tmp_path)
    text = script()
    for large, small in SMALL.items():
        assert text.count(large) == 1
        text = text.replace(large, small)
    before = dspy.settings.lm
    try:
        cells = builder().notebook_of(text)["cells"]
    finally:
        dspy.configure(lm=before)
    assert len(pictures(cells)) == 3
    assert {"navigate.json", "runs"} <= set(os.listdir(tmp_path))
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


def test_a_cell_shows_what_it_printed_and_the_value_of_its_last_line() -> None:
    source = "# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\nx = 2\nprint(x)\nx + 1\n\n# %%\nx = 5\n"
    title, first, second = builder().notebook_of(source)["cells"]
    assert "".join(title["source"]) == "# Title\n\nText"
    assert [output.get("text") or output["data"]["text/plain"] for output in first["outputs"]] == [["2\n"], ["3"]]
    assert second["outputs"] == []
