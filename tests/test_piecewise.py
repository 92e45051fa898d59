"""Texts tokenised piece by piece are tokenised as they are in one go."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from chat_families import KINDS, SPECIAL, TEMPLATES, family_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dspy_greater import piecewise
from dspy_greater.chat import render_chat
from dspy_greater.piecewise import EncodedText, PiecewiseTokenizer

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
    return PiecewiseTokenizer(functools.partial(jointly, tokenizer), special_of(tokenizer))


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
    pieces, text = pieces_of(tokenizer), data.draw(texts)
    assert pieces.encode(text) == jointly(tokenizer, text) == pieces.encode(text)


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
    monkeypatch.setattr(piecewise, "MOST_CHARACTERS", 100)
    tokenizer = family_tokenizer("merging")
    pieces = pieces_of(tokenizer)
    for number in range(50):
        text = f"<|turn|>row number {number}<|eot|>"
        assert pieces.encode(text) == jointly(tokenizer, text)
        assert sum(len(key[1]) for key in pieces._known) <= 100
