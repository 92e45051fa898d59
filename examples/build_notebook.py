"""Make `quickstart.ipynb` from `quickstart_notebook.py`, with what its cells print and draw: `make notebook`.

Cells begin with `# %%`, those of text with `# %% [markdown]`, as Jupytext and several editors have them. They are run
in one namespace in a folder that is thrown away, and the notebook is written only if all of them ran. Jupyter is not
needed for it.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE, NOTEBOOK = HERE / "quickstart_notebook.py", HERE / "quickstart.ipynb"


@dataclass(frozen=True)
class Cell:
    """A cell as it is shown: its kind, "code" or "markdown", and its text."""

    kind: str
    text: str


def cells_of(source: str) -> Iterator[Cell]:
    """The cells of a script in the percent format."""
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            yield Cell("markdown", "\n".join(lines).strip())
        else:
            yield Cell("code", body.strip())


def run(cell: Cell, names: dict[str, Any], where: str) -> tuple[str, Any]:
    """What a cell of code printed, and the value of its last line if that is an expression."""
    tree = ast.parse(cell.text, where)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    return printed.getvalue(), value


def outputs_of(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
    """A notebook's outputs of a cell: the text that it printed, and its value, as a picture where it is one."""
    found: list[dict[str, Any]] = []
    if printed:
        found.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if value is not None:
        draw = getattr(value, "_repr_png_", None)
        picture = {} if draw is None else {"image/png": base64.b64encode(draw()).decode("ascii")}
        data = {**picture, "text/plain": [type(value).__name__ if picture else repr(value)]}
        found.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return found


def notebook_of(source: str, *, where: str = str(SOURCE)) -> dict[str, Any]:
    """The notebook of a script, every cell run."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[dict[str, Any]] = []
    count = 0
    for number, cell in enumerate(cells_of(source)):
        written = {
            "cell_type": cell.kind,
            "id": f"cell-{number}",
            "metadata": {},
            "source": cell.text.splitlines(keepends=True),
        }
        if cell.kind == "code":
            count += 1
            printed, value = run(cell, names, where)
            written |= {"execution_count": count, "outputs": outputs_of(printed, value, count)}
        shown.append(written)
    about = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": shown, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Run the cells, and write the notebook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=NOTEBOOK)
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DSPY_CACHEDIR"] = folder  # answers of an earlier run would make this one look cheaper
        os.chdir(folder)
        notebook = notebook_of(SOURCE.read_text(encoding="utf-8"))
        os.chdir(HERE)  # a folder that is in use cannot be removed everywhere
    out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()
