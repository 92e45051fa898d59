"""The variants that are compared, as settings of `GReaTerTeleprompter`, and the sweeps of single knobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SEED_INSTRUCTION = "Answer the question."
MISLEADING = "Count the letters of the last word."


@dataclass(frozen=True)
class Variant:
    """Settings under a name, and the instruction that the search starts from."""

    about: str
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    instruction: str = SEED_INSTRUCTION


VARIANTS: Mapping[str, Variant] = {
    "whole": Variant("the default"),
    "paper": Variant("Algorithm 1 as published", {"variant": "paper"}),
    "without-reasoning": Variant(
        "the paper's gradient with an empty reasoning (its figure 3)", {"variant": "paper", "estimator": "answer"}
    ),
    "random": Variant(
        "the default's edits, tried in random order, without gradient and forecast",
        {"estimator": "random", "rescored": 0},
    ),
    "paper-random": Variant(
        "the paper's proposals, tried in random order", {"variant": "paper", "estimator": "random"}
    ),
    "without-chance": Variant(
        "the default, but forecasts decide even where they do not come true", {"explore_every": 0}
    ),
    "loss": Variant("the default, but cross-entropy decides what is accepted", {"acceptance": "loss"}),
}

SWEEPS: Mapping[str, Variant] = {
    "k=5": Variant("fewer tokens proposed", {"top_k": 5}),
    "k=20": Variant("more tokens proposed", {"top_k": 20}),
    "q=3": Variant("fewer rows in an intersection", {"proposal_rows": 3}),
    "q=10": Variant("more rows in an intersection", {"proposal_rows": 10}),
    "mu=3": Variant("three candidates tried, not one", {"selections": 3}),
    "mu=1-paper": Variant("the paper's variant, one candidate tried", {"variant": "paper", "selections": 1}),
    "lambda=0": Variant("the paper's variant without fluency in the loss", {"variant": "paper", "fluency_weight": 0.0}),
    "lambda=1": Variant("the paper's variant with more of it", {"variant": "paper", "fluency_weight": 1.0}),
    "misleading": Variant("from a misleading instruction (the paper's table 7)", {}, MISLEADING),
    "misleading-random": Variant(
        "the same, the default's edits in random order", {"estimator": "random", "rescored": 0}, MISLEADING
    ),
    "misleading-paper": Variant("the same, the paper's variant", {"variant": "paper"}, MISLEADING),
    "misleading-paper-random": Variant(
        "the same, the paper's proposals in random order", {"variant": "paper", "estimator": "random"}, MISLEADING
    ),
}

# Each of the default variant's above once more, with an instruction that moves only to what is better than the noise.
WITHOUT_WALK: Mapping[str, Variant] = {
    f"{name}-without-walk": replace(variant, settings={**variant.settings, "walk": False})
    for name, variant in {**VARIANTS, **SWEEPS}.items()
    if variant.settings.get("variant") != "paper"
}
