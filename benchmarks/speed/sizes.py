"""What a floor follows from: the dimensions of a model and the best rates of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSize:
    """The dimensions of a model that its cost follows from."""

    hidden: int
    intermediate: int
    layers: int
    attention_width: int  # A
    body_parameters: int  # P_b
    head_parameters: int  # P_h
    token_bytes: int  # K
    weight_bytes: int  # W: layers and output layer; of the embeddings only single rows are read

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        """Read from a `transformers` model."""
        config = model.config
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        matrices = {id(each): each for each in model.parameters() if each.dim() == 2}
        body = sum(each.numel() for key, each in matrices.items() if key not in (id(embedding), id(output)))
        element = output.element_size()
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            attention_width=heads * head_size,
            body_parameters=body,
            head_parameters=output.numel(),
            token_bytes=2 * config.num_hidden_layers * config.num_key_value_heads * head_size * element,
            weight_bytes=(body + output.numel()) * element,
        )

    def forward_flops(self, tokens: float, pairs: float, head_rows: float) -> float:
        """Operations of reading `tokens`, with `pairs` of a token and one that it attends to."""
        attention = 4 * self.layers * self.attention_width * pairs
        return 2 * tokens * self.body_parameters + attention + 2 * head_rows * self.head_parameters


@dataclass(frozen=True)
class Ceilings:
    """The best rates that were seen in this run."""

    matmul_flops: float  # floating-point operations per second, two for a multiply-add
    copy_bytes: float  # bytes read and written per second

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each; a ceiling that is measured twice is the better one."""
        return Ceilings(max(self.matmul_flops, other.matmul_flops), max(self.copy_bytes, other.copy_bytes))
