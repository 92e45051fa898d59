"""GRAD-SUM with its task model behind a real OpenAI-compatible server on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import gradsum_judge
import pytest
from serving import needs_serving

pytestmark = [pytest.mark.slow, needs_serving]


def test_a_served_model_is_optimised_end_to_end_by_a_judge(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    addresses: list[str] = []
    serve = gradsum_judge.served

    @contextmanager
    def remembered(weights: Path) -> Iterator[str]:
        with serve(weights) as address:
            addresses.append(address)
            yield address

    monkeypatch.setattr(gradsum_judge, "served", remembered)
    figures = gradsum_judge.main(
        ["--rows", "4", "--test-rows", "4", "--iterations", "1", "--sample-size", "3", "--subset-size", "2"]
    )
    told = capsys.readouterr().out
    assert "judge and editor a script" in told
    assert figures["found"]["judge"] >= figures["seed"]["judge"]  # what the weights can do is not this test's business
    spent = figures["spent"]
    assert spent["generation"]["calls"] == spent["generation"]["runs"] > 0
    assert spent["generation"]["prompt_tokens"] > spent["generation"]["completion_tokens"] > 0
    assert spent["evaluation"]["answered"] > 0
    (address,) = addresses
    assert urlparse(address).hostname == "127.0.0.1"
    with socket.socket() as probe:  # the server is gone
        assert probe.connect_ex(("127.0.0.1", urlparse(address).port)) != 0
