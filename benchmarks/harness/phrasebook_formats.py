"""What a request to a proposer asks for, and in which format: read from the text of the request alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["fields", "json", "tags", "fence", "brackets", "list", "plain"]
Draw = Callable[[], str]

_OUTPUT_FIELDS = re.compile(r"Your output fields are:\n(.*?)\nAll interactions will be structured", re.DOTALL)
_FIELD = re.compile(r"^\d+\. `(\w+)` \((.+?)\):", re.MULTILINE)
_VALUE = r"\[\[ ## {name} ## \]\]\n(.*?)(?=\n\n\[\[ ## |\n\nRespond with|\Z)"
# Tags to write between are shown with nothing, a placeholder or a joining word between them; tags around a
# text that is handed over are not.
_EMPTY_TAGS = re.compile(
    r"<([A-Za-z_]+)>\s*(?:\{[^{}<]*\}|\.\.\.|…|\[[^\]<]*\]|and(?: \w+){0,3}|to|,|"
    r"(?:your|new|improved|revised)\b[^<]{0,60})?\s*</\1>"
)
_START_END = re.compile(r"[^.\n]*<START>", re.IGNORECASE)
_FENCE = re.compile(r"(?:within|between|in|inside|wrap|wrapped|enclosed)[^\n]{0,60}```", re.IGNORECASE)
_BRACKETS = re.compile(r"(?:square brackets|in \[\]|within \[\]|between \[ and \])", re.IGNORECASE)
_NUMBERED = re.compile(
    r"numbered list|as a list numbered|one per line|numbered from 1|^1\. *(?:\.\.\.|<|\[)", re.I | re.M
)
_COUNT = re.compile(
    r"\b(\d+|two|three|four|five|six|seven|eight|nine|ten)\b(?: \w+){0,3} "
    r"(?:prompts|instructions|variations|versions|reasons|suggestions|paraphrases|candidates|alternatives|improvements)",
    re.IGNORECASE,
)
_WORDS = dict(zip("two three four five six seven eight nine ten".split(), range(2, 11), strict=True))
_CRITICISM = re.compile(
    r"\b(?:reasons? why|criticisms?|critiques?|criticize|critique|feedback|what (?:is|went) wrong|gradients?|"
    r"diagnos\w+|explain (?:why|what)|analy[sz]e)\b",
    re.IGNORECASE,
)
_PROPOSAL = re.compile(
    r"\b(?:new|improved|better|different|refined|revised|updated|optimized) (?:\w+ ){0,2}(?:prompt|instruction)s?\b|"
    r"\b(?:variation|paraphrase|rewrite|rephrase|semantic meaning)\w*|instruction was|propose|"
    r"\b(?:write|generate|suggest) (?:\w+ ){0,3}(?:prompt|instruction)s?\b",
    re.IGNORECASE,
)
_VARIATION = re.compile(
    r"variation|paraphras|rephras|rewrite|semantic meaning|crossover|cross over|mutat|differential evolution", re.I
)
_PROPOSING_FIELD = re.compile(r"instruction|prompt|version|variant|rewrit|improved|revised|proposal|advice|rule", re.I)


@dataclass(frozen=True)
class Asked:
    """A request, understood.

    Attributes:
        kind: the format of the answer.
        fields: (name, type) of the output fields, for `fields` and `json`.
        tag: the tag to write between, for `tags`.
        count: how many pieces are asked for.
        criticism: criticism is wanted, not a prompt.
        varied: short lines of a request to vary what is shown; empty for every other request.
        request: the last message of the user.
    """

    kind: Kind
    request: str
    fields: tuple[tuple[str, str], ...] = ()
    tag: str = ""
    count: int = 1
    criticism: bool = False
    varied: tuple[str, ...] = ()


def read_request(messages: Sequence[dict[str, str]]) -> Asked:
    """What the messages ask for.

    Example:
        >>> read_request(
        ...     [{"role": "user", "content": "Give the new prompt, bracketed with <prompt> and </prompt>."}]
        ... ).tag
        'prompt'
    """
    request = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    text = "\n".join(message["content"] for message in messages if message["role"] != "assistant")
    varied = tuple(line.strip() for line in re.split(r"[\n\"`]|<[^>]+>|: ", text)) if _VARIATION.search(text) else ()
    fields = _fields(messages)
    if fields:
        kind: Kind = "json" if "JSON object" in text and "[[ ## completed ## ]]" not in text else "fields"
        return Asked(kind, request, fields, varied=varied)
    count = _count(request)
    start_end = _START_END.findall(request)
    if start_end:
        about = " ".join(start_end)
        reasons = re.search(r"reason|feedback|criticism|problem", about, re.I) is not None
        return Asked("tags", request, tag="START", count=count, criticism=reasons, varied=varied)
    tag = _tag(text)
    if tag:
        return Asked("tags", request, tag=tag, count=1, varied=varied)
    if _FENCE.search(text):
        return Asked("fence", request, varied=varied)
    if _BRACKETS.search(text):
        return Asked("brackets", request, varied=varied)
    criticism = _wants_criticism(request, text)
    return Asked("list" if _NUMBERED.search(request) else "plain", request, (), "", count, criticism, varied)


def answer(asked: Asked, propose: Draw, criticise: Draw, rng: random.Random) -> str:
    """The answer's text; `propose` and `criticise` draw its pieces.

    Example:
        >>> asked = Asked("tags", "", tag="START", count=2)
        >>> answer(asked, lambda: "Think.", lambda: "Too short.", random.Random(0)).replace("\\n", " ")
        '<START>Think.<END> <START>Think.<END>'
    """
    draw = criticise if asked.criticism else propose
    if asked.kind == "fields":
        pieces = [
            f"[[ ## {name} ## ]]\n{_as_text(_value(name, kind, asked, propose, criticise, rng))}"
            for name, kind in asked.fields
        ]
        return "\n\n".join([*pieces, "[[ ## completed ## ]]"])
    if asked.kind == "json":
        return json.dumps(
            {name: _value(name, kind, asked, propose, criticise, rng) for name, kind in asked.fields}, indent=2
        )
    if asked.kind == "tags":
        end = "<END>" if asked.tag == "START" else f"</{asked.tag}>"
        return "\n".join(f"<{asked.tag}>{draw()}{end}" for _ in range(asked.count))
    if asked.kind == "fence":
        return f"```\n{draw()}\n```"
    if asked.kind == "brackets":
        return f"[{draw()}]"
    if asked.kind == "list":
        return "\n".join(f"{number}. {draw()}" for number in range(1, max(asked.count, 1) + 1))
    return draw()


def _fields(messages: Sequence[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    system = "\n".join(message["content"] for message in messages if message["role"] == "system")
    described = _OUTPUT_FIELDS.search(system)
    return tuple(_FIELD.findall(described[1] + "\n")) if described else ()


def _tag(text: str) -> str:
    """The tag that the answer is to be written between; the last one that the text speaks of."""
    found = _EMPTY_TAGS.findall(text)
    return found[-1] if found else ""


def _count(request: str) -> int:
    found = _COUNT.findall(request)
    word = found[-1].lower() if found else "1"
    return max(1, min(50, int(word) if word.isdigit() else _WORDS[word]))


def _wants_criticism(request: str, text: str) -> bool:
    """Criticism is wanted where it is spoken of and no new prompt is."""
    return bool(_CRITICISM.search(text)) and not _PROPOSAL.search(request)


def _value(name: str, kind: str, asked: Asked, propose: Draw, criticise: Draw, rng: random.Random) -> object:
    """A value of an output field, by its type and its name."""
    draw = propose if _PROPOSING_FIELD.search(name) else criticise
    if kind.startswith("Literal["):
        quoted, plain = rng.choice(re.findall(r"'([^']*)'|(\w+)", kind.removeprefix("Literal")))
        return quoted or plain
    if kind.startswith("list"):
        return [draw() for _ in range(_wanted(asked.request))]
    if kind.startswith("dict"):
        return {key: draw() for key in _names(asked.request)}
    if kind in ("int", "float"):
        return rng.randint(1, 5)
    if kind == "bool":
        return rng.random() < 0.5
    if "prefix" in name:
        return "Answer:"
    if name == "concerns":
        return ", ".join(_names(asked.request))
    if name == "score":
        return str(rng.randint(1, 5))
    return draw()


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _wanted(request: str) -> int:
    """How many entries a list is to have, where a field of the request says so."""
    found = re.search(_VALUE.format(name=r"(?:number|count|n|num_\w+)"), request, re.DOTALL)
    return max(1, min(50, int(found[1]))) if found and found[1].strip().isdigit() else 3


def _names(request: str) -> list[str]:
    """The predictors that the request speaks of: those that a field lists, or whose prompts are shown."""
    found = re.search(_VALUE.format(name=r"\w*names\w*"), request, re.DOTALL)
    listed = re.findall(r"[\"']([^\"']+)[\"']", found[1]) if found else []
    return listed or list(dict.fromkeys(re.findall(r"Predictor `([^`]+)`", request))) or ["predict"]
