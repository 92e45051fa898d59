"""The work of one step as token ids: what is measured, the same for everyone who does it.

A prompt is [head | instruction | tail]: the system message up to the instruction, and the rest of it with
the row's own input and the assistant's header. Under an instruction every row writes exactly R tokens of
reasoning, greedily and without stopping; then come the answer's header and the gold answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.pocket import transcript
from dspy_greater.errors import SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import GenerationRequest
from dspy_greater.pocket import tasks
from dspy_greater.prompt.spans import Span, Supervised

INSTRUCTION = "Work through the question one step at a time and then give the final answer."
_ANSWER_HEADER_TOKENS, _ANSWER_TOKENS = 6, 2  # of random rows
_HEAD_SHARE, _SHARED_TAIL = 0.55, 6  # of a random prompt: like a chat adapter's long system message


@dataclass(frozen=True)
class WorkRow:
    """One example: its input in the context of the proposals, and what stands around the instruction."""

    proposal_prefix: tuple[int, ...]  # x_j alone
    head: tuple[int, ...]
    tail: tuple[int, ...]
    answer_header: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """One step: p, i, the rows, and how much of everything.

    `current_reasoning` is what the rows wrote under the current instruction: the step before left it.
    """

    instruction: tuple[int, ...]
    position: int
    rows: tuple[WorkRow, ...]
    reasoning_tokens: int  # R
    selections: int  # mu
    forbidden: frozenset[int]  # tokens that must not be put into an instruction
    top_k: int = 10
    sample_size: int = 5
    draws: int = 4
    minimum: int = 6
    max_widening: int = 16
    answer_temperature: float = 0.2
    fluency_weight: float = 0.2
    seed: int = 0
    current_reasoning: tuple[tuple[int, ...], ...] = ()

    @property
    def current(self) -> int:
        """p_i, the token that the candidates compete with."""
        return self.instruction[self.position]

    def edited(self, token: int) -> tuple[int, ...]:
        """The instruction with this token at the position."""
        return (*self.instruction[: self.position], token, *self.instruction[self.position + 1 :])

    def prompts(self, instruction: Sequence[int]) -> list[tuple[int, ...]]:
        """x ⊙ p of every row, as it is deployed."""
        return [(*row.head, *instruction, *row.tail) for row in self.rows]

    def requests(self, instruction: Sequence[int]) -> list[GenerationRequest]:
        """The reasoning of every row, as long as it is told and greedy."""
        prompts = self.prompts(instruction)
        return [GenerationRequest(prompt, self.reasoning_tokens, stop_token_ids=()) for prompt in prompts]

    def proposal_contexts(self) -> list[tuple[int, ...]]:
        """x_j ⊙ p_<i of every row."""
        return [(*row.proposal_prefix, *self.instruction[: self.position]) for row in self.rows]

    def supervised(self, instruction: Sequence[int], reasoning: Sequence[tuple[int, ...]]) -> list[Supervised]:
        """x ⊙ p ⊙ r ⊙ p_extract ⊙ y of every row."""
        return [
            _supervised(row, tuple(instruction), written) for row, written in zip(self.rows, reasoning, strict=True)
        ]

    def allows(self, token: int) -> int | None:
        """The token itself when it may stand at the position, else None."""
        return None if token == self.current or token in self.forbidden else token

    def generator(self) -> random.Random:
        """Decides which rows propose; the same for every arm."""
        return random.Random(self.seed)

    def first_rows(self, count: int) -> Work:
        """The same step on fewer rows."""
        return replace(self, rows=self.rows[:count], current_reasoning=self.current_reasoning[:count])

    def shortened(self, tokens: int) -> Work:
        """The same step with less reasoning."""
        return replace(
            self,
            reasoning_tokens=min(tokens, self.reasoning_tokens),
            current_reasoning=tuple(each[:tokens] for each in self.current_reasoning),
        )

    def with_current_reasoning(self, engine: Engine) -> Work:
        """The step as a search comes to it: the current instruction's reasoning is there already."""
        generated = engine.generate(self.requests(self.instruction))
        return replace(self, current_reasoning=tuple(each.token_ids for each in generated))


def _supervised(row: WorkRow, instruction: tuple[int, ...], reasoning: tuple[int, ...]) -> Supervised:
    begin = len(row.head)
    prompt = (*row.head, *instruction, *row.tail)
    before = (*prompt, *reasoning, *row.answer_header)
    return Supervised(
        token_ids=(*before, *row.answer),
        instruction=Span(begin, begin + len(instruction)),
        reasoning=Span(len(prompt), len(prompt) + len(reasoning)),
        answer=Span(len(before), len(before) + len(row.answer)),
    )


def pocket_work(engine: Engine, *, rows: int, reasoning_tokens: int, selections: int, input_tokens: int = 0) -> Work:
    """Rows in the formats that the pocket model knows, in the text of DSPy's ChatAdapter.

    `input_tokens` lengthens every question to about so many tokens, by telling it several times.
    """
    rng = random.Random("speed")
    questions: dict[str, str] = {}
    while len(questions) < rows:
        question = tasks.generate("navigate", rng)
        questions[question] = tasks.work_out("navigate", question).answer
    tokenizer = engine.tokenizer
    built = []
    for question, answer in questions.items():
        length = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        built.append(_pocket_row(tokenizer, " ".join([question] * max(1, round(input_tokens / length))), answer))
    return Work(
        instruction=built[0][1],
        position=len(built[0][1]) // 2,
        rows=tuple(row for row, _ in built),
        reasoning_tokens=reasoning_tokens,
        selections=selections,
        forbidden=frozenset(tokenizer.all_special_ids),
    )


def _pocket_row(tokenizer: Any, question: str, answer: str) -> tuple[WorkRow, tuple[int, ...]]:
    """A row, and the instruction's tokens in it: the prompt is tokenised as a whole."""
    head = transcript.SYSTEM + transcript.system_head(reasoning=True)
    request = transcript.user_message(question, reasoning=True)
    tail = transcript.END + transcript.USER + request + transcript.END + transcript.ASSISTANT
    encoded = tokenizer(head + INSTRUCTION + tail, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = tuple(encoded["input_ids"]), encoded["offset_mapping"]
    begin, end = len(head), len(head) + len(INSTRUCTION)
    covered = [index for index, (a, b) in enumerate(offsets) if a < end and b > begin]
    first, last = covered[0], covered[-1] + 1

    def plain(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    row = WorkRow(
        proposal_prefix=plain(f"{transcript.USER}[[ ## question ## ]]\n{question}\n\n"),
        head=ids[:first],
        tail=ids[last:],
        answer_header=plain("\n\n[[ ## answer ## ]]\n"),
        answer=plain(answer),
    )
    return row, ids[first:last]


def random_work(
    engine: Engine,
    *,
    rows: int,
    reasoning_tokens: int,
    selections: int,
    prompt_tokens: int,
    instruction_tokens: int = 20,
) -> Work:
    """Rows of random token ids with the proportions of a chat prompt: a long shared head, own inputs of uneven length.

    Raises:
        SettingsError: a prompt with no room for the instruction and an input.
    """
    head_tokens = int(_HEAD_SHARE * prompt_tokens)
    own = prompt_tokens - head_tokens - instruction_tokens - _SHARED_TAIL
    if head_tokens < 1 or own < 4:
        least = round((instruction_tokens + _SHARED_TAIL + 5) / (1 - _HEAD_SHARE)) + 1
        raise SettingsError(f"A prompt of {prompt_tokens} tokens has no room for an input; give at least {least}.")
    rng, vocabulary = random.Random("speed"), len(engine.tokenizer)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, vocabulary) for _ in range(count))

    head, instruction, shared_tail, request = draw(head_tokens), draw(instruction_tokens), draw(_SHARED_TAIL), draw(2)
    header = draw(_ANSWER_HEADER_TOKENS)

    def row() -> WorkRow:
        question = draw(own - 2 - rng.randrange(own // 3 + 1))
        return WorkRow(question, head, (*shared_tail, *question, *request), header, draw(_ANSWER_TOKENS))

    return Work(
        instruction=instruction,
        position=instruction_tokens // 2,
        rows=tuple(row() for _ in range(rows)),
        reasoning_tokens=reasoning_tokens,
        selections=selections,
        forbidden=frozenset({0}),
        # Random weights agree about nothing across contexts: as many contexts, but each proposes for itself.
        top_k=2,
        sample_size=1,
        draws=20,
    )
