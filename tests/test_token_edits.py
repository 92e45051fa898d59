"""Edits of an instruction's tokens: legal, deployed as they were scored, one position or a phrase at a time."""

from __future__ import annotations

import pytest
from chat_families import KINDS, TEMPLATES
from hypothesis import assume, given
from hypothesis import strategies as st
from test_layout import ADAPTERS, ROW, ROW_MERGES, SEEDS, SIGNATURE, layout_for, quick, slow_ids

from dspy_greater.errors import LayoutError
from dspy_greater.prompt.layout import Layout


@pytest.mark.slow
@quick
@given(
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(list(TEMPLATES)),
    adapter=st.sampled_from(list(ADAPTERS)),
    seed=st.sampled_from(SEEDS),
    where=st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
def test_every_legal_edit_is_deployed_as_it_was_scored(
    kind: str, template: str, adapter: str, seed: str, where: float, data: st.DataObject
) -> None:
    assume((kind, template) not in ROW_MERGES)
    layout = layout_for(kind, template, adapter)
    ids = layout.edits.instruction_ids(seed)
    positions = layout.edits.positions(ids)
    position = positions[int(where * len(positions))]
    for token in data.draw(st.lists(st.integers(0, len(layout.tokenizer) - 1), min_size=8, max_size=8)):
        for edit, length in (
            (layout.edits.replace(ids, position, token), len(ids)),
            (layout.edits.insert(ids, position, token), len(ids) + 1),
            (layout.edits.append(ids, token), len(ids) + 1),
            (layout.edits.delete(ids, position), len(ids) - 1),
        ):
            if edit is None:
                continue
            canonical, text = edit
            assert len(canonical) == length
            assert layout.signature.with_instructions(text).instructions == text
            prompt = layout.prompt(text, ROW)
            assert prompt.token_ids == slow_ids(layout.tokenizer, ADAPTERS[adapter], SIGNATURE, text, ROW)
            assert prompt.token_ids[prompt.instruction.start : prompt.instruction.stop] == canonical
            assert layout.edits.text_of(canonical) == text


@quick
@given(kind=st.sampled_from(KINDS), seed=st.sampled_from(SEEDS), data=st.data())
def test_a_replacement_changes_one_position_only(kind: str, seed: str, data: st.DataObject) -> None:
    layout = layout_for(kind)
    ids = layout.edits.instruction_ids(seed)
    position = data.draw(st.sampled_from(layout.edits.positions(ids)))
    for token in data.draw(st.lists(st.integers(0, len(layout.tokenizer) - 1), min_size=10, max_size=10)):
        edit = layout.edits.replace(ids, position, token)
        if edit is None:
            continue
        assert [i for i, (a, b) in enumerate(zip(ids, edit[0], strict=True)) if a != b] in ([], [position])
        if position not in (0, len(ids) - 1):
            assert edit[0][position] == token


@pytest.mark.parametrize("kind", ["byte-level", "merging"])
def test_words_replace_words(kind: str) -> None:
    layout = layout_for(kind)
    ids = layout.edits.instruction_ids("Answer the question.")
    position = next(i for i, token in enumerate(ids) if layout.tokenizer.decode([token]) == " the")
    word = next(t for t in layout.edits.instruction_ids("Say a word") if layout.tokenizer.decode([t]) == " a")
    assert layout.edits.replace(ids, position, word) == (
        layout.edits.instruction_ids("Answer a question."),
        "Answer a question.",
    )


def test_a_first_token_without_its_blank_becomes_the_one_with_it() -> None:
    layout = layout_for("merging")
    ids = layout.edits.instruction_ids("A question.")
    bare, with_blank = (layout.tokenizer.convert_tokens_to_ids(piece) for piece in ("I", "ĠI"))
    if with_blank is None:
        with_blank = layout.edits.instruction_ids("I am")[0]
    edit = layout.edits.replace(ids, 0, bare)
    assert edit is not None
    assert edit[1] == "I question."
    assert edit[0] == layout.edits.instruction_ids("I question.")


@pytest.mark.parametrize("template", ["gemma", "mistral", "chatml"])
def test_a_last_token_that_takes_in_what_follows_is_still_editable(template: str) -> None:
    layout = layout_for("merging", template)
    ids = layout.edits.instruction_ids("Think first")
    longer = layout.edits.append(ids, layout.tokenizer.convert_tokens_to_ids("."))
    assert longer is not None
    assert longer[1] == "Think first."
    changed = layout.edits.replace(longer[0], len(longer[0]) - 1, layout.tokenizer.convert_tokens_to_ids("?"))
    assert changed is not None
    assert changed[1] == "Think first?"


def test_a_token_that_does_not_survive_retokenising_is_rejected() -> None:
    layout = layout_for("merging")
    ids = layout.edits.instruction_ids("Say th question")
    assert layout.tokenizer.decode([ids[1]]) != " the"
    position = next(i for i, token in enumerate(ids) if layout.tokenizer.decode([token]).endswith("h"))
    # "th" and "e" would be tokenised as one token, "the".
    assert layout.edits.insert(ids, position + 1, layout.tokenizer.convert_tokens_to_ids("e")) is None


def test_illegal_tokens_and_positions_are_rejected() -> None:
    layout = layout_for("byte-level")
    tokenizer = layout.tokenizer
    ids = layout.edits.instruction_ids("Answer the question.")
    newline, tab, half = (tokenizer.convert_tokens_to_ids(piece) for piece in ("Ċ", "ĉ", "Ã"))
    tokenizer_size = len(tokenizer)
    for token in (newline, tab, half, *layout.encoder.special_ids, tokenizer_size, -1):
        assert layout.edits.replace(ids, 1, token) is None
        assert layout.edits.append(ids, token) is None
    word = layout.edits.instruction_ids("a b")[1]
    assert layout.edits.replace(ids, len(ids), word) is None
    assert layout.edits.delete(ids, len(ids)) is None
    assert layout.edits.replace(ids, -1, word) is None


def test_an_edit_cannot_empty_the_instruction() -> None:
    layout = layout_for("byte-level")
    ids = layout.edits.instruction_ids("a")
    blank = layout.tokenizer.convert_tokens_to_ids("Ġ")
    assert layout.edits.replace(ids, 0, blank) is None
    assert layout.edits.delete(ids, 0) is None
    assert layout.edits.replace(ids, 0, layout.tokenizer.convert_tokens_to_ids(".")) is None


def test_field_markers_and_invisible_characters_cannot_be_written() -> None:
    layout = layout_for("byte-level")
    legal = layout.edits.token_filter
    for text in ("use [[ ## it", "say <answer> now", "a\u200bb", "a\u2028b", "a\x07b", "a\u00a0b", "<|eot|>"):
        assert not legal.no_worse(text, "plain")
        assert legal.no_worse(text, text)
    assert legal.no_worse("é – 漢 <b> {x}", "plain")


def test_line_breaks_of_the_seed_stay_and_cannot_be_edited() -> None:
    layout = layout_for("merging")
    ids = layout.edits.instruction_ids("First line.\n\nSecond line.")
    pieces = [layout.tokenizer.decode([token]) for token in ids]
    positions = layout.edits.positions(ids)
    assert all("\n" not in pieces[i] for i in positions)
    assert layout.edits.text_of(ids) == "First line.\n\nSecond line."
    breaks = [i for i, piece in enumerate(pieces) if "\n" in piece]
    assert breaks
    assert all(layout.edits.replace(ids, i, ids[0]) is None and layout.edits.delete(ids, i) is None for i in breaks)


def test_ids_that_no_instruction_gives_have_no_text() -> None:
    layout = layout_for("merging")
    with pytest.raises(LayoutError, match="do not survive decoding, rendering and tokenising"):
        layout.edits.text_of([layout.tokenizer.convert_tokens_to_ids("Ã")])


def test_tokens_that_end_in_a_blank_keep_it_when_decoded() -> None:
    layout = layout_for("unigram with a first blank")
    for instruction in ("the total is four", "the - sign", "a – b"):
        assert layout.edits.text_of(layout.edits.instruction_ids(instruction)) == instruction
    assert layout.encoder.decode(layout.edits.instruction_ids("the total")).strip() == "the total"


def test_an_edit_in_the_middle_never_changes_the_ends() -> None:
    layout = layout_for("merging across blanks", "chatml")
    ids = layout.edits.instruction_ids("List each item and add")
    for position in layout.edits.positions(ids)[1:-1]:
        for token in range(0, len(layout.tokenizer), 3):
            edit = layout.edits.replace(ids, position, token)
            if edit is not None:
                assert (edit[0][0], edit[0][-1], edit[0][position]) == (ids[0], ids[-1], token)


# --- phrases ---


@quick
@given(
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(list(TEMPLATES)),
    adapter=st.sampled_from(list(ADAPTERS)),
    seed=st.sampled_from(SEEDS),
    phrase=st.sampled_from(["list each item", "a, b", "Step 3:", "carefully", "the question."]),
    data=st.data(),
)
def test_a_phrase_is_deployed_as_it_was_scored_and_leaves_the_other_tokens(
    kind: str, template: str, adapter: str, seed: str, phrase: str, data: st.DataObject
) -> None:
    assume((kind, template) not in ROW_MERGES)
    layout = layout_for(kind, template, adapter)
    ids, tokens = (layout.edits.instruction_ids(each) for each in (seed, phrase))
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, min(start + 3, len(ids))))
    edit = layout.edits.splice(ids, start, stop, tokens)
    if edit is None:
        return
    canonical, text = edit
    assert len(canonical) == start + len(tokens) + len(ids) - stop
    assert layout.signature.with_instructions(text).instructions == text
    prompt = layout.prompt(text, ROW)
    assert prompt.token_ids == slow_ids(layout.tokenizer, ADAPTERS[adapter], SIGNATURE, text, ROW)
    assert prompt.token_ids[prompt.instruction.start : prompt.instruction.stop] == canonical
    meant = (*ids[:start], *tokens, *ids[stop:])
    changed = {i for i, (a, b) in enumerate(zip(canonical, meant, strict=True)) if a != b}
    assert changed <= {0, len(canonical) - 1, start - 1 if start == len(ids) else 0}


@pytest.mark.parametrize("kind", ["byte-level", "merging"])
def test_a_phrase_takes_the_place_of_another_is_put_in_or_goes(kind: str) -> None:
    edits = layout_for(kind).edits
    ids = edits.instruction_ids("Answer the question.")
    longer = edits.instruction_ids("Answer each hard question.")
    old = edits.instruction_ids("Answer the")
    new = edits.instruction_ids("Answer each hard")
    shared = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    assert longer[: len(new)] == new and len(new) - shared > 1
    there = edits.splice(ids, shared, len(old), new[shared:])
    assert there == (longer, "Answer each hard question.")
    assert edits.splice(longer, shared, len(new), old[shared:]) == (ids, "Answer the question.")
    inserted = edits.splice(ids, len(old), len(old), new[shared:])
    assert inserted is not None and inserted[1] == "Answer the each hard question."
    assert edits.splice(inserted[0], len(old), len(old) + len(new) - shared, ()) == (ids, "Answer the question.")
    appended = edits.splice(ids, len(ids), len(ids), new[shared:])
    assert appended is not None and appended[1] == "Answer the question. each hard"


def test_a_phrase_is_refused_where_one_of_its_tokens_or_positions_would_be() -> None:
    edits = layout_for("byte-level").edits
    ids = edits.instruction_ids("Answer the question.")
    word = edits.instruction_ids("a b")[1]
    newline = edits.encoder.tokenizer.convert_tokens_to_ids("Ċ")
    assert edits.splice(ids, 1, 2, (word, word)) is not None
    assert edits.splice(ids, 1, 2, (word, newline)) is None
    for start, stop in ((-1, 1), (2, 1), (1, len(ids) + 1), (len(ids), len(ids) + 1)):
        assert edits.splice(ids, start, stop, (word, word)) is None
    assert edits.splice(ids, 0, len(ids), ()) is None
    lines = edits.instruction_ids("First line.\n\nSecond line.")
    broken = next(i for i in range(len(lines)) if i not in edits.positions(lines))
    assert edits.splice(lines, broken - 1, broken + 1, (word, word)) is None


def test_a_phrase_leaves_the_fixed_text() -> None:
    kind = layout_for("byte-level")
    edits = Layout(kind.tokenizer, kind.adapter, kind.signature, fixed="Answer the").edits
    ids, bare = edits.instruction_ids("Answer the question."), edits.instruction_ids("Answer the")
    words = kind.edits.instruction_ids("a b c")[1:]
    assert edits.splice(ids, len(bare) - 1, len(bare) + 1, words) is None
    found = edits.splice(ids, len(bare), len(ids), words)
    assert found is not None and found[1] == "Answer the b c"
