"""What the site needs besides mkdocs: links that leave it become their text, and no public name is forgotten.

The pages are read on a forge as well, where a link such as `../dspy_greater/reference.py` opens the file. The site
holds no source files. There the text of the link stays, and a link to a file that the repository lacks ends the build.

A public name of the package that no page of the reference asks for is shown on the reference's first page.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_FIRST = "reference/index.md"
_LINK = re.compile(r"\[(?P<text>[^\]\n]*(?:\n[^\]\n]*)?)\]\((?P<target>\.\./[^)\s]*)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page with links that leave the site replaced by their text, and on the reference's first what is left."""
    docs = Path(config["docs_dir"]).resolve()
    if page.file.src_uri == _FIRST:
        markdown += "".join(f"\n\n::: dspy_greater.{name}\n" for name in _without_a_page(docs))
    folder = (docs / page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        target = (folder / link["target"].partition("#")[0]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri} links to {link['target']}, which does not exist.")
        return link["text"]

    return _LINK.sub(replaced, markdown)


def _without_a_page(docs: Path) -> list[str]:
    """The names of the package's `__all__` that no page of the reference asks for."""
    tree = ast.parse((docs.parent / "dspy_greater" / "__init__.py").read_text(encoding="utf-8"))
    [names] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    asked = "\n".join(page.read_text(encoding="utf-8") for page in (docs / "reference").glob("*.md"))
    return [name for name in names if not re.search(rf"^::: dspy_greater\.{name}$", asked, re.MULTILINE)]
