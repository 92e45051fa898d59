"""Where weights are changes neither what they are called nor what they compute."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import numbered_tokenizer, save_tiny, tiny_model

from dspy_greater import local_lm
from dspy_greater.errors import SettingsError, WeightsError
from dspy_greater.lm.local import LocalEngine
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import GenerationRequest, Leaf, TokenQuery
from dspy_greater.model.registry import as_engine, live_engine

ON_DISK = {"model.layers.1": "disk", "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu"}
ALL_ON_DISK = dict.fromkeys((*ON_DISK, "lm_head"), "disk") | {"model.rotary_emb": "cpu", "model.norm": "cpu"}

PLACEMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "auto": lambda folder: {"device_map": "auto"},
    "one device": lambda folder: {"device_map": "cpu", "max_memory": {"cpu": "1GiB"}},
    "a layer on disk": lambda folder: {
        "device_map": {**ON_DISK, "lm_head": "cpu", "model.rotary_emb": "cpu"},
        "offload_folder": str(folder / "away"),
    },
    "embeddings on disk": lambda folder: {"device_map": ALL_ON_DISK, "offload_folder": str(folder / "away")},
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return save_tiny(tmp_path / "model", tie_word_embeddings=request.param)


def computed(engine: Engine) -> list[Any]:
    sequences = [(*range(5, 45), *range(60, 64 + row)) for row in range(3)]
    asked = [TokenQuery(row, len(each) - 1) for row, each in enumerate(sequences)]
    gradient = engine.logprob_gradient(sequences, asked, Leaf((20,) * 3, engine.embed([7])))
    texts = engine.generate([GenerationRequest(each, 8) for each in sequences])
    return [engine.token_logprobs(sequences, asked).tolist(), gradient.tolist(), texts]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placed_weights_keep_their_name_and_compute_the_same_bits(saved: str, placement: str, tmp_path: Path) -> None:
    whole = Engine.from_pretrained(saved, device="cpu", dtype="float32")
    placed = local_lm(saved, device="cpu", dtype="float32", **PLACEMENTS[placement](tmp_path))
    engine: Engine = placed.engine.engine
    assert engine is not whole and placed.model == f"local/{whole.identity}"
    assert engine.checks.backward().works
    assert computed(engine) == computed(whole)
    assert engine.identity == whole.identity


def test_other_weights_on_disk_have_another_name(tmp_path: Path) -> None:
    names = set()
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        path = save_tiny(folder / "model", seed=seed)
        options = PLACEMENTS["embeddings on disk"](folder)
        names.add(Engine.from_pretrained(path, device="cpu", dtype="float32", **options).checks.revision)
    assert len(names) == 2


def test_another_attention_is_loaded_and_keeps_the_name(saved: str) -> None:
    whole = Engine.from_pretrained(saved, device="cpu", dtype="float32")
    lm = local_lm(saved, device="cpu", dtype="float32", attn_implementation="eager")
    engine: Engine = lm.engine.engine
    assert engine.model.config._attn_implementation == "eager" != whole.model.config._attn_implementation
    assert engine.identity == whole.identity
    for found, expected in zip(computed(engine)[:2], computed(whole)[:2], strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_a_saved_program_loads_its_weights_as_they_were_loaded(saved: str) -> None:
    options: dict[str, Any] = {
        "attn_implementation": "eager",
        "device_map": {"": torch.device("cpu")},
        "max_memory": {0: "1GiB", "cpu": "2GiB"},
    }
    lm = local_lm(saved, device="cpu", dtype="float32", **options)
    state, identity = json.loads(json.dumps(lm.engine.dump_state())), lm.engine.engine.identity
    del lm
    gc.collect()
    assert live_engine(identity) is None
    engine = LocalEngine.load_state(state).engine
    assert engine.load_device == "cpu" and engine.model.config._attn_implementation == "eager"
    assert {name: engine.load_options[name] for name in options} == {**options, "device_map": {"": "cpu"}}


def test_a_saved_program_of_before_and_one_of_a_device_that_is_not_here_load_where_this_machine_would(
    saved: str,
) -> None:
    state = LocalEngine(Engine.from_pretrained(saved)).dump_state()
    assert set(state["origin"]) == {"name_or_path", "dtype", "revision"}  # as ever, where nothing was said
    gc.collect()
    assert LocalEngine.load_state(state).engine.identity == state["identity"]
    elsewhere = {**state, "origin": {**state["origin"], "device": "cuda:99"}}
    assert LocalEngine.load_state(elsewhere).engine.load_device is None


def test_what_cannot_be_saved_of_how_weights_were_loaded_is_named_before_they_are_loaded(saved: str) -> None:
    engine = Engine.from_pretrained(saved, token="very-secret")
    engine.load_options["quantization_config"] = object()
    state = LocalEngine(engine).dump_state()
    assert "very-secret" not in json.dumps(state)
    del engine
    gc.collect()
    expected = r"loaded with quantization_config, which could not be saved with it.*quantization_config=\.\.\."
    with pytest.raises(WeightsError, match=expected):
        LocalEngine.load_state(state)


def test_a_saved_program_lets_no_code_run_that_its_loader_did_not_allow(saved: str) -> None:
    engine = Engine.from_pretrained(saved, trust_remote_code=True)
    state = LocalEngine(engine).dump_state()
    assert "trust_remote_code" not in json.dumps(state)
    del engine
    gc.collect()
    state["origin"]["loading"] = {"trust_remote_code": True}
    assert LocalEngine.load_state(state).engine.load_options["trust_remote_code"] is False


def test_weights_take_a_name_with_options(saved: str) -> None:
    options = {"device_map": "auto", "dtype": "float32", "device": "cpu"}
    engine = as_engine((saved, options))
    assert engine.load_options["device_map"] == "auto" and as_engine((saved, options)) is engine
    assert as_engine(saved) is not engine


def test_options_for_loading_are_refused_for_what_is_loaded(saved: str) -> None:
    engine = Engine.from_pretrained(saved, device="cpu")
    with pytest.raises(SettingsError, match="device_map says how weights are loaded, and these are loaded already"):
        local_lm(engine, device_map="auto")


@pytest.mark.parametrize("option", ["tp_plan", "distributed_config"])
def test_weights_that_processes_would_divide_are_refused_with_what_to_use(saved: str, option: str) -> None:
    expected = f"{option} would divide the weights of .*workers=1, shards=4.*device_map='auto'.*Leave {option} out."
    with pytest.raises(WeightsError, match=expected):
        local_lm(saved, device="cpu", **dict[str, Any]({option: "auto"}))
    with pytest.raises(WeightsError, match=expected):
        as_engine((saved, {"device": "cpu", option: "auto"}))


def test_a_model_of_which_a_part_is_here_is_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    alone: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=alone, rank=0, world_size=1)
    try:
        model = tiny_model("llama", 64)
        layer = model.model.layers[0].mlp.up_proj
        part = distribute_tensor(layer.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        layer.weight = torch.nn.Parameter(part, requires_grad=False)
        with pytest.raises(WeightsError, match="divided among processes .tensor parallel or FSDP.*Pass the whole"):
            local_lm((model, numbered_tokenizer(64)))
    finally:
        dist.destroy_process_group()


def test_options_that_transformers_refuses_are_an_error_of_weights(saved: str) -> None:
    with pytest.raises(WeightsError, match="could not be loaded"):
        local_lm(saved, attn_implementation="no such attention")
