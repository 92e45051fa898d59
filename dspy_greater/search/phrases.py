"""Phrases for one position of the instruction: equations 3 and 4 of the paper, for two to eight tokens at once.

The model continues x_j ⊙ p_<i on one row, and a phrase is about the task as far as the model finds it likely on other
rows too. A phrase can be put in at the position, or in the place of as many tokens from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from dspy_greater.model.interface import GenerationRequest, TokenQuery
from dspy_greater.model.tensors import floats
from dspy_greater.objective.evaluator import Instruction
from dspy_greater.search.edits import Edit, Kind
from dspy_greater.search.state import ends_sentence
from dspy_greater.search.step import StepContext
from dspy_greater.stats import mean

_SHORTEST, LONGEST = 2, 8  # tokens
_TOP_P = 0.95


def propose_phrases(at: StepContext) -> tuple[Edit, ...]:
    """Edits by phrases at the position that were not tried yet, the likeliest phrase first."""
    contexts = at.evaluator.proposal_contexts(at.current, at.state.position)
    if at.settings.phrases == 0 or not contexts:
        return ()
    random = Random(f"{at.random_seed}/{at.predictor}/{at.state.step}/phrases/{at.state.position}")
    drawn, *others = random.sample(contexts, min(1 + at.settings.proposal_rows, len(contexts)))
    phrases = _continued(at, drawn, random)
    likelihoods = mean_likelihoods(at, others or [drawn], phrases)
    ranked = sorted(zip(phrases, likelihoods, strict=True), key=lambda pair: -pair[1])
    return tuple(edit for phrase, likelihood in ranked for edit in _edits(at, phrase, likelihood))


def mean_likelihoods(
    at: StepContext, contexts: Sequence[Sequence[int]], phrases: Sequence[Sequence[int]]
) -> list[float]:
    """How likely each phrase is after the contexts: nats per token, mean over the contexts; [P]."""
    if not phrases:
        return []
    pairs = [(tuple(context), tuple(phrase)) for phrase in phrases for context in contexts]
    queries = [
        TokenQuery(row, len(context) + offset)
        for row, (context, phrase) in enumerate(pairs)
        for offset in range(len(phrase))
    ]
    numbers = iter(floats(at.model.token_logprobs([(*context, *phrase) for context, phrase in pairs], queries)))
    return [mean([next(numbers) for _ in contexts for _ in phrase]) for phrase in phrases]


def _continued(at: StepContext, context: Sequence[int], random: Random) -> list[tuple[int, ...]]:
    """Different continuations of the context, each up to the end of a sentence."""
    requests = [
        GenerationRequest(tuple(context), LONGEST, 1.0, _TOP_P, seed=random.randrange(2**31))
        for _ in range(at.settings.phrases)
    ]
    cut = [_to_the_end_of_a_sentence(at, generation.token_ids) for generation in at.model.generate(requests)]
    return list(dict.fromkeys(phrase for phrase in cut if len(phrase) >= _SHORTEST))


def _to_the_end_of_a_sentence(at: StepContext, tokens: Sequence[int]) -> tuple[int, ...]:
    decode = at.evaluator.layout.encoder.decode
    ends = (stop for stop in range(1, len(tokens) + 1) if ends_sentence(decode(tokens[:stop])))
    return tuple(tokens[: next(ends, len(tokens))])


def _edits(at: StepContext, phrase: tuple[int, ...], likelihood: float) -> list[Edit]:
    """The phrase put in at the position, and in the place of as many tokens."""
    ids, position, edits = at.current.token_ids, at.state.position, at.evaluator.layout.edits
    stop = min(position + len(phrase), len(ids))
    places: list[tuple[Kind, int]] = [("insert", position)] if stop == position else [("replace", stop)]
    if position < len(ids):
        places.append(("insert", position))
    found: list[Edit] = []
    for kind, behind in dict.fromkeys(places):
        spliced = edits.splice(ids, position, behind, phrase)
        if spliced is None or at.evaluator.knows(spliced[1]):
            continue
        if edits.length(spliced[0]) <= at.settings.max_instruction_tokens:
            found.append(Edit(kind, phrase, Instruction(*spliced), likelihood, origin="phrase"))
    return found
