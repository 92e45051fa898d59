"""`local_lm`: a `dspy.LM` that runs on open weights inside this process."""

from __future__ import annotations

import queue
import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import dspy
from dspy import lm15

from dspy_greater.errors import SettingsError, WeightsError
from dspy_greater.lm.asynchronous import AsyncEngine
from dspy_greater.lm.batcher import Batcher, Compute
from dspy_greater.lm.lockstep import Lockstep
from dspy_greater.lm.request import (
    PROVIDER,
    SUPPORTED_PARAMETERS,
    as_lm15_errors,
    messages_of,
    refuse_unsupported_features,
)
from dspy_greater.lm.streaming import TextWriter
from dspy_greater.prompt.encoder import PromptEncoder
from dspy_greater.scalars import plain_scalar

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine
    from dspy_greater.model.interface import Generation, GenerationRequest

DEFAULT_MAX_TOKENS = 1024
_REPEATS_REMEMBERED = 1024
_LEAST_TOP_P = 1e-9  # top_p=0 leaves the likeliest token


def local_lm(
    name_or_path: Any,
    *,
    device: Any = None,
    dtype: Any = None,
    revision: str | None = None,
    temperature: float = 0.0,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    cache: bool = True,
    **kwargs: Any,
) -> dspy.LM:
    """A `dspy.LM` over an in-process Hugging Face model.

    It is an ordinary `dspy.LM`: thread-safe (calls of many threads are answered in one batch), cached,
    streamable, with real token counts. Copies and deep copies share the weights. The model string is
    `local/name@revision:dtype`. The revision is found out anew by each call of `local_lm`, so cached answers of other
    weights are never returned; after you have changed the weights in this process, make a new LM.

    A program that carries such an LM is saved with it, and
    `program.load(path, allow_unsafe_lm_state=True)` loads the same weights again, in a fresh process too
    (DSPy asks for the flag for every LM that is not its own; no code comes from the file, and weights that
    have changed since are an error, as is an object that they were loaded with, such as a `quantization_config`: load
    them first in the same way). A program that takes its LM from `dspy.configure` needs no flag.

    Args:
        name_or_path: a hub id, a directory, a GGUF file (as llama.cpp, Ollama and LM Studio have them) or a
            directory with one, `"pocket"` for the model inside this package, a loaded `(model, tokenizer)`
            pair, or an `Engine`.
        device: where to load to; an accelerator if there is one.
        dtype: such as `"bfloat16"`. Without it, on an accelerator: as saved, and bfloat16 for quantised GGUF
            files. On a CPU: bfloat16 where the processor computes in it (AVX-512 BF16, AMX, Arm's BF16), the
            weights are saved in 16 bits or fewer, and there are at least 100 million; float32 otherwise. It
            is part of the model string, so answers of one type are never taken for those of another.
        revision: a hub branch, tag or commit. The version of a GGUF file is its SHA-256.
        temperature: 0 is greedy. Otherwise each call draws anew; pass `seed=` to draw the same again.
        max_tokens: the most tokens written per call.
        cache: let DSPy remember answers.
        kwargs: more arguments of `dspy.LM` (`num_retries`, `top_p`, `stop`, `seed`, ...); `trust_remote_code=True`,
            which runs Python code that comes with the weights; and for models that are larger than a device,
            as `from_pretrained` of transformers takes them: `device_map`, `max_memory`, `offload_folder`,
            `offload_buffers`, `quantization_config`, `attn_implementation`. Where weights are is no part of the model
            string; how they are quantised is. `tp_plan` is refused, with what to use instead.

    Raises:
        WeightsError: the weights cannot be loaded, the tokenizer has no chat template, or both are not a causal
            language model and its tokenizer (`dspy_greater.model.handshake`).

    Example:
        >>> lm = local_lm("pocket")  # doctest: +SKIP
        >>> dspy.configure(lm=lm)  # doctest: +SKIP
    """
    from dspy_greater.model.placement import LOADING
    from dspy_greater.model.registry import as_engine, shared_engine

    loading = {name: kwargs.pop(name) for name in LOADING if name in kwargs}
    trust = kwargs.pop("trust_remote_code", False)
    if isinstance(name_or_path, str) or hasattr(name_or_path, "__fspath__"):
        options = {"device": device, "dtype": dtype, "revision": revision, "trust_remote_code": trust, **loading}
        engine = shared_engine(name_or_path, **options)
    elif loading:
        raise SettingsError(
            f"{', '.join(loading)} says how weights are loaded, and these are loaded already; give it to "
            "from_pretrained, or pass their name or path to local_lm."
        )
    else:
        engine = as_engine(name_or_path)
    if not getattr(engine.tokenizer, "chat_template", None):
        raise WeightsError(
            f"The tokenizer of {engine.name!r} has no chat template, so DSPy's chat messages cannot be "
            "rendered; use an instruction-tuned model, or load it with Engine.from_pretrained, set "
            "engine.tokenizer.chat_template and pass (engine.model, engine.tokenizer)."
        )
    identity, local = engine.checks.renew(), LocalEngine.over(engine)
    return dspy.LM(
        f"{PROVIDER}/{identity}",
        engine=local,
        async_engine=AsyncLocalEngine(local),
        temperature=plain_scalar(temperature),
        max_tokens=plain_scalar(max_tokens),
        cache=cache,
        **{name: plain_scalar(value) for name, value in kwargs.items()},
    )


@dataclass(frozen=True)
class _Call:
    """A request, tokenised: the engine's request, the text it writes, and the prompt's length."""

    request: GenerationRequest
    writer: TextWriter
    prompt_tokens: int


class LocalEngine:
    """DSPy's engine contract (one lm15 request in, one response out) over an `Engine`.

    Attributes:
        engine: the weights.
        batcher: what makes one batch of the calls of many threads.
    """

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = SUPPORTED_PARAMETERS

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.batcher = Batcher(engine.generate, most_rows=engine.max_batch_rows)
        self._repeats: OrderedDict[int, tuple[lm15.Request, int]] = OrderedDict()
        self._repeats_lock = threading.Lock()

    @classmethod
    def over(cls, engine: Engine) -> LocalEngine:
        """The one local engine over these weights, so that all LMs on them share batches."""
        with _over_lock:
            local = _over.get(id(engine))
            if local is None or local.engine is not engine:
                local = _over[id(engine)] = cls(engine)
            return local

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalEngine:
        return self  # weights are never copied

    def __copy__(self) -> LocalEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_local, (self.dump_state(),)

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request; concurrent calls share a batch.

        Raises:
            lm15.LM15Error: a feature that is not supported, a prompt that is too long, a lack of memory.
        """
        with as_lm15_errors():
            call = self._call(request)
            generation = self.batcher.submit(call.request)
            self._count_repeat(request)
        return lm15.Response(
            id=None,
            model=request.model,
            message=lm15.Message.assistant(call.writer.finish()),
            finish_reason=generation.finish_reason,
            usage=_usage(call, generation),
        )

    def stream(self, request: lm15.Request, cancelled: threading.Event | None = None) -> Iterator[Any]:
        """Answer one request in pieces of text; closing the iterator stops the generation, and so does `cancelled`."""
        pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with as_lm15_errors():
            call = self._call(request, on_text=pieces.put, cancelled=cancelled)
        yield lm15.StreamStartEvent(model=request.model)
        writer = threading.Thread(target=self._write, args=(call, pieces.put), name="local-lm-stream")
        writer.start()
        try:
            with as_lm15_errors():
                while isinstance(piece := pieces.get(), str):
                    yield lm15.StreamDeltaEvent(lm15.TextDelta(piece))
                if isinstance(piece, BaseException):
                    raise piece
        finally:
            call.writer.cancel()
            if writer is not threading.current_thread():  # which may be where an iterator left behind is collected
                writer.join()
        self._count_repeat(request)
        if rest := call.writer.rest():
            yield lm15.StreamDeltaEvent(lm15.TextDelta(rest))
        yield lm15.StreamEndEvent(finish_reason=piece.finish_reason, usage=_usage(call, piece))

    def lockstep(
        self, workers: int, *, stall_seconds: float = 60.0, generate: Compute | None = None
    ) -> AbstractContextManager[Lockstep]:
        """Batches that start exactly when all `workers` threads wait, so that they do not depend on timing.

        `generate` computes them in the place of the engine, such as a session's does.

        Every worker thread enters `.worker()` of what this yields for as long as it lives. Requests of
        other threads go the ordinary way.

        Example:
            >>> with local.lockstep(2) as group:  # doctest: +SKIP
            ...     with group.worker():  # in each of the two threads
            ...         program(question="...")
        """
        return self.batcher.lockstep(workers, stall_seconds=stall_seconds, compute=generate)

    def prompt_ids(self, request: lm15.Request) -> tuple[int, ...]:
        """The tokens that the model reads for a request, which are those that a search scores.

        Raises:
            LayoutError: the chat template refuses the request's messages.
            lm15.UnsupportedFeatureError: a message has a part that is not text.
        """
        return self._encoder.chat_ids(messages_of(request))

    def close(self) -> None:
        """Nothing to close: no thread, no connection; the weights go when nothing holds them."""

    def dump_state(self) -> dict[str, Any]:
        """What `program.save` writes: how to load the same weights, and which they have to be."""
        from dspy_greater.model.registry import saved_origin

        return {"identity": self.engine.identity, "origin": saved_origin(self.engine)}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> LocalEngine:
        """The engine of a saved program: the weights that are loaded already, or the same loaded again.

        Raises:
            WeightsError: the weights are gone, have changed, were handed in as objects, or were loaded with something
                that cannot be saved.
        """
        from dspy_greater.model.registry import live_engine, load_saved

        identity, origin = state.get("identity"), state.get("origin")
        engine = live_engine(str(identity))
        if engine is None and isinstance(origin, dict) and isinstance(origin.get("name_or_path"), str):
            engine = load_saved(origin)
        if engine is None:
            raise WeightsError(
                f"The saved LM ran on {identity!r}, a model that was passed as an object and that nothing in "
                "this process holds; load it, keep local_lm((model, tokenizer)), and load the program again."
            )
        if engine.identity != identity:
            raise WeightsError(
                f"The saved LM ran on {identity!r}, but {engine.identity!r} was found in its place; restore "
                "those weights, or save the program again with an LM on the new ones."
            )
        return cls.over(engine)

    @cached_property
    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(self.engine.tokenizer)

    def _call(
        self,
        request: lm15.Request,
        on_text: Callable[[str], object] | None = None,
        cancelled: threading.Event | None = None,
    ) -> _Call:
        from dspy_greater.model.interface import GenerationRequest
        from dspy_greater.model.requests import room_after
        from dspy_greater.model.sampling import row_seed

        refuse_unsupported_features(request)
        tokenizer, config = self.engine.tokenizer, request.config
        prompt = self.prompt_ids(request)
        room = room_after(self.engine, len(prompt))
        most = config.max_tokens or DEFAULT_MAX_TOKENS
        writer = TextWriter(tokenizer, stop=config.stop, on_text=on_text, cancelled=cancelled)
        temperature = config.temperature or 0.0
        seed = 0
        if temperature > 0:
            base = secrets.randbits(63) if config.seed is None else config.seed
            # Different prompts draw differently: rows that share their draws would all err on the same side.
            seed = row_seed(row_seed(base, zlib.crc32(repr(prompt).encode())), self._repeat(request))
        generation = GenerationRequest(
            prompt,
            most if room is None else min(room, most),
            temperature,
            1.0 if config.top_p is None else max(config.top_p, _LEAST_TOP_P),
            seed,
            None,
            writer.accept,
        )
        return _Call(generation, writer, len(prompt))

    def _write(self, call: _Call, put: Callable[[object], object]) -> None:
        try:
            put(self.batcher.submit(call.request))
        except BaseException as error:  # raised again by the thread that reads the stream
            put(error)

    def _repeat(self, request: lm15.Request) -> int:
        """How often this request object was answered: DSPy asks for `n` samples by passing it `n` times."""
        with self._repeats_lock:
            return self._repeats.get(id(request), (request, 0))[1]

    def _count_repeat(self, request: lm15.Request) -> None:
        with self._repeats_lock:
            # The request is kept with its count, so that its id is not given to another one.
            self._repeats[id(request)] = (request, self._repeats.get(id(request), (request, 0))[1] + 1)
            self._repeats.move_to_end(id(request))
            while len(self._repeats) > _REPEATS_REMEMBERED:
                self._repeats.popitem(last=False)


class AsyncLocalEngine(AsyncEngine):
    """The asynchronous side of a `LocalEngine`; shares its weights and its batches."""

    kind = LocalEngine
    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = LocalEngine.supported_params

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request without blocking the event loop, unless its thread is in lockstep.

        There the thread itself has to wait, so that batches do not depend on timing.
        """
        if self.engine.batcher.is_in_lockstep():
            return self.engine.complete(request)
        return await super().complete(request)

    def _begun(self, request: lm15.Request) -> tuple[Any, Callable[[], None]]:
        cancelled = threading.Event()
        return self.engine.stream(request, cancelled), cancelled.set


def local_engine(lm: Any) -> LocalEngine | None:
    """The in-process engine of an LM, if it has one."""
    engine = getattr(lm, "engine", None)
    return engine if isinstance(engine, LocalEngine) else None


_over: WeakValueDictionary[int, LocalEngine] = WeakValueDictionary()
_over_lock = threading.Lock()


def _load_local(state: dict[str, Any]) -> LocalEngine:
    return LocalEngine.load_state(state)


def _usage(call: _Call, generation: Generation) -> lm15.Usage:
    return lm15.Usage(input_tokens=call.prompt_tokens, output_tokens=len(generation.token_ids))
