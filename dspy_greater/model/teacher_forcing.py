"""Finished sequences read in one pass: the log-probabilities of tokens that stand in them.

This is where equations 5 and 6, equation 7 and every forecast meet the model. Attention is causal, so a real token
never sees the padding to its right, and no attention mask is needed.

Shapes: N sequences of a batch, P tokens of a prefix that all begin with, T tokens behind it in the longest, R asked
tokens, V vocabulary, d embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from dspy_greater.errors import EngineMemoryError, LayoutError, SettingsError

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine
    from dspy_greater.model.fast.prefix_cache import Prefix

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")

Asked = tuple[int, int, float]  # row, index of the token, temperature


def logprobs(
    engine: Engine, sequences: Sequence[Sequence[int]], asked: Sequence[Asked], prefix: Prefix | None = None
) -> Tensor:
    """The log-probability [R] of each asked token, differentiable; one forward pass. Hold the engine meanwhile.

    With a `prefix`, with which every sequence begins, only what follows it is read: no asked index may be its length
    or less.
    """
    shared = len(prefix) if prefix else 0
    token_ids, position_ids = right_padded([sequence[shared:] for sequence in sequences])  # [N, T] each
    rows, indices = torch.tensor([query[:2] for query in asked], dtype=torch.long).reshape(-1, 2).unbind(dim=1)
    cache = {"past_key_values": prefix.cache(engine.model, len(sequences))} if prefix else {}
    real = sum(len(sequence) - shared for sequence in sequences)
    logits = logits_at(
        engine, token_ids, position_ids + shared, (rows, indices - 1 - shared), real=real, **cache
    )  # [R, V]
    return of_tokens(logits, [sequences[row][at] for row, at, _ in asked], [heat for *_, heat in asked])


def of_tokens(logits: Tensor, tokens: Sequence[int], temperatures: Sequence[float]) -> Tensor:
    """Logits [R, V] -> the log-probability of one token of each row, [R]."""
    targets = torch.tensor(tokens, device=logits.device)
    heat = logits.new_tensor(temperatures)[:, None]
    return -cross_entropy(logits / heat, targets, reduction="none")


def next_logits(engine: Engine, contexts: Sequence[Sequence[int]]) -> Tensor:
    """The logits [N, V] of what follows each context; one forward pass."""
    token_ids, position_ids = right_padded(contexts)  # [N, T]
    last = torch.tensor([len(context) - 1 for context in contexts])
    real = sum(map(len, contexts))
    return logits_at(engine, token_ids, position_ids, (torch.arange(len(contexts)), last), real=real)


def logits_at(
    engine: Engine,
    token_ids: Tensor,
    position_ids: Tensor,
    places: tuple[Tensor, Tensor],
    *,
    real: int,
    **model_inputs: Any,
) -> Tensor:
    """One forward pass over [N, T] tokens, `real` of them no padding; logits [R, V] at (rows, columns) `places`.

    Whatever the model does to its logits (Gemma's soft cap, Granite's scale) it does here too: it is the model
    itself that runs. At least float32.

    Raises:
        LayoutError: a place before the first token that is read.
    """
    if bool((places[1] < 0).any()):
        raise LayoutError(
            "A token is asked for that nothing in this pass predicts: it is the first of its sequence, or what stands "
            "before it is not read here. Ask for later tokens, or read a shorter prefix."
        )
    device = engine.weights.device
    with computed_only_at(engine.model, places, token_ids.shape) as narrowed:
        logits: Tensor = engine.model(
            input_ids=token_ids.to(device),
            position_ids=position_ids.to(device),
            use_cache="past_key_values" in model_inputs,
            **model_inputs,
        ).logits
    projected = len(places[0]) if narrowed else token_ids.numel()
    engine.tally.add(forwards=1, prefilled_tokens=real, padded_tokens=token_ids.numel() - real, lm_head_rows=projected)
    logits = logits[0] if narrowed else logits[places]  # [R, V]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def computed_only_at(model: Any, places: tuple[Tensor, Tensor], shape: torch.Size) -> Iterator[list[bool]]:
    """Inside, the output layer, the widest of all, maps [N, T, d] to [1, R, V]. Yields a list, not empty once it has.

    A model without such a layer, or that feeds it something else, runs unchanged: the caller picks the places
    from the full logits instead. transformers' own `logits_to_keep` slices the states instead, and on a CPU the product
    with a slice copies the layer's weights for each row (24 rows of a 0.5B model in bfloat16 on two cores: 12 s).
    """
    narrowed: list[bool] = []

    def keep_places(_layer: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or inputs[0].shape[:-1] != shape:
            return None
        narrowed.append(True)
        return (inputs[0][places][None], *inputs[1:])  # [1, R, d]

    layer = model.get_output_embeddings()
    if layer is None:
        yield narrowed
        return
    hook = layer.register_forward_pre_hook(keep_places)
    try:
        yield narrowed
    finally:
        hook.remove()


@contextmanager
def embedded_at(layer: Module, places: Sequence[int], embedding: Tensor) -> Iterator[None]:
    """Inside, `layer` puts out `embedding[j]` at place `places[j]` of row j, and else what it always does."""
    rows, columns = torch.arange(len(places)), torch.tensor(places)  # [N] each

    def substitute(_layer: Module, _inputs: Any, embedded: Tensor) -> Tensor:  # [N, T, d]
        return embedded.index_put((rows, columns), embedding)

    hook = layer.register_forward_hook(substitute)
    try:
        yield
    finally:
        hook.remove()


def token_batches(lengths: Sequence[int], max_batch_tokens: int, apart: float = math.inf) -> list[list[int]]:
    """Indices of the rows, neighbours in length together, so that rows times longest row stays in bounds.

    A row longer than the bound gets a batch of its own. Rows of up to `apart` tokens are not put beside longer ones.

    >>> token_batches([4, 9, 5, 30], max_batch_tokens=20)
    [[0, 2], [1], [3]]
    >>> token_batches([4, 9, 5, 30], max_batch_tokens=99, apart=5)
    [[0, 2], [1, 3]]
    """
    if max_batch_tokens < 1:
        raise SettingsError(f"max_batch_tokens is {max_batch_tokens}; give at least 1 token.")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        alike = bool(batches) and (lengths[batches[-1][-1]] <= apart) == (lengths[index] <= apart)
        if alike and (len(batches[-1]) + 1) * lengths[index] <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def in_batches(
    work: Callable[[Sequence[RowT]], Sequence[ResultT]],
    rows: Sequence[RowT],
    lengths: Sequence[int],
    max_batch_tokens: int,
    relieve: Callable[[], bool] = lambda: False,
    apart: float = math.inf,
) -> list[ResultT]:
    """What `work` makes of each row, in the rows' order; `work` is given some rows at a time.

    Batches are those of `token_batches`. When memory runs out `relieve` is called and the batch is tried again in
    two halves. A row alone is tried once more where `relieve` says that it gave something up, and otherwise raises
    `EngineMemoryError`.

    >>> in_batches(lambda batch: [row.upper() for row in batch], ["abc", "d"], [3, 1], max_batch_tokens=4)
    ['ABC', 'D']
    """
    results: dict[int, ResultT] = {}
    retried: set[int] = set()
    waiting = token_batches(lengths, max_batch_tokens, apart)
    while waiting:
        batch = waiting.pop(0)
        try:
            results.update(zip(batch, work([rows[index] for index in batch]), strict=True))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            freed = relieve()
            if len(batch) == 1 and freed and batch[0] not in retried:
                retried.add(batch[0])
                waiting.insert(0, batch)
                continue
            if len(batch) == 1:
                raise EngineMemoryError(
                    f"A row of {lengths[batch[0]]} tokens alone does not fit into memory; use a smaller "
                    "dtype such as bfloat16, shorter inputs or reasoning, or a smaller model."
                ) from error
            half = len(batch) // 2
            waiting[:0] = [batch[:half], batch[half:]]
    return [results[index] for index in range(len(rows))]


def right_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and their positions, each [N, T], on the CPU."""
    longest = max(len(sequence) for sequence in sequences)
    token_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        token_ids[row, : len(sequence)] = torch.tensor(sequence)
    return token_ids, torch.arange(longest).expand_as(token_ids)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error says that memory ran out, on whatever device."""
    said = any(words in str(error).lower() for words in ("out of memory", "can't allocate memory"))
    return said or isinstance(error, torch.OutOfMemoryError)
