"""Prompts to tokens: what is scored is what DSPy sends."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import dspy
import pydantic
import pytest
from chat_families import DROPS_INSTRUCTION, KINDS, REPEATS_SYSTEM, TEMPLATES, family_tokenizer
from hypothesis import HealthCheck, settings

from dspy_greater.errors import DataError, LayoutError
from dspy_greater.prompt.chat_template import render_chat
from dspy_greater.prompt.layout import Layout, Span
from dspy_greater.prompt.spans import covering

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = {"chat": dspy.ChatAdapter(), "json": dspy.JSONAdapter(), "xml": dspy.XMLAdapter()}
SIGNATURE = dspy.Signature("question -> reasoning, answer", "Answer the question.")
ROW = {"question": "How many?\n2 + 2"}
DEMO = dspy.Example(question="1 + 1?", reasoning="one and one", answer="two").with_inputs("question")
SEEDS = [
    "Answer the question.",
    "Think step by step, then answer",
    "First line.\n\nSecond line:\n- a\n  - b",
    '3 steps: é – 漢 "quoted" <b> & {braces} \\n',
    "Tab\tinside and a trailing blank ",
]
quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=tuple(HealthCheck))


def slow_ids(
    tokenizer: Any, adapter: Any, signature: Any, instruction: str, inputs: Any, demos: Any = ()
) -> tuple[int, ...]:
    """The obvious twin of `Layout.prompt`."""
    messages = adapter.format(signature.with_instructions(instruction), list(demos), dict(inputs))
    text = render_chat(tokenizer, messages)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def decoded(layout: Layout, ids: tuple[int, ...], span: Span) -> str:
    return layout.tokenizer.decode(list(ids[span.start : span.stop]), clean_up_tokenization_spaces=False)


_LAYOUTS: dict[tuple[str, str, str], Layout] = {}


def layout_for(kind: str = "merging", template: str = "llama3", adapter: str = "chat") -> Layout:
    key = (kind, template, adapter)
    if key not in _LAYOUTS:
        _LAYOUTS[key] = Layout(family_tokenizer(kind, template), ADAPTERS[adapter], SIGNATURE)
    return _LAYOUTS[key]


# --- prompts ---


# A tokenizer that merges over blanks makes one token of an instruction's end and what follows it; with these
# templates that is text of the row.
ROW_MERGES = {("merging across blanks", "gemma"), ("merging across blanks", "mistral")}


@pytest.mark.parametrize("kind,template", sorted(ROW_MERGES))
def test_an_instruction_whose_tokens_depend_on_the_row_is_refused(kind: str, template: str) -> None:
    layout = layout_for(kind, template)
    with pytest.raises(LayoutError, match="merges text of the row into its last token"):
        layout.prompt("Answer the question.", ROW)


@pytest.mark.parametrize("kind,template", sorted(set(itertools.product(KINDS, TEMPLATES)) - ROW_MERGES))
def test_a_prompt_is_exactly_what_dspy_sends(kind: str, template: str) -> None:
    for name, adapter in ADAPTERS.items():
        layout = layout_for(kind, template, name)
        for instruction in SEEDS:
            prompt = layout.prompt(instruction, ROW)
            assert prompt.token_ids == slow_ids(layout.tokenizer, adapter, SIGNATURE, instruction, ROW)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_demonstrations_are_part_of_the_prompt(adapter: str) -> None:
    partial = dspy.Example(question="3?", answer="three")
    layout = Layout(family_tokenizer(), ADAPTERS[adapter], SIGNATURE, demos=[DEMO, partial])
    prompt = layout.prompt(SEEDS[0], ROW)
    assert prompt.token_ids == slow_ids(layout.tokenizer, ADAPTERS[adapter], SIGNATURE, SEEDS[0], ROW, [DEMO, partial])


def test_the_messages_of_a_real_call_give_the_scored_tokens() -> None:
    lm = dspy.utils.DummyLM([{"reasoning": "two and two", "answer": "four"}])
    program = dspy.ChainOfThought("question -> answer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
            program(**ROW)
    signature = program.predict.signature
    layout = Layout(family_tokenizer(), dspy.ChatAdapter(), signature)
    sent = layout.encoder.chat_ids(lm.history[-1]["messages"])
    assert layout.prompt(signature.instructions, ROW).token_ids == sent


@pytest.mark.parametrize("kind", KINDS)
def test_the_span_covers_the_instruction_and_no_more(kind: str) -> None:
    layout = layout_for(kind)
    ids = layout.edits.instruction_ids(SEEDS[0])
    prompt = layout.prompt(SEEDS[0], ROW)
    assert prompt.token_ids[prompt.instruction.start : prompt.instruction.stop] == ids
    assert len(prompt.instruction) == len(ids)
    assert decoded(layout, prompt.token_ids, prompt.instruction).strip() == SEEDS[0]


def test_the_first_token_may_take_in_the_indentation() -> None:
    layout = layout_for("merging")
    alone = layout.tokenizer(SEEDS[0], add_special_tokens=False)["input_ids"]
    ids = layout.edits.instruction_ids(SEEDS[0])
    assert ids[0] != alone[0]
    assert layout.tokenizer.decode([ids[0]]).startswith(" ")


def test_another_instruction_does_not_render_the_prompt_again() -> None:
    calls = []

    class Counting(dspy.ChatAdapter):
        def format(self, signature: Any, demos: Any, inputs: Any) -> Any:
            calls.append(signature.instructions)
            return super().format(signature, demos, inputs)

    layout = Layout(family_tokenizer(), Counting(), SIGNATURE)
    layout.prompt("Answer.", ROW)
    before = len(calls)
    for instruction in ("Think.", "Add the items.", "Answer the question."):
        layout.prompt(instruction, ROW)
        layout.prompt(instruction, dict(ROW))
    assert len(calls) == before


def test_values_that_are_equal_but_render_differently_have_their_own_prompts() -> None:
    layout = layout_for()
    prompts = {layout.prompt("Answer.", {"question": value}).token_ids for value in (1, 1.0, True, "1.")}
    assert len(prompts) == 4


def test_the_longest_row_is_found() -> None:
    layout = layout_for()
    rows = [{"question": "a"}, {"question": "a much longer question than the others"}, {"question": "b?"}]
    index, tokens = layout.longest(rows, "Answer.")
    assert index == 1
    assert tokens == len(layout.prompt("Answer.", rows[1]).token_ids)
    with pytest.raises(LayoutError, match=r"no inputs to measure.*at least one row"):
        layout.longest([], "Answer.")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_proposal_context_puts_the_input_first_and_stays_open(template: str) -> None:
    layout = layout_for("merging", template)
    text = layout.tokenizer.decode(list(layout.proposal_prefix(ROW)), clean_up_tokenization_spaces=False)
    assert text.endswith("2 + 2\n\n")
    assert "Answer the question" not in text
    assert "assistant" not in text


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_renderings_equal_the_golden_ones(template: str, adapter: str) -> None:
    layout = layout_for("merging", template, adapter)
    supervised = layout.supervised("Think first.\nThen answer.", ROW, {"reasoning": "2 and 2"}, "answer", "four")
    ids, parts = supervised.token_ids, []
    for name, span in (("p", supervised.instruction), ("r", supervised.reasoning), ("y", supervised.answer)):
        start = parts[-1][1].stop if parts else 0
        parts.append(("", Span(start, span.start)))
        parts.append((name, span))
    shown = "".join(
        f"⟦{name}:{decoded(layout, ids, span)}⟧" if name else decoded(layout, ids, span) for name, span in parts
    )
    path = GOLDEN / f"{template}_{adapter}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(shown + "\n", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == shown + "\n"


def test_a_template_that_drops_the_instruction_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"drops what a user's message says.*keeps the system message"):
        Layout(family_tokenizer(template=DROPS_INSTRUCTION), dspy.ChatAdapter(), SIGNATURE)
    shortens = DROPS_INSTRUCTION.replace("'\n'", "message['content'][:20]")
    with pytest.raises(LayoutError, match=r"occurs 0 times.*keeps the system message"):
        Layout(family_tokenizer(template=shortens), dspy.ChatAdapter(), SIGNATURE)


def test_a_template_that_repeats_the_instruction_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"occurs 2 times in the prompt that ChatAdapter"):
        Layout(family_tokenizer(template=REPEATS_SYSTEM), dspy.ChatAdapter(), SIGNATURE)


@pytest.mark.parametrize("instruction", ["", "  ", "\n\n"])
def test_an_empty_instruction_is_refused(instruction: str) -> None:
    with pytest.raises(LayoutError, match="The instruction is empty"):
        layout_for().prompt(instruction, ROW)


def test_a_tokenizer_without_offsets_or_template_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(LayoutError, match=r"Slow cannot report which characters.*use_fast=True"):
        Layout(Slow(), dspy.ChatAdapter(), SIGNATURE)
    tokenizer = family_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(LayoutError, match="has no chat template"):
        Layout(tokenizer, dspy.ChatAdapter(), SIGNATURE)


def test_text_that_no_token_covers_is_refused() -> None:
    assert covering([(0, 2), (2, 5), (5, 6)], 3, 6) == Span(1, 3)
    with pytest.raises(LayoutError, match="No token covers the instruction"):
        covering([(0, 2)], 4, 5)


# --- special tokens in the data ---


@pytest.mark.parametrize("kind", ["byte-level", "merging"])
def test_special_tokens_in_the_data_are_plain_text(kind: str) -> None:
    layout = Layout(family_tokenizer(kind), dspy.ChatAdapter(), SIGNATURE)
    end = layout.tokenizer.convert_tokens_to_ids("<|eot|>")
    row = {"question": "What does <|eot|> mean, and <|turn|>user?"}
    with pytest.warns(UserWarning, match=r"contains the special tokens <\|eot\|>, <\|turn\|>"):
        prompt = layout.prompt("Answer.", row)
    harmless = layout.prompt("Answer.", {"question": "What?"})
    assert prompt.token_ids.count(end) == harmless.token_ids.count(end)
    text = layout.tokenizer.decode(list(prompt.token_ids), clean_up_tokenization_spaces=False)
    messages = ADAPTERS["chat"].format(SIGNATURE.with_instructions("Answer."), [], row)
    assert text == render_chat(layout.tokenizer, messages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout.prompt("Answer again.", {"question": "And <|end|>?"})


def test_the_sender_of_a_prompt_and_its_scorer_agree_on_special_tokens() -> None:
    layout = Layout(family_tokenizer(), dspy.ChatAdapter(), SIGNATURE)
    row = {"question": "<|begin|> é <|eot|>"}
    messages = ADAPTERS["chat"].format(SIGNATURE.with_instructions("Answer."), [], row)
    with pytest.warns(UserWarning, match="special tokens"):
        assert layout.encoder.chat_ids(messages) == layout.prompt("Answer.", row).token_ids
    supervised = layout.supervised("Answer.", row, {"reasoning": "a <|end|> b"}, "answer", "<|eot|>")
    begin, end = (layout.tokenizer.convert_tokens_to_ids(text) for text in ("<|begin|>", "<|end|>"))
    assert supervised.token_ids.count(begin) == 1
    assert end not in supervised.token_ids
    assert decoded(layout, supervised.token_ids, supervised.answer).strip() == "<|eot|>"


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = family_tokenizer()
    before = tokenizer("a <|eot|> b", add_special_tokens=False)["input_ids"], tokenizer._tokenizer.to_str()
    layout = Layout(tokenizer, dspy.ChatAdapter(), SIGNATURE)
    with pytest.warns(UserWarning, match="special tokens"):
        layout.prompt("Answer.", {"question": "<|eot|>"})
    assert tokenizer._tokenizer.encode_special_tokens is False
    assert before == (
        tokenizer("a <|eot|> b", add_special_tokens=False)["input_ids"],
        tokenizer._tokenizer.to_str(),
    )


# --- supervised sequences ---


class Colour(enum.Enum):
    RED = "red"
    REDDISH = "reddish"


class Person(pydantic.BaseModel):
    name: str
    age: int


TYPED = [
    (str, "four", {"chat": "four", "json": "four", "xml": "four"}),
    (str, 'a < b & "c"', {"chat": 'a < b & "c"', "json": 'a < b & \\"c\\"', "xml": 'a &lt; b &amp; "c"'}),
    (int, 12, {"chat": "12", "json": "12", "xml": "12"}),
    (int, "12", {"chat": "12", "json": "12", "xml": "12"}),
    (float, 0.5, {"chat": "0.5", "json": "0.5", "xml": "0.5"}),
    (bool, True, {"chat": "True", "json": "true", "xml": "True"}),
    (Literal["yes, sir", "yes, madam"], "yes, sir", dict.fromkeys(ADAPTERS, "yes, sir")),
    (Colour, Colour.REDDISH, dict.fromkeys(ADAPTERS, "reddish")),
    (list[str], ["a", "b"], {"chat": '["a", "b"]', "xml": "<item>a</item><item>b</item>"}),
    (Person, Person(name="Ada", age=3), {"chat": '{"name": "Ada", "age": 3}'}),
]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind,gold,expected", TYPED)
def test_the_answer_span_is_the_gold_value(kind: Any, gold: Any, expected: dict[str, str], adapter: str) -> None:
    signature = SIGNATURE.with_updated_fields("answer", type_=kind)
    layout = Layout(family_tokenizer("byte-level"), ADAPTERS[adapter], signature)
    supervised = layout.supervised("Answer.", ROW, {"reasoning": "so"}, "answer", gold)
    assert supervised.answer.stop == len(supervised.token_ids)
    text = decoded(layout, supervised.token_ids, supervised.answer)
    if adapter in expected:
        assert text.lstrip('\n "') == expected[adapter]
    else:
        assert text.lstrip()[0] in "[{<"
        assert text[-1] in "]}>"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("fields", ["question -> reasoning, answer", "question -> answer"])
def test_with_its_header_the_answer_begins_where_the_reasoning_ends(fields: str, adapter: str) -> None:
    layout = Layout(family_tokenizer("byte-level"), ADAPTERS[adapter], dspy.Signature(fields, "Answer."))
    written = {"reasoning": "so"} if "reasoning" in fields else {}
    value, whole = (
        layout.supervised("Answer.", ROW, written, "answer", "four", from_header=from_header)
        for from_header in (False, True)
    )
    assert dataclasses.replace(whole, answer=value.answer) == value
    assert whole.answer == Span(value.reasoning.stop, value.answer.stop)
    assert decoded(layout, whole.token_ids, whole.answer).endswith(decoded(layout, value.token_ids, value.answer))
    assert "answer" in decoded(layout, whole.token_ids, whole.answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_supervised_sequence_is_the_joint_tokenisation(adapter: str, kind: str) -> None:
    layout = layout_for(kind, "chatml", adapter)
    written = {"reasoning": "2 and 2 make four.", "answer": "four"}
    supervised = layout.supervised(SEEDS[0], ROW, {"reasoning": written["reasoning"]}, "answer", "four")
    messages = ADAPTERS[adapter].format(SIGNATURE.with_instructions(SEEDS[0]), [], ROW)
    content = ADAPTERS[adapter].format_assistant_message_content(SIGNATURE, written)
    content = content[: content.rindex("four") + 4]
    whole = layout.tokenizer(render_chat(layout.tokenizer, messages) + content, add_special_tokens=False)
    assert supervised.token_ids == tuple(whole["input_ids"])
    reasoning = decoded(layout, supervised.token_ids, supervised.reasoning)
    assert written["reasoning"].rstrip(".") in reasoning
    assert "four" in decoded(layout, supervised.token_ids, supervised.answer)
    assert supervised.reasoning.stop <= supervised.answer.start


def test_the_assistants_text_of_a_row_is_rendered_once_for_all_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(family_tokenizer("byte-level"), dspy.ChatAdapter(), SIGNATURE)
    rendered: list[str] = []
    original = dspy.ChatAdapter.format_assistant_message_content

    def counted(self: Any, *args: Any, **kwargs: Any) -> str:
        rendered.append(original(self, *args, **kwargs))
        return rendered[-1]

    monkeypatch.setattr(dspy.ChatAdapter, "format_assistant_message_content", counted)
    first = layout.supervised("Answer.", ROW, {"reasoning": "so"}, "answer", "four")
    once = len(rendered)
    again = layout.supervised("Think.", ROW, {"reasoning": "so"}, "answer", "four")
    assert len(rendered) == once > 1
    assert decoded(layout, again.token_ids, again.answer) == decoded(layout, first.token_ids, first.answer) == "four"
    others = [("four!", "four"), ("so", "five"), ("so", 4), ("so", 4.0)]
    for reasoning, gold in others:
        found = layout.supervised("Answer.", ROW, {"reasoning": reasoning}, "answer", gold)
        assert str(gold) in decoded(layout, found.token_ids, found.answer)
    assert len(rendered) == (1 + len(others)) * once


def test_without_earlier_fields_the_reasoning_is_empty() -> None:
    layout = Layout(family_tokenizer(), dspy.ChatAdapter(), dspy.Signature("question -> answer, note"))
    supervised = layout.supervised("Answer.", ROW, {}, "answer", "four")
    assert len(supervised.reasoning) == 0
    assert "note ## ]]" not in decoded(layout, supervised.token_ids, Span(supervised.reasoning.start, 10**6))


def test_text_before_the_first_field_counts_as_reasoning() -> None:
    layout = Layout(family_tokenizer("byte-level"), dspy.ChatAdapter(), dspy.Signature("question -> answer"))
    thought = "<think>\n2 and 2\n</think>\n\n"
    supervised = layout.supervised("Answer.", ROW, {}, "answer", "four", preamble=thought)
    assert decoded(layout, supervised.token_ids, supervised.reasoning) == thought


def test_an_extractor_replaces_the_header() -> None:
    layout = Layout(family_tokenizer("byte-level"), dspy.ChatAdapter(), SIGNATURE, extractor=" So: ")
    supervised = layout.supervised("Answer.", ROW, {"reasoning": "two twos."}, "answer", "four")
    tail = decoded(layout, supervised.token_ids, Span(supervised.reasoning.start, len(supervised.token_ids)))
    assert tail == "[[ ## reasoning ## ]]\ntwo twos. So: four"


def test_a_missing_empty_or_unfitting_gold_value_is_refused() -> None:
    layout = layout_for()
    for missing in ("", " ", None, float("nan"), []):
        with pytest.raises(DataError, match="gold value of `answer` is missing"):
            layout.supervised("Answer.", ROW, {"reasoning": "so"}, "answer", missing)
    with pytest.raises(DataError, match="`answer` has 2 acceptable answers. Lay out each of them by itself."):
        layout.supervised("Answer.", ROW, {"reasoning": "so"}, "answer", ["four", "4"])
    with pytest.raises(LayoutError, match="`reasoning` comes before `answer` and has no value"):
        layout.supervised("Answer.", ROW, {}, "answer", "four")
    with pytest.raises(LayoutError, match="`verdict` is not an output field"):
        layout.supervised("Answer.", ROW, {}, "verdict", "four")
    typed = Layout(family_tokenizer(), dspy.ChatAdapter(), SIGNATURE.with_updated_fields("answer", type_=int))
    with pytest.raises(DataError, match="'four' of `answer` does not fit its type"):
        typed.supervised("Answer.", ROW, {"reasoning": "so"}, "answer", "four")


def test_messages_in_several_parts_are_read_as_one_text() -> None:
    encoder = Layout(family_tokenizer(), dspy.ChatAdapter(), SIGNATURE).encoder
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "<|eot|>?"}]
    with pytest.warns(UserWarning, match="special tokens"):
        ids = encoder.chat_ids([{"role": "user", "content": parts}])
    assert ids == encoder.chat_ids([{"role": "user", "content": "What is\n<|eot|>?"}])
    assert ids.count(encoder.tokenizer.convert_tokens_to_ids("<|eot|>")) == 1
