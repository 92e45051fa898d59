"""A page as a reader sees it: its elements, attributes and text, parsed strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(each if isinstance(each, str) else each.text for each in self.children)

    def all(self, tag: str, kind: str | None = None) -> list[Node]:
        """Every element of this tag, and class, inside of this one, in the order of the page."""
        found: list[Node] = []
        for each in self.children:
            if isinstance(each, Node):
                classes = (each.attributes.get("class") or "").split()
                if each.tag == tag and (kind is None or kind in classes):
                    found.append(each)
                found += each.all(tag, kind)
        return found

    def everything(self) -> list[Node]:
        nodes = [each for each in self.children if isinstance(each, Node)]
        return nodes + [deeper for each in nodes for deeper in each.everything()]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def read(page: str) -> Node:
    """The page's root; AssertionError where an element is not closed in its order."""
    reader = _Reader()
    assert page.startswith("<!doctype html>\n")
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def table(node: Node) -> list[list[str]]:
    """A table's cells, its head first."""
    return [[cell.text for cell in row.all("th") + row.all("td")] for row in node.all("tr")]
