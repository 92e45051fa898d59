"""Settings: presets, ranges, and errors that say what to do."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspy_greater import GradSumTeleprompter, GReaTerTeleprompter
from dspy_greater.errors import GreaterError, SettingsError
from dspy_greater.gradsum.settings import GradSumSettings
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.paper_step import PaperStep
from dspy_greater.search.variants import step_of
from dspy_greater.settings import Settings


def test_without_a_preset_the_settings_are_the_papers() -> None:
    paper = Settings.of(None)
    assert (paper.steps, paper.train_rows, paper.top_k, paper.proposal_rows, paper.fluency_weight) == (
        105,
        50,
        10,
        5,
        0.2,
    )
    assert paper == Settings()


def test_how_many_candidates_are_tried_depends_on_the_step_unless_it_is_said() -> None:
    assert (Settings().selections, step_of("default").selections, step_of("paper").selections) == (None, 1, 3)


def test_a_preset_costs_less_than_the_next_one() -> None:
    light, medium, heavy = (Settings.of(auto) for auto in ("light", "medium", "heavy"))
    for name in ("steps", "train_rows", "validation_rows"):
        assert getattr(light, name) < getattr(medium, name) < getattr(heavy, name)


def test_a_setting_of_the_users_own_wins_over_the_preset_and_none_keeps_it() -> None:
    assert Settings.of("light", steps=3).steps == 3
    assert Settings.of("light", steps=None).steps == Settings.of("light").steps


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="auto='lihgt' is not a preset. Use one of 'light', 'medium', 'heavy' or"):
        Settings.of("lihgt")


def test_a_preset_of_another_type_is_refused_like_an_unknown_one() -> None:
    with pytest.raises(SettingsError, match="is not a preset"):
        Settings.of(["light"])


def test_an_unknown_setting_is_named_and_the_known_ones_are_listed() -> None:
    with pytest.raises(SettingsError, match="There is no setting stepz. The settings are: answer_temperature, .*steps"):
        Settings.of("light", stepz=5)


@pytest.mark.parametrize("variant", ["papper", "whole", None, 3, PaperStep, SimpleNamespace(take=len, move=len)])
def test_an_unknown_variant_says_which_there_are(variant: Any) -> None:
    with pytest.raises(SettingsError, match="variant=.* is not known. Use one of 'default', 'paper', or a step."):
        GReaTerTeleprompter(variant=variant)


def test_a_variant_is_a_step_by_its_name_or_of_ones_own() -> None:
    assert GReaTerTeleprompter().step == DefaultStep()
    assert GReaTerTeleprompter(variant="paper").step == PaperStep()
    own = DefaultStep(rank=None, selections=2)
    assert GReaTerTeleprompter(variant=own).step is own


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", float("nan")])
def test_a_count_has_to_be_a_whole_number_in_range(value: object) -> None:
    with pytest.raises(SettingsError, match="steps=.*: give a whole number of at least 0"):
        Settings.of(None, steps=value)


@pytest.mark.parametrize(
    "name", ["train_rows", "top_k", "selections", "finalists", "num_threads", "proposal_draws", "replayed"]
)
def test_what_cannot_be_zero_is_refused_by_name(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}=0: give a whole number of at least 1"):
        Settings.of(None, **{name: 0})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "0.2"])
@pytest.mark.parametrize(
    "name",
    [
        "fluency_weight",
        "score_fluency_weight",
        "answer_temperature",
        "answer_weight",
        "uncertainty_weight",
        "baseline_scale",
    ],
)
def test_a_weight_has_to_be_a_finite_number_that_is_not_negative(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"{name}=.*: give a finite number that is not negative"):
        Settings.of(None, **{name: value})


def test_a_temperature_of_zero_is_refused_because_it_is_a_divisor() -> None:
    with pytest.raises(SettingsError, match="answer_temperature=0: logits are divided by it"):
        Settings.of(None, answer_temperature=0)


def test_no_candidate_needs_to_be_forecast() -> None:
    assert Settings(forecasts=0).forecasts == 0
    with pytest.raises(SettingsError, match="forecasts=-1: give a whole number of at least 0"):
        Settings.of(None, forecasts=-1)


def test_errors_can_be_caught_as_the_packages_own_and_as_value_errors() -> None:
    with pytest.raises(GreaterError):
        Settings.of(None, top_k=-3)
    with pytest.raises(ValueError, match="top_k"):
        Settings.of(None, top_k=-3)


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = Settings()
    with pytest.raises(FrozenInstanceError):
        settings.steps = 3


def test_every_setting_is_checked_for_its_type() -> None:
    for field in fields(Settings):
        with pytest.raises(SettingsError, match=field.name):
            Settings.of(None, **{field.name: object()})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1e6"])
def test_a_budget_of_tokens_has_to_be_a_whole_number_if_there_is_one(value: object) -> None:
    assert Settings.of("light").max_generated_tokens is None
    assert Settings.of("light", max_generated_tokens=1).max_generated_tokens == 1
    with pytest.raises(SettingsError, match="max_generated_tokens=.*: give a whole number of at least 1"):
        Settings.of("light", max_generated_tokens=value)


def test_a_search_that_would_never_forecast_again_is_refused() -> None:
    with pytest.raises(SettingsError, match="explore_every=1: no step would forecast again; give 2 or more, or 0"):
        Settings(explore_every=1)
    assert [Settings(explore_every=each).explore_every for each in (0, 2)] == [0, 2]


# ---- numbers of other libraries


def kinds_of(value: Any) -> list[Any]:
    """The same number as numpy and torch have it."""
    if isinstance(value, bool):
        return [np.bool_(value), np.array(value), torch.tensor(value)]
    if isinstance(value, int):
        return [np.int64(value), np.int32(value), np.uint8(max(2, value % 256)), np.array(value), torch.tensor(value)]
    return [np.float64(value), np.float32(value), np.array([value]), torch.tensor(value, dtype=torch.float64)]


NUMBERS = {name: value for name, value in asdict(Settings()).items() if isinstance(value, (int, float))}
NUMBERS |= {"selections": 2, "max_generated_tokens": 7}
OF_GRADSUM = {name: value for name, value in asdict(GradSumSettings()).items() if isinstance(value, (int, float))}
OF_GRADSUM |= {"max_lm_calls": 9, "max_lm_tokens": 9}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((Settings, name, value) for name, value in NUMBERS.items()),
        *((GradSumSettings, name, value) for name, value in OF_GRADSUM.items()),
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(kind: Any, name: str, value: Any) -> None:
    for given in kinds_of(value):
        settings = kind.of(None, **{name: given})
        found = getattr(settings, name)
        assert type(found) in (bool, int, float) and type(found) is type(given.item())
        assert found == given.item()
        json.dumps(asdict(settings))


def test_a_run_with_numbers_of_numpy_is_the_same_run() -> None:
    plain = GReaTerTeleprompter(seed=3, steps=5, fluency_weight=0.5)
    numpy = GReaTerTeleprompter(seed=np.int64(3), steps=np.int16(5), fluency_weight=np.float32(0.5))
    assert (numpy.settings, numpy.seed) == (plain.settings, plain.seed)
    assert json.dumps([asdict(numpy.settings), numpy.seed]) == json.dumps([asdict(plain.settings), plain.seed])
    textual = GradSumTeleprompter("Do it.", "good", seed=np.uint8(3), judge_scale=np.array([0, 2]), summarize=np.True_)
    assert (textual.seed, textual.settings) == (3, GradSumSettings(judge_scale=(0, 2)))
    assert json.dumps(asdict(textual.settings))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", np.float64(5.0)),
        ("steps", np.bool_(True)),
        ("steps", np.array([1, 2])),
        ("fluency_weight", np.float32("nan")),
        ("positions_ahead", np.int64(0)),
        ("steps", np.datetime64("2024-01-01")),
    ],
)
def test_what_is_out_of_range_stays_so_as_a_number_of_numpy(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name}="):
        Settings.of(None, **{name: value})


@pytest.mark.parametrize("seed", [np.float64(1), np.bool_(True), np.array([1, 2]), "1"])
def test_a_seed_of_numpy_has_to_be_a_whole_number_too(seed: Any) -> None:
    for build in (GReaTerTeleprompter, lambda **options: GradSumTeleprompter("Do it.", "good", **options)):
        with pytest.raises(SettingsError, match="seed=.*: give a whole number"):
            build(seed=seed)


class Elsewhere:
    """A path of another library."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __fspath__(self) -> Any:
        return self.path


@pytest.mark.parametrize("build", [GReaTerTeleprompter, partial(GradSumTeleprompter, "Do it.", "good")])
def test_a_log_dir_is_any_path_and_nothing_else(build: Any) -> None:
    assert build(log_dir=None).log_dir is None
    assert build(log_dir="runs/a").log_dir == "runs/a" == build(log_dir=np.str_("runs/a")).log_dir
    assert build(log_dir=Path("runs/a")).log_dir == build(log_dir=Elsewhere("runs/a")).log_dir == Path("runs/a")
    for bad in ("", " ", 3, b"runs", Elsewhere(b"runs"), Elsewhere(""), ["runs"], True):
        with pytest.raises(SettingsError, match="log_dir=.*: give the path of a directory, or None"):
            build(log_dir=bad)
