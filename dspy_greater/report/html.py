"""Elements of a page that cannot be broken by what they hold: every text is escaped, whoever wrote it.

Only `element` and `styled` make `Markup`, and whatever else is put into an element becomes text. Names of elements and
attributes come from the code alone.
"""

from __future__ import annotations

import html
import re

_VOID = {"meta", "br", "hr"}
# What a page cannot hold or a reader cannot see: control characters, lone surrogates, marks that turn text around.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


class Markup(str):
    """Text that is a part of a page already."""

    __slots__ = ()


def escaped(text: object) -> Markup:
    """A text as it is to be read: what would be markup, or cannot be seen, is shown as text.

    Example:
        >>> escaped('<b title="x">'), escaped("a\\u202eb")
        ('&lt;b title=&quot;x&quot;&gt;', 'a‹U+202E›b')
    """
    if isinstance(text, Markup):
        return text
    shown = _INVISIBLE.sub(lambda found: f"‹U+{ord(found.group()):04X}›", str(text).replace("\r\n", "\n"))
    return Markup(html.escape(shown.replace("\r", "\n"), quote=True))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element with its children; what is None is left out, and so is an attribute that is None or False.

    An attribute's name may end with `_`, where it is a word of Python, and a `_` inside of it stands for `-`.

    Example:
        >>> element("p", "1 < 2", element("br"), class_="note", hidden=True)
        '<p class="note" hidden>1 &lt; 2<br></p>'
    """
    opened = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        named = key.rstrip("_").replace("_", "-")
        opened.append(named if value is True else f'{named}="{escaped(value)}"')
    if name in _VOID:
        return Markup(f"<{' '.join(opened)}>")
    return Markup(f"<{' '.join(opened)}>{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    """Children one after the other, each escaped unless it is markup; tuples and lists are joined too."""
    return Markup("".join(_parts(children)))


def styled(css: str) -> Markup:
    """A style sheet of our own; nothing of a run belongs into it."""
    return Markup(f"<style>{css}</style>")


def _parts(children: tuple[object, ...] | list[object]) -> list[str]:
    found: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, (tuple, list)):
            found += _parts(child)
        else:
            found.append(escaped(child))
    return found
