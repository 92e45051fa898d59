"""Continuous batching: many greedy rows on an accelerator through the paged attention of `transformers`.

A row that ends makes room for the next one at once, nothing is padded between rows, and pages of the
key-value cache that prompts have in common are read once. The slow, obvious twin is `decode.decode`, which
also takes whatever `suits` turns down.

This drives the manager behind `model.generate_batch` instead of that function itself, which knows one
length limit and one set of stop tokens for all rows, and logs the errors of its thread instead of raising them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.utils.import_utils import is_flash_attn_2_available

from .errors import GreaterError
from .prefix import Tally, is_out_of_memory
from .sampling import Row

_ROWS_LEAST = 32  # below this, setting up pages and graphs costs more than padding
_PAGE = 32  # tokens; prompts share whole pages only, so small ones share more
_FLASH_2_PAGE = 256  # its kernel reads pages of multiples of this only
_SPARE = 1.25  # the scheduler admits nothing into the last 15 % of its pages
_PATIENCE = 1.0  # seconds between two looks at whether the thread is alive

_refused: WeakSet[Any] = WeakSet()  # models that turned out not to work; each has been warned about once
_refused_lock = threading.Lock()


class ContinuousBatchingError(GreaterError, RuntimeError):
    """Continuous batching ended before its rows did."""


def suits(model: Any, rows: Sequence[Row]) -> bool:
    """Whether these rows are better written by `generate_rows` than by `decode.decode`.

    They are when there are many of them, all are greedy and reported to nobody while they are written, every
    layer of the model keeps a full cache, and a flash attention kernel can read pages. Without one, paged
    attention compares each row with the keys of all rows, which costs rows times more.

    Example:
        >>> suits(engine.model, [Row((1, 2), 8, frozenset({0}))])  # doctest: +SKIP
        False
    """
    return (
        len(rows) >= _ROWS_LEAST
        and all(row.temperature == 0 and row.on_token is None for row in rows)
        and model not in _refused
        and _flash_attention(model) is not None
        and _keeps_everything(model)
    )


def _flash_attention(model: Any) -> str | None:
    """The flash attention this model can use where it is: its own, or an installed one; never a download."""
    weight = model.get_input_embeddings().weight
    on_one_device = {parameter.device for parameter in model.parameters()} == {weight.device}
    if weight.device.type != "cuda" or weight.dtype not in (torch.bfloat16, torch.float16) or not on_one_device:
        return None
    chosen = model.config._attn_implementation or ""
    if "flash" in chosen:
        return chosen
    if not getattr(model, "_supports_flash_attn", False):
        return None
    if _flash_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


def _flash_3_available() -> bool:
    try:
        from transformers.utils.import_utils import is_flash_attn_3_available
    except ImportError:  # the first releases of transformers 5
        return False
    return is_flash_attn_3_available()


def _keeps_everything(model: Any) -> bool:
    """Whether every layer attends to all earlier tokens by plain scores, and a manager of pages can be had."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)  # not every kernel obeys it
    layers = DynamicCache(config=model.config).layers
    full = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return full and not capped and callable(getattr(model, "init_continuous_batching", None))


def generate_rows(model: Any, rows: Sequence[Row], *, tally: Tally) -> bool:
    """Write every row to its end as `decode.decode` does, in place; False if this model cannot, after a warning.

    The counters are taken from the batches that the scheduler hands to the model. What was written before
    memory ran out is kept, so the rows go on from there. The attention implementation and the random state are
    put back, and the thread has ended, however this returns.

    Raises:
        ContinuousBatchingError: memory ran out, or some rows were given up.
        RuntimeError: what the model itself raised, once at least one token was written.

    Example:
        >>> row = Row((1, 2, 3), 8, frozenset({0}))
        >>> generate_rows(engine.model, [row], tally=engine.tally), row.written  # doctest: +SKIP
        (True, [221, 23])
    """
    before = sum(len(row.written) for row in rows)
    spent = _Spent()
    try:
        with _random_state(), _attention(model, _flash_attention(model)), _manager(model, rows) as manager:
            spent.watch(manager)
            _write(manager, rows)
    except Exception as error:  # an untried model or kernel can fail in any way
        if _lacks_memory(error):
            raise ContinuousBatchingError(f"Continuous batching ran out of memory ({error}).") from error
        if sum(len(row.written) for row in rows) > before:
            raise
        _refuse(model, error)
        return False
    finally:
        tally(**spent.counts, generated_tokens=sum(len(row.written) for row in rows) - before)
    return True


class _Spent:
    """What was computed, read off the batches on their way to the model; captured graphs hide its forwards."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("forwards", "prefilled_tokens", "padded_tokens", "lm_head_rows"), 0)

    def watch(self, manager: Any) -> None:
        """Count what this manager prepares; the manager lives for one call, the model is left alone."""
        inputs = manager.batch_processor.inputs_and_outputs
        inputs.prepare_batch_tensors = self._counted(inputs.prepare_batch_tensors)

    def _counted(self, prepare: Callable[..., None]) -> Callable[..., None]:
        def prepare_and_count(requests_in_batch: list[Any], *args: Any, num_q_tokens: int, **options: Any) -> None:
            read = prompts = 0
            for request in requests_in_batch:
                start, length = request.state.position_offset, request.query_length
                read += length
                # What comes after the prompt was written here; of a row put off and read again, all is prompt.
                prompts += max(0, min(start + length, len(request.state.initial_tokens)) - start)
            self.counts["forwards"] += 1
            self.counts["prefilled_tokens"] += prompts
            self.counts["padded_tokens"] += num_q_tokens - read
            self.counts["lm_head_rows"] += sum(request.has_new_token for request in requests_in_batch)
            prepare(requests_in_batch, *args, num_q_tokens=num_q_tokens, **options)

        return prepare_and_count


@contextmanager
def _manager(model: Any, rows: Sequence[Row]) -> Iterator[Any]:
    """A running manager with pages for these rows; its thread has ended afterwards."""
    try:
        manager = _new_manager(model, _pages(rows, _page_size(model)))
    except MemoryError as short:  # then as many pages as there is room for, and rows take turns
        try:
            manager = _new_manager(model, None)
        except ValueError:  # not even one
            raise short from None
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()


def _new_manager(model: Any, pages: int | None) -> Any:
    from transformers import ContinuousBatchingConfig

    manager = model.init_continuous_batching(
        # Its own, not the model's: greedy, and no logits processors.
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=_page_size(model),
            num_blocks=pages,
            allow_block_sharing=True,
            auto_switch_to_flash=False,  # it may download a kernel; `_attention` has switched already
        ),
    )
    # What its `warmup` does first; here, so that a failure is raised in this thread, and without capturing graphs
    # of sizes that may never occur.
    manager.batch_processor = manager._create_batch_processor()
    return manager


def _page_size(model: Any) -> int:
    chosen = model.config._attn_implementation or ""
    return _FLASH_2_PAGE if "flash" in chosen and "3" not in chosen else _PAGE


def _pages(rows: Sequence[Row], size: int) -> int:
    """Enough pages for all rows at their longest, side by side."""
    lengths = [len(row.prompt) + row.max_new_tokens for row in rows]
    return int(_SPARE * sum(-(-length // size) + 1 for length in lengths)) + 1


def _write(manager: Any, rows: Sequence[Row]) -> None:
    """Hand in all rows, those with the same beginnings side by side, and take what comes back."""
    waiting = {str(index): row for index, row in enumerate(rows) if row.finish_reason is None}
    for name in sorted(waiting, key=lambda name: waiting[name].context):
        row = waiting[name]
        manager.add_request(
            list(row.context),
            request_id=name,
            max_new_tokens=row.max_new_tokens - len(row.written),
            eos_token_id=sorted(row.stop_token_ids),
        )
    problem = None
    while waiting:
        alive = manager.is_running()
        output = manager.get_result(timeout=_PATIENCE)
        if output is not None:
            problem = output.error or problem
            _take(waiting.pop(output.request_id), output.generated_tokens)
        elif not alive:
            break
    failure = manager.background_thread_status.fatal_error
    if failure is not None:
        raise failure
    left = sum(row.finish_reason is None for row in rows)
    if left:
        raise ContinuousBatchingError(
            f"Continuous batching gave up {left} of {len(rows)} rows ({problem or 'it does not say why'}); use an "
            "attention implementation other than flash attention to have them written in padded batches."
        )


def _take(row: Row, tokens: Sequence[int]) -> None:
    for token in tokens:
        if row.finish_reason is None:
            row.accept(token)


@contextmanager
def _attention(model: Any, implementation: str | None) -> Iterator[None]:
    """The model with this attention implementation (its own if None), and with its own again afterwards."""
    own = model.config._attn_implementation
    try:
        if implementation not in (None, own):
            model.set_attn_implementation(implementation)
        yield
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)


@contextmanager
def _random_state() -> Iterator[None]:
    """The global random state put back: a manager seeds it even when nothing is drawn."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _lacks_memory(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return is_out_of_memory(error) or "No requests can be scheduled" in str(error)  # the latter: no page is free
    return isinstance(error, MemoryError)


def _refuse(model: Any, error: Exception) -> None:
    with _refused_lock:
        known = model in _refused
        _refused.add(model)
    if not known:
        warnings.warn(
            f"Continuous batching does not work with this {type(model).__name__} here ({type(error).__name__}: "
            f"{error}); its rows are written in padded batches instead, which is slower and otherwise the same.",
            stacklevel=2,
        )
