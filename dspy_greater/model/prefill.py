"""The first reading of a batch's prompts: in parts that begin alike, together with drafts of what will be generated.

All rows of a batch begin with the chat template's system message; the rows of one candidate also share what stands
after the edited token. Each such beginning is read once (`prefix_cache`), and the rest of its rows in parts that
differ little in length, so that little of what is computed is padding. A draft (`speculative`) is read with its prompt,
and its tokens are taken as long as they are the ones that the row would have chosen.

Shapes: n rows of a part, P tokens of its prefix, T tokens of its longest rest, R places with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dspy_greater.model.fast.generated_kv import Places
from dspy_greater.model.fast.prefix_cache import LEAST_SAVED, PrefixCache
from dspy_greater.model.kv_cache import new_cache, shared_length
from dspy_greater.model.sampling import Row, choose
from dspy_greater.model.teacher_forcing import computed_only_at

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

_LEAST_ROWS = 8  # of a part
_MOST_PADDING = 0.15  # of a part's own tokens
_MOST_TOKENS = 2048  # of a part: more fill no processor better, and leave the caches of a CPU
_MOST_LOGITS = 1 << 28  # numbers, of the drafts of one part


@dataclass(frozen=True)
class Part:
    """Rows of a batch, by their number in it, that begin with the same `shared` tokens."""

    rows: tuple[int, ...]
    shared: int


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A part after its first reading: what its rows generated already is in them."""

    rows: tuple[int, ...]  # [n] their numbers in the batch
    places: tuple[Places, ...]  # [n] of their tokens in the cache
    known: tuple[int, ...]  # [n] how many of their tokens are in the cache
    rejected: tuple[int, ...]  # [n] tokens of drafts that were not accepted, in the cache behind the others
    length: int  # slots of the cache
    cache: DynamicCache
    logits: Tensor  # [n, V] for the token after the known ones


def prefill(engine: Engine, rows: Sequence[Row], part: Part, prefixes: PrefixCache, capacity: int) -> Prefilled:
    """Read the prompts of a part, and accept of the drafts what the rows would choose.

    `capacity` is the most slots that the cache of the whole batch will have.
    """
    model, tally = engine.model, engine.tally.add
    mine = [rows[row] for row in part.rows]
    contexts = [row.context for row in mine]
    most = _MOST_LOGITS // (len(mine) * model.get_input_embeddings().weight.shape[0])
    drafts = [row.expected[:most] for row in mine]
    prefix = prefixes.read(contexts[0][: part.shared], rows=len(contexts), longest=capacity)
    shared, cache = len(prefix) if prefix else 0, new_cache(model, capacity)
    if prefix:
        prefix.fill(cache.layers, len(contexts))  # pyright: ignore[reportArgumentType]
    own = [(*context[shared:], *draft) for context, draft in zip(contexts, drafts, strict=True)]
    logits, pads = _read(engine, own, [len(draft) + 1 for draft in drafts], cache, shared)
    tally(prefilled_tokens=sum(map(len, own)), padded_tokens=sum(pads))
    before = sum(len(row.generated) for row in mine)
    try:
        accepted = _follow(mine, drafts, logits)
    finally:
        tally(generated_tokens=sum(len(row.generated) for row in mine) - before)
    tally(prefilled_tokens=-sum(accepted))  # it was generated; the rest of a draft was read for nothing
    rejected = [len(draft) - count for draft, count in zip(drafts, accepted, strict=True)]
    return Prefilled(
        part.rows,
        tuple(Places(0, shared, few) for few in pads),
        tuple(len(context) + count for context, count in zip(contexts, accepted, strict=True)),
        tuple(rejected),
        shared + max(map(len, own)),
        cache,
        torch.stack([row_logits[count] for row_logits, count in zip(logits, accepted, strict=True)]),
    )


def _read(
    engine: Engine, own: Sequence[Sequence[int]], ends: Sequence[int], cache: Any, shared: int
) -> tuple[Sequence[Tensor], list[int]]:
    """One forward pass, left-padded; for each row the logits after its last `ends[j]` tokens, and its pads."""
    model, device, pad, width = engine.model, engine.weights.device, engine.weights.pad_token_id, max(map(len, own))
    pads = [width - len(tokens) for tokens in own]
    ids = torch.tensor([[pad] * few + list(tokens) for few, tokens in zip(pads, own, strict=True)])  # [n, T]
    steps = torch.arange(width)[None] - torch.tensor(pads)[:, None]
    mask = torch.cat([torch.ones(len(own), shared, dtype=torch.long), (steps >= 0).long()], 1)  # [n, P + T]
    row = torch.arange(len(own)).repeat_interleave(torch.tensor(ends))  # [R]
    column = torch.cat([torch.arange(width - end, width) for end in ends])  # [R]
    with computed_only_at(model, (row, column), ids.shape) as narrowed:
        logits: Tensor = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(shared + steps.clamp(min=-shared)).to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits
    engine.tally.add(forwards=1, lm_head_rows=logits.shape[0] * logits.shape[1])
    return (logits[0] if narrowed else logits[row, column]).split(list(ends)), pads


def _follow(rows: Sequence[Row], drafts: Sequence[Sequence[int]], logits: Sequence[Tensor]) -> list[int]:
    """Take the tokens of each draft that the row would choose, from its first on; how many there are."""
    accepted = [0] * len(rows)
    going = [j for j, draft in enumerate(drafts) if draft]
    while going:
        tokens = choose(torch.stack([logits[j][accepted[j]] for j in going]), [rows[j] for j in going])
        chosen, going = dict(zip(going, tokens, strict=True)), []
        for j, token in chosen.items():
            row, draft, at = rows[j], drafts[j], accepted[j]
            last = at == len(draft) and len(row.generated) + 1 == row.max_new_tokens
            if last or token in row.stop_token_ids:  # nothing comes after it, so it need not be read
                row.accept(token)
            elif at < len(draft) and token == draft[at]:
                row.accept(token)
                accepted[j] += 1
                going += [j] if row.finish_reason is None else []
    return accepted


def parts_of(
    contexts: Sequence[tuple[int, ...]], lengths: Sequence[int] | None = None, *, divide: bool = True
) -> list[Part]:
    """Every row in one part; each row keeps at least one token behind the shared ones.

    `lengths` are those of the rows with their drafts. With `divide=False` all rows are one part.

    >>> parts_of([(1, 2), (1, 2, 3)])
    [Part(rows=(0, 1), shared=1)]
    """
    everyone = tuple(range(len(contexts)))
    together = Part(everyone, _alike(contexts, everyone))
    lengths = [len(context) for context in contexts] if lengths is None else lengths
    return _by_length(_by_beginning(together, contexts), lengths) if divide else [together]


def _by_beginning(part: Part, contexts: Sequence[tuple[int, ...]]) -> list[Part]:
    """Split where the token after the shared ones differs, wherever that shares enough tokens more."""
    branches: dict[int, list[int]] = {}
    for row in part.rows:
        branches.setdefault(contexts[row][part.shared], []).append(row)
    if len(branches) < 2:
        return [part]
    found: list[Part] = []
    rest: list[int] = []
    for rows in branches.values():
        branch = Part(tuple(rows), _alike(contexts, rows))
        if (len(rows) - 1) * (branch.shared - part.shared) >= LEAST_SAVED:
            found += _by_beginning(branch, contexts)
        else:
            rest += rows
    return [*found, Part(tuple(sorted(rest)), part.shared)] if rest else found


def _by_length(parts: Sequence[Part], lengths: Sequence[int]) -> list[Part]:
    """Cut parts that are large, or whose rows differ so much in length that padding costs more than another pass."""
    found: list[Part] = []
    for part in parts:
        ordered = sorted(part.rows, key=lambda row: lengths[row])
        start = 0
        for at in range(len(ordered)):
            mine = [lengths[row] - part.shared for row in ordered[start : at + 1]]
            padding = len(mine) * mine[-1] - sum(mine)
            uneven = len(mine) > _LEAST_ROWS and padding > max(LEAST_SAVED, _MOST_PADDING * sum(mine))
            if uneven or (len(mine) > 1 and len(mine) * mine[-1] > _MOST_TOKENS):
                found.append(Part(tuple(ordered[start:at]), part.shared))
                start = at
        found.append(Part(tuple(ordered[start:]), part.shared))
    return found


def _alike(contexts: Sequence[tuple[int, ...]], rows: Sequence[int]) -> int:
    return shared_length([contexts[row][:-1] for row in rows])
