"""A local open-weight model behind one lock: weights, tokenizer, identity, counters, and the fast model interface."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dspy_greater.errors import SettingsError
from dspy_greater.model.checks import Checks
from dspy_greater.model.counters import Counters, Tally
from dspy_greater.model.fast.session import Session
from dspy_greater.model.frozen import ModelLock
from dspy_greater.model.interface import Generation, GenerationRequest, Leaf, TokenQuery, Tokens
from dspy_greater.model.memory import release
from dspy_greater.model.weights import Weights

_MOST_BATCH_TOKENS = 2048  # rows x longest row of one teacher-forced batch: memory against speed


class Engine:
    """A causal language model and its tokenizer behind one lock; `interface.Model` over them.

    Args:
        model: a loaded `transformers` causal language model. Its train/eval mode and its parameters'
            `requires_grad` flags are put back after every use.
        tokenizer: its tokenizer.
        name: what the weights are called; part of `identity`, and so of every cache key.
        revision: which version of them; found out from the weights themselves when not given.
        max_batch_rows: the most rows decoded together, 192 on CPU and 256 elsewhere when not given; halved where memory
            runs out.
        max_batch_tokens: rows times longest row of a batch that is read; changes memory and speed, results by rounding.

    Attributes:
        weights: facts about them, such as device and dtype.
        checks: what was tried on them: the handshake, and whether they give a gradient.
        tally: what was computed; `counters` is its snapshot.

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
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._lock = ModelLock(model)
        self.weights = Weights(model, tokenizer, name)
        self.checks = Checks(self.weights, self._lock.hold, revision)
        self.tally = Tally()
        self.max_batch_rows = max_batch_rows or (192 if self.weights.device.type == "cpu" else 256)
        self.max_batch_tokens = max_batch_tokens
        # How to load the same weights in another process; None for weights that were handed in.
        self.origin: dict[str, str | None] | None = None
        self.load_options: dict[str, Any] = {}  # what else `from_pretrained` was given,
        self.load_device: str | None = None  # and where it was told to load to

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
        engine._lock.freeze_for_good()
        engine.origin = {
            "name_or_path": name,
            "dtype": str(engine.weights.dtype).removeprefix("torch."),
            "revision": commit or revision,
        }
        options = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
        engine.load_options = {**options, **model_settings}
        engine.load_device = None if device is None else str(device)
        return engine

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self  # weights are never copied

    def __copy__(self) -> Engine:
        return self

    @property
    def identity(self) -> str:
        """`name@revision:dtype`, with the quantisation method if there is one; of the weights as they are now."""
        return self.checks.identity

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and output together, as the model's configuration says."""
        config = self.model.config
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def counters(self) -> Counters:
        """A snapshot of everything computed so far; those who run passes of their own on `model` add to `tally`."""
        return self.tally.total

    @contextmanager
    def exclusive(self) -> Iterator[Engine]:
        """Hold the model: one thread at a time, re-entrant, in eval mode, all parameters frozen.

        For a model the caller handed in, mode and `requires_grad` flags are put back at the end.
        """
        with self._lock.hold():
            yield self

    @contextmanager
    def session(self, expected: Iterable[tuple[Tokens, Tokens]] = ()) -> Iterator[Session]:
        """See `interface.Model`. What a session keeps belongs to it: two searches on one model never meet."""
        opened = Session(self, expected)
        try:
            yield opened
        finally:
            opened.forget()
            release()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """See `interface.Model`."""
        try:
            return Session(self, keeps=False).generate(requests)
        finally:
            release()

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
            return layer(torch.tensor(list(tokens), dtype=torch.long, device=self.weights.device))
