"""A local open-weight model behind one lock: weights, tokenizer, identity, counters, and the fast model interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dspy_greater.errors import ContextLengthError, EngineMemoryError, LayoutError, SettingsError
from dspy_greater.model.backward_probe import Backward, try_backward
from dspy_greater.model.counters import Counters
from dspy_greater.model.fast.session import Session
from dspy_greater.model.frozen import frozen
from dspy_greater.model.handshake import shake_hands
from dspy_greater.model.interface import Generation, GenerationRequest, Leaf, TokenQuery, Tokens
from dspy_greater.model.kv_cache import reach_of
from dspy_greater.model.sampling import Row
from dspy_greater.model.weights_digest import WeightsDigest, quantisation
from dspy_greater.prompt.chat_template import end_of_turn_ids

_MOST_BATCH_TOKENS = 2048  # rows x longest row of one teacher-forced batch: memory against speed


class Engine:
    """A causal language model and its tokenizer behind one lock.

    Args:
        model: a loaded `transformers` causal language model. Its train/eval mode and its parameters'
            `requires_grad` flags are put back after every use.
        tokenizer: its tokenizer.
        name: what the weights are called; part of `identity`, and so of every cache key.
        revision: which version of them; found out from the weights themselves when not given.
        max_batch_rows: the most rows decoded together, 192 on CPU and 256 elsewhere when not given; halved where memory
            runs out.
        max_batch_tokens: rows times longest row of a batch that is read; changes memory and speed, results by rounding.

    Raises:
        WeightsError: model and tokenizer failed the handshake (`handshake`, a dozen tiny passes), which says why.

    Example:
        >>> engine = Engine.from_pretrained("pocket")  # doctest: +SKIP
        >>> prompt = tuple(engine.tokenizer("2 + 2 =")["input_ids"])  # doctest: +SKIP
        >>> engine.generate([GenerationRequest(prompt, max_new_tokens=4)])  # doctest: +SKIP
        [Generation(token_ids=(221, 23), finish_reason='stop')]
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        revision: str | None = None,
        max_batch_rows: int | None = None,
        max_batch_tokens: int = _MOST_BATCH_TOKENS,
    ) -> None:
        if max_batch_rows is not None and max_batch_rows < 1:
            raise SettingsError(f"max_batch_rows is {max_batch_rows}; it has to be at least 1")
        self.handshake = shake_hands(model, tokenizer, name)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._digest = WeightsDigest(model, tokenizer, known=revision)
        self._checked = self._digest.first
        self._backward: tuple[str, Backward] | None = None  # of which revision
        self.max_batch_rows = max_batch_rows or (192 if self.device.type == "cpu" else 256)
        self._owned = False
        self._lock, self._tally_lock, self._depth = threading.RLock(), threading.Lock(), 0
        self._counters = Counters()
        self.max_batch_tokens = max_batch_tokens
        self.stop_token_ids = _stop_ids(model, tokenizer)
        # How to load the same weights in another process; None for weights that were handed in.
        self.origin: dict[str, str | None] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_batch_rows: int | None = None,
        local_files_only: bool = False,
        **model_settings: Any,
    ) -> Engine:
        """Load weights (safetensors or GGUF) and tokenizer, and freeze them.

        Args:
            name_or_path: a hub id, a local directory, a GGUF file or a directory with one, or `"pocket"` for
                the model inside this package.
            device: where to; an accelerator if there is one, else the CPU.
            dtype: such as `torch.bfloat16` or `"bfloat16"`; when not given, as `local_lm` chooses it.
            revision: a hub branch, tag or commit.
            trust_remote_code: run Python code that comes with the weights; never unless you say so.
            local_files_only: do not download.
            model_settings: more arguments of `AutoModelForCausalLM.from_pretrained`.

        Raises:
            WeightsError: they could not be loaded; says what was tried and what to do.
        """
        from dspy_greater.model.registry import load_pretrained

        name = os.fspath(name_or_path)
        model, tokenizer = load_pretrained(
            name,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            **model_settings,
        )
        commit = getattr(model.config, "_commit_hash", None)
        engine = cls(model, tokenizer, name=name, revision=commit, max_batch_rows=max_batch_rows)
        engine._owned = True
        model.requires_grad_(False).eval()
        engine.origin = {
            "name_or_path": name,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "revision": commit or revision,
        }
        return engine

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self  # weights are never copied

    def __copy__(self) -> Engine:
        return self

    @property
    def revision(self) -> str:
        """Which version the weights are, found out anew each time: see `weights_digest`."""
        return self._digest.label()

    @property
    def identity(self) -> str:
        """`name@revision:dtype`, with the quantisation method if there is one; of the weights as they are now."""
        return self._identity(self.revision)

    def recognise(self) -> str:
        """The identity, after a new handshake where the weights are not those of the last one.

        Raises:
            WeightsError: they were changed into something that cannot be used.
        """
        revision = self.revision
        if revision != self._checked:
            with self.exclusive():
                self.handshake = shake_hands(self.model, self.tokenizer, self.name)
                self.__dict__.pop("cache_reach", None)  # cached
                self._checked = revision
        return self._identity(revision)

    def backward(self) -> Backward:
        """Whether these weights give gradients; tried once, and again when they have changed."""
        revision = self.revision
        if self._backward is None or revision != self._backward[0]:
            with self.exclusive():
                self._backward = (revision, try_backward(self.model, self.tokenizer))
        return self._backward[1]

    def _identity(self, revision: str) -> str:
        method = quantisation(self.model)
        return f"{self.name}@{revision}:{str(self.dtype).removeprefix('torch.')}{f'+{method}' if method else ''}"

    @property
    def device(self) -> torch.device:
        """Where the input embeddings are, and so where token ids have to go."""
        return self.embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the input embeddings."""
        return self.embedding_weight.dtype

    @property
    def exact_dtype(self) -> torch.dtype:
        """What log-probabilities and gradients are computed in: float32, or float64 for a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def pad_token_id(self) -> int:
        """What fills rows up; no real token sees it."""
        choices = (self.tokenizer.pad_token_id, *sorted(self.stop_token_ids))  # of which the model has to know one
        return next((each for each in choices if each is not None and each < self.embedding_weight.shape[0]), 0)

    @cached_property
    def cache_reach(self) -> float:
        """The most tokens of a sequence in which key-value states of its beginning can be shared; 0: never."""
        return reach_of(self.model) if self.handshake.keys_and_values else 0

    @property
    def embedding_weight(self) -> Tensor:
        """The input embedding matrix [V, d]."""
        return self.model.get_input_embeddings().weight

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and output together, as the model's configuration says."""
        config = self.model.config
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def counters(self) -> Counters:
        """A snapshot of everything computed so far."""
        return self._counters

    def tally(self, **increments: int) -> None:
        """Add to the counters; for those who run forward passes of their own on `model`."""
        with self._tally_lock:
            self._counters = self._counters + Counters(**increments)

    @contextmanager
    def exclusive(self) -> Iterator[Engine]:
        """Hold the model: one thread at a time, re-entrant, in eval mode, all parameters frozen.

        For a model the caller handed in, mode and `requires_grad` flags are put back at the end.
        """
        with self._lock:
            self._depth += 1
            try:
                if self._owned or self._depth > 1:
                    yield self
                else:
                    with frozen(self.model):
                        yield self
            finally:
                self._depth -= 1

    def room(self, prompt_length: int) -> int | None:
        """How many tokens can be written after a prompt of this many; None when there is no limit.

        Raises:
            ContextLengthError: none.
        """
        limit = self.context_length
        if limit is None:
            return None
        if prompt_length >= limit:
            raise ContextLengthError(
                f"A prompt of {prompt_length} tokens leaves no room for an answer in the context of {limit} "
                f"tokens of {self.name!r}; shorten the input, use fewer demonstrations, or use a model "
                "with a longer context."
            )
        return limit - prompt_length

    @contextmanager
    def session(self, expected: Iterable[tuple[Tokens, Tokens]] = ()) -> Iterator[Session]:
        """See `interface.Model`. What a session keeps belongs to it: two searches on one model never meet."""
        opened = Session(self, expected)
        try:
            yield opened
        finally:
            opened.forget()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """See `interface.Model`."""
        return Session(self, keeps=False).generate(requests)

    def next_token_logprobs(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """See `interface.Model`."""
        return Session(self, keeps=False).next_token_logprobs(contexts)

    def token_logprobs(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery]) -> Tensor:
        """See `interface.Model`."""
        return Session(self, keeps=False).token_logprobs(sequences, queries)

    def logprob_gradient(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery], leaf: Leaf) -> Tensor:
        """See `interface.Model`. No weight receives a gradient; model and random state are left as they were."""
        return Session(self, keeps=False).logprob_gradient(sequences, queries, leaf)

    @torch.no_grad()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        """See `interface.Model`. A scale inside the embedding layer (Gemma's √d) is part of it.

        Raises:
            SettingsError: a token that is not in the vocabulary.
        """
        layer = self.model.get_input_embeddings()
        for token in tokens:
            if not 0 <= token < layer.weight.shape[0]:
                raise SettingsError(
                    f"Candidate token {token} is outside the model's vocabulary of {layer.weight.shape[0]}; "
                    "give ids from the model's own tokenizer."
                )
        with self.exclusive():
            return layer(torch.tensor(list(tokens), dtype=torch.long, device=layer.weight.device))

    def row(self, request: GenerationRequest) -> Row:
        """A request that was checked; raises what `generate` raises for one that cannot be."""
        if not request.prompt:
            raise LayoutError("A prompt has no tokens; a model needs at least one to write after.")
        known, largest = self.embedding_weight.shape[0], max(request.prompt)
        if largest >= known:
            raise LayoutError(
                f"A prompt has the token {largest} ({self.tokenizer.decode([largest])!r}), and {self.name!r} has "
                f"embeddings for {known}; leave it out of the chat template, or resize the embeddings."
            )
        if request.max_new_tokens < 1:
            raise SettingsError(f"max_new_tokens is {request.max_new_tokens}; it has to be at least 1")
        if request.temperature < 0 or not 0 < request.top_p <= 1:
            raise SettingsError(
                f"temperature is {request.temperature} and top_p is {request.top_p}; "
                "they have to be at least 0, and above 0 and at most 1"
            )
        room = self.room(len(request.prompt))
        most = request.max_new_tokens if room is None else min(room, request.max_new_tokens)
        stop = self.stop_token_ids if request.stop_token_ids is None else frozenset(request.stop_token_ids)
        return Row(request.prompt, most, stop, request.temperature, request.top_p, request.seed, request.on_token)

    def halve_batches(self, rows: int, failure: str) -> None:
        """Decode at most half of so many rows together from now on.

        Raises:
            EngineMemoryError: it was one row.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rows == 1:
            raise EngineMemoryError(
                f"One row alone does not fit into the memory of {self.device} beside {self.name!r} "
                f"({failure}); use a smaller dtype such as bfloat16, a smaller max_tokens, shorter inputs or "
                "a smaller model."
            )
        self.max_batch_rows = rows // 2


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn: of the tokenizer, the model's configurations and the chat template."""
    found: set[int] = set(end_of_turn_ids(tokenizer))
    for source in (tokenizer, getattr(model, "generation_config", None), model.config):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)
