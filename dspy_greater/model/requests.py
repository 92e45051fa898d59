"""A request for text, checked against the model that is to answer it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_greater.errors import ContextLengthError, LayoutError, SettingsError
from dspy_greater.model.interface import GenerationRequest
from dspy_greater.model.sampling import Row

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine


def room_after(engine: Engine, prompt_length: int) -> int | None:
    """How many tokens can be written after a prompt of this many; None when there is no limit.

    Raises:
        ContextLengthError: none.
    """
    limit = engine.context_length
    if limit is None:
        return None
    if prompt_length >= limit:
        raise ContextLengthError(
            f"A prompt of {prompt_length} tokens leaves no room for an answer in the context of {limit} "
            f"tokens of {engine.name!r}; shorten the input, use fewer demonstrations, or use a model "
            "with a longer context."
        )
    return limit - prompt_length


def row_of(engine: Engine, request: GenerationRequest) -> Row:
    """The row that answers a request; raises what `Model.generate` raises for one that cannot be answered."""
    if not request.prompt:
        raise LayoutError("A prompt has no tokens; a model needs at least one to write after.")
    known, largest = engine.weights.embedding_matrix.shape[0], max(request.prompt)
    if largest >= known:
        raise LayoutError(
            f"A prompt has the token {largest} ({engine.tokenizer.decode([largest])!r}), and {engine.name!r} has "
            f"embeddings for {known}; leave it out of the chat template, or resize the embeddings."
        )
    if request.max_new_tokens < 1:
        raise SettingsError(f"max_new_tokens is {request.max_new_tokens}; it has to be at least 1")
    if request.temperature < 0 or not 0 < request.top_p <= 1:
        raise SettingsError(
            f"temperature is {request.temperature} and top_p is {request.top_p}; "
            "they have to be at least 0, and above 0 and at most 1"
        )
    room = room_after(engine, len(request.prompt))
    most = request.max_new_tokens if room is None else min(room, request.max_new_tokens)
    own = request.stop_token_ids
    stop = engine.weights.stop_token_ids if own is None else frozenset(own)
    sampling = request.temperature, request.top_p, request.seed
    return Row(request.prompt, most, stop, *sampling, request.on_token, request.on_end)
