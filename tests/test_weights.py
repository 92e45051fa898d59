"""Which open weights stand behind a language model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import dspy
import pytest
from test_lm import engine_of, pair, tiny_lm
from tiny_models import save_tiny

from dspy_greater.errors import WeightsError
from dspy_greater.served.weights import weights_behind


def test_explicit_weights_come_first_and_a_local_lm_is_its_own(tmp_path: Path) -> None:
    lm = tiny_lm()
    engine = engine_of(lm).engine
    other = pair(seed=3)
    assert weights_behind(lm) is engine
    found = weights_behind(lm, weights=other)
    assert found.model is other[0] and weights_behind(lm, weights=other) is found
    served = dspy.LM("openai/gpt-4o", api_key="x")
    assert weights_behind(served, weights=engine) is engine
    assert weights_behind(served, weights=lm) is engine
    path = save_tiny(tmp_path / "model")
    assert weights_behind(served, weights={"openai/gpt-4o": path}).name == path
    assert weights_behind(served, weights={"openai/gpt-4o": path, "hop": engine}, predictor_name="hop") is engine
    launched = dspy.LM(f"openai/local:{path}", api_key="x")
    assert weights_behind(launched) is weights_behind(served, weights=path)
    with pytest.raises(WeightsError, match="weights is a int"):
        weights_behind(lm, weights=3)


def test_an_api_model_fails_fast_and_names_predictor_lm_and_fix() -> None:
    started = time.monotonic()
    with pytest.raises(WeightsError, match=r"predictor 'hop'.*'openai/gpt-4o'.*Pass weights=.*local_lm"):
        weights_behind(dspy.LM("openai/gpt-4o", api_key="x"), predictor_name="hop")
    with pytest.raises(WeightsError, match="anthropic/claude"):
        weights_behind(dspy.LM("anthropic/claude-sonnet-4", api_key="x"), weights={"other": "x"})
    with pytest.raises(WeightsError, match="Ollama tags are not hub ids"):
        weights_behind(dspy.LM("ollama_chat/llama3.2:1b"))
    assert time.monotonic() - started < 1


def test_a_download_is_tried_last_and_only_for_a_model_that_is_served(monkeypatch: Any) -> None:
    asked: list[tuple[str, bool]] = []

    def absent(name: str, *, local_files_only: bool = False) -> Any:
        asked.append((name, local_files_only))
        raise WeightsError("not here")

    monkeypatch.setattr("dspy_greater.model.registry.shared_engine", absent)
    with pytest.raises(WeightsError, match=r"Tried 'org/name' \(not here\)"):
        weights_behind(dspy.LM("hosted_vllm/org/name", api_key="x"))
    assert asked == [("org/name", True), ("org/name", False)]
    asked.clear()
    for name in ("openai/org/name", "groq/org-name", "openai/gpt-4o"):
        with pytest.raises(WeightsError, match="Pass weights="):
            weights_behind(dspy.LM(name, api_key="x"))
    assert asked == []
