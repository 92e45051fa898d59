"""The models of a run behind LiteLLM: `litellm.completion(model="dspy-greater/pocket")` without a server.

Optimizers that know nothing of DSPy call their models through LiteLLM; here they reach the very weights, and the very
account, that DSPy's optimizers use. Streaming is not offered.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import litellm
from dspy import lm15
from litellm.llms.custom_llm import CustomLLM, CustomLLMError

from dspy_greater.errors import SettingsError

PROVIDER = "dspy-greater"
HONOURED = frozenset({"temperature", "max_tokens", "max_completion_tokens", "top_p", "stop", "seed", "n"})
# What says nothing about the text that is written.
_IGNORED = frozenset({"user", "metadata", "extra_body", "extra_headers", "stream_options", "max_retries", "timeout"})
_NEUTRAL = {"stream": False, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False}


class _Served:
    """Engines by name; names that nobody registered are loaded as in-process weights."""

    def __init__(self) -> None:
        self._engines: dict[str, tuple[Any, Mapping[str, Any]]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, engine: Any, defaults: Mapping[str, Any]) -> None:
        with self._lock:
            if name in self._engines:
                raise SettingsError(f"{PROVIDER}/{name} is registered already; leave that block first.")
            self._engines[name] = (engine, defaults)

    def remove(self, name: str) -> None:
        with self._lock:
            self._engines.pop(name, None)

    def find(self, name: str) -> tuple[Any, Mapping[str, Any]]:
        with self._lock:
            known = self._engines.get(name)
        if known is None:
            from dspy_greater import local_lm

            lm: Any = local_lm(name, cache=False)
            known = (lm.engine, {"temperature": 0.0})
        return known


_served = _Served()


@contextmanager
def served(name: str, lm: Any) -> Iterator[str]:
    """Inside, `litellm.completion(model="dspy-greater/NAME")` is answered by the engine of this `dspy.LM`.

    Settings that a call leaves out are the LM's own.

    Example:
        >>> with served("task", dspy_greater.local_lm("pocket")) as model:  # doctest: +SKIP
        ...     litellm.completion(model, messages=[{"role": "user", "content": "2 + 2 ="}])

    Raises:
        SettingsError: the name is taken, or the LM has no engine of its own.
    """
    if not hasattr(lm.engine, "complete"):
        raise SettingsError(f"The LM {lm.model!r} has no engine object; LiteLLM can call it by its own name.")
    register()
    _served.add(name, lm.engine, {key: value for key, value in lm.kwargs.items() if key in HONOURED})
    try:
        yield f"{PROVIDER}/{name}"
    finally:
        _served.remove(name)


def register() -> None:
    """Make LiteLLM know the provider; calling it again changes nothing."""
    if all(entry["provider"] != PROVIDER for entry in litellm.custom_provider_map):
        litellm.custom_provider_map.append({"provider": PROVIDER, "custom_handler": InProcess()})
    litellm.utils.custom_llm_setup()


class InProcess(CustomLLM):
    """LiteLLM's side of the provider: an OpenAI request in, a `ModelResponse` out."""

    def completion(self, model: str, messages: list[Any], optional_params: dict[str, Any], **_: Any) -> Any:
        """Answer one request, `n` times if asked.

        Raises:
            CustomLLMError: status 400, for a setting that cannot be honoured or a message that is not text.
        """
        engine, defaults = _served.find(model)
        asked = {**defaults, **_checked(optional_params)}
        count = int(asked.pop("n", None) or 1)
        request = _request(model, messages, asked)
        try:
            # The same request object each time: that is how an engine tells samples from repetitions.
            responses = [engine.complete(request) for _ in range(count)]
        except (lm15.InvalidRequestError, lm15.UnsupportedFeatureError) as error:
            raise CustomLLMError(status_code=400, message=str(error)) from error
        return _model_response(model, responses)

    async def acompletion(self, model: str, messages: list[Any], optional_params: dict[str, Any], **_: Any) -> Any:
        """`completion` in a thread."""
        return await asyncio.to_thread(self.completion, model=model, messages=messages, optional_params=optional_params)

    def streaming(self, *_: Any, **__: Any) -> Any:
        """Refused."""
        raise CustomLLMError(status_code=400, message=f"{PROVIDER} does not stream; call it with stream=False.")

    async def astreaming(self, *_: Any, **__: Any) -> Any:
        """Refused."""
        self.streaming()


def _checked(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are honoured; refuses what would change the answer and cannot be done."""
    given = {
        key: value
        for key, value in params.items()
        if value is not None and key not in _IGNORED and value != _NEUTRAL.get(key, object())
    }
    strangers = sorted(set(given) - HONOURED)
    if strangers:
        raise CustomLLMError(
            status_code=400,
            message=f"{PROVIDER} does not honour {', '.join(strangers)}; it takes {', '.join(sorted(HONOURED))}.",
        )
    return given


def _request(model: str, messages: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> lm15.Request:
    settings = {key: value for key, value in asked.items() if value is not None}
    if "max_completion_tokens" in settings:
        settings["max_tokens"] = settings.pop("max_completion_tokens")
    stop = settings.get("stop")
    if isinstance(stop, str):
        settings["stop"] = [stop]
    try:
        return lm15.request_from_openai_chat(
            {"model": model, "messages": [dict(each) for each in messages], **settings}
        )
    except (ValueError, TypeError, lm15.LM15Error) as error:
        raise CustomLLMError(status_code=400, message=f"{PROVIDER} cannot read the request: {error}") from error


def _model_response(model: str, responses: Sequence[lm15.Response]) -> Any:
    read = responses[0].usage.input_tokens or 0
    written = sum(response.usage.output_tokens or 0 for response in responses)
    return litellm.ModelResponse(
        id=f"{PROVIDER}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        choices=[
            litellm.Choices(
                index=index,
                finish_reason=response.finish_reason,
                message=litellm.Message(role="assistant", content=_text(response)),
            )
            for index, response in enumerate(responses)
        ],
        usage=litellm.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written),
    )


def _text(response: lm15.Response) -> str:
    return "".join(part.text for part in response.message.parts if isinstance(part, lm15.TextPart))
