"""The exact loss of rows that the model has just written: what is already known of them is not read again.

`score` gives the numbers of `loss.teacher_forced_losses`, its plain twin. Where the states of a row were kept
(`written`), only what follows them is read: the tokens between reasoning and answer, and the gold answer. The
instruction's fluency depends on what stands before it alone, so it is read once for all rows that begin alike.

Shapes: n rows of one batch, T tokens that are read in the longest, R predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.generated_kv import Continuation, continued
from dspy_greater.model.fast.prefix_cache import Beginning, shared_length
from dspy_greater.model.teacher_forcing import (
    Losses,
    SupervisedTokens,
    check_supervised,
    in_batches,
    logits_at,
    logits_before,
    losses_of,
    right_padded,
    teacher_forced_losses,
)

Beginnings = dict[tuple[int, ...], float]  # tokens up to the instruction's end -> mean NLL of the instruction
Known = tuple[SupervisedTokens, Continuation]
_MOST_PADS = 1.5  # times the slots of kept states may be filled when they are put into one cache


def score(
    engine: Engine,
    supervised: Sequence[SupervisedTokens],
    *,
    answer_temperature: float = 0.2,
    max_batch_tokens: int = 16_384,
) -> Losses:
    """Equations 5 and 6 without gradient, in the order given; arguments and errors as in `teacher_forced_losses`.

    Inside `engine.kept_rows()`, rows that were written there are read from where their states end.

    >>> from types import SimpleNamespace as Row
    >>> engine = Engine.from_pretrained("pocket")
    >>> with engine.kept_rows():
    ...     [written] = engine.generate([(1, 5, 6, 7)], max_new_tokens=4, stop_token_ids=())
    ...     row = Row(
    ...         token_ids=(1, 5, 6, 7, *written.token_ids, 9),
    ...         instruction=Row(start=1, stop=3),
    ...         answer=Row(start=8, stop=9),
    ...     )
    ...     before = engine.counters.prefilled_tokens
    ...     score(engine, [row]).finite, engine.counters.prefilled_tokens - before
    ((True,), 5)
    """
    check_supervised(supervised, answer_temperature)
    with engine.exclusive(), torch.no_grad():
        kept = {row: found for row, each in enumerate(supervised) if (found := _kept(engine, each))}
        known = [(supervised[row], found) for row, found in kept.items()]
        unknown = [row for row in range(len(supervised)) if row not in kept]
        fluency = _fluency(engine, [each for each, _ in known], max_batch_tokens)
        answers = _answers(engine, known, answer_temperature, max_batch_tokens)
        read = teacher_forced_losses(
            engine,
            [supervised[row] for row in unknown],
            answer_temperature=answer_temperature,
            max_batch_tokens=max_batch_tokens,
        )
    found = dict(zip(unknown, zip(read.cross_entropy, read.fluency_nll, strict=True), strict=True))
    for row, answer, (each, _) in zip(kept, answers, known, strict=True):
        found[row] = (answer, fluency[_beginning(each)])
    return losses_of(found[row] for row in range(len(supervised)))


def _kept(engine: Engine, each: SupervisedTokens) -> Continuation | None:
    """Where its states are, if they reach past the instruction and no sliding window would have moved."""
    found = engine.written.find(each.token_ids, least=each.instruction.stop, most=each.answer.start - 1)
    if found is None or found.rows.slots + len(each.token_ids) - found.known > engine.prefixes.reach:
        return None
    return found


def _answers(engine: Engine, known: Sequence[Known], answer_temperature: float, max_batch_tokens: int) -> list[float]:
    """L_CE of each row, from where its states end."""
    answers: dict[int, float] = {}
    for rows in _alike([found.rows.slots for _, found in known], engine.max_batch_rows):
        lengths = [len(each.token_ids) - found.known for each, found in (known[row] for row in rows)]
        work = partial(_neighbours_together, engine, answer_temperature)
        read = in_batches(work, [known[row] for row in rows], lengths, max_batch_tokens, relieve=engine.prefixes.drop)
        answers.update(zip(rows, read, strict=True))
    return [answers[row] for row in range(len(known))]


def _alike(slots: Sequence[int], most: int) -> list[list[int]]:
    """Rows whose states go into one cache: at most as many as are decoded at once, and little of it pads.

    >>> _alike([10, 400, 12, 11], most=2)
    [[0, 3], [2], [1]]
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(slots)), key=slots.__getitem__):
        group = groups[-1] if groups else []
        if 0 < len(group) < most and slots[row] * (len(group) + 1) <= _MOST_PADS * sum(
            slots[each] for each in [*group, row]
        ):
            group.append(row)
        else:
            groups.append([row])
    return groups


def _neighbours_together(engine: Engine, answer_temperature: float, batch: Sequence[Known]) -> list[float]:
    """`_continued`, with rows that were kept side by side side by side, so that they are copied in one piece."""
    written: dict[int, int] = {}
    places = [(written.setdefault(id(found.rows), len(written)), found.row) for _, found in batch]
    order = sorted(range(len(batch)), key=places.__getitem__)
    answers = dict(zip(order, _continued(engine, answer_temperature, [batch[row] for row in order]), strict=True))
    return [answers[row] for row in range(len(batch))]


def _continued(engine: Engine, answer_temperature: float, batch: Sequence[Known]) -> list[float]:
    """L_CE of n rows whose states were kept; one forward pass over what follows them."""
    known = [found.known for _, found in batch]
    rest = [tuple(each.token_ids[found.known :]) for each, found in batch]
    token_ids, steps = right_padded(rest)  # [n, T]
    length = torch.tensor([len(each) for each in rest])[:, None]
    real = steps < length
    cache, held = continued(engine.model, [found for _, found in batch], token_ids.shape[1])  # held: [n, S]
    asked = [(row, at) for row, (each, _) in enumerate(batch) for at in range(each.answer.start, each.answer.stop)]
    row, at = torch.tensor(asked).unbind(1)  # [R]
    logits = logits_at(
        engine,
        token_ids,
        torch.tensor(known)[:, None] + torch.minimum(steps, length - 1),
        (row, at - 1 - torch.tensor(known)[row]),
        real=int(real.sum()),
        attention_mask=torch.cat([held, real.long()], 1).to(engine.device),
        past_key_values=cache,
    )  # [R, V]
    targets = torch.tensor([batch[row][0].token_ids[at] for row, at in asked], device=logits.device)
    nll = cross_entropy(logits / answer_temperature, targets, reduction="none")  # [R]
    return [part.mean().item() for part in nll.split([each.answer.stop - each.answer.start for each, _ in batch])]


def _fluency(engine: Engine, supervised: Sequence[SupervisedTokens], max_batch_tokens: int) -> Beginnings:
    """The mean NLL of each instruction after what stands before it, each distinct beginning read once."""
    starts = {_beginning(each): each.instruction.start for each in supervised}
    if not starts:
        return {}
    beginnings = list(starts)
    alike = shared_length([tokens[: start - 1] for tokens, start in starts.items()])
    lengths = [len(tokens) for tokens in beginnings]
    shared = Beginning(engine.prefixes, beginnings[0][:alike], rows=len(beginnings), longest=max(lengths))

    def read(batch: Sequence[tuple[int, ...]]) -> list[float]:
        asked = [(row, at) for row, tokens in enumerate(batch) for at in range(starts[tokens], len(tokens))]
        logits = logits_before(engine, batch, asked, prefix=shared.read())  # [R, V]
        targets = torch.tensor([batch[row][at] for row, at in asked], device=logits.device)
        nll = cross_entropy(logits, targets, reduction="none").split([len(each) - starts[each] for each in batch])
        return [part.mean().item() for part in nll]

    means = in_batches(read, beginnings, lengths, max_batch_tokens, shared.length(), shared.forget)
    return {tokens: mean if math.isfinite(mean) else math.nan for tokens, mean in zip(beginnings, means, strict=True)}


def _beginning(each: SupervisedTokens) -> tuple[int, ...]:
    return tuple(each.token_ids[: each.instruction.stop])
