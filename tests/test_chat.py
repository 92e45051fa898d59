"""Chat messages to text and tokens back to text."""

from __future__ import annotations

import pytest
from tiny_models import NO_SYSTEM_TEMPLATE, SILENT_DROP_TEMPLATE, tiny_model, tiny_tokenizer

from dspy_greater.errors import LayoutError, WeightsError
from dspy_greater.lm.local import local_lm
from dspy_greater.lm.streaming import TextWriter
from dspy_greater.prompt.chat_template import end_of_turn_ids, render_chat, with_template_options


@pytest.mark.parametrize("template", [NO_SYSTEM_TEMPLATE, SILENT_DROP_TEMPLATE])
def test_a_template_without_a_system_role_gets_the_text_in_the_first_user_turn(template: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert "<|turn|>user\nBe brief.\n\nHi<|eot|>" in render_chat(tiny_tokenizer(template), messages)
    assert messages[1]["content"] == "Hi"


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


PARTS = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
# A system message that is a text before users' messages that are lists, as some vision-language models have it.
MIXED = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '<|eot|>' }}" + (
    "{% set messages = messages[1:] %}{% endif %}" + PARTS
)
EITHER = PARTS.replace(
    "{% for part in m['content'] %}",
    "{% if m['content'] is string %}{{ m['content'] }}{% endif %}"
    "{% for part in m['content'] if m['content'] is not string %}",
)
STRICT_PARTS = PARTS.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('no text here') }}{% endif %}",
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "What is 2 + 2?"},
]


@pytest.mark.parametrize("template", [PARTS, MIXED, EITHER, STRICT_PARTS])
def test_every_template_is_given_messages_in_the_form_that_it_reads(template: str) -> None:
    text = render_chat(tiny_tokenizer(template), TALK)
    places = [text.find(message["content"]) for message in TALK]
    assert places == sorted(places) and places[0] >= 0
    assert "{'type'" not in text
    assert end_of_turn_ids(tiny_tokenizer(template)) == (4,)


def test_a_template_of_parts_writes_what_it_writes_for_parts() -> None:
    tokenizer = tiny_tokenizer(PARTS)
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in TALK]
    whole = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, TALK) == whole == render_chat(tokenizer, parts)


@pytest.mark.parametrize(
    ("template", "dropped"),
    [
        ("{{ '<|turn|>' }}", "a user's message says"),
        ("{{ '<|turn|>' + messages[-1]['content'] }}", "an assistant's earlier message says"),
        (
            "{% for m in messages %}{{ m['content'] if m['role'] == 'assistant' or loop.last }}{% endfor %}",
            "a user's earlier messages say",
        ),
    ],
)
def test_a_template_that_drops_what_was_said_is_refused(template: str, dropped: str) -> None:
    with pytest.raises(LayoutError, match=f"drops what {dropped}.* or leave out what it drops: demonstrations and a"):
        render_chat(tiny_tokenizer(template), TALK[1:])


def test_what_a_template_would_drop_may_be_missing() -> None:
    last = tiny_tokenizer("{{ '<|turn|>' + messages[-1]['content'] }}")
    assert render_chat(last, TALK[-1:]) == "<|turn|>What is 2 + 2?"
    assert render_chat(last, [*TALK[:1], *TALK[-1:]]) == "<|turn|>Be brief.\n\nWhat is 2 + 2?"  # it has no system role


def test_variables_are_given_to_a_copy_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer("{{ messages[0]['content'] }}{% if loud %}!{% endif %}")
    loud = with_template_options(tokenizer, {"loud": True})
    assert (render_chat(loud, TALK[1:2]), render_chat(tokenizer, TALK[1:2])) == ("Hi!", "Hi")
    assert with_template_options(tokenizer, {}) is tokenizer
