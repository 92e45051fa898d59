"""The pocket model: a small causal LM that ships with the package, and the rows that it can work out.

A model organism for prompt search: its reasoning depends on its instruction and
its answer depends on its reasoning. It is not a general language model; its
card, `weights/README.md`, says what it was trained on and how well it does.
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
