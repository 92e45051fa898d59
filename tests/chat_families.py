"""Chat templates in the manner of well-known model families, and tokenizers that merge across boundaries."""

from __future__ import annotations

from functools import cache
from typing import Any

import dspy
from tiny_models import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '<|side|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant<|side|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|eot|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<|begin|>' }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|turn|>' + role + '\n' + message['content'] | trim + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<|begin|>' }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] | trim + '\n\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + ns.system + message['content'] | trim + ' [/INST]' }}"
    "{% set ns.system = '' %}{% else %}{{ ' ' + message['content'] | trim + '<|end|>' }}{% endif %}"
    "{% endfor %}"
)
DROPS_INSTRUCTION = "{% for message in messages %}{{ '<|turn|>' + message['role'] + '\n' }}{% endfor %}"
REPEATS_SYSTEM = (
    "{% for message in messages %}{{ '<|turn|>' + message['content'] + '<|eot|>' }}{% endfor %}"
    "{{ messages[0]['content'] }}"
)
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL}

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|turn|>", "<|side|>", "<|eot|>")
_WORDS = (
    "Answer the question. Think step by step, then answer. List each item and add: the total is four. "
    "Evaluate the innermost brackets first; follow each person in turn? Yes! No."
)


def _corpus() -> list[str]:
    """Prompts as DSPy writes them, so that merges run over the ends of instructions and answers."""
    texts = [_WORDS]
    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()):
        for instruction in _WORDS.split(". "):
            signature = dspy.Signature("question -> reasoning, answer", instruction + ".")
            messages = adapter.format(signature, [], {"question": "How many?\n2 + 2"})
            texts += ["\n\n".join(message["content"] for message in messages)] * 3
            outputs = {"reasoning": "a", "answer": "yes"}
            texts.append(adapter.format_assistant_message_content(signature, outputs))
    return texts


def _finish(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


@cache
def _merging(words: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    # Merges that swallow what stands before and after an instruction.
    return _finish(core)


@cache
def _unigram(prepend: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=prepend)
    alphabet = sorted({chr(code) for code in range(32, 127)} | {"\n", "é", "–", "漢"})
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        initial_alphabet=alphabet,
        unk_token="<unk>",
        show_progress=False,
        special_tokens=["<unk>", *SPECIAL],
    )
    core.train_from_iterator(_corpus(), trainer)
    tokenizer = _finish(core)
    tokenizer.unk_token = "<unk>"
    return tokenizer


KINDS = ("byte-level", "merging", "merging across blanks", "unigram", "unigram with a first blank")


def family_tokenizer(kind: str = "merging", template: str = "llama3") -> Any:
    """A tokenizer of one of `KINDS` with the chat template of one of `TEMPLATES`."""
    import copy

    if kind == "byte-level":
        base = tiny_tokenizer()
        base.add_special_tokens({"additional_special_tokens": ["<|side|>"]})
    elif kind.startswith("merging"):
        base = copy.copy(_merging(kind == "merging"))
    else:
        base = copy.copy(_unigram("first" if "first" in kind else "never"))
    base.chat_template = TEMPLATES.get(template, template)
    return base
