"""GGUF files, as llama.cpp, Ollama and LM Studio keep models in: found, checked, and unpacked once by transformers.

Transformers reads such files (with the packages `gguf` and `accelerate`), and passes over what it does not know without
a word. Here a file is refused where that would change what the model computes. Reading takes a minute, so what was
unpacked is kept: see `unpacked_cache`.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dspy_greater.errors import WeightsError
from dspy_greater.model.dtypes import chosen_dtype, named_dtype
from dspy_greater.model.gguf_meaning import settle_hyper_parameters, tokenizer_of, unread_tensors
from dspy_greater.model.unpacked_cache import keep, kept, log

MAGIC = b"GGUF"
DIGITS = 12  # of the SHA-256, in the model string
_LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")  # of texts; the reader counts the others
_FLOAT32 = 0  # the number of that type of tensor
_AS_IT_WAS = "Pass the model as it was before the conversion: a hub id, or a directory with *.safetensors."
_digests: dict[tuple[str, int, int], str] = {}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape as torch has it, the number of its type, and its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the weights, of a file that is whole."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Such as `"qwen2"`; it is also the prefix of the hyper-parameters' keys."""
        return str(self.fields["general.architecture"])

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """float32 where every weight is stored so, else bfloat16, which holds what 16 bits or fewer can say."""
        exact = all(tensor.kind == _FLOAT32 for tensor in self.tensors.values())
        return torch.float32 if exact else torch.bfloat16

    @property
    def end_token_ids(self) -> list[int]:
        """The tokens that end what the model writes: of a text, a turn and a message."""
        ids = [self.fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        return sorted({int(token) for token in ids if token is not None})

    def refusal(self, what: str) -> WeightsError:
        """The error for a file of which transformers would leave something out."""
        return WeightsError(f"The GGUF file {str(self.path)!r} {what}. {_AS_IT_WAS}")


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether this is a file that begins as a GGUF file does; Ollama's have no suffix to know them by."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def find_gguf(place: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a folder without other weights; None for all else.

    Projectors of vision models (`mmproj-*`) are passed over in a folder.

    Raises:
        WeightsError: the folder has several, or the file is not there or not a GGUF file.

    Example:
        >>> find_gguf("Qwen/Qwen3-4B") is None
        True
    """
    path = Path(place)
    if is_gguf(path):
        return path
    if path.is_file():
        raise WeightsError(
            f"{str(path)!r} is a file that cannot be read, or not a GGUF file (those begin with the letters GGUF); "
            "pass a GGUF file, or the directory that holds config.json and *.safetensors."
        )
    if path.suffix.lower() == ".gguf" and not path.exists():
        raise WeightsError(f"There is no file {str(path)!r}; a GGUF file has to lie on this machine.")
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
    found = [file for file in found if not file.name.lower().startswith("mmproj")] or found[:1]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise WeightsError(f"{str(path)!r} holds {len(found)} GGUF files; pass the path of one of them: {names}.")
    return found[0] if found else None


def digest(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, computed once as long as its size and time stay the same.

    It takes about a second a gigabyte, and is the one that model hubs show and that Ollama names its files by.
    """
    state = path.stat()
    key = (os.path.realpath(path), state.st_size, state.st_mtime_ns)
    if key not in _digests:
        total = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                total.update(piece)
        _digests[key] = total.hexdigest()
    return _digests[key]


def read_header(path: Path) -> GgufHeader:
    """The header of a file that can be loaded as a whole language model.

    Raises:
        WeightsError: a package is missing; the file is cut off, damaged, a part of a split model, a projector, or of an
            architecture that is not read.
    """
    where = f"The GGUF file {str(path)!r}"
    try:
        import accelerate  # noqa: F401  (transformers asks for it)
        import gguf  # noqa: F401
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    except ImportError as error:
        raise WeightsError(
            f"{where} cannot be read without further packages ({error}): pip install 'dspy-greater[gguf]'."
        ) from error
    size = path.stat().st_size
    try:
        header = _parsed(path)
        last = max((tensor.start + _bytes(tensor) for tensor in header.tensors.values()), default=0)
        problem = f"its weights would end at byte {last}" if last > size else ""
    except Exception as error:  # a damaged header raises whatever its bytes come to
        header, problem = GgufHeader(path, {}, {}), f"its header cannot be read ({error})"
    if problem:
        raise WeightsError(
            f"{where} is cut off or damaged, or of a version that is not read: {problem}; it has {size} bytes. "
            "Download it again and compare its SHA-256."
        )
    if header.architecture == "clip" or header.fields.get("general.type") == "mmproj":
        raise WeightsError(
            f"{where} is the vision or audio projector of a model, not the model; pass the language model's own file."
        )
    if (parts := int(header.fields.get("split.count") or 1)) > 1:
        raise WeightsError(
            f"{where} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART JOINED."
        )
    known = sorted({*GGUF_CONFIG_ARCHS, *GGUF_CONFIG_MAPPING} - {"general", "tokenizer"})
    if header.architecture.replace("moe", "_moe").replace("-", "_") not in known and header.architecture not in known:
        raise header.refusal(
            f"has the architecture {header.architecture!r}; transformers reads {', '.join(known)} from GGUF"
        )
    return header


def _parsed(path: Path) -> GgufHeader:
    from transformers.integrations.gguf import reader

    blob = reader._mapped(str(path))
    fields, count, position = reader._read_metadata(blob, str(path), _LISTS)
    entries, position = reader._read_tensor_table(blob, count, position)
    alignment = int(fields.get("general.alignment", 32)) or 32
    start = -(-position // alignment) * alignment
    return GgufHeader(path, fields, {name: GgufTensor(shape, kind, start + at) for name, shape, kind, at in entries})


def _bytes(tensor: GgufTensor) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, width = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    return math.prod(tensor.shape) // values * width


def load_gguf(
    path: Path, *, target: torch.device, dtype: Any = None, revision: str | None = None, **settings: Any
) -> tuple[Any, Any]:
    """Model and tokenizer from a GGUF file, or from what an earlier call unpacked.

    Args:
        path: the file.
        target: the device that the weights go to.
        dtype: what the weights are unpacked to, which is what memory has to hold; chosen when not given.
        revision: the beginning of the file's SHA-256, where it has to be the same file as before.
        settings: more arguments of `from_pretrained`.

    Raises:
        WeightsError: the file has changed, or something in it would be left out: nothing is guessed.
    """
    sha256 = digest(path)
    if revision is not None and not sha256.startswith(revision):
        raise WeightsError(
            f"The GGUF file {str(path)!r} has the SHA-256 {sha256[:DIGITS]}..., not {revision}: it has changed, or "
            "a branch was asked for, which a file does not have."
        )
    header = read_header(path)
    if dtype is None:
        dtype = chosen_dtype(target, header.dtype, header.parameters)
    dtype = header.dtype if dtype == "auto" else named_dtype(dtype)
    found = kept(sha256, dtype, settings)
    if found is None:
        log.info("Unpacking %s to %s, which takes a minute or so.", path, str(dtype).removeprefix("torch."))
        try:
            model, tokenizer = _unpack(header, dtype)
            keep(model, tokenizer, sha256, dtype)
            if settings:
                weights = model.state_dict()
                model = type(model).from_pretrained(
                    None, config=model.config, state_dict=weights, dtype=dtype, **settings
                )
        except WeightsError:
            raise
        except Exception as error:  # a file that was written by hand makes the libraries raise what they like
            raise header.refusal(f"could not be loaded by transformers ({error})") from error
        found = model, tokenizer
    model, tokenizer = found
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = str(path)
    model.config._commit_hash = sha256[:DIGITS]  # where transformers puts the version of what it loaded
    return model if "device_map" in settings else model.to(target), tokenizer


def _unpack(header: GgufHeader, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GgufConfig

    place: Any = {"pretrained_model_name_or_path": str(header.path.parent), "gguf_file": os.path.abspath(header.path)}
    tokenizer = tokenizer_of(header)
    config = AutoConfig.from_pretrained(**place)
    settle_hyper_parameters(header, config)
    if unread := unread_tensors(header, config):
        raise header.refusal(f"has a tensor {unread[0]!r}, which transformers would leave out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **place,
        config=config,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, report = loaded
    _refuse_gaps(header, report)
    model.is_quantized = False  # the blocks are unpacked
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.eos_token_id = header.end_token_ids or None
    return model, tokenizer


def _refuse_gaps(header: GgufHeader, report: dict[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if found := sorted(map(str, report.get(kind) or ())):
            raise header.refusal(
                f"does not fit its architecture {header.architecture!r}: {len(found)} {kind.replace('_', ' ')}, such "
                f"as {found[0]}"
            )
