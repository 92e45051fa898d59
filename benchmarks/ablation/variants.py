"""The variants that are compared, as steps and settings of `GReaTerTeleprompter`, and the sweeps of single knobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.steps import CHANCE, PAPER_CHANCE, WITHOUT_REASONING
from dspy_greater.search.step import Step
from dspy_greater.search.variants import VARIANTS as STEPS

SEED_INSTRUCTION = "Answer the question."

# Other instructions to start from: one that makes the pocket model do something else than the task, and the two of
# the paper's appendix F.
STARTS: Mapping[str, str] = {
    "misleading": "Count the letters of the last word.",
    "published": "Use proper logical reasoning and think step by step. Finally, give the actual correct answer.",
    "feeling": "Use no thinking just feeling.",
}


@dataclass(frozen=True)
class Variant:
    """A kind of step, settings, and the instruction that the search starts from."""

    about: str
    step: Step = STEPS["default"]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    instruction: str = SEED_INSTRUCTION


_PAPER = STEPS["paper"]
VARIANTS: Mapping[str, Variant] = {
    "whole": Variant("the default"),
    "paper": Variant("Algorithm 1 as published", _PAPER),
    "without-reasoning": Variant("the paper's gradient with an empty reasoning (its figure 3)", WITHOUT_REASONING),
    "random": Variant("the default's edits, tried in random order, without gradient and forecast", CHANCE),
    "paper-random": Variant("the paper's proposals, tried in random order", PAPER_CHANCE),
    "without-chance": Variant(
        "the default, but forecasts decide even where they do not come true", settings={"explore_every": 0}
    ),
}

SWEEPS: Mapping[str, Variant] = {
    "k=5": Variant("fewer tokens proposed", settings={"top_k": 5}),
    "k=20": Variant("more tokens proposed", settings={"top_k": 20}),
    "q=3": Variant("fewer rows in an intersection", settings={"proposal_rows": 3}),
    "q=10": Variant("more rows in an intersection", settings={"proposal_rows": 10}),
    "ahead=1": Variant("one position looked at, as the paper does", settings={"positions_ahead": 1}),
    "ahead=2": Variant("two positions", settings={"positions_ahead": 2}),
    "mu=3": Variant("three candidates tried, not one", settings={"selections": 3}),
    "mu=1-paper": Variant("the paper's variant, one candidate tried", _PAPER, {"selections": 1}),
    "lambda=0": Variant("the paper's variant without fluency in the loss", _PAPER, {"fluency_weight": 0.0}),
    "lambda=1": Variant("the paper's variant with more of it", _PAPER, {"fluency_weight": 1.0}),
}

# Each variant from each of these: `published` is the default from there, `published-paper` the paper's.
FROM: Mapping[str, Variant] = {
    start if name == "whole" else f"{start}-{name}": replace(
        variant, about=f"{variant.about}, from {text!r}", instruction=text
    )
    for start, text in STARTS.items()
    for name, variant in {**VARIANTS, **SWEEPS}.items()
}
