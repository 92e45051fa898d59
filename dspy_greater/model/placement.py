"""Where the weights of a model are: on one device, spread over several, or on a disk until a layer needs them.

`device_map` leaves a placeholder on the device "meta" in the place of a weight that is elsewhere, and a hook on its
module that fetches it. The hook knows both where the module computes and where its weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from dspy_greater.errors import WeightsError

# Arguments of `from_pretrained` that say where and how a model runs, and not which one it is.
LOADING = (
    "attn_implementation",
    "device_map",
    "distributed_config",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "quantization_config",
    "tp_plan",
)

# Those that divide the weights among processes, each of which would run the whole program.
_DIVIDING = ("distributed_config", "tp_plan")
_INSTEAD = (
    "and a search is one process. GReaTer(..., workers=1, shards=4) divides them among four processes that work for "
    "it; device_map='auto' spreads layers over the devices of this one."
)


def refuse_dividing(name: str, settings: Mapping[str, Any]) -> None:
    """Raises `WeightsError` where weights are to be loaded in parts, by this process and its like.

    >>> refuse_dividing("pocket", {"device_map": "auto", "tp_plan": None})
    """
    asked = [setting for setting in _DIVIDING if settings.get(setting) is not None]
    if asked:
        raise WeightsError(
            f"{' and '.join(asked)} would divide the weights of {name!r} among processes that all run the whole "
            f"program, {_INSTEAD} Leave {' and '.join(asked)} out."
        )


def refuse_parts(name: str, model: object) -> None:
    """Raises `WeightsError` where a model that was handed in has a part of its weights in this process.

    >>> refuse_parts("whole", torch.nn.Linear(2, 2))
    """
    if isinstance(model, Module) and any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise WeightsError(
            f"The weights of {name!r} are divided among processes (tensor parallel or FSDP) that all run the whole "
            f"program, {_INSTEAD} Pass the whole weights, or their name."
        )


def input_device(model: Any) -> torch.device:
    """Where token ids have to go: to the input embeddings, or to where these are fetched when they are needed.

    >>> input_device(torch.nn.Embedding(3, 2))
    device(type='cpu')
    """
    layer = model if isinstance(model, torch.nn.Embedding) else model.get_input_embeddings()
    if not layer.weight.is_meta:
        return layer.weight.device
    places = [getattr(hook, "execution_device", None) for hook in _hooks(layer)]
    return next((torch.device(place) for place in places if place is not None), layer.weight.device)


def fetched_later(model: Module) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    """Weights that are elsewhere, by name: what they are in, and under which key."""
    found: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            store = getattr(hook, "weights_map", None)
            if store is None:
                continue
            recurse = bool(getattr(hook, "place_submodules", False))
            named = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
            found.update({f"{prefix}.{key}": (store, key) for key, tensor in named if tensor.is_meta})
    return found


def copies_of_others(model: Module) -> frozenset[str]:
    """Names of weights that are others' own, such as an output layer's, and that placing made tensors of their own."""
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    tied: Any = getattr(model, "all_tied_weights_keys", None) or ()
    return frozenset(tied) if spread else frozenset()


def _hooks(module: Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
