"""Settings: presets, ranges, and errors that say what to do."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from dspy_greater.errors import GreaterError, SettingsError
from dspy_greater.settings import Settings


def test_without_a_preset_the_settings_are_the_papers() -> None:
    paper = Settings.of(None)
    assert (paper.steps, paper.top_k, paper.proposal_rows, paper.fluency_weight, paper.selections) == (
        105,
        10,
        5,
        0.2,
        3,
    )
    assert paper == Settings()


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


def test_an_unknown_variant_says_which_there_are() -> None:
    with pytest.raises(SettingsError, match="variant='papper' is not known. Use variant='paper'"):
        Settings.of(None, variant="papper")


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", float("nan")])
def test_a_count_has_to_be_a_whole_number_in_range(value: object) -> None:
    with pytest.raises(SettingsError, match="steps=.*: give a whole number of at least 0"):
        Settings.of(None, steps=value)


@pytest.mark.parametrize("name", ["train_rows", "top_k", "selections", "finalists", "threads", "proposal_draws"])
def test_what_cannot_be_zero_is_refused_by_name(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}=0: give a whole number of at least 1"):
        Settings.of(None, **{name: 0})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "0.2"])
@pytest.mark.parametrize("name", ["fluency_weight", "score_fluency_weight", "answer_temperature"])
def test_a_weight_has_to_be_a_finite_number_that_is_not_negative(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"{name}=.*: give a finite number that is not negative"):
        Settings.of(None, **{name: value})


def test_an_answer_temperature_of_zero_is_refused_because_it_is_a_divisor() -> None:
    with pytest.raises(SettingsError, match="answer_temperature=0: logits are divided by it"):
        Settings.of(None, answer_temperature=0)


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
