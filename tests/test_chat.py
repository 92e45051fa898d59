"""Chat messages to text and tokens back to text."""

from __future__ import annotations

import pytest
from tiny_models import NO_SYSTEM_TEMPLATE, SILENT_DROP_TEMPLATE, tiny_model, tiny_tokenizer

from dspy_greater.errors import LayoutError, WeightsError
from dspy_greater.lm.local import local_lm
from dspy_greater.lm.streaming import TextWriter
from dspy_greater.prompt.chat_template import end_of_turn_ids, render_chat


@pytest.mark.parametrize("template", [NO_SYSTEM_TEMPLATE, SILENT_DROP_TEMPLATE])
def test_a_template_without_a_system_role_gets_the_text_in_the_first_user_turn(template: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert "<|turn|>user\nBe brief.\n\nHi<|eot|>" in render_chat(tiny_tokenizer(template), messages)
    assert messages[1]["content"] == "Hi"


def test_an_open_answer_continues_exactly_what_the_model_reads_before_it_writes() -> None:
    tokenizer = tiny_tokenizer(NO_SYSTEM_TEMPLATE)
    question = [{"role": "user", "content": "Hi"}]
    answer = [*question, {"role": "assistant", "content": " so \n"}]
    assert render_chat(tokenizer, answer, continue_final=True) == render_chat(tokenizer, question) + " so \n"
    with pytest.raises(LayoutError, match="needs an assistant message at the end"):
        render_chat(tokenizer, question, continue_final=True)


def test_there_is_one_begin_token_whoever_writes_it() -> None:
    doubled = tiny_tokenizer("{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}")
    assert render_chat(doubled, [{"role": "user", "content": "Hi"}]) == "<|begin|>Hi"
    assert end_of_turn_ids(tiny_tokenizer()) == (4,)


def test_a_tokenizer_without_a_template_and_a_refusing_template_are_named() -> None:
    with pytest.raises(LayoutError, match="no chat template"):
        render_chat(tiny_tokenizer(None), [{"role": "user", "content": "Hi"}])
    with pytest.raises(LayoutError, match=r"refused messages with the roles .*must alternate"):
        render_chat(tiny_tokenizer(NO_SYSTEM_TEMPLATE), [{"role": "user", "content": "Hi"}] * 2)
    with pytest.raises(LayoutError, match="'image_url'"):
        render_chat(tiny_tokenizer(), [{"role": "user", "content": [{"type": "image_url"}]}])
    with pytest.raises(WeightsError, match="no chat template"):
        local_lm((tiny_model(), tiny_tokenizer(None)))


def test_a_character_of_several_tokens_is_handed_out_whole() -> None:
    tokenizer = tiny_tokenizer()
    pieces: list[str] = []
    writer = TextWriter(tokenizer, on_text=pieces.append)
    for token in tokenizer("naïve 日本 🙂!", add_special_tokens=False)["input_ids"]:
        writer.accept(token)
    assert "".join([*pieces, writer.rest()]) == writer.finish() == "naïve 日本 🙂!"
    assert not any("\ufffd" in piece for piece in pieces)


def test_no_part_of_a_stop_string_is_handed_out() -> None:
    tokenizer = tiny_tokenizer()
    pieces: list[str] = []
    writer = TextWriter(tokenizer, stop=["END"], on_text=pieces.append)
    ended = [writer.accept(token) for token in tokenizer("abcENDxyz", add_special_tokens=False)["input_ids"]]
    assert any(ended) and "".join([*pieces, writer.rest()]) == writer.finish() == "abc"
