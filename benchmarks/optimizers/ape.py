"""`ape`: Automatic Prompt Engineer, proposals from demonstrations and iterative resampling (arXiv 2211.01910)."""

from __future__ import annotations

import dspy

from benchmarks.optimizers.apo import PARAPHRASE
from benchmarks.optimizers.textual import (
    InstructionSearch,
    PaperPeer,
    TextualTeleprompter,
    distinct,
    ranked,
    shown_input,
    shown_label,
)

PROPOSALS, DEMONSTRATIONS, RESAMPLINGS = 50, 5, 3
KEPT = 10  # of the 50, whose variations fill up the next population
SUBSETS = (10, 25, 50)  # rows on which all, the better half, and the better quarter are scored

_PROPOSE = """I gave a friend an instruction and {count} inputs. The friend read the instruction and wrote an output \
for every one of the inputs.
Here are the input-output pairs:

{pairs}

The instruction was"""

# Models were asked to go on with a text; one that chats is told not to.
ALONE = "\n\n(Write the instruction alone, without any other text.)"


class AutomaticPromptEngineer(TextualTeleprompter):
    """Instructions inferred from demonstrations, scored by execution accuracy, and resampled around the best.

    Followed: Algorithm 1 with forward generation, 50 proposals, each from 5 demonstrations of its own; execution
    accuracy; the filtering scheme in which promising candidates get more rows; the paper's iterative variant, which
    asks for variations of the best candidates, for three rounds.

    Departures: the requests say that the instruction alone is wanted, for proposers that chat. The seed instruction
    takes part, so that it can be kept. The filter halves the candidates at fixed sizes (10, 25, 50 rows) where the
    paper leaves its threshold open. All rows are training rows, as in the paper, the same in every round, so a
    candidate is not paid for twice. Programs with several predictors: one after the other, each shown the whole
    program's inputs and outputs.
    """

    def improve(self, search: InstructionSearch) -> str:
        """Algorithm 1: propose, filter, resample around the best."""
        rows = search.sample(search.train, SUBSETS[-1])
        population = distinct([search.seed, *(propose(search) for _ in range(PROPOSALS))])
        kept = filtered(search, population, rows)
        for _ in range(RESAMPLINGS):
            each = max(1, (PROPOSALS - len(kept)) // len(kept))
            variations = [search.ask(PARAPHRASE.format(prompt=text) + ALONE) for text in kept for _ in range(each)]
            kept = filtered(search, distinct([*kept, *variations]), rows)
        return search.best


def propose(search: InstructionSearch) -> str:
    """One instruction, guessed from five demonstrations."""
    rows = search.sample(search.train, DEMONSTRATIONS)
    return search.ask(_PROPOSE.format(count=len(rows), pairs=show_pairs(rows)) + ALONE)


def show_pairs(rows: list[dspy.Example]) -> str:
    """Demonstrations as the paper shows them."""
    return "\n\n".join(f"Input: {shown_input(row)}\nOutput: {shown_label(row)}" for row in rows)


def filtered(search: InstructionSearch, candidates: list[str], rows: list[dspy.Example]) -> list[str]:
    """The best candidates; only those that look promising are scored on all rows."""
    kept = candidates
    for size in SUBSETS[:-1]:
        found = search.scores(kept, rows[:size])
        kept = ranked(found)[: max(KEPT, (len(kept) + 1) // 2)]
    found = search.scores(kept, rows)
    return ranked(found)[:KEPT]


class Ape(PaperPeer):
    """APE in the comparison."""

    name = "ape"
    about = "APE (2211.01910): 50 proposals from demonstrations, 3 rounds of resampling; the seed takes part"
    teleprompter = AutomaticPromptEngineer
