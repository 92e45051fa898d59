"""Instructions that must stay: the tool list survives to the byte, and only what is appended to it changes."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import dspy
import pytest
from chat_families import KINDS, TEMPLATES, family_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_layout import ADAPTERS, ROW_MERGES, slow_ids

from dspy_greater.errors import LayoutError
from dspy_greater.model.engine import Engine
from dspy_greater.program.predictors import predictors_of
from dspy_greater.program.roundtrip import round_trip, write_back
from dspy_greater.prompt.layout import Layout

ROW = {"question": "How warm is it?\nIn Paris.", "trajectory": "[[ ## thought_0 ## ]]\nI look it up."}
FAMILIES = sorted(set(itertools.product(KINDS, TEMPLATES)) - ROW_MERGES)
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=tuple(HealthCheck))


def weather(city: str, options: dict[str, list[int]]) -> str:
    """Tells the weather of a city.

    Use it as {"city": "Paris"}, or as `weather('x')`; {{ braces }} and <b>tags</b> stay.
      - indented "line" <|eot|>
    """
    return city


def add(a: int, b: int) -> int:
    """Adds {two} numbers: é – 漢."""
    return a + b


def agent() -> Any:
    return dspy.ReAct(dspy.Signature("question -> answer", "Answer the question."), tools=[weather, add])


@functools.cache
def pocket_tokenizer() -> Any:
    return Engine.from_pretrained("pocket").tokenizer


def tokenizer_of(kind: str, template: str) -> Any:
    return pocket_tokenizer() if kind == "pocket" else family_tokenizer(kind, template)


@functools.cache
def react_layout(kind: str = "byte-level", template: str = "llama3", adapter: str = "chat") -> Layout:
    predictor = predictors_of(agent())[0]
    return Layout(tokenizer_of(kind, template), ADAPTERS[adapter], predictor.signature, fixed=predictor.instruction)


def appended_word_by_word(layout: Layout, text: str) -> tuple[tuple[int, ...], str]:
    """The instruction with `text` after its fixed part, built with `append` alone."""
    ids, instruction = layout.edits.instruction_ids(layout.edits.fixed), layout.edits.fixed
    for token in layout.edits.instruction_ids(layout.edits.fixed + text)[len(ids) :]:
        edit = layout.edits.append(ids, token)
        assert edit is not None
        ids, instruction = edit
    return ids, instruction


def pieces(layout: Layout, ids: tuple[int, ...]) -> str:
    return layout.tokenizer.decode([ids[i] for i in layout.edits.positions(ids)], clean_up_tokenization_spaces=False)


pytestmark = pytest.mark.filterwarnings("ignore:The data contains the special tokens")


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["pocket", "byte-level", "merging"])
def test_the_tool_list_survives_to_the_byte_from_the_first_edit_to_the_deployed_prompt(kind: str, adapter: str) -> None:
    layout, program = react_layout(kind, "llama3", adapter), agent()
    ids, text = appended_word_by_word(layout, " Think first. Then act.")
    assert text == f"{layout.edits.fixed} Think first. Then act."
    position = layout.edits.positions(ids)[0]
    word = layout.edits.instruction_ids(f"{layout.edits.fixed} a")[-1]
    edit = layout.edits.replace(ids, position, word)
    assert edit is not None and edit[1].startswith(f"{layout.edits.fixed} a")
    round_trip(layout, *reversed(edit), inputs=ROW)

    better = write_back(program, {"react": edit[1]})
    (react, _), (before, _) = predictors_of(better), predictors_of(program)
    system, old = (
        ADAPTERS[adapter].format(predictor.signature, [], ROW)[0]["content"] for predictor in (react, before)
    )
    (objective,) = (line.rstrip("\n") for line in [old[old.index("your objective is") :]])
    assert system.startswith(old[: old.index(objective)] + objective)
    for tool in program.tools.values():
        assert str(tool) in system
    assert before.instruction == layout.edits.fixed


@pytest.mark.parametrize("kind,template", [*FAMILIES, ("pocket", "")])
def test_nothing_that_overlaps_the_fixed_text_can_be_edited(kind: str, template: str) -> None:
    layout = react_layout(kind, template)
    ids = layout.edits.instruction_ids(layout.edits.fixed)
    assert layout.edits.positions(ids) == ()
    # One token in this vocabulary, and more text of its own in others.
    word = next(
        new[-1]
        for text in (" a", ".")
        if len(new := layout.edits.instruction_ids(layout.edits.fixed + text)) == len(ids) + 1
    )
    for position in random.Random(0).sample(range(len(ids)), 20):
        assert layout.edits.replace(ids, position, word) is None
        assert layout.edits.insert(ids, position, word) is None
        assert layout.edits.delete(ids, position) is None
    longer = layout.edits.append(ids, word)
    assert longer is not None
    assert layout.edits.positions(longer[0]) == (len(ids),)
    # Taking the last one away leads back to where it began.
    assert layout.edits.delete(longer[0], len(ids)) == (ids, layout.edits.fixed)


@pytest.mark.slow
@quick
@given(
    family=st.sampled_from([*FAMILIES, ("pocket", "")]),
    adapter=st.sampled_from(list(ADAPTERS)),
    added=st.sampled_from(["", " Think", ". Think first", " Use the tools.", "!"]),
    where=st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
def test_every_legal_edit_keeps_the_fixed_text_and_is_deployed_as_it_was_scored(
    family: tuple[str, str], adapter: str, added: str, where: float, data: st.DataObject
) -> None:
    layout = react_layout(*family, adapter)
    ids = layout.edits.instruction_ids(layout.edits.fixed + added)
    positions = layout.edits.positions(ids)
    assert pieces(layout, ids).strip() in added
    place = positions[int(where * len(positions))] if positions else len(ids)
    for token in data.draw(st.lists(st.integers(0, len(layout.tokenizer) - 1), min_size=4, max_size=4)):
        for edit in (
            layout.edits.append(ids, token),
            layout.edits.replace(ids, place, token),
            layout.edits.insert(ids, place, token),
            layout.edits.delete(ids, place),
        ):
            if edit is None:
                continue
            canonical, text = edit
            assert text.startswith(layout.edits.fixed)
            assert "\n" not in text[len(layout.edits.fixed) :]
            assert layout.signature.with_instructions(text).instructions == text
            prompt = layout.prompt(text, ROW)
            if "<|eot|>" not in layout.encoder.special_texts:  # else the twin would read the tools' text as markup
                assert prompt.token_ids == slow_ids(layout.tokenizer, ADAPTERS[adapter], layout.signature, text, ROW)
            assert prompt.token_ids[prompt.instruction.start : prompt.instruction.stop] == canonical


def test_the_last_fixed_word_does_not_grow() -> None:
    layout = react_layout("byte-level")
    assert layout.edits.fixed.endswith("JSON format")
    ids = layout.edits.instruction_ids(layout.edits.fixed)
    bare, blank = (layout.tokenizer.convert_tokens_to_ids(piece) for piece in ("s", "Ġthe"))
    assert layout.edits.append(ids, bare) is None
    assert (layout.edits.append(ids, blank) or ((), ""))[1] == f"{layout.edits.fixed} the"
    stop = layout.edits.append(ids, layout.tokenizer.convert_tokens_to_ids("."))
    assert stop is not None and stop[1] == f"{layout.edits.fixed}."
    # Nor later, when what stands between is replaced or deleted.
    ids, _ = appended_word_by_word(layout, " as")
    assert [layout.tokenizer.decode([token]) for token in ids[-2:]] == [" a", "s"]
    assert layout.edits.delete(ids, len(ids) - 2) is None


@pytest.mark.parametrize("kind", ["unigram", "unigram with a first blank"])
def test_letters_that_the_tokenizer_does_not_have_stay_in_the_fixed_text(kind: str) -> None:
    fixed = "Sei gegr\u00fc\u00dft:\n\n(1) na\u00efve {x}"
    layout = Layout(family_tokenizer(kind), dspy.ChatAdapter(), dspy.Signature("question -> answer"), fixed=fixed)
    ids = layout.edits.instruction_ids(fixed)
    assert layout.tokenizer.unk_token_id in ids
    assert layout.edits.positions(ids) == ()
    edit = layout.edits.append(ids, layout.tokenizer.convert_tokens_to_ids("."))
    assert edit is not None and edit[1] == f"{fixed}."
    round_trip(layout, edit[1], edit[0])


def test_a_fixed_text_of_one_line_works_alike() -> None:
    signature = dspy.Signature("question -> answer")
    layout = Layout(family_tokenizer("byte-level"), dspy.ChatAdapter(), signature, fixed="Be kind.")
    ids = layout.edits.instruction_ids("Be kind.")
    assert layout.edits.positions(ids) == ()
    edit = layout.edits.append(ids, layout.tokenizer.convert_tokens_to_ids("Ġthe"))
    assert edit is not None and edit[1] == "Be kind. the"


def test_without_a_fixed_text_everything_is_as_before() -> None:
    predictor = predictors_of(agent())[0]
    free = Layout(family_tokenizer("byte-level"), ADAPTERS["chat"], predictor.signature)
    ids = free.edits.instruction_ids(predictor.instruction)
    assert free.edits.fixed == "" and free.edits.positions(ids)[:2] == (0, 1)
    assert set(free.edits.positions(ids)) < set(range(len(ids)))


def test_ids_of_an_instruction_without_the_fixed_text_are_refused() -> None:
    layout = react_layout()
    with pytest.raises(LayoutError, match=r"'Answer.' does not begin with the fixed text 'Answer the .*, which has to"):
        layout.edits.positions(layout.edits.instruction_ids("Answer."))


@pytest.mark.parametrize("fixed", [" Answer.", "\nAnswer.", "Answer.\n", "Answer:\n  - a\n  - b\n"])
def test_a_fixed_text_that_dspy_would_change_is_refused(fixed: str) -> None:
    with pytest.raises(LayoutError, match=r"is not as DSPy keeps an instruction.*Pass `signature.instructions`"):
        Layout(family_tokenizer(), dspy.ChatAdapter(), dspy.Signature("question -> answer"), fixed=fixed)
