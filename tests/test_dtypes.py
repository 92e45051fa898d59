"""The floating type of weights when the caller does not say: nothing that is stored gets lost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_lm import engine_of
from tiny_models import save_tiny

from dspy_greater.errors import WeightsError
from dspy_greater.lm.local import local_lm
from dspy_greater.model import dtypes
from dspy_greater.model.dtypes import SMALL, chosen_dtype, computes_bfloat16, default_dtype, named_dtype
from dspy_greater.model.engine import Engine
from dspy_greater.model.registry import shared_engine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def processor(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    monkeypatch.setattr(dtypes, "computes_bfloat16", lambda: bfloat16)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [SMALL - 1, SMALL])
@pytest.mark.parametrize("native", [True, False])
def test_a_processor_reads_in_bfloat16_only_what_is_large_and_loses_nothing(
    stored: torch.dtype, size: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, bfloat16=native)
    narrow = native and size >= SMALL and stored != torch.float32
    assert chosen_dtype(CPU, stored, size) == (torch.bfloat16 if narrow else torch.float32)
    assert chosen_dtype(GPU, stored, size) == stored


@pytest.mark.parametrize("saved", ["bfloat16", "float16", "float32"])
def test_a_directory_is_loaded_in_the_type_of_its_configuration_and_size(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, bfloat16=True)
    path, state = save_tiny(tmp_path, dtype=getattr(torch, saved)), torch.get_rng_state()
    assert default_dtype(CPU, path, {}) == torch.float32  # small
    monkeypatch.setattr(dtypes, "SMALL", 1000)
    expected = "float32" if saved == "float32" else "bfloat16"
    assert default_dtype(CPU, path, {}) == getattr(torch, expected)
    assert torch.equal(torch.get_rng_state(), state)
    lm = local_lm(path)
    assert engine_of(lm).engine.weights.dtype == getattr(torch, expected) and lm.model.endswith(f":{expected}")
    assert shared_engine(path, dtype="float64").identity.endswith(":float64")


def test_without_bfloat16_nothing_is_read_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, bfloat16=False)
    assert default_dtype(CPU, "no such place", {}) == torch.float32
    assert default_dtype(GPU, "no such place", {}) == "auto"


def test_a_place_that_is_nowhere_is_our_own_error_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processor(monkeypatch, bfloat16=True)
    with pytest.raises(WeightsError, match="could not be loaded"):
        shared_engine(tmp_path, local_files_only=True)


def test_the_pocket_model_stays_in_float32_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, bfloat16=True)
    assert engine_of(local_lm("pocket", device="cpu")).engine.weights.dtype == torch.float32


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_what_the_processor_says_of_itself_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"avx2": True, "avx512_f": True, "neon": True, "architecture": "some"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: plain, raising=False)
    assert not computes_bfloat16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**plain, name: True})
    assert computes_bfloat16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**plain, name: False})
    assert not computes_bfloat16()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("Features\t: fp asimd i8mm bf16 dgh", True),
        ("Features\t: fp asimd asimddp", False),
    ],
)
def test_an_older_torch_asks_the_system(flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(path: Any) -> Any:
        return SimpleNamespace(read_text=lambda **_: flags)

    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(dtypes, "Path", told)
    assert computes_bfloat16() is expected


def test_a_type_is_a_torch_type_or_its_name() -> None:
    assert named_dtype("torch.float16") == named_dtype(torch.float16) == torch.float16
    for wrong in ("int8", "nothing", torch.int64):
        with pytest.raises(WeightsError, match=r"it has to be a floating type of torch, such as 'bfloat16'"):
            named_dtype(wrong)


@pytest.mark.parametrize("dtype", ["bf16", "nonsense", "int8", torch.int8])
def test_a_misspelt_type_is_our_own_error_before_anything_is_read(dtype: Any) -> None:
    with pytest.raises(WeightsError, match="it has to be a floating type of torch, such as 'bfloat16'"):
        Engine.from_pretrained("pocket", dtype=dtype)
    with pytest.raises(WeightsError, match="it has to be a floating type of torch"):
        local_lm("pocket", dtype=dtype)
