"""Unpacked GGUF models on disk, so that reading them a second time takes seconds.

One folder a file, floating type and reader: `$DSPY_GREATER_CACHE/gguf/SHA256-DTYPE-READER`, by default below
`~/.cache/dspy_greater`, with the weights as safetensors and the tokenizer. A folder appears under its name as a whole
or not at all; one that is damaged is written anew. `DSPY_GREATER_CACHE=off` keeps nothing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dspy_greater.errors import WeightsError

VARIABLE = "DSPY_GREATER_CACHE"
_FORMAT = 1  # of what is written here; another number is another folder
_SIZES = "sizes.json"  # of the files beside it, in bytes
_OFF = frozenset({"off", "0", "no", "false"})

log = logging.getLogger(__name__)


def cache_folder(sha256: str, dtype: torch.dtype) -> Path | None:
    """Where the unpacked model of a file lies or would lie; None where nothing is to be kept.

    Args:
        sha256: of the GGUF file, in hexadecimal.
        dtype: what its weights are unpacked to.
    """
    import transformers

    root = os.environ.get(VARIABLE, "")
    if root.lower() in _OFF:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = Path(root) if root else home / "dspy_greater"
    reader = f"{_FORMAT}.{transformers.__version__}"
    return place / "gguf" / f"{sha256[:16]}-{str(dtype).removeprefix('torch.')}-{reader}"


def kept(sha256: str, dtype: torch.dtype, settings: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Model and tokenizer as they were kept; None where they were not, or where a file is not as it was written.

    Args:
        sha256, dtype: as in `cache_folder`.
        settings: more arguments of `from_pretrained`.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = cache_folder(sha256, dtype)
    if folder is None or not folder.is_dir():
        return None
    try:
        sizes = json.loads((folder / _SIZES).read_text(encoding="utf-8"))
        if sizes != _sizes(folder):
            raise WeightsError("files are missing or have changed")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **settings
        )
        model, report = loaded
        if any(report.values()):
            raise WeightsError(f"it does not fit: {report}")
        return model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        log.warning("What was kept in %s cannot be used (%s); the file is unpacked again.", folder, error)
        return None


def keep(model: Any, tokenizer: Any, sha256: str, dtype: torch.dtype) -> None:
    """Write an unpacked model down; where that cannot be done, say so in the log and go on without."""
    from safetensors import SafetensorError

    folder = cache_folder(sha256, dtype)
    if folder is None:
        return
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / _SIZES).write_text(json.dumps(_sizes(scratch)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        scratch.replace(folder)
        log.info("The unpacked model is kept in %s; %s=off keeps none.", folder, VARIABLE)
    except (OSError, SafetensorError) as error:
        log.warning("The unpacked model could not be kept in %s (%s).", folder, error)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != _SIZES}
