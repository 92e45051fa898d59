"""Weights that a real quantiser made are searched with, or refused for what they lack; skipped where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dspy_greater import local_lm
from dspy_greater.errors import WeightsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Leaf, TokenQuery
from dspy_greater.model.registry import as_engine
from tests.short_search import short_search

pytestmark = [
    pytest.mark.slow,
    # What quantisers say while they are imported, or of their own kernels.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def quanto() -> Any:
    pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def torchao() -> Any:
    pytest.importorskip("torchao", reason="pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_activations() -> Any:
    pytest.importorskip("torchao", reason="pip install torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def bitsandbytes() -> Any:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4() -> Any:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


WITH_GRADIENT = [quanto, torchao, bitsandbytes]
WITHOUT = [torchao_activations, bitsandbytes_nf4]  # on a CPU


@pytest.mark.parametrize("quantise", [*WITH_GRADIENT, *WITHOUT])
def test_the_name_follows_how_weights_are_quantised_and_not_where_they_are(quantise: Callable[[], Any]) -> None:
    config = quantise()
    whole = as_engine(("pocket", {"device": "cpu"}))
    places: list[dict[str, Any]] = [{}, {"device_map": "cpu"}, {"device_map": "auto"}]
    names = {
        local_lm("pocket", device="cpu", quantization_config=config, **each).model.removeprefix("local/")
        for each in places
    }
    (name,) = names
    assert name != whole.identity and name.startswith("pocket@")
    assert name.endswith(f":float32+{config.quant_method.value}")
    assert name.partition(":")[0] != whole.identity.partition(":")[0]


@pytest.mark.parametrize("quantise", WITH_GRADIENT)
def test_a_search_on_quantised_weights_runs_to_its_end(quantise: Callable[[], Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "quantization_config": quantise()}
    lm = local_lm("pocket", cache=False, max_tokens=60, **options)
    own = short_search(lm, log_dir=tmp_path / "own", steps=2)
    others = short_search(log_dir=tmp_path / "weights", weights=("pocket", options), steps=2)
    for each in (own, others):
        assert len(each.detailed_results.steps) == 2


@pytest.mark.parametrize("quantise", WITHOUT)
def test_kernels_that_give_no_gradient_are_refused_before_a_step(quantise: Callable[[], Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "quantization_config": quantise()}
    refused = r"the weights of 'pocket' give no gradient.*The weights are quantised \((torchao|bitsandbytes)\)\. Load"
    with pytest.raises(WeightsError, match=refused):
        short_search(local_lm("pocket", cache=False, max_tokens=60, **options), log_dir=tmp_path / "own")
    with pytest.raises(WeightsError, match=refused):
        short_search(log_dir=tmp_path / "weights", weights=("pocket", options))


@pytest.mark.parametrize("quantise", [quanto, torchao])
def test_the_gradient_is_that_of_the_numbers_that_quantised_weights_stand_for(quantise: Callable[[], Any]) -> None:
    engine = as_engine(("pocket", {"device": "cpu", "quantization_config": quantise()}))
    same = Engine.from_pretrained("pocket", device="cpu", dtype="float32")
    whole = dict(same.model.named_parameters())
    with torch.no_grad():
        for name, each in engine.model.named_parameters():
            whole[name].copy_(each.dequantize() if hasattr(each, "dequantize") else each)
    sequences = [tuple(range(5, 45)), tuple(range(60, 90))]
    asked = [TokenQuery(row, len(each) - 1) for row, each in enumerate(sequences)]
    leaf = Leaf((20, 20), same.embed([7]))
    found, expected = (each.logprob_gradient(sequences, asked, leaf) for each in (engine, same))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert bool(expected.any())
