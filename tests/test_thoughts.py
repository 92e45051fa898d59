"""Where a model's thoughts belong, found by asking its chat template."""

from __future__ import annotations

import pytest
from scripted_engine import TEMPLATE
from tiny_models import tiny_tokenizer

from dspy_greater.prompt.chat_template import with_template_options
from dspy_greater.prompt.thoughts import ThoughtTags, thought_tags

THINK = ThoughtTags("<think>\n", "\n</think>\n\n")
# In the manner of models that think: which message keeps its thoughts, and what the prompt ends with, differ.
WRITES = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and m['KEY'] %}"
    "{{ '<think>\n' + m['KEY'].strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].lstrip('\n') + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OPENS = WRITES.replace("{{ '<|turn|>assistant\n' }}", "{{ '<|turn|>assistant\n<think>\n' }}")
CUTS = (
    "{% for m in messages %}{% set said = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in said %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|turn|>' + m['role'] + '\n' + said + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
CUTS_AND_OPENS = CUTS.replace("{{ '<|turn|>assistant\n' }}", "{{ '<|turn|>assistant\n<think>\n' }}")
OTHER_TAGS = WRITES.replace("<think>", "<reflect>").replace("</think>", "</reflect>")
SPECIAL = WRITES.replace("'<think>\n'", "'<|turn|>analysis\n'").replace("'\n</think>\n\n'", "'<|eot|><|turn|>final\n'")


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        *((WRITES.replace("KEY", key), THINK) for key in ("reasoning_content", "reasoning", "thinking")),
        (OPENS.replace("KEY", "reasoning_content"), ThoughtTags("", "\n</think>\n\n")),
        (CUTS, THINK),
        (CUTS_AND_OPENS, ThoughtTags("", "\n</think>\n\n")),
        (OTHER_TAGS.replace("KEY", "reasoning_content"), ThoughtTags("<reflect>\n", "\n</reflect>\n\n")),
        (TEMPLATE, None),
        (SPECIAL.replace("KEY", "reasoning_content"), None),  # tags that no text can spell
    ],
)
def test_the_tags_of_thoughts_are_those_of_the_chat_template(template: str, tags: ThoughtTags | None) -> None:
    assert thought_tags(tiny_tokenizer(template)) == tags


def test_a_template_that_is_told_not_to_think_has_no_place_for_thoughts() -> None:
    tokenizer = tiny_tokenizer(WRITES.replace("KEY", "reasoning_content"))
    assert thought_tags(with_template_options(tokenizer, {"enable_thinking": False})) is None
    assert thought_tags(tokenizer) == THINK


def test_what_is_put_together_is_what_the_template_writes() -> None:
    tokenizer = tiny_tokenizer(WRITES.replace("KEY", "reasoning_content"))
    asked = {"role": "user", "content": "2 + 2?"}
    for thoughts, text in (("Two and two.", "four"), ("\nTwo.\n\nAnd two.\n", "\n\nfour\n"), ("", "four")):
        answer = {"role": "assistant", "content": text, "reasoning_content": thoughts}
        whole = tokenizer.apply_chat_template([asked, answer], tokenize=False)
        prompt = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        joined = THINK.joined(thoughts, text) if thoughts else text
        assert whole == f"{prompt}{joined}<|eot|>"


def test_thoughts_whose_end_cannot_be_told_are_left_in_the_text() -> None:
    assert ThoughtTags("", "\n").said("Two and two.\nfour") == "Two and two.\nfour"
