"""The loss of a prompt, given the reasoning that it led to: equations 5 and 6 of the paper.

Nothing is generated here. Each example arrives as one finished sequence x ⊙ p ⊙ r ⊙ p_extract ⊙ y that says
where its instruction p and its gold answer y stand, and one forward pass reads off how likely the model finds
both. `dspy_greater.gradient` differentiates the very same numbers.

Shapes: N examples (of one batch), T tokens in the longest, R predicted tokens, V vocabulary, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from dspy_greater.engine import Engine, EngineMemoryError
from dspy_greater.errors import LayoutError, SettingsError

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")


class TokenSpan(Protocol):
    """A half-open range of token indices."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class SupervisedTokens(Protocol):
    """What the loss needs to know of x ⊙ p ⊙ r ⊙ p_extract ⊙ y; `dspy_greater.layout.Supervised` has it."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def instruction(self) -> TokenSpan: ...
    @property
    def answer(self) -> TokenSpan: ...


@dataclass(frozen=True)
class Losses:
    """The two parts of equation 6 for each of N examples, in natural-log units (nats) per token.

    A part that came out as infinity or not-a-number is kept as nan, and its example's `finite` is False.

    >>> losses = Losses(cross_entropy=(0.5, float("nan")), fluency_nll=(0.0, 0.0))
    >>> losses.finite, losses.perplexity
    ((True, False), (1.0, 1.0))
    >>> losses.total(fluency_weight=0.2)
    (0.7, nan)
    """

    cross_entropy: tuple[float, ...]  # [N]  mean over the answer's tokens, at the answer temperature
    fluency_nll: tuple[float, ...]  # [N]  mean over the instruction's tokens, at temperature 1

    @property
    def finite(self) -> tuple[bool, ...]:
        """Per example: whether both parts are numbers."""
        pairs = zip(self.cross_entropy, self.fluency_nll, strict=True)
        return tuple(math.isfinite(first) and math.isfinite(second) for first, second in pairs)

    @property
    def perplexity(self) -> tuple[float, ...]:
        """L_perpl of equation 6, exp(mean NLL) of the instruction; infinity where that overflows a double."""
        return tuple(math.exp(nll) if not nll > 709.0 else math.inf for nll in self.fluency_nll)

    def total(self, fluency_weight: float) -> tuple[float, ...]:
        """L = L_CE + λ · L_perpl per example, with λ = `fluency_weight`; λ = 0 leaves perplexity out."""
        if fluency_weight == 0:
            return self.cross_entropy
        pairs = zip(self.cross_entropy, self.perplexity, strict=True)
        return tuple(answer + fluency_weight * perplexity for answer, perplexity in pairs)


def teacher_forced_losses(
    engine: Engine,
    supervised: Sequence[SupervisedTokens],
    *,
    answer_temperature: float = 0.2,
    max_batch_tokens: int = 16_384,
) -> Losses:
    """Equations 5 and 6 without gradient: one forward pass over each example, in the order given.

    `answer_temperature` divides the logits of the answer's tokens (not the instruction's) before the softmax.
    `max_batch_tokens` bounds rows times longest row of a padded batch; it changes speed, never the losses
    beyond rounding. Softmax and mean are taken in float32 (float64 for a float64 model).

    Raises `LayoutError` for an empty or misplaced span, `SettingsError` for a temperature or bound that is
    not positive.

    >>> from types import SimpleNamespace as Row
    >>> from dspy_greater.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> row = Row(token_ids=(1, 5, 6, 7, 9), instruction=Row(start=1, stop=3), answer=Row(start=4, stop=5))
    >>> teacher_forced_losses(engine, [row]).finite
    (True,)
    """
    check_supervised(supervised, answer_temperature)

    def of_batch(batch: Sequence[SupervisedTokens]) -> list[tuple[float, float]]:
        answer, fluency = batch_losses(engine, batch, answer_temperature=answer_temperature)  # [N], [N]
        return list(zip(answer.tolist(), fluency.tolist(), strict=True))

    lengths = [len(example.token_ids) for example in supervised]
    with engine.exclusive(), torch.no_grad():
        return losses_of(in_batches(of_batch, supervised, lengths, max_batch_tokens))


def batch_losses(
    engine: Engine, batch: Sequence[SupervisedTokens], *, answer_temperature: float
) -> tuple[Tensor, Tensor]:
    """L_CE and the mean NLL inside L_perpl of equation 6, each [N], differentiable; one forward pass."""
    instruction = [(row, at) for row, each in enumerate(batch) for at in _indices(each.instruction)]
    answer = [(row, at) for row, each in enumerate(batch) for at in _indices(each.answer)]
    positions = instruction + answer

    logits = logits_before(engine, [each.token_ids for each in batch], positions)  # [R, V]  equation 5
    targets = torch.tensor([batch[row].token_ids[at] for row, at in positions], device=logits.device)  # [R]
    temperature = logits.new_tensor([1.0] * len(instruction) + [answer_temperature] * len(answer))  # [R]
    nll = cross_entropy(logits / temperature[:, None], targets, reduction="none")  # [R]

    fluency_nll = _mean_of_each(nll[: len(instruction)], [each.instruction for each in batch])  # [N]
    answer_nll = _mean_of_each(nll[len(instruction) :], [each.answer for each in batch])  # [N]
    return answer_nll, fluency_nll


def logits_before(engine: Engine, sequences: Sequence[Sequence[int]], positions: Sequence[tuple[int, int]]) -> Tensor:
    """The logits [R, V] with which the model predicts the token at each (row, index) of `positions`.

    They stand one place earlier, at index - 1; an index equal to a row's length asks for the next token. The
    output layer, the widest of all, is applied to these R places and no others. Whatever the model does to
    its logits afterwards (Gemma's soft cap, Granite's scale) it does here too: it is the model itself that
    runs. At least float32. Call it inside `engine.exclusive()`.
    """
    token_ids, position_ids = _right_padded(sequences)  # [N, T] each, on the CPU
    rows, indices = torch.tensor(positions).unbind(dim=1)  # [R] each
    places = (rows, indices - 1)
    device = engine.model.get_input_embeddings().weight.device
    with _output_layer_sees_only(engine.model, places, token_ids.shape) as narrowed:
        logits: Tensor = engine.model(
            input_ids=token_ids.to(device), position_ids=position_ids.to(device), use_cache=False
        ).logits
    projected = len(positions) if narrowed else token_ids.numel()
    real = sum(len(sequence) for sequence in sequences)
    engine.tally(forwards=1, prefilled_tokens=real, padded_tokens=token_ids.numel() - real, lm_head_rows=projected)
    logits = logits[0] if narrowed else logits[places]  # [R, V]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _output_layer_sees_only(model: Any, places: tuple[Tensor, Tensor], shape: torch.Size) -> Iterator[list[bool]]:
    """Inside, the output layer maps [N, T, d] to [1, R, V]. Yields a list that is not empty once it has.

    A model without such a layer, or that feeds it something else, runs unchanged: the caller picks the places
    from the full logits instead.
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


def token_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices of the rows, neighbours in length together, so that rows times longest row stays in bounds.

    A row longer than the bound gets a batch of its own.

    >>> token_batches([4, 9, 5, 30], max_batch_tokens=20)
    [[0, 2], [1], [3]]
    """
    if max_batch_tokens < 1:
        raise SettingsError(f"max_batch_tokens is {max_batch_tokens}; give at least 1 token.")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def in_batches(
    work: Callable[[Sequence[RowT]], Sequence[ResultT]],
    rows: Sequence[RowT],
    lengths: Sequence[int],
    max_batch_tokens: int,
) -> list[ResultT]:
    """What `work` makes of each row, in the rows' order; `work` is given some rows at a time.

    Batches are those of `token_batches`. When memory runs out the batch is tried again in two halves; a row
    that does not fit alone raises `EngineMemoryError`.

    >>> in_batches(lambda batch: [row.upper() for row in batch], ["abc", "d"], [3, 1], max_batch_tokens=4)
    ['ABC', 'D']
    """
    results: dict[int, ResultT] = {}
    waiting = token_batches(lengths, max_batch_tokens)
    while waiting:
        batch = waiting.pop(0)
        try:
            results.update(zip(batch, work([rows[index] for index in batch]), strict=True))
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise EngineMemoryError(
                    f"A row of {lengths[batch[0]]} tokens alone does not fit into memory; use a smaller "
                    "dtype such as bfloat16, shorter inputs or reasoning, or a smaller model."
                ) from error
            half = len(batch) // 2
            waiting[:0] = [batch[:half], batch[half:]]
    return [results[index] for index in range(len(rows))]


def losses_of(pairs: Iterable[tuple[float, float]]) -> Losses:
    """`Losses` from each example's two parts; what is not finite becomes nan."""
    rows = [[each if math.isfinite(each) else math.nan for each in pair] for pair in pairs]
    return Losses(tuple(row[0] for row in rows), tuple(row[1] for row in rows))


def check_supervised(supervised: Sequence[SupervisedTokens], answer_temperature: float) -> None:
    """Raises `LayoutError` or `SettingsError` for what `teacher_forced_losses` cannot use."""
    if not answer_temperature > 0:
        raise SettingsError(f"answer_temperature is {answer_temperature}; give a number above 0, like 0.2.")
    for row, example in enumerate(supervised):
        for name, span in (("instruction", example.instruction), ("answer", example.answer)):
            if not 1 <= span.start < span.stop <= len(example.token_ids):
                raise LayoutError(
                    f"Example {row}: the {name} span [{span.start}, {span.stop}) does not fit its "
                    f"{len(example.token_ids)} tokens. It must hold a token and have one before it that "
                    "predicts it; begin the sequence with a chat template or a begin-of-text token."
                )


def _right_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and their positions, each [N, T]. Attention is causal: no real token sees the padding."""
    longest = max(len(sequence) for sequence in sequences)
    token_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        token_ids[row, : len(sequence)] = torch.tensor(sequence)
    return token_ids, torch.arange(longest).expand_as(token_ids)


def _indices(span: TokenSpan) -> range:
    return range(span.start, span.stop)


def _mean_of_each(nll: Tensor, spans: Sequence[TokenSpan]) -> Tensor:
    """[R] negative log-likelihoods, span after span -> [N] means."""
    return torch.stack([part.mean() for part in nll.split([len(_indices(span)) for span in spans])])
