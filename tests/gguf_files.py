"""Tiny GGUF files, written with llama.cpp's own writer as its converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    architecture: str,
    *,
    stored: str = "F32",
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """The model as a GGUF file; matrices are `stored` as F32, F16, BF16, Q8_0 and so on, the rest as F32.

    `fields` are added to the header or replace what is there; a value of None leaves the field out, and a key that
    begins with a dot belongs to the architecture. `tensors` are added to those of the model.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    header = {**_hyper_parameters(model.config, architecture), **_vocabulary(tokenizer), "tokenizer.ggml.pre": "gpt-2"}
    for key, value in {**header, **(fields or {})}.items():
        _add(writer, f"{architecture}{key}" if key.startswith(".") else key, value)
    kind = gguf.GGMLQuantizationType[stored]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = _converted(name, tensor, model.config, architecture).float().numpy()
        if values.ndim == 1 or stored == "F32":
            writer.add_tensor(_name(name, architecture), values)
        else:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(_name(name, architecture), packed, raw_dtype=kind)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def _name(name: str, architecture: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    names = {**NAMES, **GEMMA} if architecture.startswith("gemma") else NAMES
    if stem.startswith("model.layers."):
        layer, stem = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{names[stem]}.{leaf}"
    return f"{names[stem]}.{leaf}"


def _converted(name: str, tensor: torch.Tensor, config: Any, architecture: str) -> torch.Tensor:
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _hyper_parameters(config: Any, architecture: str) -> dict[str, Any]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    found = {
        ".vocab_size": config.vocab_size,
        ".context_length": config.max_position_embeddings,
        ".embedding_length": config.hidden_size,
        ".block_count": config.num_hidden_layers,
        ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        ".rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if architecture == "llama":
        found[".rope.dimension_count"] = head
    if architecture.startswith(("qwen3", "gemma")):
        found |= {".attention.key_length": head, ".attention.value_length": head}
    if architecture.startswith("gemma"):
        found[".attention.sliding_window"] = config.sliding_window
    return found


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    """A byte-level vocabulary, as `tiny_models.tiny_tokenizer` makes it."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(core["model"]["vocab"], key=core["model"]["vocab"].__getitem__)
    control = {each["content"] for each in core["added_tokens"] if each["special"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in core["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def q4_0(values: np.ndarray) -> np.ndarray:
    """What is left of float32 values after Q4_0: the largest of 32 decides the step, in the format's own words."""
    blocks = values.reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    step = largest / -8
    scale = np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)
    whole = np.clip(np.trunc(blocks * scale + 8.5), 0, 15) - 8
    return (whole * step.astype(np.float16).astype(np.float32)).reshape(values.shape)
