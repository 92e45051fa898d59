"""Engines to measure on: the pocket model, or random weights of a well-known shape, made on the device."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from dspy_greater.errors import SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.registry import POCKET

_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-3-8b": (
        LlamaConfig,
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            "tie_word_embeddings": False,
        },
    ),
    "gemma-2-9b": (
        Gemma2Config,
        {
            "vocab_size": 256_000,
            "hidden_size": 3584,
            "intermediate_size": 14_336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": (
        Qwen3Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        LlamaConfig,
        {"max_position_embeddings": 4096, "tie_word_embeddings": True},
    ),
}
# What makes a shape small enough for the gate, whatever its architecture.
_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # wide enough that no two logits are near a tie
}
SHAPES = (POCKET, *_CONFIGS)


@dataclass(frozen=True)
class Untokenized:
    """Stands in for the tokenizer of a model that is given token ids only."""

    size: int
    pad_token_id: int = 0
    eos_token_id: None = None
    chat_template: None = None
    all_special_ids: tuple[int, ...] = field(default=())

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str, **_: object) -> list[int]:
        """No text has tokens."""
        return []

    def get_vocab(self) -> dict[str, int]:
        """No token has a text."""
        return {}


def build(
    shape: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    small: bool = False,
    seed: int = 0,
    max_batch_tokens: int = 2048,
) -> Engine:
    """An engine of this shape with frozen weights; random ones from `seed`, except for the pocket model.

    `small` keeps the architecture and shrinks every dimension. Nothing is downloaded. `max_batch_tokens` bounds the
    padded batches of everybody who reads finished sequences.

    Raises:
        SettingsError: a shape that is not known.

    Example:
        >>> build("tiny", device=torch.device("cpu"), dtype=torch.float32).model.config.hidden_size
        64
    """
    if shape == POCKET:
        engine = Engine.from_pretrained(POCKET, device=device, dtype=dtype)
    elif shape in _CONFIGS:
        engine = _random(shape, device=device, dtype=dtype, small=small or shape == "tiny", seed=seed)
    else:
        raise SettingsError(f"There is no shape {shape!r}. The shapes are {', '.join(SHAPES)}.")
    # Lengths are forced: nothing may end a row before its time, in anybody's decoding loop.
    engine.model.generation_config.eos_token_id = None
    engine.model.generation_config.pad_token_id = 0
    engine.max_batch_tokens = max_batch_tokens
    return engine


def in_float64(engine: Engine) -> Engine:
    """An engine on a copy of the same weights, where rounding is far below what anybody compares.

    Norms and rotary angles stay in float32, as the models compute them in any dtype.

    Example:
        >>> in_float64(build("tiny", device=torch.device("cpu"), dtype=torch.float32)).weights.dtype
        torch.float64
    """
    wide = copy.deepcopy(engine.model).double()
    limits = {"max_batch_rows": engine.max_batch_rows, "max_batch_tokens": engine.max_batch_tokens}
    return Engine(wide, engine.tokenizer, name=engine.name, revision="in float64", **limits)


def _random(shape: str, *, device: torch.device, dtype: torch.dtype, small: bool, seed: int) -> Engine:
    config_class, dimensions = _CONFIGS[shape]
    settings = {**dimensions, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if small:
        settings |= _SMALL
        if "query_pre_attn_scalar" in settings:
            settings["query_pre_attn_scalar"] = _SMALL["head_dim"]
    config = config_class(**settings)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(device).requires_grad_(False).eval()
    return Engine(model, Untokenized(settings["vocab_size"]), name=f"random {shape}", revision=f"seed-{seed}")
