"""Tiny random models of architectures that are no plain attention, as transformers has them, and some that are."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 512
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

# With states of their own beside keys and values, or instead of them: what their configurations need.
OWN_STATES: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 8},
    "Mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "FalconMamba": {"state_size": 8},
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "Bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "Zamba2": {
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"],
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "Qwen3Next": {**_LINEAR, **_EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "FalconH1": {**_MAMBA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "GraniteMoeHybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "NemotronH": {
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
        "use_mamba_kernels": False,
    },
    "OlmoHybrid": {**_LINEAR, "linear_num_value_heads": 2},
    "KimiLinear": {
        **_LATENT,
        **_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_expert_group": 1,
        "topk_group": 1,
    },
    "DeepseekV32": {  # attends to the places that an indexer with keys of its own has chosen
        **_LATENT,
        "q_lora_rank": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "index_topk": 8,
        "index_head_dim": 8,
        "index_n_heads": 16,  # enough that no two places have the same score
    },
}
# Of these only rows of the same length may be read together: they do not look at the attention mask as they should.
EVEN_ROWS: dict[str, dict[str, Any]] = {
    "MiniMax": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "xLSTM": {"num_heads": 2, "num_blocks": 2, "chunk_size": 8, "hidden_size": 128, "embedding_dim": 128},
}
# These keep their states inside the model, take them back wrongly for several rows, or have none.
NO_CACHE: dict[str, dict[str, Any]] = {
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 64, "num_hidden_layers": 3, "head_dim": 8},
    "Rwkv": {"attention_hidden_size": 32, "context_length": 1024},
    "OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
}
KEYS_AND_VALUES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mistral": {"sliding_window": 16},
    "Gemma3Text": {**_SLIDING, "head_dim": 8},
    "GptOss": {**_SLIDING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ALL = {**OWN_STATES, **EVEN_ROWS, **NO_CACHE, **KEYS_AND_VALUES}


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY) -> Any:
    """A random causal language model in eval mode; the global random state is left as it was."""
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **ALL[name], "vocab_size": vocabulary})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()
