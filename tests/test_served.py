"""Who answers behind an LM, and which weights it says it serves."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from serving import free_port
from stand_ins import Answers, completion, knows, llama_cpp, ollama, sglang, stand_in, vllm
from tiny_models import save_tiny

from dspy_greater import served_lm
from dspy_greater.errors import ServerError, WeightsError
from dspy_greater.lm.address import address_of
from dspy_greater.served.http import ask
from dspy_greater.served.kinds import who_answers
from dspy_greater.served.weights import weights_behind

VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE", "HOSTED_VLLM_API_BASE", "OLLAMA_API_BASE", "LLAMAFILE_API_BASE")


@pytest.fixture(autouse=True)
def _no_address_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def lm_on(url: str, name: str = "assistant", **more: Any) -> dspy.LM:
    return dspy.LM(f"openai/{name}", api_base=url, api_key="secret", **more)


# --- where the calls go ---


@pytest.mark.parametrize(
    ("model", "options", "variables", "base"),
    [
        ("openai/m", {"api_base": "http://a/v1/"}, {"OPENAI_API_BASE": "http://b/v1"}, "http://a/v1"),
        ("openai/m", {"base_url": "http://a/v1"}, {}, "http://a/v1"),
        ("openai/m", {}, {"OPENAI_API_BASE": "http://b/v1"}, "http://b/v1"),
        ("openai/m", {}, {"OPENAI_API_BASE": "http://b/v1", "OPENAI_BASE_URL": "http://c/v1"}, "http://c/v1"),
        ("hosted_vllm/org/m", {}, {"HOSTED_VLLM_API_BASE": "http://d/v1"}, "http://d/v1"),
        ("hosted_vllm/org/m", {}, {"OPENAI_API_BASE": "http://b/v1"}, None),
        ("ollama_chat/m:1b", {}, {}, "http://localhost:11434"),
        ("ollama/m:1b", {}, {"OLLAMA_API_BASE": "http://e:1"}, "http://e:1"),
        ("llamafile/m", {}, {}, "http://127.0.0.1:8080/v1"),
        ("openai/gpt-4o", {}, {}, None),
        ("anthropic/claude-sonnet-4", {}, {"OPENAI_API_BASE": "http://b/v1"}, None),
    ],
)
def test_calls_go_where_dspy_and_litellm_send_them(
    model: str, options: dict[str, str], variables: dict[str, str], base: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = address_of(dspy.LM(model, api_key="x", **options))
    assert (None if found is None else found.base) == base


def test_an_address_never_shows_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", "from-the-environment")
    found = address_of(dspy.LM("hosted_vllm/m", api_base="http://a/v1"))
    assert found is not None and found.headers == {"Authorization": "Bearer from-the-environment"}
    assert "from-the" not in repr(found) and found.given_by == "api_base"


def test_an_lm_in_this_process_has_no_server() -> None:
    class Own:
        def complete(self, request: Any) -> Any:
            raise AssertionError("not asked")

    assert who_answers(dspy.LM("openai/m", engine=Own())) is None


# --- what kind, and which weights ---


@pytest.mark.parametrize(
    ("answers", "kind", "place"),
    [
        (vllm("assistant", "/weights"), "vLLM", "GET {url}/v1/models, root"),
        (sglang("assistant", "/weights"), "SGLang", "GET {url}/model_info, model_path"),
        (sglang("assistant", "/weights", place="/get_model_info"), "SGLang", "GET {url}/get_model_info, model_path"),
        (llama_cpp("assistant", "/weights"), "llama.cpp", "GET {url}/props, model_path"),
        (ollama("assistant", "/weights"), "Ollama", "POST {url}/api/show, the line FROM of modelfile"),
    ],
)
def test_a_server_is_known_by_what_it_answers(answers: Answers, kind: str, place: str) -> None:
    heard: list[Any] = []
    with stand_in(answers, heard) as url:
        server = who_answers(lm_on(f"{url}/v1"))
    assert server is not None
    assert (server.kind, server.said, server.told_by) == (kind, "/weights", place.format(url=url))
    assert server.listed == ("assistant",) and {key for *_, key in heard} == {"Bearer secret"}


def test_weights_of_a_nickname_are_those_that_the_server_names(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    for answers in (vllm("assistant", path), sglang("assistant", path)):
        with stand_in(answers) as url:
            lm = lm_on(f"{url}/v1")
            assert weights_behind(lm, server=who_answers(lm)).name == path
            assert weights_behind(lm, weights={"openai/assistant": path}, server=who_answers(lm)).name == path


def test_weights_behind_several_servers_are_those_that_they_name(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    heard: list[Any] = []
    with stand_in(vllm("assistant", path), heard) as one, stand_in(vllm("assistant", path), heard) as other:
        lm = served_lm("openai/assistant", [f"{one}/v1", f"{other}/v1"], api_key="secret\n")
        server = who_answers(lm)
        assert weights_behind(lm, server=server).name == path
    assert server is not None and [each.address.root for each in server.every] == [one, other]
    assert {key for *_, key in heard} == {"Bearer secret"} and "secret" not in repr(server)


def test_calls_of_ollamas_own_api_are_known_by_their_address() -> None:
    with stand_in(ollama("assistant:1b", "/blobs/sha256-0123")) as url:
        server = who_answers(dspy.LM("ollama_chat/assistant:1b", api_base=url))
    assert server is not None and (server.kind, server.said) == ("Ollama", "/blobs/sha256-0123")
    assert server.neutral == {}  # its own API takes other settings


def test_the_packaged_model_is_not_behind_a_server_that_calls_its_own_pocket(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    with stand_in(vllm("pocket", path)) as url:
        lm = lm_on(f"{url}/v1", "pocket")
        assert weights_behind(lm, server=who_answers(lm)).name == path
    silent = {"GET /v1/models": {"data": [{"id": "pocket"}]}, "POST /v1/chat/completions": knows("pocket")}
    with stand_in(silent) as url:
        assert "does not say which weights it serves" in refusal(f"{url}/v1", "pocket")
    assert weights_behind(dspy.LM("openai/pocket", api_key="x")).name == "pocket"


# --- every error says what was asked, what came back, and the line to write ---


def find(lm: dspy.LM) -> Any:
    return weights_behind(lm, server=who_answers(lm, predictor_name="hop"), predictor_name="hop")


def refusal(url: str, name: str = "assistant") -> str:
    with pytest.raises(WeightsError) as caught:
        find(lm_on(url, name))
    return str(caught.value)


def test_a_server_that_is_down_is_named() -> None:
    base = f"http://127.0.0.1:{free_port()}/v1"
    text = refusal(base)
    assert f"No server answers at {base} (api_base)" in text and "'hop'" in text
    assert f"GET {base}/models gave no answer: Connection refused" in text
    assert "dspy.LM('openai/assistant', api_base='http://HOST:PORT/v1')" in text


def test_an_address_without_v1_is_completed() -> None:
    with stand_in(vllm("assistant", "/weights")) as url:
        text = refusal(url)
        assert "has an api_base that lacks /v1" in text and f"POST {url}/chat/completions gave status 404" in text
        assert f"dspy.LM('openai/assistant', api_base='{url}/v1')" in text


def test_a_name_that_is_not_served_is_refused_before_any_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("dspy_greater.model.registry.shared_engine", load)
    with stand_in(vllm("assistant", "/weights")) as url:
        text = refusal(f"{url}/v1", "WRONGNAME")
        assert "does not serve 'WRONGNAME'" in text and "it lists 'assistant'" in text
        assert "gave status 404" in text and "The model `WRONGNAME` does not exist" in text
        assert f"dspy.LM('openai/assistant', api_base='{url}/v1')" in text


def test_a_server_that_names_no_weights_is_told_apart() -> None:
    silent = {
        "GET /v1/models": {"data": [{"id": "assistant", "object": "model"}]},
        "POST /v1/chat/completions": completion("assistant"),
    }
    with stand_in(silent) as url:
        text = refusal(f"{url}/v1")
        assert "(OpenAI-compatible) answers, and does not say which weights it serves" in text
        assert f"GET {url}/v1/models gave status 200" in text and "no field root" in text
        assert "GReaTer(..., weights={'openai/assistant': 'ORG/NAME'})" in text


def test_weights_on_another_machine_are_told_apart() -> None:
    with stand_in(vllm("assistant", "/elsewhere/model")) as url:
        text = refusal(f"{url}/v1")
        assert "says that its weights are '/elsewhere/model'" in text and "which is not on this machine" in text


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((401, {"error": "bad key"}), "does not accept the key"),
        ((403, {"error": "bad key"}), "does not accept the key"),
        ((500, {"error": "out of memory"}), "cannot answer a message of one word"),
        ((200, "<html>Welcome</html>"), "cannot answer a message of one word"),
        ((422, {"error": "no messages"}), "does not take chat messages"),
    ],
)
def test_a_server_that_refuses_a_message_is_quoted(reply: Any, words: str) -> None:
    answers = {"GET /v1/models": {"data": [{"id": "assistant"}]}, "POST /v1/chat/completions": reply}
    with stand_in(answers) as url:
        text = refusal(f"{url}/v1")
        said = reply[1] if isinstance(reply[1], str) else next(iter(reply[1].values()))
        assert words in text and said in text and f"status {reply[0]}" in text and "secret" not in text


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc", None),
        (b"HTTP/1.1 502 Bad\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc", 502),
        (b"HTTP/1.1 503 X\r\nContent-Length: 100\r\n\r\nabc", 503),
        (b"nonsense\r\n\r\n", None),
        (b"", None),
    ],
)
@pytest.mark.parametrize("hangs", [False, True])
def test_a_question_gets_a_reply_however_the_connection_breaks(sent: bytes, status: int | None, hangs: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:
        ended = threading.Event()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(sent)
                if hangs:
                    ended.wait(10)

        done = threads.submit(serve)
        reply = ask(f"http://127.0.0.1:{listening.getsockname()[1]}/v1/models", {}, seconds=0.2)
        ended.set()
        done.result()
    assert (reply.status, reply.data, reply.ok) == (status, None, False) and reply.text
    assert str(reply).startswith("GET http://127.0.0.1:")


def test_a_deeply_nested_answer_is_a_reply_without_data() -> None:
    with stand_in({"GET /v1/models": "[" * 100_000}) as url:
        assert ask(f"{url}/v1/models", {}).data is None


@pytest.mark.parametrize("key", ["sk-very\nsecret", "sk-very\u2026secret"])
def test_a_key_that_cannot_be_sent_is_named_and_not_shown(key: str) -> None:
    with stand_in(vllm("assistant", "/weights")) as url, pytest.raises(ServerError) as caught:
        who_answers(dspy.LM("openai/assistant", api_base=f"{url}/v1", api_key=key))
    text = str(caught.value)
    assert "the header Authorization (the API key?) has characters that HTTP does not allow" in text
    assert "sk-" not in text and "secret" not in text and "Start the server" not in text
    assert "sk-" not in str(ask("http://127.0.0.1:9/v1/models", {"Authorization": f"Bearer {key}"}))


def test_the_end_of_the_line_of_a_key_from_a_file_is_no_part_of_it() -> None:
    heard: list[Any] = []
    with stand_in(vllm("assistant", "/weights"), heard) as url:
        assert who_answers(dspy.LM("openai/assistant", api_base=f"{url}/v1", api_key="secret\r\n")) is not None
    assert {key for *_, key in heard} == {"Bearer secret"}


def test_every_kind_of_error_is_a_server_error_or_names_weights() -> None:
    with stand_in({}) as url, pytest.raises(ServerError, match="does not take chat messages"):
        who_answers(lm_on(f"{url}/v1"))


# --- sampling defaults ---


def picky(*known: str) -> Any:
    """A chat API that refuses fields that it does not know."""

    def answer(body: dict[str, Any]) -> Any:
        strange = set(body) - {"model", "messages", "temperature", "max_tokens", *known}
        return (422, {"detail": f"Unexpected fields {sorted(strange)}"}) if strange else completion(body["model"])

    return answer


def test_sampling_defaults_are_switched_off_as_far_as_the_server_takes_them() -> None:
    listed = {"GET /v1/models": {"data": [{"id": "assistant", "root": "/w"}]}}
    with stand_in({**listed, "POST /v1/chat/completions": picky("frequency_penalty", "top_p")}) as url:
        greedy = who_answers(lm_on(f"{url}/v1", temperature=0.0))
        sampled = who_answers(lm_on(f"{url}/v1", temperature=0.7))
        own = who_answers(lm_on(f"{url}/v1", temperature=0.7, frequency_penalty=0.5))
    assert greedy is not None and sampled is not None and own is not None
    assert greedy.neutral == {"frequency_penalty": 0.0}
    assert sampled.neutral == {"frequency_penalty": 0.0, "top_p": 1.0}
    assert own.neutral == {"top_p": 1.0}  # what the caller has set stays
    with stand_in(vllm("assistant", "/w")) as url:
        every = who_answers(lm_on(f"{url}/v1", temperature=0.0, extra_body={"repetition_penalty": 1.2}))
    assert every is not None and set(every.neutral) == {"frequency_penalty", "presence_penalty", "repeat_penalty"}
