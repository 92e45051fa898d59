"""Language models whose answers a Python function writes: `dspy.LM`s without weights, safe in many threads."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import dspy
from dspy import lm15
from scripted_engine import chat_answer

Script = Callable[["Asked"], "str | dict[str, Any]"]


class Asked(dict[str, str]):
    """The input fields of a ChatAdapter prompt; `instruction` is its objective, `text` all of it."""

    def __init__(self, system: str, user: str) -> None:
        fields = re.findall(r"\[\[ ## (\w+) ## \]\]\n(.*?)(?=\n\n\[\[ ## |\n\nRespond with )", user, re.DOTALL)
        super().__init__(fields)
        self.text = f"{system}\n{user}"
        objective = system.rsplit("your objective is:", 1)[-1]
        self.instruction = " ".join(objective.split())

    def list_of(self, name: str) -> list[str]:
        """A field that holds a list."""
        return json.loads(self[name])


class ScriptedText:
    """DSPy's engine contract over a script; `asked` keeps every request in the order of arrival."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = frozenset({"temperature", "max_tokens"})

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> ScriptedText:
        return self

    def complete(self, request: Any) -> Any:
        system = request.system if isinstance(request.system, str) else "".join(p.text for p in request.system or ())
        asked = Asked(system, request.messages[-1].text or "")
        with self._lock:
            self.asked.append(asked)
        answer = self.script(asked)
        if isinstance(answer, dict):
            answer = chat_answer(
                **{name: json.dumps(value) if isinstance(value, list) else value for name, value in answer.items()}
            )
        return lm15.Response(
            id=None,
            model="scripted",
            message=lm15.Message.assistant([lm15.TextPart(answer)]),
            finish_reason="stop",
            usage=lm15.Usage(input_tokens=10, output_tokens=2, total_tokens=12),
        )

    def stream(self, request: Any) -> Any:
        return lm15.response_to_events(self.complete(request))

    def close(self) -> None:
        pass


def text_lm(script: Script, name: str = "scripted/text", **settings: Any) -> Any:
    """A `dspy.LM` that answers what the script says, without a cache."""
    return dspy.LM(name, engine=ScriptedText(script), cache=False, num_retries=0, **settings)
