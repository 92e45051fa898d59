"""Open weights: how they are found, loaded and shared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import torch

from dspy_greater.errors import SettingsError, WeightsError
from dspy_greater.model.dtypes import default_dtype, named_dtype
from dspy_greater.model.engine import Engine
from dspy_greater.model.gguf import digest, find_gguf, is_gguf, load_gguf
from dspy_greater.model.placement import LOADING, refuse_dividing

POCKET = "pocket"  # the name of the model that travels with the package

_READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")  # files of a model's directory

# Arguments of `from_pretrained` that are about who loads the weights, and where from.
_OF_THE_LOADER = frozenset({"trust_remote_code", "local_files_only", "token", "cache_dir", "proxies"})

_shared: WeakValueDictionary[Any, Engine] = WeakValueDictionary()


def as_engine(weights: Any) -> Engine:
    """An engine from an engine, a `local_lm`, a `(model, tokenizer)` pair, or a name or path.

    `(name, options)` is a name or path that is loaded with more arguments of `from_pretrained`, such as
    `("Qwen/Qwen3-32B", {"device_map": "auto"})`.

    Raises:
        WeightsError: it is none of these, or cannot be loaded.
    """
    if isinstance(weights, Engine):
        remember(weights)
        return weights
    if isinstance(weights, (str, os.PathLike)):
        return shared_engine(os.fspath(weights))
    for holder in (weights, getattr(weights, "engine", None)):
        inner = getattr(holder, "engine", None)
        if isinstance(inner, Engine):
            return inner
    if isinstance(weights, (tuple, list)) and len(weights) == 2:
        name, options = weights
        if isinstance(name, (str, os.PathLike)) and isinstance(options, Mapping):
            return shared_engine(os.fspath(name), **cast("Mapping[str, Any]", options))
        return _from_pair(*weights)
    raise WeightsError(
        f"weights is a {type(weights).__name__}; pass an Engine, a local_lm, a loaded "
        "(model, tokenizer) pair, a name or path, a pair of one and options for loading, or a mapping "
        "to one of these from the predictor's name or the LM's model string."
    )


def shared_engine(
    name_or_path: str | os.PathLike[str],
    *,
    device: Any = None,
    dtype: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    **settings: Any,
) -> Engine:
    """`Engine.from_pretrained`, or the engine that already holds these weights; same arguments and errors.

    A directory or file that has changed is loaded anew.
    """
    name = os.fspath(name_or_path)
    if file := gguf_behind(name):
        place: Any = (os.path.realpath(name), digest(file))
    else:
        place = (os.path.realpath(name), _files(name)) if os.path.isdir(name) else name
    key = (place, str(device), str(dtype).removeprefix("torch."), revision, trust_remote_code, repr(settings))
    engine = _shared.get(key)
    if engine is None:
        engine = Engine.from_pretrained(
            name,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            **settings,
        )
        # Weights that were loaded before under another spelling are not kept twice.
        identity = engine.identity
        alike = (identity, str(engine.weights.device), repr(settings))
        before = _shared.get(alike)
        if before is not None and before.identity == identity:  # nobody has changed them since
            engine = before
        _shared[key] = _shared[alike] = engine
    return engine


def _files(directory: str) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of the files in a directory that a model may be loaded from."""
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.stat()) for entry in entries if entry.is_file() and entry.name.endswith(_READ)]
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in found))


def live_engine(identity: str) -> Engine | None:
    """The engine with this identity that some part of this process still holds, if any."""
    return next((engine for engine in list(_shared.values()) if engine.identity == identity), None)


def remember(engine: Engine) -> None:
    """Let `live_engine` find an engine that the caller built, so that a program saved with it can be loaded."""
    _shared[(engine.identity, id(engine))] = engine


def saved_origin(engine: Engine) -> dict[str, Any] | None:
    """How to load the same weights again, as plain values; None for weights that were handed in as objects.

    Code that comes with weights and keys are the business of whoever loads them, and are not saved. What cannot be
    saved is named, so that `load_saved` does not load the weights in another way.
    """
    if engine.origin is None:
        return None
    kept: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in engine.load_options.items():
        if name in _OF_THE_LOADER or value is None:
            continue
        plain = _plain(value) if name in LOADING else None
        if plain is None:
            lost.append(name)
        else:
            kept[name] = plain
    more = {"device": engine.load_device, "loading": kept, "lost": lost}
    return {**engine.origin, **{name: value for name, value in more.items() if value}}


def load_saved(origin: Mapping[str, Any]) -> Engine:
    """The engine of what `saved_origin` said, in this process or another one.

    A device that this machine lacks does not count.

    Raises:
        WeightsError: the weights could not be loaded, or something of how they were could not be saved.
    """
    name, lost = origin["name_or_path"], origin.get("lost") or ()
    if lost:
        raise WeightsError(
            f"The saved LM ran on {name!r}, loaded with {', '.join(lost)}, which could not be saved with it. Load the "
            f"weights in the same way first and keep them, as in lm = local_lm({name!r}, {lost[0]}=...), and load the "
            "program again."
        )
    given = origin.get("loading") or {}
    loading = {option: _numbered(given[option]) for option in LOADING if option in given}
    device = _if_here(origin.get("device"))
    return shared_engine(name, device=device, dtype=origin.get("dtype"), revision=origin.get("revision"), **loading)


def _plain(value: Any) -> Any:
    """The same as JSON has it; None for what it cannot hold."""

    def spelled(part: Any) -> str:
        if isinstance(part, (torch.device, os.PathLike)):
            return str(part)
        raise SettingsError(f"A {type(part).__name__} cannot be saved.")

    try:
        return json.loads(json.dumps(value, default=spelled))
    except (SettingsError, TypeError, ValueError):  # an object, or keys that are none of JSON
        return None


def _numbered(value: Any) -> Any:
    """A mapping whose keys are numbers where JSON made them text, as those of devices are."""
    if not isinstance(value, Mapping):
        return value
    return {int(key) if key.isdecimal() else key: _numbered(each) for key, each in value.items()}


def _if_here(device: str | None) -> str | None:
    """The device, if this machine has it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch says the latter where it was built without it
        return None
    return device


def load_pretrained(
    name: str,
    *,
    device: Any,
    dtype: Any,
    revision: str | None,
    trust_remote_code: bool,
    local_files_only: bool,
    **settings: Any,
) -> tuple[Any, Any]:
    """Model and tokenizer from safetensors or GGUF; what `Engine.from_pretrained` does first, with its errors."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    refuse_dividing(name, settings)
    dtype = dtype if dtype in (None, "auto") else named_dtype(dtype)
    target = torch.device(device) if device is not None else _best_device()
    if file := gguf_behind(name):
        return load_gguf(file, target=target, dtype=dtype, revision=revision, **settings)
    place = str(import_module("dspy_greater.pocket").path()) if name == POCKET else name
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    if revision is not None:
        common["revision"] = revision
    try:
        model_class = _model_class(place, {**common, **settings})
        if dtype is None:
            dtype = default_dtype(target, place, common, model_class)
        tokenizer = AutoTokenizer.from_pretrained(place, **common)
        loaded: Any = model_class.from_pretrained(
            place, dtype=dtype, use_safetensors=True, output_loading_info=True, **common, **settings
        )
        model, report = loaded
        if "device_map" not in settings:
            model = model.to(target)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"The weights of {name!r} could not be loaded ({first_line(error)}); pass a hub id, a "
            "GGUF file, or a directory with config.json, a tokenizer and *.safetensors (pickled weights are not read; "
            "trust_remote_code=True is needed for models that bring code of their own)."
        ) from error
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise WeightsError(
            f"The weights of {name!r} lack {len(missing)} parameters of their own architecture, such as "
            f"{missing[0]!r}, which would be random; the files are incomplete or of another model."
        )
    return model, tokenizer


def gguf_behind(name: str) -> Path | None:
    """The GGUF file that a name or path means, if it means one; raises what `find_gguf` raises."""
    return None if name == POCKET else find_gguf(name)


def _model_class(place: str, options: Mapping[str, Any]) -> Any:
    """AutoModelForCausalLM; for what that does not know, such as a vision-language model, the class of config.json."""
    import transformers

    known = ("trust_remote_code", "local_files_only", "revision", "token", "cache_dir", "subfolder")
    read = {name: options[name] for name in known if name in options}
    config = options.get("config") or transformers.AutoConfig.from_pretrained(place, **read)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    return next((kind for kind in named if hasattr(kind, "from_pretrained")), transformers.AutoModelForCausalLM)


def _best_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def is_here(name: str) -> bool:
    """Whether it is a directory or a GGUF file on this machine."""
    return os.path.isdir(name) or is_gguf(name)


def first_line(error: BaseException) -> str:
    """What an error says first, without the full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _from_pair(model: Any, tokenizer: Any) -> Engine:
    key = ("pair", id(model), id(tokenizer))
    engine = _shared.get(key)
    if engine is None or engine.model is not model:
        config = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", "") or type(model).__name__
        engine = Engine(model, tokenizer, name=name)
        _shared[key] = engine
    return engine
