"""Weights that give no gradient are refused for searches that need one, and may write all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripted_engine import (
    ScriptedEngine,
    exact_match,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
    shared_tokenizer,
    small_model,
)
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from dspy_greater import GReaTerTeleprompter
from dspy_greater.errors import WeightsError
from dspy_greater.model.backward_probe import try_backward
from dspy_greater.model.engine import Engine
from dspy_greater.search.default_step import DefaultStep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")


class NoBackward(torch.nn.Module):
    """As an inference kernel of a quantised layer."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return self.linear(hidden)


class Detached(NoBackward):
    """As a kernel that hands out a new tensor."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).detach()


class Kernel(torch.autograd.Function):
    """A kernel without a backward pass: torch itself raises where one is asked for."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden @ weight.T


class Unfinished(NoBackward):
    """Its backward pass raises."""

    def forward(self, hidden: Tensor) -> Any:
        return Kernel.apply(hidden, self.linear.weight)


class Overflowing(NoBackward):
    """Its output is right and its gradient is not a number."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) + 0 * (hidden - hidden.detach()).sum(-1, keepdim=True).sqrt()


def replaced(model: Any, kind: type[NoBackward], *names: str) -> Any:
    """The model with layers of this kind in the place of the linear ones of those names."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if name in names and isinstance(child, torch.nn.Linear):
                    setattr(part, name, kind(child))
    return model


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAULTS = {
    NoBackward: r"is zero, though they are related\. No gradient passes \d+ layers of type NoBackward, such as",
    Detached: r"is zero, though they are related\. No gradient passes \d+ layers of type Detached, such as",
    Unfinished: r"backward pass fails: You must implement either the backward or vjp method for your custom autograd\.",
    Overflowing: r"with respect to an earlier token's embedding is not finite",
}


@pytest.mark.parametrize("kind", list(FAULTS))
def test_weights_without_a_gradient_are_refused_before_the_search_and_may_write(kind: type[NoBackward]) -> None:
    tokenizer = shared_tokenizer()
    engine = ScriptedEngine(obedient_script, model=replaced(small_model(tokenizer), kind, *ALL))
    remedy = r".* Load 'scripted' in bfloat16 or float32, without quantisation .*weights="
    with pytest.raises(WeightsError, match=f"Predictor `predict`: .* give no gradient.*{FAULTS[kind]}{remedy}"):
        optimizer().compile(program_on(engine), planted_rows(8))
    assert engine.batches == []  # nothing was generated
    assert program_on(engine)(question="one of apples").answer in ("yes", "no")


def test_what_needs_no_gradient_may_use_weights_without_one() -> None:
    engine = ScriptedEngine(obedient_script, model=replaced(small_model(shared_tokenizer()), NoBackward, *ALL))
    better = optimizer(variant=DefaultStep(rank=None, forecast=None, needs_gradient=False), steps=1).compile(
        program_on(engine), planted_rows(8)
    )
    assert better.detailed_results.steps


def test_other_weights_for_the_gradient_are_the_remedy() -> None:
    tokenizer = shared_tokenizer()
    engine = ScriptedEngine(obedient_script, model=replaced(small_model(tokenizer), NoBackward, *ALL))
    better = optimizer(steps=1, weights=(small_model(tokenizer), tokenizer)).compile(
        program_on(engine), planted_rows(8)
    )
    assert better.detailed_results.steps


@pytest.mark.slow
@pytest.mark.parametrize("names", [("down_proj",), ("gate_proj", "up_proj", "down_proj"), ("v_proj",)])
def test_layers_that_hold_back_a_part_of_the_gradient_are_named_in_a_warning(names: tuple[str, ...]) -> None:
    model = replaced(small_model(shared_tokenizer(), layers=2), NoBackward, *names)
    engine = ScriptedEngine(obedient_script, model=model)
    with pytest.warns(UserWarning, match="not the whole one. No gradient passes .* of type NoBackward") as heard:
        optimizer(steps=1).compile(program_on(engine), planted_rows(8))
    assert heard[0].filename == __file__


def test_the_quantisation_is_named_where_the_configuration_tells_it() -> None:
    model = replaced(tiny_model(vocab_size=512), NoBackward, *ALL)
    model.config.quantization_config = {"quant_method": "gptq"}
    engine = Engine(model, tiny_tokenizer(), name="tiny")
    assert "The weights are quantised (gptq)." in engine.checks.backward().explained("tiny", model)
    assert engine.identity.endswith(":float32+gptq")


def test_a_model_that_does_not_look_back_is_not_blamed_for_a_gradient_of_zero() -> None:
    assert planted_engine().checks.backward().works


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_with_a_gradient_pass_and_are_tried_once(kind: Any, dtype: torch.dtype, monkeypatch: Any) -> None:
    engine = Engine(tiny_model(kind, 512, dtype), tiny_tokenizer(), name="tiny")
    times: list[int] = []

    def counted(*args: Any) -> Any:
        times.append(1)
        return try_backward(*args)

    monkeypatch.setattr("dspy_greater.model.checks.try_backward", counted)
    for _ in range(2):
        assert engine.checks.backward().works and engine.checks.backward().blocked == ()
    assert len(times) == 1
    replaced(engine.model, NoBackward, *ALL)
    assert not engine.checks.backward().works and len(times) == 2


def test_weights_that_were_loaded_for_inference_alone_are_refused_and_not_found_out_later() -> None:
    with torch.inference_mode():
        model = small_model(shared_tokenizer())
    engine = ScriptedEngine(obedient_script, model=model)
    teleprompter = GReaTerTeleprompter(metric=exact_match, auto=None, steps=1, progress=False)
    with pytest.raises(WeightsError, match=r"The backward pass fails: Inference tensors cannot be saved for backward"):
        teleprompter.compile(program_on(engine), planted_rows(8))
