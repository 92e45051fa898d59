"""What transformers reads from a GGUF file against what the file says: put right where it is plain, else refused.

Its reader passes over hyper-parameters and tensors that it has no place for, and takes the way in which GPT-2 cuts text
for every way that it does not know. All of that would make a model compute something else without a sign.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from dspy_greater.model.gguf import GgufHeader

_CONTROL, _USER_DEFINED = 3, 4  # kinds of token that are found in a text before it is cut
# Ways to cut text before tokens are merged, besides those that transformers knows.
_AS_GPT2 = frozenset({"gpt-2", "olmo", "phi-2", "jina-es", "jina-de"})
_DIGITS_ALONE = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
# Whole words of the vocabulary are taken as they are, also where no merges lead to them.
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "tekken"})
_COMPOSED = frozenset({"qwen2", "qwen35", "deepseek-r1-qwen", "megrez"})  # reads é as one letter, however it is written

_SAME: dict[str, str] = {  # hyper-parameters that transformers does not read -> what it must have taken for them
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_PLAIN: dict[str, tuple[Any, ...]] = {  # the values under which they change nothing
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
}
_LOOKED_AFTER = ("rope.scaling.", "rope.scale_linear", "vision.", "audio.", "mm.", "tensor_data_layout")  # elsewhere
_ROPE_FACTORS = "rope_freqs.weight"  # how Llama 3 scales its positions, and all that a file says about it
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_OTHER_SENSES = ("v.", "mm.", "a.")  # the eyes and ears of a model that came in one file
_LARGEST_GEMMAS = (46, 62)  # layers of the only two that do not divide queries by the root of a head's size


def settle_hyper_parameters(header: GgufHeader, config: Any) -> None:
    """Write into a configuration what transformers left out of a header and is plain.

    Raises:
        WeightsError: a hyper-parameter that is neither read nor known to change nothing.
    """
    if _has_own_reader(header.architecture):
        return
    prefix = f"{header.architecture}."
    for key, value in header.fields.items():
        name = key.removeprefix(prefix)
        if name == key or name in _read_by_transformers(header.architecture) or name.startswith(_LOOKED_AFTER):
            continue
        if value not in _PLAIN.get(name, ()) and not _agrees(name, value, config):
            raise header.refusal(f"sets {key} to {value!r}, which transformers would leave out")
    _scale_positions(header, config)
    if hasattr(config, "query_pre_attn_scalar"):  # Gemma's files do not say it
        whole = config.num_hidden_layers in _LARGEST_GEMMAS
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if whole else config.head_dim


def _has_own_reader(architecture: str) -> bool:
    """Whether transformers has a function for this architecture that reads every hyper-parameter it has."""
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    return architecture in GGUF_CONFIG_ARCHS


def _read_by_transformers(architecture: str) -> set[str]:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    names = (architecture, architecture.replace("moe", "_moe"), architecture.replace("-", "_"))
    found = next((GGUF_CONFIG_MAPPING[name] for name in names if name in GGUF_CONFIG_MAPPING), {})
    return {key for key, into in found.items() if into is not None}


def _agrees(name: str, value: Any, config: Any) -> bool:
    """Whether transformers has by itself what the file says."""
    if name in _SAME:
        ours = getattr(config, _SAME[name], None)
        if ours is None and _SAME[name] == "head_dim":
            ours = config.hidden_size // config.num_attention_heads
        return ours == value
    if name == "rope.freq_base":
        return _far(config).get("rope_theta") == value
    if name == "rope.freq_base_swa":
        return config.rope_parameters.get("sliding_attention", {}).get("rope_theta") == value
    if name == "attention.sliding_window_pattern" and isinstance(value, int):
        kinds = [
            "full_attention" if (i + 1) % value == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
        ]
        return getattr(config, "layer_types", None) == kinds
    return False


def _scale_positions(header: GgufHeader, config: Any) -> None:
    field = f"{header.architecture}.rope.scal".__add__
    old = header.fields.get(field("e_linear"))  # how it was written before there were other ways
    kind = header.fields.get(field("ing.type"), "linear" if old else "none")
    factor = header.fields.get(field("ing.factor"), old)
    if header.architecture == "gemma3" and config.num_hidden_layers > 26 and factor is None:
        raise header.refusal("does not say how its long-range layers scale their positions")
    if kind != "none" and factor not in (None, 0.0, 1.0):
        if kind not in ("linear", "yarn"):
            raise header.refusal(f"scales its positions in the way {kind!r}, which is not read")
        length = header.fields.get(field("ing.original_context_length"), config.max_position_embeddings)
        original = {"original_max_position_embeddings": length} if kind == "yarn" else {}
        _far(config).update(rope_type=kind, factor=factor, **original)
    if _ROPE_FACTORS in header.tensors:
        _scale_as_llama3(header, config)


def _far(config: Any) -> dict[str, Any]:
    """The positions of the layers that see everything."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def _scale_as_llama3(header: GgufHeader, config: Any) -> None:
    """A file has what every frequency is divided by; that has to be what Llama 3 makes of some factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tensor = header.tensors[_ROPE_FACTORS]
    divisors = torch.from_numpy(np.fromfile(header.path, "<f4", tensor.shape[-1], offset=tensor.start))
    theta, head = _far(config)["rope_theta"], 2 * len(divisors)
    plain = theta ** -(torch.arange(0, head, 2) / head)
    _far(config).update(rope_type="llama3", factor=float(divisors.max()), **_LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if scaled.shape != divisors.shape or not torch.allclose(scaled, plain / divisors, rtol=1e-4, atol=0):
        raise header.refusal(f"scales its positions by {_ROPE_FACTORS} in a way that is not Llama 3's")


def unread_tensors(header: GgufHeader, config: Any) -> list[str]:
    """The tensors of a file that transformers has no place for, where it does not report them itself."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if _has_own_reader(header.architecture):
        return []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    places = get_gguf_hf_weights_map(model, processor)
    settled = {_ROPE_FACTORS} if _far(config).get("rope_type") == "llama3" else set()
    return [name for name in header.tensors if name not in {*places, *settled} and not name.startswith(_OTHER_SENSES)]


def tokenizer_of(header: GgufHeader) -> Any:
    """The tokenizer of a file, with its special tokens and its chat template, if it has one.

    Raises:
        WeightsError: it cuts text in a way that is not known, or would differ from the file in a token.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, parts, settings = get_gguf_tokenizer(str(header.path))
    core, more = convert_gguf_tokenizer(architecture, parts)
    core = _without_foreign_tokens(core, len(parts["tokens"]))
    if parts.get("tokenizer_type") == "gpt2":
        _settle_byte_level(header, core)
    elif parts.get("tokenizer_type") == "llama":
        _settle_sentencepiece(core, begins_with_blank=bool(parts.get("add_prefix_space", True)))
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **settings, **more
    )
    _refuse_other_tokens(header, tokenizer, parts["tokens"])
    return tokenizer


def _without_foreign_tokens(core: Any, count: int) -> Any:
    """Without the special tokens of the class that transformers fills in, which the model has no embedding for."""
    if core.get_vocab_size() == count:
        return core
    described = json.loads(core.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < count]
    return type(core).from_str(json.dumps(described))


def _refuse_other_tokens(header: GgufHeader, tokenizer: Any, tokens: Sequence[str]) -> None:
    if len(tokenizer) != len(tokens):
        raise header.refusal(f"has {len(tokens)} tokens, of which transformers makes {len(tokenizer)}")
    kinds = header.fields.get("tokenizer.ggml.token_type") or ()
    for index, (token, sort) in enumerate(zip(tokens, kinds, strict=False)):
        if sort in (_CONTROL, _USER_DEFINED):
            ids = tokenizer(token, add_special_tokens=False)["input_ids"]
            if ids != [index]:
                raise header.refusal(f"has the token {token!r} as {index}, which transformers reads as {ids}")
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        theirs, ours = header.fields.get(f"tokenizer.ggml.{key}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if theirs != ours:
            raise header.refusal(f"has {theirs} as its {key} token, for which transformers takes {ours}")


def _settle_byte_level(header: GgufHeader, core: Any) -> None:
    from tokenizers import normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    cut = str(header.fields.get("tokenizer.ggml.pre", "default"))
    if cut in _DIGITS_ALONE:
        digits = pre_tokenizers.Digits(individual_digits=True)
        core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif cut not in _AS_GPT2 and cut not in GGUF_PRE_TOKENIZER_SPLITS:
        known = ", ".join(sorted({*_AS_GPT2, *_DIGITS_ALONE, *GGUF_PRE_TOKENIZER_SPLITS}))
        raise header.refusal(
            f"cuts text in the way {cut!r} before it merges tokens, which is not known; known: {known}"
        )
    if cut in _COMPOSED:
        core.normalizer = normalizers.NFC()
    if cut in _WHOLE_WORDS:
        core.model.ignore_merges = True


def _settle_sentencepiece(core: Any, *, begins_with_blank: bool) -> None:
    """Every stretch of text gets its blank in front, whatever it begins with, or none does: as SentencePiece."""
    from tokenizers import decoders, normalizers

    blank = "▁"
    before: list[Any] = [normalizers.Replace(" ", blank)]
    undo: list[Any] = [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()]
    if begins_with_blank:
        before.insert(0, normalizers.Prepend(blank))
        undo.append(decoders.Strip(" ", 1, 0))
    core.normalizer, core.pre_tokenizer = normalizers.Sequence(before), None
    core.decoder = decoders.Sequence(undo)
