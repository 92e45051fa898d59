"""What is known in the end of a model behind a server, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ServedModel:
    """The server behind a predictor's LM, and how far it is the model that is loaded here.

    Attributes:
        predictor: whose LM it is.
        kind: of server, by what it answers: "vLLM", "SGLang", "llama.cpp", "Ollama", "transformers serve", or
            "OpenAI-compatible".
        url: its address.
        model: the name that it was asked for.
        said: the weights as the server names them, None where it names none.
        weights: the identity of those that are loaded here.
        device: where they are loaded.
        dtype: of the loaded weights.
        neutral: sampling settings that are passed explicitly while searching, in the place of the server's defaults.
        prompts: how many prompts were compared, by token ids or by count.
        prompts_by_ids: how many of these by token ids.
        prompts_different: how many differed.
        written: tokens of the server at temperature 0 that were compared with the weights' own choice.
        agreed: how many of them the weights would have written, too.
    """

    predictor: str
    kind: str
    url: str
    model: str
    said: str | None
    weights: str
    device: str
    dtype: str
    neutral: tuple[tuple[str, float], ...] = ()
    prompts: int = 0
    prompts_by_ids: int = 0
    prompts_different: int = 0
    written: int = 0
    agreed: int = 0

    @property
    def agreement(self) -> float | None:
        """The share of the server's tokens that the weights would have written; None where none was compared."""
        return self.agreed / self.written if self.written else None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for `json.dumps`."""
        return {**asdict(self), "neutral": dict(self.neutral), "agreement": self.agreement}

    def __str__(self) -> str:
        told = f", whose weights are {self.said!r}" if self.said else ""
        return (
            f"{self.kind} at {self.url} serves {self.model!r}{told}; loaded here: {self.weights} on {self.device} in "
            f"{self.dtype}"
        )
