"""Docstrings as the site's reader wants them.

`Example:`, which holds doctests, is the section that it calls `Examples:`; and the comment behind a field of a
dataclass is what the field's docstring would say.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_HEADING = re.compile(r"^(\s*)Example:$", re.MULTILINE)
_COMMENT = re.compile(r"  # (?P<text>.+)$")


class Docstrings(griffe.Extension):
    """Runs over every object that is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section, so that its doctests are shown as code."""
        if obj.docstring is not None:
            obj.docstring.value = _HEADING.sub(r"\1Examples:", obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the comment behind a field for its docstring."""
        is_field = isinstance(attr.parent, griffe.Class)
        comment = _COMMENT.search(attr.source.splitlines()[0]) if is_field and attr.source else None
        if comment and attr.docstring is None:
            attr.docstring = griffe.Docstring(comment["text"], parent=attr)
