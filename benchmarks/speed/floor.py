"""The least seconds that one step can take on a machine: counted operations and bytes over measured rates.

A lower bound for *any* exact implementation, so it is generous to nobody: a token whose whole past is the same in
several rows is computed once (`Nodes`), no slot is padding, logits are made where they are needed and nowhere
else, nothing but the weights, the keys and the values is moved, and both ceilings are reached at once.

Notation: P_b parameters of the layers' matrices, P_h of the output layer, L layers, A = heads x head size,
K = key and value bytes of one token in all layers, W bytes of the weights.

    forward of n tokens      2 n P_b + 4 L A Σ(tokens before and including each)      operations
    output layer on m rows   2 m P_h                                                  operations
    backward, weights frozen the same again as what it goes back through
    seconds                  max(operations / matmul rate, bytes / copy rate)         of every forward pass
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.sizes import Ceilings, ModelSize
from benchmarks.speed.work import Work
from dspy_greater.model.counters import Counters


@dataclass(frozen=True)
class Nodes:
    """The distinct beginnings of some sequences: what has to be computed at least once, as a trie has nodes."""

    tokens: int
    pairs: int  # Σ depth: how many tokens each of them attends to, itself included

    @classmethod
    def of(cls, sequences: Iterable[tuple[int, ...]], *, after: int = 0) -> Nodes:
        """Of the parts of the sequences from token number `after` on.

        Example:
            >>> Nodes.of([(1, 2, 3), (1, 2, 4)])
            Nodes(tokens=4, pairs=9)
        """
        tokens = pairs = 0
        before: tuple[int, ...] = ()
        for sequence in sorted(set(sequences)):
            same = zip(before, sequence, strict=False)
            shared = next((i for i, (a, b) in enumerate(same) if a != b), min(len(before), len(sequence)))
            first, last = max(shared, after), len(sequence)
            if last > first:
                tokens += last - first
                pairs += (first + 1 + last) * (last - first) // 2
            before = sequence
        return cls(tokens, pairs)


def floor_seconds(work: Work, size: ModelSize, ceilings: Ceilings, selected: Sequence[int]) -> dict[str, float]:
    """Phase -> the least seconds; `selected` are the candidates that reason. Their sum is the floor of the step."""
    prompts = [prompt for token in selected for prompt in work.prompts(work.edited(token))]

    def seconds(flops: float, moved: float = 0.0) -> float:
        return max(flops / ceilings.matmul_flops, (size.weight_bytes + moved) / ceilings.copy_bytes)

    return {
        "proposals": _proposals(work, size, seconds),
        "reasoning": _reasoning(work, size, seconds, prompts),
        "gradient": _gradient(work, size, seconds),
        "scoring": _scoring(work, size, seconds, prompts, len(selected)),
    }


def _proposals(work: Work, size: ModelSize, seconds: Any) -> float:
    """The distinct contexts that are sampled, once, with logits at their ends."""
    contexts, rng = work.proposal_contexts(), work.generator()
    draws = [rng.sample(contexts, min(work.sample_size, len(contexts))) for _ in range(work.draws)]
    distinct = {context for draw in draws for context in draw}
    nodes = Nodes.of(distinct)
    return seconds(size.forward_flops(nodes.tokens, nodes.pairs, len(distinct)))


def _reasoning(work: Work, size: ModelSize, seconds: Any, prompts: Sequence[tuple[int, ...]]) -> float:
    """Read all prompts at once; then R - 1 times one token for all rows: weights, keys and values are read each time.

    Keys and values that rows share are read once for all of them.
    """
    nodes, rows = Nodes.of(prompts), len(prompts)
    total = seconds(size.forward_flops(nodes.tokens, nodes.pairs, rows))
    depth = sum(map(len, prompts))
    for written in range(1, work.reasoning_tokens):
        pairs = depth + rows * written
        held = nodes.tokens + rows * written
        total += seconds(size.forward_flops(rows, pairs, rows), held * size.token_bytes)
    return total


def _gradient(work: Work, size: ModelSize, seconds: Any) -> float:
    """Forward over everything, back over what follows the position; logits for the instruction and the answers."""
    supervised = work.supervised(work.instruction, work.current_reasoning)
    sequences = [each.token_ids for each in supervised]
    start = supervised[0].instruction.start + work.position
    forward, back = Nodes.of(sequences), Nodes.of(sequences, after=start)
    head_rows = len(work.instruction) + sum(len(each.answer) for each in supervised)
    back_rows = head_rows - work.position
    flops = size.forward_flops(forward.tokens, forward.pairs, head_rows)
    return seconds(flops + size.forward_flops(back.tokens, back.pairs, back_rows))


def _scoring(work: Work, size: ModelSize, seconds: Any, prompts: Sequence[tuple[int, ...]], selected: int) -> float:
    """Keys and values up to the last reasoning token but one are there; what follows is read by every row."""
    ends = [1 + len(row.answer_header) + len(row.answer) for row in work.rows] * selected
    starts = [len(prompt) + work.reasoning_tokens - 1 for prompt in prompts]
    pairs = sum((2 * start + 1 + count) * count / 2 for start, count in zip(starts, ends, strict=True))
    head_rows = selected * (len(work.instruction) + sum(len(row.answer) for row in work.rows))
    held = Nodes.of(prompts).tokens + len(prompts) * (work.reasoning_tokens - 1)
    return seconds(size.forward_flops(sum(ends), pairs, head_rows), held * size.token_bytes)


def model_flops(counters: Counters, size: ModelSize, work: Work, *, weight_gradients: bool) -> float:
    """Operations of the useful tokens that an arm says it computed: what its share of the matmul rate is made of.

    Padding does not count. Attention is taken at the mean length of a row, which is exact to a few per cent.
    """
    prompt = sum(map(len, work.prompts(work.instruction))) / len(work.rows)
    length = prompt + work.reasoning_tokens
    pairs = counters.prefilled_tokens * length / 2 + counters.generated_tokens * (prompt + work.reasoning_tokens / 2)
    tokens = counters.prefilled_tokens + counters.generated_tokens
    flops = size.forward_flops(tokens, pairs, counters.lm_head_rows)
    share = counters.backward_tokens / counters.prefilled_tokens if counters.prefilled_tokens else 0.0
    back = size.forward_flops(
        counters.backward_tokens, counters.backward_tokens * length / 2, counters.lm_head_rows * share
    )
    return flops + back * (2 if weight_gradients else 1)


def model_bytes(counters: Counters, size: ModelSize, work: Work) -> float:
    """Bytes of weights, keys and values that an arm's forward passes read, at the mean length of a row."""
    prompt = sum(map(len, work.prompts(work.instruction))) / len(work.rows)
    held = counters.generated_tokens * (prompt + work.reasoning_tokens / 2)
    return counters.forwards * size.weight_bytes + held * size.token_bytes
