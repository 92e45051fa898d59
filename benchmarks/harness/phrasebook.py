"""`phrasebook`: a proposer where no model is at hand that can write critiques.

It answers any request for a prompt in the format that the request asks for, with an instruction drawn from the grammar
that the pocket model was trained on, and any request for criticism with a fluent criticism. It is generous to those
who ask: nine of ten proposals are fluent, and six of ten fit one of the pocket model's four tasks. Which of them is at
hand it does not know: the task is drawn as well, and only a request to vary an instruction that is shown keeps, half
of the time, to what that instruction is about.

The draws follow from the seed, the text of the request and how often it was made before: not from the order of threads.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections import Counter
from typing import Any

from dspy import lm15

from benchmarks.harness.phrasebook_formats import Asked, answer, read_request
from benchmarks.pocket import grammar
from dspy_greater.lm.request import messages_of
from dspy_greater.pocket.tasks import TASKS

PHRASEBOOK = "phrasebook"

_CRITICISMS = (
    "The instruction does not say what to write down, so the model answers at once and its answers are guesses.",
    "The answers are wrong where the question has many parts: the instruction should ask for every part in its turn.",
    "The instruction is too general. It should name what the question is about and what to keep track of.",
    "The model skips steps. The instruction should ask for the working before the answer.",
    "The instruction asks for an answer and not for a way to it; it should say how the answer is reached.",
    "The instruction does not name the things that the question is about, so that they are mixed up on the way.",
)


class PhrasebookEngine:
    """DSPy's engine contract over the grammar: one request in, one proposal out.

    Args:
        seed: of the draws.
    """

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = True
    supported_params = frozenset({"temperature", "max_tokens", "top_p", "stop", "seed", "response_format"})

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._asked: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> PhrasebookEngine:
        return self  # one count of what was asked, however often a program is copied

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer in the format that is asked for. Usage is what the texts would be at four letters a token."""
        messages = messages_of(request)
        text = "\n".join(message["content"] for message in messages)
        written = self.write(messages)
        return lm15.Response(
            id=None,
            model=request.model,
            message=lm15.Message.assistant(written),
            finish_reason="stop",
            usage=lm15.Usage(input_tokens=len(text) // 4, output_tokens=len(written) // 4),
        )

    def write(self, messages: list[dict[str, str]]) -> str:
        """The answer to chat messages.

        Example:
            >>> PhrasebookEngine(0).write([{"role": "user", "content": "Propose a prompt between <INS> and </INS>."}])
            '<INS>...</INS>'
        """
        asked = read_request(messages)
        key = zlib.crc32(repr(messages).encode())
        with self._lock:
            times = self._asked[key]
            self._asked[key] += 1
        rng = random.Random(f"phrasebook/{self._seed}/{key}/{times}")
        return answer(asked, lambda: instruction(rng, asked), lambda: rng.choice(_CRITICISMS), rng)

    def close(self) -> None:
        """Nothing to close."""


def instruction(rng: random.Random, asked: Asked) -> str:
    """An instruction: six of ten fit some task, the rest is general advice, plain or garbled."""
    topics = [task for line in asked.varied for task in topics_of(line)]
    task = rng.choice(topics) if topics and rng.random() < 0.5 else rng.choice(TASKS)
    kind = rng.choices(("fitting", "generic", "plain", "corrupted"), (60, 15, 15, 10))[0]
    if kind == "generic":
        return grammar.generic(rng)
    if kind == "plain":
        return grammar.plain(rng)
    fitting = grammar.fitting(task, rng)
    return fitting if kind == "fitting" else grammar.corrupted(fitting, rng)


def topics_of(line: str) -> list[str]:
    """The tasks whose instruction a short line can be taken for; none for a question or a long text.

    Example:
        >>> topics_of("List each item with its number and add.")
        ['object_counting']
    """
    if len(line) > 160 or "?" in line:
        return []
    return [task for task in TASKS if grammar.strength(line, task) >= 3]
