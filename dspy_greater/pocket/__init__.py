"""The pocket model: a small causal LM that ships with the package.

A model organism for prompt search: its reasoning depends on its instruction and
its answer depends on its reasoning. It is not a general language model; its
card, `weights/README.md`, says what it was trained on and how well it does.

The modules in the order in which the data flows:

    tasks.py        rows: question, gold answer, how to work it out
    grammar.py      instructions, and how strongly each asks for working it out
    transcript.py   row + instruction + reasoning -> the chat DSPy would send and read
    vocabulary.py   transcripts -> byte-level BPE tokenizer and chat template
    train.py        transcripts -> weights
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The directory with the pocket model's config, tokenizer and weights.

    Example:
        >>> (path() / "config.json").is_file()
        True
    """
    return Path(__file__).parent / "weights"
