"""Texts tokenised piece by piece are tokenised as they are in one go."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from chat_families import KINDS, SPECIAL, TEMPLATES, family_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from dspy_greater.prompt import piecewise
from dspy_greater.prompt.chat_template import render_chat
from dspy_greater.prompt.piecewise import EncodedText, PiecewiseTokenizer, cuts

thorough = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=tuple(HealthCheck))
WORDS = st.sampled_from(
    [" ", "\n", "\n\n", "  ", "Answer", " the", " question", ".", "four", "<|", "|>", "turn", "\u00e9"]
)
texts = st.lists(st.one_of(WORDS, st.sampled_from(SPECIAL), st.text(max_size=5)), max_size=25).map("".join)


def jointly(tokenizer: Any, text: str) -> EncodedText:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return EncodedText(tuple(found["input_ids"]), tuple(found["offset_mapping"]))


def special_of(tokenizer: Any) -> dict[str, int]:
    return {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def pieces_of(tokenizer: Any) -> PiecewiseTokenizer:
    return PiecewiseTokenizer(functools.partial(jointly, tokenizer), cuts(tokenizer))


@functools.cache
def shared_pieces(kind: str) -> PiecewiseTokenizer:
    """One for all texts of a kind, so that pieces meet again."""
    return pieces_of(family_tokenizer(kind))


@functools.cache
def difficult_tokenizer(normalizer: str) -> Any:
    """With a normalizer, and added tokens that are looked for in the normalised text, as words, or over others."""
    tokenizer: Any = family_tokenizer("unigram")
    core = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    core.normalizer = {
        "prepend": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        "lowercase": normalizers.Lowercase(),
        "nfkc": normalizers.NFKC(),
    }[normalizer]
    found = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>")
    special = [AddedToken("<N>", special=True, normalized=True), AddedToken("<W>", special=True, single_word=True)]
    found.add_special_tokens({"additional_special_tokens": special})
    found.add_tokens([AddedToken(">\n<|eot|>\n", normalized=False), AddedToken("question<", normalized=False)])
    return found


@functools.cache
def blank_eating_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens that take in the blanks before or after them, as those of some families do."""
    tokenizer: Any = family_tokenizer("merging")
    core = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    wide = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>")
    left = [AddedToken("<|l|>", lstrip=True, special=True, normalized=False)]
    right = [AddedToken("<|r|>", rstrip=True, special=True, normalized=False)]
    both = [AddedToken("<|b|>", lstrip=True, rstrip=True, special=True, normalized=False)]
    wide.add_special_tokens({"additional_special_tokens": [*left, *right, *both]})
    return wide


@pytest.mark.parametrize("kind", KINDS)
@thorough
@given(data=st.data())
def test_any_text_is_tokenised_as_in_one_go(kind: str, data: st.DataObject) -> None:
    tokenizer = family_tokenizer(kind)
    pieces, text = shared_pieces(kind), data.draw(texts)
    assert pieces.encode(text) == jointly(tokenizer, text) == pieces.encode(text)


@pytest.mark.parametrize("normalizer", ["prepend", "lowercase", "nfkc"])
@thorough
@given(parts=st.lists(st.one_of(WORDS, st.sampled_from(["<N>", "<W>", "<|eot|>", "<|turn|>", "<", ">"])), max_size=20))
def test_normalizers_and_added_tokens_that_overlap_change_nothing(normalizer: str, parts: list[str]) -> None:
    tokenizer, text = difficult_tokenizer(normalizer), "".join(parts)
    assert pieces_of(tokenizer).encode(text) == jointly(tokenizer, text)


def test_texts_are_cut_only_where_what_is_around_does_not_matter() -> None:
    found = cuts(difficult_tokenizer("prepend"))
    assert "<|turn|>" in found and not {"<N>", "<W>", "<|eot|>"} & set(found)


@thorough
@given(parts=st.lists(st.one_of(WORDS, st.sampled_from(["<|l|>", "<|r|>", "<|b|>", "<|eot|>"])), max_size=20))
def test_special_tokens_that_take_in_blanks_keep_their_offsets(parts: list[str]) -> None:
    tokenizer, text = blank_eating_tokenizer(), "".join(parts)
    assert pieces_of(tokenizer).encode(text) == jointly(tokenizer, text)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_chats_of_every_family_are_tokenised_as_in_one_go(kind: str, template: str) -> None:
    tokenizer = family_tokenizer(kind, template)
    pieces = pieces_of(tokenizer)
    for system in ("Answer.", "Think step by step, then answer.\n"):
        for user in ("How many?", " 2 + 2\n\n", "<|eot|>"):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            text = render_chat(tokenizer, messages)
            assert pieces.encode(text) == jointly(tokenizer, text)


def test_a_piece_that_returns_is_not_tokenised_again() -> None:
    tokenizer, read = family_tokenizer("merging"), []

    def counted(text: str) -> EncodedText:
        read.append(text)
        return jointly(tokenizer, text)

    pieces = PiecewiseTokenizer(counted, special_of(tokenizer))
    for system in ("one", "two"):
        for user in ("a", "b", "c"):
            pieces.encode(f"<|turn|>{system}<|eot|>{user}<|end|>")
    assert len(read) == 7  # what stands before the first special token and after the last, the systems, the users


def test_where_a_special_text_is_no_token_the_whole_text_is_tokenised() -> None:
    tokenizer = family_tokenizer("merging")
    pieces = PiecewiseTokenizer(functools.partial(jointly, tokenizer), {"the": 1, "<|eot|>": 10**6})
    for text in ("Answer the question.", "a<|eot|>b", "the", ""):
        assert pieces.encode(text) == jointly(tokenizer, text)


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "MOST_TOKENS", 200)
    tokenizer = family_tokenizer("merging")
    pieces = pieces_of(tokenizer)
    for number in range(50):
        text = f"<|turn|>row number {number}<|eot|>"
        assert pieces.encode(text) == jointly(tokenizer, text)
        assert sum(len(found.token_ids) for found in pieces._known.values() if found) <= 200
        assert len(pieces._known) <= 200 / piecewise._OF_A_PIECE
