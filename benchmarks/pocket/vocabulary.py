"""Transcripts -> a byte-level BPE tokenizer with the pocket model's chat template.

The pre-tokenizer keeps DSPy's boilerplate phrases, words and signed numbers whole,
so that BPE may learn each as one token: a DSPy prompt then costs the model about a
third of the tokens, and every running total is one symbol.
"""

from __future__ import annotations

import random
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.pocket import grammar
from benchmarks.pocket.transcript import CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS, draw, proposal
from dspy_greater.pocket.tasks import TASKS

VOCABULARY_SIZE = 2816
_PHRASES = (
    "Your input fields are:\n",
    "Your output fields are:\n",
    "All interactions will be structured in the following way, with the appropriate values filled in.\n\n",
    "In adhering to this structure, your objective is: \n",
    "\n\nRespond with the corresponding output fields, starting with the field",
    ", and then ending with the marker for",
    "If you follow these instructions, do you return to the starting point?",
    "\nOptions:\n- Yes\n- No",
)
_PATTERN = "|".join(
    [re.escape(phrase).replace("\\\n", "\\n").replace("\n", "\\n") for phrase in _PHRASES]
    + [
        r" ?`\[\[ ## [a-z_]+ ## \]\]`",  # a field marker that is spoken of
        r"(?:\n\n)?\[\[ ## [a-z_]+ ## \]\]\n*",  # a field marker with its line ends
        r"[0-9]\. `[a-z_]+` \([a-z]+\): ?\n",  # a field's description
        r"\{[a-z_]+\}",
        r" ?[A-Za-z]+",
        r" ?-?[0-9]+",
        r" ?[^\sA-Za-z0-9]+",
        r"\n+",
        r"[^\S\n]+(?!\S)",  # an indent, less the space that belongs to the next word
        r"\s+",
    ]
)


def corpus(samples_per_task: int, seed: int) -> list[str]:
    """The texts on which the vocabulary is learned: samples of all tasks, and the signed numbers."""
    rng = random.Random(seed)
    texts = []
    for task in TASKS:
        for _ in range(samples_per_task):
            texts += [part.text for part in draw(task, rng)]
            texts.append(grammar.salad(task, rng))
            texts += [part.text for part in proposal(task, "", rng)]
    texts += [" ".join(str(n) for n in range(-60, 61)) + " " + ", ".join(grammar._FILLER)] * (samples_per_task // 10)
    return texts


def train_tokenizer(
    *, size: int = VOCABULARY_SIZE, samples_per_task: int = 3000, seed: int = 0
) -> PreTrainedTokenizerFast:
    """Learn the tokenizer. Deterministic for a given seed.

    Example:
        >>> tokenizer = train_tokenizer(size=600, samples_per_task=20)
        >>> tokenizer.decode(tokenizer("Take 3 steps.")["input_ids"])
        'Take 3 steps.'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(samples_per_task, seed), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
