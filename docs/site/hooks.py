"""What the site needs besides mkdocs: links to files that are not on it become their text.

The pages are read on a forge as well, where a link such as `../dspy_greater/reference.py` opens the file. The site
holds no source files. There the text of the link stays, and a link to a file that the repository lacks ends the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LINK = re.compile(r"\[(?P<text>[^\]\n]*(?:\n[^\]\n]*)?)\]\((?P<target>\.\./[^)\s]*)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page with links that leave the site replaced by their text."""
    docs = Path(config["docs_dir"]).resolve()
    folder = (docs / page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        target = (folder / link["target"].partition("#")[0]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri} links to {link['target']}, which does not exist.")
        return link["text"]

    return _LINK.sub(replaced, markdown)
