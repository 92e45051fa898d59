"""A local open-weight model: token ids in, token ids out, with counters for everything it computes."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dspy_greater.errors import ContextLengthError, GreaterError, LayoutError, SettingsError, WeightsError
from dspy_greater.model.counters import Counters
from dspy_greater.model.fast.generated_kv import WrittenStates
from dspy_greater.model.fast.prefix_cache import PrefixStore, frozen, is_out_of_memory
from dspy_greater.model.fast.scoped import Scoped
from dspy_greater.model.fast.speculative import Drafts
from dspy_greater.model.generate import decode
from dspy_greater.model.sampling import Generation, GenerationRequest, Row, row_seed
from dspy_greater.prompt.chat_template import end_of_turn_ids


class EngineMemoryError(GreaterError, MemoryError):
    """One row alone does not fit into memory."""


class Engine:
    """A causal language model and its tokenizer behind one lock.

    Args:
        model: a loaded `transformers` causal language model. Its train/eval mode and its parameters'
            `requires_grad` flags are put back after every use.
        tokenizer: its tokenizer.
        name: what the weights are called; part of `identity`, and so of every cache key.
        revision: which version of them; found out from the weights themselves when not given.
        max_batch_rows: the most rows decoded together, 192 on CPU and 256 elsewhere when not given.

    Raises:
        WeightsError: the model is not one that reads and writes tokens.

    Example:
        >>> engine = Engine.from_pretrained("pocket")  # doctest: +SKIP
        >>> engine.generate([engine.tokenizer("2 + 2 =")["input_ids"]], max_new_tokens=4)  # doctest: +SKIP
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
    ) -> None:
        if not callable(getattr(model, "get_input_embeddings", None)) or not hasattr(model, "config"):
            raise WeightsError(
                f"The model of {name!r} is a {type(model).__name__}, not a transformers causal language "
                "model; load it with AutoModelForCausalLM, or pass its name or path instead."
            )
        if max_batch_rows is not None and max_batch_rows < 1:
            raise SettingsError(f"max_batch_rows is {max_batch_rows}; it has to be at least 1")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        commit = getattr(model.config, "_commit_hash", None)
        self.revision: str = revision or commit or _fingerprint(model, tokenizer)
        self._batch_rows = max_batch_rows or (192 if self.device.type == "cpu" else 256)
        self._owned = False
        self._lock, self._tally_lock, self._depth = threading.RLock(), threading.Lock(), 0
        self._counters = Counters()
        self.prefixes = PrefixStore(model, self.tally)
        self.written = WrittenStates(self._lock)
        self._drafting = Scoped[Drafts]()
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
        """Load weights (safetensors only) and tokenizer, and freeze them.

        Args:
            name_or_path: a hub id, a local directory, or `"pocket"` for the model inside this package.
            device: where to; an accelerator if there is one, else the CPU.
            dtype: such as `torch.bfloat16` or `"bfloat16"`; float32 on CPU and what the weights were saved
                in elsewhere when not given.
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
        engine = cls(model, tokenizer, name=name, revision=None, max_batch_rows=max_batch_rows)
        engine._owned = True
        model.requires_grad_(False).eval()
        engine.origin = {
            "name_or_path": name,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "revision": getattr(model.config, "_commit_hash", None) or revision,
        }
        return engine

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self  # weights are never copied

    def __copy__(self) -> Engine:
        return self

    @property
    def identity(self) -> str:
        """`name@revision:dtype`, with the quantisation method if there is one."""
        settings = getattr(self.model.config, "quantization_config", None)
        if settings is None:
            method = ""
        else:
            known = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
            method = f"+{getattr(known, 'value', known) or 'quantized'}"
        return f"{self.name}@{self.revision}:{str(self.dtype).removeprefix('torch.')}{method}"

    @property
    def device(self) -> torch.device:
        """Where the input embeddings are, and so where token ids have to go."""
        return self.embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the input embeddings."""
        return self.embedding_weight.dtype

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
    def max_batch_rows(self) -> int:
        """The most rows decoded together; halved for good when memory runs out."""
        return self._batch_rows

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

    def shared_prefixes(self) -> AbstractContextManager[object]:
        """Inside, what prompts have in common is read once for gradients, scores and texts together.

        One prefix is kept, the longest that was read, until the outermost block ends; threads that carry the block's
        context share it. Outside, every call reads for itself.
        """
        return self.prefixes.open()

    def kept_rows(self) -> AbstractContextManager[object]:
        """Inside, the states of rows that were written are kept for `scoring.score` to go on from.

        At most 2 GiB of them; on CUDA a tenth of the device's memory where that is more.
        """
        return self.written.open()

    def drafting(self, written: Iterable[tuple[Sequence[int], Sequence[int]]]) -> AbstractContextManager[object]:
        """Inside, rows are expected to write what was `written` after prompts like theirs (`draft`); only faster."""
        return self._drafting.holding(Drafts(written))

    @property
    def drafts(self) -> Drafts:
        """Those of the innermost block."""
        return self._drafting.value or Drafts()

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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] | None = None,
        on_token: Callable[[int, int], bool | None] | None = None,
    ) -> list[Generation]:
        """Write after every prompt, in batches; the results come in the prompts' order.

        Args:
            prompts: token ids, each row at least one.
            max_new_tokens: the most tokens per row; less where the context is shorter.
            temperature: 0 is greedy; otherwise logits are divided by it and a token is drawn.
            top_p: draw from the smallest set of likeliest tokens that together reach this probability.
            seed: each row draws from a generator of its own, seeded from this and its place in `prompts`,
                so that a row does not depend on its batch; None takes fresh randomness.
            stop_token_ids: instead of the model's own end tokens.
            on_token: called with (row, token) for every token written; a true answer ends the row.

        Raises:
            ContextLengthError: a prompt leaves no room.
            LayoutError: a prompt has no tokens.
            EngineMemoryError: a single row does not fit into memory.
        """
        base = secrets.randbits(63) if seed is None else seed
        stop = None if stop_token_ids is None else tuple(stop_token_ids)
        return self.complete(
            [
                GenerationRequest(
                    tuple(prompt),
                    max_new_tokens,
                    temperature,
                    top_p,
                    row_seed(base, index),
                    stop,
                    None if on_token is None else partial(on_token, index),
                )
                for index, prompt in enumerate(prompts)
            ]
        )

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """`generate` for rows that each have their own settings; raises what `generate` raises."""
        rows = [self._row(request) for request in requests]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt), rows[i].prompt, rows[i].seed))
        pad = self.tokenizer.pad_token_id
        pad = next(iter(sorted(self.stop_token_ids)), 0) if pad is None else pad
        with self.exclusive(), self.shared_prefixes():
            waiting = [rows[i] for i in order]
            drafts = self.drafts
            for row in waiting if len(drafts) else []:
                row.draft = drafts.guess(row.prompt)
            while waiting:
                batches = -(-len(waiting) // self._batch_rows)
                size = -(-len(waiting) // batches)  # even batches, no small rest
                batch, waiting = waiting[:size], waiting[size:]
                if not self._decoded(batch, pad):
                    waiting = [row for row in batch if row.finish_reason is None] + waiting
        return [Generation(tuple(row.written), row.finish_reason or "length") for row in rows]

    def _row(self, request: GenerationRequest) -> Row:
        if not request.prompt:
            raise LayoutError("A prompt has no tokens; a model needs at least one to write after.")
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

    def _decoded(self, batch: Sequence[Row], pad: int) -> bool:
        """Decode the batch; False when memory ran out and the batch limit has been halved for another try."""
        try:
            decode(self.model, batch, pad_token_id=pad, tally=self.tally, prefixes=self.prefixes, written=self.written)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            failure = str(error).splitlines()[0]
        else:
            return True
        kept = self.written.bytes
        self.prefixes.drop()
        self.written.drop()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if kept:
            return False  # what was kept may have been too much, and not the batch
        if len(batch) == 1:
            raise EngineMemoryError(
                f"One row alone does not fit into the memory of {self.device} beside {self.name!r} "
                f"({failure}); use a smaller dtype such as bfloat16, a smaller max_tokens, shorter inputs or "
                "a smaller model."
            )
        self._batch_rows = len(batch) // 2
        return False


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn: of the tokenizer, the model's configurations and the chat template."""
    found: set[int] = set(end_of_turn_ids(tokenizer))
    for source in (tokenizer, getattr(model, "generation_config", None), model.config):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """Twelve hexadecimal digits over a sample of every weight, the vocabulary size and the chat template."""
    digest = hashlib.blake2b(digest_size=6)
    samples: list[Tensor] = []
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type == "meta" or not parameter.numel():
            continue
        flat = parameter.detach().reshape(-1)
        count = min(64, flat.numel())
        places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
        samples.append(flat[places].float().cpu())
    if samples:
        digest.update(torch.cat(samples).numpy().tobytes())
    digest.update(f"{len(tokenizer)}{getattr(tokenizer, 'chat_template', None)}".encode())
    return digest.hexdigest()
