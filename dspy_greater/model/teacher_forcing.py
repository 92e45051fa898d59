"""The loss of a prompt, given the reasoning that it led to: equations 5 and 6 of the paper.

Nothing is generated here. Each example arrives as one finished sequence x ⊙ p ⊙ r ⊙ p_extract ⊙ y that says
where its instruction p and its gold answer y stand, and one forward pass reads off how likely the model finds
both. `dspy_greater.estimators.paper_gradient` differentiates the very same numbers. What all examples begin with is
read once (`dspy_greater.model.fast.prefix_cache`).

Shapes: N examples (of one batch), P tokens that all begin with, T tokens after these in the longest, R predicted
tokens, U predicted tokens that are the same for all, V vocabulary, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.engine import Engine, EngineMemoryError
from dspy_greater.model.fast.prefix_cache import Prefix, is_out_of_memory, shared_length
from dspy_greater.model.output_layer import computed_only_at

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")


class TokenSpan(Protocol):
    """A half-open range of token indices."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class SupervisedTokens(Protocol):
    """What the loss needs to know of x ⊙ p ⊙ r ⊙ p_extract ⊙ y; `dspy_greater.prompt.layout.Supervised` has it."""

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
    """Equations 5 and 6 without gradient, in the order given: one forward pass over what all examples begin
    with, and one over the rest of each.

    `answer_temperature` divides the logits of the answer's tokens (not the instruction's) before the softmax.
    `max_batch_tokens` bounds rows times longest row of a padded batch, what is read once left out; it changes
    speed, never the losses beyond rounding. Softmax and mean are taken in float32 (float64 for a float64 model).

    Raises `LayoutError` for an empty or misplaced span, `SettingsError` for a temperature or bound that is
    not positive.

    >>> from types import SimpleNamespace as Row
    >>> from dspy_greater.model.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> row = Row(token_ids=(1, 5, 6, 7, 9), instruction=Row(start=1, stop=3), answer=Row(start=4, stop=5))
    >>> teacher_forced_losses(engine, [row]).finite
    (True,)
    """
    check_supervised(supervised, answer_temperature)
    if not supervised:
        return Losses((), ())

    def of_batch(batch: Sequence[SupervisedTokens]) -> list[tuple[float, float]]:
        answer, fluency = reading.losses(batch)  # [N], [N]
        return list(zip(answer.tolist(), fluency.tolist(), strict=True))

    lengths = [len(example.token_ids) for example in supervised]
    with engine.exclusive(), torch.no_grad():
        reading = Reading(engine, supervised, answer_temperature=answer_temperature)
        shared = reading.shared()
        return losses_of(in_batches(of_batch, supervised, lengths, max_batch_tokens, shared, reading.forget))


class Reading:
    """Examples that are read batch by batch, and what they begin with, which is read once without gradient.

    Args:
        engine: the model; hold it (`Engine.exclusive`) while the reading is used.
        supervised: all examples of the call, at least one.
        answer_temperature: divides the logits of the answers' tokens.
        most: nothing from this index on is read together.
    """

    def __init__(
        self,
        engine: Engine,
        supervised: Sequence[SupervisedTokens],
        *,
        answer_temperature: float,
        most: int | None = None,
    ) -> None:
        self._engine, self._heat = engine, answer_temperature
        self._rows, self._longest = len(supervised), max(len(each.token_ids) for each in supervised)
        length = shared_length([tuple(each.token_ids[:-1]) for each in supervised])
        self._tokens = tuple(supervised[0].token_ids[: length if most is None else min(length, most)])  # [P]
        self._prefix: Prefix | None = None
        self._asked = False
        ends = {(at, heat) for each in supervised for at, heat in self._predicted(each)}
        self._ends = sorted(ends)  # what the hidden states of the prefix predict, once P is known
        self._log_probabilities: Tensor | None = None  # [U, V]

    def shared(self) -> int:
        """P: how many tokens all rows begin with, their states being at hand; 0 when nothing is shared."""
        if not self._asked:
            self._asked, prefixes = True, self._engine.prefixes
            self._prefix = prefixes.read(self._tokens, rows=self._rows, longest=self._longest, with_hidden=True)
            if self._prefix:  # the same again if it has to be read again
                self._tokens = self._prefix.token_ids
                self._ends = [end for end in self._ends if end[0] <= len(self._prefix)]  # [U]
        return len(self._prefix) if self._prefix else 0

    def forget(self) -> None:
        """Give the memory of what is shared back; it is read again for the next batch."""
        self._prefix, self._asked = None, False
        self._engine.prefixes.drop()

    def losses(self, batch: Sequence[SupervisedTokens]) -> tuple[Tensor, Tensor]:
        """L_CE and the mean NLL inside L_perpl of equation 6, each [N], differentiable; one forward pass."""
        instruction = [(row, at, 1.0) for row, each in enumerate(batch) for at in _indices(each.instruction)]
        answer = [(row, at, self._heat) for row, each in enumerate(batch) for at in _indices(each.answer)]
        nll = self._nll(batch, instruction + answer)  # [R]
        fluency_nll = _mean_of_each(nll[: len(instruction)], [each.instruction for each in batch])  # [N]
        answer_nll = _mean_of_each(nll[len(instruction) :], [each.answer for each in batch])  # [N]
        return answer_nll, fluency_nll

    def _nll(self, batch: Sequence[SupervisedTokens], asked: Sequence[tuple[int, int, float]]) -> Tensor:
        """[R] negative log-likelihood of the token at each (row, index, temperature); equation 5."""
        shared = self.shared()
        inside = [place for place, (_, at, _) in enumerate(asked) if shared and at <= shared]
        own = [place for place, (_, at, _) in enumerate(asked) if not shared or at > shared]
        unknown = self._ends if inside and self._log_probabilities is None else []

        logits = logits_before(
            self._engine,
            [each.token_ids for each in batch],
            [asked[each][:2] for each in own],
            prefix=self._prefix,
            in_prefix=[at for at, _ in unknown],
        )  # [U + R, V]
        targets = torch.tensor([batch[row].token_ids[at] for row, at, _ in asked], device=logits.device)  # [R]
        heat = logits.new_tensor([heat for *_, heat in unknown] + [asked[each][2] for each in own])
        logits = logits / heat[:, None]
        if unknown:
            self._log_probabilities = logits[: len(unknown)].detach().log_softmax(-1)
        nll = cross_entropy(logits[len(unknown) :], targets[own], reduction="none")
        if self._log_probabilities is None or not inside:
            return nll
        rows = [self._ends.index(asked[each][1:]) for each in inside]
        constant = -self._log_probabilities[rows, targets[inside]]
        order = torch.tensor([*inside, *own], device=nll.device).argsort()
        return torch.cat([constant, nll])[order]

    def _predicted(self, example: SupervisedTokens) -> list[tuple[int, float]]:
        """(index, temperature) of every token of the example whose likelihood is asked for."""
        return [(at, 1.0) for at in _indices(example.instruction)] + [
            (at, self._heat) for at in _indices(example.answer)
        ]


def logits_before(
    engine: Engine,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[tuple[int, int]],
    *,
    prefix: Prefix | None = None,
    in_prefix: Sequence[int] = (),
) -> Tensor:
    """The logits [R, V] with which the model predicts the token at each (row, index) of `positions`.

    They stand one place earlier, at index - 1; an index equal to a row's length asks for the next token. The
    output layer, the widest of all, is applied to these R places and no others. Whatever the model does to
    its logits afterwards (Gemma's soft cap, Granite's scale) it does here too: it is the model itself that
    runs. At least float32. Call it inside `engine.exclusive()`.

    With a `prefix`, which shows its hidden states and with which every row begins, only what follows it is read:
    no index may be its length or less. The indices of `in_prefix` are predicted by the prefix; their logits come
    first. Raises `LayoutError` for an index whose token nothing that is read here predicts.
    """
    shared = len(prefix) if prefix else 0
    token_ids, position_ids = right_padded([sequence[shared:] for sequence in sequences])  # [N, T] each, on the CPU
    rows, indices = torch.tensor(positions, dtype=torch.long).reshape(-1, 2).unbind(dim=1)  # [R] each
    places = (rows, indices - 1 - shared)
    if bool((places[1] < 0).any()):
        raise LayoutError(
            f"The token at index {int(indices.min())} is predicted by what stands before it, of which {shared} tokens "
            "are not read here; ask for later tokens, or read a shorter prefix."
        )
    before = prefix.hidden[[at - 1 for at in in_prefix]] if prefix and prefix.hidden is not None else None  # [U, d]
    cache = {"past_key_values": prefix.cache(engine.model, len(sequences))} if prefix else {}
    real = sum(len(sequence) - shared for sequence in sequences)
    return logits_at(engine, token_ids, position_ids + shared, places, real=real, before=before, **cache)


def logits_at(
    engine: Engine,
    token_ids: Tensor,
    position_ids: Tensor,
    places: tuple[Tensor, Tensor],
    *,
    real: int,
    before: Tensor | None = None,
    **model_inputs: Any,
) -> Tensor:
    """One forward pass over [N, T] tokens, `real` of them no padding; logits [U + R, V] at (rows, columns) `places`.

    The logits that hidden states `before` [U, d] lead to come first. At least float32.
    """
    device = engine.model.get_input_embeddings().weight.device
    with computed_only_at(engine.model, places, token_ids.shape, before) as narrowed:
        logits: Tensor = engine.model(
            input_ids=token_ids.to(device),
            position_ids=position_ids.to(device),
            use_cache="past_key_values" in model_inputs,
            **model_inputs,
        ).logits
    projected = len(places[0]) + (0 if before is None else len(before)) if narrowed else token_ids.numel()
    engine.tally(forwards=1, prefilled_tokens=real, padded_tokens=token_ids.numel() - real, lm_head_rows=projected)
    logits = logits[0] if narrowed else logits[places]  # [U + R, V]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
    shared: int = 0,
    relieve: Callable[[], None] = lambda: None,
) -> list[ResultT]:
    """What `work` makes of each row, in the rows' order; `work` is given some rows at a time.

    Batches are those of `token_batches`, for rows without the `shared` tokens that cost a batch nothing. When
    memory runs out `relieve` is called and the batch is tried again in two halves; a row that does not fit alone
    raises `EngineMemoryError`.

    >>> in_batches(lambda batch: [row.upper() for row in batch], ["abc", "d"], [3, 1], max_batch_tokens=4)
    ['ABC', 'D']
    """
    results: dict[int, ResultT] = {}
    waiting = token_batches([length - shared for length in lengths], max_batch_tokens)
    while waiting:
        batch = waiting.pop(0)
        try:
            results.update(zip(batch, work([rows[index] for index in batch]), strict=True))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            relieve()
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


def right_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
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
