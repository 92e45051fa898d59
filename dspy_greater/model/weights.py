"""What loaded weights say of themselves: where they are, what they compute in, which tokens pad and end a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dspy_greater.model.placement import input_device
from dspy_greater.prompt.chat_template import end_of_turn_ids


@dataclass(frozen=True, eq=False)
class Weights:
    """A causal language model, its tokenizer, and what both are called.

    >>> from dspy_greater.model.engine import Engine
    >>> weights = Engine.from_pretrained("pocket", device="cpu").weights
    >>> weights.device, weights.exact_dtype
    (device(type='cpu'), torch.float32)
    """

    model: Any
    tokenizer: Any
    name: str

    @property
    def embedding_matrix(self) -> Tensor:
        """The input embeddings [V, d]."""
        return self.model.get_input_embeddings().weight

    @property
    def device(self) -> torch.device:
        """Where the input embeddings are, and so where token ids have to go."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the input embeddings."""
        return self.embedding_matrix.dtype

    @property
    def exact_dtype(self) -> torch.dtype:
        """What log-probabilities and gradients are computed in: float32, or float64 for a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def pad_token_id(self) -> int:
        """What fills rows up; no real token sees it."""
        choices = (self.tokenizer.pad_token_id, *sorted(self.stop_token_ids))  # of which the model has to know one
        return next((token for token in choices if token is not None and token < self.embedding_matrix.shape[0]), 0)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Every token that ends a turn: of the tokenizer, the model's configurations and the chat template."""
        found: set[int] = set(end_of_turn_ids(self.tokenizer))
        for source in (self.tokenizer, getattr(self.model, "generation_config", None), self.model.config):
            value = getattr(source, "eos_token_id", None)
            if value is not None:
                found.update([value] if isinstance(value, int) else value)
        return frozenset(found)
