"""A rendered, chat-templated DSPy prompt as token ids, with the spans that the search works on.

The tokens that are searched over are the tokens that will be deployed: the prompt is rendered by the
predictor's own adapter and the model's own chat template, tokenised as one text, and the instruction's
tokens are those that cover its characters.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from dspy_greater.errors import LayoutError
from dspy_greater.prompt.chat_template import end_of_turn_ids, with_template_options
from dspy_greater.prompt.edits import TokenEdits
from dspy_greater.prompt.encoder import PromptEncoder, RenderedText
from dspy_greater.prompt.spans import Prompt, Span, Supervised, Written
from dspy_greater.prompt.target import AssistantText, assistant_text
from dspy_greater.prompt.template import Templates, remember, row_key
from dspy_greater.prompt.thoughts import ThoughtTags, thought_tags
from dspy_greater.prompt.token_filter import TokenFilter

__all__ = ["Layout", "Prompt", "Span", "Supervised", "Written"]


class Layout:
    """Maps one predictor's prompts to token ids: which tokens are the instruction, reasoning and answer.

    Arguments: the model's tokenizer, the DSPy adapter and signature of the predictor, its
    demonstrations, and optionally the text between reasoning and gold value (`extractor`, by default the
    adapter's header of the answer field) and the leading text of the instruction that no edit may change
    (`fixed`; what follows it is searched). None of them is changed.

    Special tokens that occur in the data are tokenised as plain text, with one warning; send prompts to
    the model with `PromptEncoder.chat_ids` and it sees the same tokens.

    Raises `LayoutError` when the instruction cannot be found exactly once in the rendered prompt, or `fixed` is
    not as DSPy keeps an instruction.

    ```python
    layout = Layout(tokenizer, dspy.ChatAdapter(), dspy.Signature("question -> reasoning, answer"))
    prompt = layout.prompt("Think step by step.", {"question": "2 + 2?"})
    ids = layout.edits.instruction_ids("Think step by step.")
    layout.edits.replace(ids, 1, new_token)  # (canonical ids, new instruction), or None
    ```
    """

    def __init__(
        self,
        tokenizer: Any,
        adapter: Any,
        signature: Any,
        *,
        demos: Sequence[Any] = (),
        extractor: str | None = None,
        fixed: str = "",
    ) -> None:
        self.encoder = PromptEncoder(tokenizer)
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.signature = signature
        self.demos = list(demos)
        self.extractor = extractor
        self._assistant: dict[str, AssistantText] = {}
        self._templates = Templates(self.encoder, adapter, signature, self.demos)
        self.edits = TokenEdits(self.encoder, self._templates, TokenFilter(self.encoder, signature), fixed)
        self._with_demos: dict[str, Layout] = {}
        self._end_of_turn = end_of_turn_ids(tokenizer) or _end_of_text(tokenizer)

    # ------------------------------------------------------------------ prompts

    def with_demos(self, demos: Sequence[Any] | None) -> Layout:
        """The layout of a call with demonstrations of its own; None: with those of the predictor."""
        if demos is None:
            return self
        key = json.dumps([dict(demo) for demo in demos], default=repr)
        if key not in self._with_demos:
            other = copy.copy(self)  # shares all that does not depend on demonstrations
            other.demos = list(demos)
            other._templates = Templates(self.encoder, self.adapter, self.signature, other.demos)
            other.edits = replace(self.edits, templates=other._templates)
            remember(self._with_demos, key, other)
        return self._with_demos[key]

    def messages(self, instruction: str, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages that DSPy would send with this instruction and these inputs."""
        return self._templates.messages(instruction, inputs)

    @property
    def placeholders(self) -> dict[str, Any]:
        """Inputs that stand for those of a row."""
        return dict(self._templates.reference_inputs)

    @cached_property
    def thought_tags(self) -> ThoughtTags | None:
        """The tags between which the model thinks, as far as its chat template tells them."""
        return thought_tags(self.tokenizer)

    @cached_property
    def asking(self) -> PromptEncoder:
        """For questions that are answered at once: without thoughts, where the chat template can leave them out."""
        return PromptEncoder(with_template_options(self.tokenizer, {"enable_thinking": False}))

    def prompt(self, instruction: str, inputs: Mapping[str, Any]) -> Prompt:
        """The prompt that DSPy would send with this instruction and these inputs.

        Raises `LayoutError` when the instruction's tokens differ from those in other prompts.
        """
        encoded, span, _ = self._templates.encode(self._templates.of(inputs), instruction)
        self._require_same_ids(instruction, encoded.token_ids, span)
        return Prompt(encoded.token_ids, span)

    def supervised(
        self,
        instruction: str,
        inputs: Mapping[str, Any],
        written: Mapping[str, object],
        field: str,
        gold: object,
        *,
        preamble: str = "",
        from_header: bool = False,
    ) -> Supervised:
        """The prompt followed by the assistant's text up to the end of the gold value of `field`.

        `written` maps the output fields before `field` to what the model wrote for them; `preamble` is
        what it wrote before its first field (a native `<think>` block), counted as reasoning. With `from_header` the
        answer begins where the field's header does.

        Raises `LayoutError` or `DataError`, see `assistant_text`.
        """
        content = self._assistant_text(written, field, gold)
        text = preamble + content.text
        tail = RenderedText(text, self.encoder.special_ranges(text))
        encoded, span, begin = self._templates.encode(self._templates.of(inputs), instruction, tail)
        self._require_same_ids(instruction, encoded.token_ids, span)
        starts = [start for start, _ in encoded.offsets]
        stops = [stop for _, stop in encoded.offsets]
        header = begin + len(preamble) + content.header
        gold_start = begin + len(preamble) + content.gold
        first = next(i for i, stop in enumerate(stops) if stop > begin)
        # A token that straddles the end of the reasoning (".\n\n") is the model's way to end it.
        reasoning_stop = next((i for i in range(first, len(starts)) if starts[i] >= header), len(starts))
        answer = next(i for i, stop in enumerate(stops) if stop > gold_start)
        reasoning = Span(first, min(reasoning_stop, answer)) if header > begin else Span(first, first)
        begins = min(reasoning_stop, answer) if from_header else answer
        return Supervised(encoded.token_ids, span, reasoning, Span(begins, len(starts)))

    def written(
        self, instruction: str, inputs: Mapping[str, Any], completion: str, *, limit: int | None = None
    ) -> Written:
        """The prompt followed by what the model wrote, and the token that ends its turn.

        The probability that the model writes `completion` and then stops is the product over the completion's
        tokens. Where its text is tokenised as the model wrote it, these are the prompt's ids and the ids that
        were generated. `limit` is the most tokens that the model could write: a completion of that many was cut
        off, so no end of the turn follows it.

        Raises `LayoutError` as `prompt` does.
        """
        prompt = self.prompt(instruction, inputs)
        tail = RenderedText(completion, self.encoder.special_ranges(completion))
        encoded, _, _ = self._templates.encode(self._templates.of(inputs), instruction, tail)
        begin = len(prompt.token_ids)
        added = encoded.token_ids[begin:]
        if encoded.token_ids[:begin] != prompt.token_ids:
            added = self._after_a_wall(tail)  # the model read the prompt before there was anything to merge with
        if limit is None or len(added) < limit:
            added += self._end_of_turn
        return Written((*prompt.token_ids, *added), prompt.instruction, Span(begin, begin + len(added)))

    def proposal_prefix(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of a user's turn, left open, that holds the inputs and waits for an instruction.

        This is the paper's layout (input first, prompt after it), in which the next tokens that the
        model proposes for the instruction depend on the input.
        """
        content = self.adapter.format_user_message_content(self.signature, dict(inputs), main_request=False)
        messages = [{"role": "user", "content": f"{content}\n\n{self._templates.sentinel}"}]
        rendered = self.encoder.render(messages, add_generation_prompt=False)
        if rendered.text.count(self._templates.sentinel) != 1:
            raise LayoutError(
                "The chat template does not keep a user's message as it is, so the inputs cannot be put "
                "before the instruction. Check tokenizer.chat_template."
            )
        return self.encoder.encode(_cut(rendered, rendered.text.index(self._templates.sentinel))).token_ids

    def longest(self, inputs_list: Sequence[Mapping[str, Any]], instruction: str) -> tuple[int, int]:
        """Index of the inputs with the longest prompt, and its length in tokens.

        Raises `LayoutError` when there are no inputs.
        """
        if not inputs_list:
            raise LayoutError("There are no inputs to measure. Pass at least one row.")
        lengths = [len(self.prompt(instruction, inputs).token_ids) for inputs in inputs_list]
        index = max(range(len(lengths)), key=lengths.__getitem__)
        return index, lengths[index]

    # ------------------------------------------------------------------ internals

    def _assistant_text(self, written: Mapping[str, object], field: str, gold: object) -> AssistantText:
        """See `assistant_text`; one for all instructions under which a row is laid out."""
        key = f"{field} {row_key(written)} {row_key({field: gold})}"
        if key not in self._assistant:
            found = assistant_text(self.adapter, self.signature, written, field, gold, self.extractor)
            remember(self._assistant, key, found)
        return self._assistant[key]

    def _after_a_wall(self, tail: RenderedText) -> tuple[int, ...]:
        """A text's tokens after a special token, with which nothing merges."""
        wall = next(iter(self.encoder.special_texts), "")
        plain = tuple((a + len(wall), b + len(wall)) for a, b in tail.plain)
        encoded = self.encoder.encode(RenderedText(wall + tail.text, plain))
        return tuple(
            token for token, (_, stop) in zip(encoded.token_ids, encoded.offsets, strict=True) if stop > len(wall)
        )

    def _require_same_ids(self, instruction: str, token_ids: tuple[int, ...], span: Span) -> None:
        if token_ids[span.start : span.stop] != self.edits.instruction_ids(instruction):
            raise LayoutError(
                f"The instruction {instruction[:60]!r} is tokenised differently in different prompts: the "
                "tokenizer merges text of the row into its last token. End the instruction with a full stop, "
                "or use a chat template that closes the system message."
            )


def _cut(rendered: RenderedText, stop: int) -> RenderedText:
    return RenderedText(rendered.text[:stop], tuple(pair for pair in rendered.plain if pair[1] <= stop))


def _end_of_text(tokenizer: Any) -> tuple[int, ...]:
    end = getattr(tokenizer, "eos_token_id", None)
    return () if end is None else (end,)
