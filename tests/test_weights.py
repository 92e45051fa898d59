"""Which open weights stand behind a language model."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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


@pytest.fixture
def server() -> Iterator[Any]:
    """Lists one model, as vLLM does; `server.models` is the list."""
    seen = SimpleNamespace(models=[], keys=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.keys.append(self.headers.get("Authorization"))
            body = json.dumps({"data": seen.models}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{running.server_port}/v1"
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield seen
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_server_is_asked_what_its_alias_is_made_from(server: Any, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    server.models = [{"id": "other", "root": "nowhere"}, {"id": "assistant", "root": path}]
    engine = weights_behind(dspy.LM("openai/assistant", api_base=server.url, api_key="secret"))
    assert engine.name == path and server.keys == ["Bearer secret"]
    server.models = [{"id": "nothing", "root": "not a name"}]
    with pytest.raises(WeightsError, match=r"'openai/else'"):
        weights_behind(dspy.LM("openai/else", api_base=server.url, api_key="x"))


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
