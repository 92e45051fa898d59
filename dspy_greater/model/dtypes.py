"""The floating type in which weights are loaded when the caller does not say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dspy_greater.errors import WeightsError

SMALL = 100_000_000  # parameters: below, float32 is under 400 MB and rounding costs more than it saves
_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"})  # as torch and Linux spell them


def default_dtype(
    target: torch.device, place: str, common: Mapping[str, Any], model_class: Any = None
) -> torch.dtype | str:
    """The type for a directory or hub id, whose configuration is read only where it decides.

    Args:
        target: the device that the weights go to.
        place: a directory or hub id.
        common: arguments of `AutoConfig.from_pretrained`, such as the revision.
        model_class: what loads the weights; `AutoModelForCausalLM` when not given.
    """
    if target.type != "cpu":
        return "auto"
    if not computes_bfloat16():
        return torch.float32
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(place, **common)
    chosen: Any = model_class or AutoModelForCausalLM
    with torch.device("meta"):
        if build := getattr(chosen, "from_config", None):
            model = build(config, trust_remote_code=bool(common.get("trust_remote_code")))
        else:  # a class of its own, such as a vision-language model's
            model = chosen(config)
    stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    return chosen_dtype(target, named_dtype(stored), sum(parameter.numel() for parameter in model.parameters()))


def chosen_dtype(target: torch.device, stored: torch.dtype, parameters: int) -> torch.dtype:
    """What the weights are stored in on an accelerator; on a CPU bfloat16 or float32.

    On a CPU: bfloat16 where the processor computes in it, nothing that is stored gets lost (16 bits or fewer), and the
    model is not small; float32 otherwise.

    Args:
        target: the device that the weights go to.
        stored: the type that the checkpoint has; of quantised weights the type that they are unpacked to.
        parameters: how many weights there are.

    Example:
        >>> chosen_dtype(torch.device("cpu"), torch.bfloat16, 2_600_000)
        torch.float32
    """
    if target.type != "cpu":
        return stored
    worthwhile = stored.itemsize <= 2 and parameters >= SMALL and computes_bfloat16()
    return torch.bfloat16 if worthwhile else torch.float32


def computes_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (AVX-512 BF16, AMX or Arm's BF16), by its own account."""
    if probe := getattr(torch.cpu, "get_capabilities", None):
        return any(probe().get(name) for name in _INSTRUCTIONS)
    try:  # torch before 2.10
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not _INSTRUCTIONS.isdisjoint(words)


def named_dtype(dtype: Any) -> torch.dtype:
    """A floating type from itself or from its name, such as `"bfloat16"`.

    Raises:
        WeightsError: it is neither.

    Example:
        >>> named_dtype("bfloat16")
        torch.bfloat16
    """
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise WeightsError(f"dtype is {dtype!r}; it has to be a floating type of torch, such as 'bfloat16'.")
    return found
