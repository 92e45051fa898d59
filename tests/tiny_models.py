"""Tiny random models and a tiny chat tokenizer, built in memory: no network, no files.

The tokenizer is a byte-level BPE whose merges are few, so any text round-trips; the models are a few
thousand parameters of real Llama, Qwen2 and Gemma2 code with random weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
TURN, END_OF_TURN = "<|turn|>", "<|eot|>"

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
# As Gemma's: no system role, roles must alternate, content is trimmed, the assistant is called model.
NO_SYSTEM_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|turn|>' + role + '\n' + message['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>model\n' }}{% endif %}"
)
# Writes no beginning-of-sequence token and, as some templates do, silently drops the system message.
SILENT_DROP_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|eot|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)

_CORPUS = [
    "Think step by step, then answer the question. The answer is yes. The answer is no. True or False?",
    "Given the fields `question`, produce the fields `reasoning`, `answer`.",
    "Your input fields are: 1. `question` (str): Your output fields are:",
    "1. `reasoning` (str): 2. `answer` (str):",
    "All interactions will be structured in the following way, with the appropriate values filled in.",
    "In adhering to this structure, your objective is: Respond with the corresponding output fields, "
    "starting with the field [[ ## reasoning ## ]], then [[ ## answer ## ]], and then ending with the "
    "marker for [[ ## completed ## ]].",
    "I have two apples, three pears and a cat. How many fruits do I have?",
    "List each item with its number and add.",
    "If you follow these instructions, do you return to the starting point? Take 4 steps. Turn left.",
    "Turn around.",
    "not ( True ) and ( False ) or not True is; Evaluate the innermost brackets first.",
]


def tiny_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, *, vocab_size: int = 512, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE chat tokenizer; with `adds_bos`, plain encoding writes the begin token, as Llama's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS, TURN, END_OF_TURN)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        begin = core.token_to_id(BOS)
        core.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, begin)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def numbered_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly so many tokens, the words "0", "1" and so on, for models of a handful of tokens."""
    core = Tokenizer(models.WordLevel({str(number): number for number in range(count)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="0")


def tokenizer_for(model: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, or a numbered one where the model has fewer embeddings than that has tokens."""
    count = model.get_input_embeddings().weight.shape[0]
    return tiny_tokenizer() if count >= 512 else numbered_tokenizer(count)


def tiny_model(
    kind: Literal["llama", "qwen2", "gemma2"] = "llama",
    vocab_size: int = 512,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    context: int = 1024,
    sharpness: float = 0.2,
    **overrides: Any,
) -> Any:
    """A random causal LM in eval mode; the global random state is left as it was.

    `sharpness` is the standard deviation of the weights: large enough that greedy text is not one token
    repeated and that no two logits are near a tie.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": sharpness,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": [2, 4],
    }
    if kind == "gemma2":
        settings.update(head_dim=hidden_size // 4, query_pre_attn_scalar=hidden_size // 4, sliding_window=64)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    }[kind]
    config = config_class(**{**settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    return model.to(dtype=dtype).eval()  # pyright: ignore[reportArgumentType]


def save_tiny(directory: Any, *, kind: Literal["llama", "qwen2", "gemma2"] = "llama", **settings: Any) -> str:
    """Write a tiny model and its tokenizer as a Hugging Face directory; returns the path as text."""
    tokenizer = tiny_tokenizer()
    tiny_model(kind, len(tokenizer), **settings).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


class InDouble(TorchFunctionMode):
    """Model code rounds to float32 in places, whatever its weights are; inside, to float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wider = {torch.float32: torch.float64}
        arguments = [wider.get(each, each) if isinstance(each, torch.dtype) else each for each in args]
        named = {
            key: wider.get(each, each) if isinstance(each, torch.dtype) else each
            for key, each in (kwargs or {}).items()
        }
        return func(*arguments, **named)
