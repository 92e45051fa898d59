"""`apo`: ProTeGi, prompt optimisation with textual gradients and beam search (arXiv 2305.03495)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import dspy

from benchmarks.optimizers.textual import (
    InstructionSearch,
    Outcome,
    PaperPeer,
    TextualTeleprompter,
    between,
    distinct,
    shown_input,
    shown_label,
)

ROUNDS, BEAM, MINIBATCH = 6, 4, 64
GRADIENTS, ERRORS, EDITS, PARAPHRASES = 4, 4, 1, 2
SUCCESSORS = 8  # per parent, drawn at random before the bandit
BANDIT_ROUNDS, PULLS, PULL_ROWS, EXPLORATION = 8, 8, 32, 1.0

_GRADIENT = """I'm trying to write a zero-shot prompt.

My current prompt is:
"{prompt}"

But this prompt gets the following examples wrong:
{errors}

give {count} reasons why the prompt could have gotten these examples wrong.
Wrap each reason with <START> and <END>"""

_EDIT = """I'm trying to write a zero-shot prompt.

My current prompt is:
"{prompt}"

But it gets the following examples wrong:
{errors}

Based on these examples the problem with this prompt is that {reason}

Based on the above information, I wrote {count} different improved prompts.
Each prompt is wrapped with <START> and <END>.

The {count} new prompts are:"""

PARAPHRASE = """Generate a variation of the following instruction while keeping the semantic meaning.

Input: {prompt}

Output:"""


class ProTeGi(TextualTeleprompter):
    """Automatic prompt optimisation with "gradient descent" and beam search.

    Followed: Algorithms 1 and 2 with the settings of the paper's experiments: 6 rounds, beam of 4, minibatch of 64,
    4 gradients of 4 errors each, 1 edit per gradient, 2 paraphrases per edit, 8 successors per parent, and UCB
    bandits with the released settings (8 rounds of 8 prompts on 32 rows, c = 1).

    Departures: the requests say "prompt" where the paper says "classifier prompt", as not every task is a
    classification. A minibatch is all rows where there are fewer. A prompt that makes no errors in its minibatch has
    no gradient and is only paraphrased. The bandit tries each prompt once before it compares them, and its rewards are
    remembered row by row, so a row is never paid for twice. Programs with several predictors: one after the other.
    """

    def improve(self, search: InstructionSearch) -> str:
        """Algorithm 1: expand, select, and at the end the best of the beam on all validation rows."""
        beam = [search.seed]
        for _ in range(ROUNDS):
            minibatch = search.sample(search.train, MINIBATCH)
            successors = [text for prompt in beam for text in expand(search, prompt, minibatch)]
            beam = select(search, distinct([*beam, *successors]))
            search.best = beam[0]
        search.scores(beam, search.dev)
        return search.best


def expand(search: InstructionSearch, prompt: str, minibatch: list[dspy.Example]) -> list[str]:
    """Algorithm 2: errors -> gradients -> edits -> paraphrases."""
    errors = [outcome for outcome in search.outcomes(prompt, minibatch) if not outcome.is_right]
    edits: list[str] = []
    for _ in range(GRADIENTS if errors else 0):
        shown = show_errors(search, search.sample(errors, ERRORS))
        for reason in between(search.ask(_GRADIENT.format(prompt=prompt, errors=shown, count=1)), "<START>", "<END>")[
            :1
        ]:
            request = _EDIT.format(prompt=prompt, errors=shown, reason=reason, count=EDITS)
            edits += between(search.ask(request), "<START>", "<END>")[:EDITS]
    edits = distinct(edits, but=[prompt])
    paraphrases = [search.ask(PARAPHRASE.format(prompt=text)) for text in edits or [prompt] for _ in range(PARAPHRASES)]
    return search.sample(distinct([*edits, *paraphrases], but=[prompt]), SUCCESSORS)


def show_errors(search: InstructionSearch, errors: list[Outcome]) -> str:
    """Rows that went wrong, as the paper shows them."""
    return "\n".join(
        f'## Example {number}\nText: "{shown_input(each.row)}"\nLabel: {shown_label(each.row)}\n'
        f"Prediction: {search.said(each)}\n"
        for number, each in enumerate(errors, start=1)
    )


@dataclass
class Arm:
    """One prompt in the bandit: its rows so far and what they were worth."""

    prompt: str
    reward: float = 0.0
    rows: int = 0

    def mean(self) -> float:
        """Average reward; 0 before the first pull."""
        return self.reward / self.rows if self.rows else 0.0

    def bound(self, time: int) -> float:
        """Q + c sqrt(log t / N); a prompt that was never tried comes first."""
        return self.mean() + EXPLORATION * math.sqrt(math.log(time) / self.rows) if self.rows else math.inf


def select(search: InstructionSearch, prompts: list[str]) -> list[str]:
    """UCB bandits: the beam of the prompts that look best, without paying for all on all rows."""
    if len(prompts) == 1:
        return prompts
    arms = [Arm(prompt) for prompt in prompts]
    for time in range(1, BANDIT_ROUNDS + 1):
        search.rng.shuffle(arms)  # ties fall at random
        rows = search.sample(search.dev, PULL_ROWS)
        for arm in sorted(arms, key=lambda each: -each.bound(time))[:PULLS]:
            arm.reward += search.score(arm.prompt, rows) * len(rows)
            arm.rows += len(rows)
            search.best = max(arms, key=Arm.mean).prompt
    return [arm.prompt for arm in sorted(arms, key=lambda each: -each.mean())[:BEAM]]


class Apo(PaperPeer):
    """ProTeGi in the comparison."""

    name = "apo"
    about = "ProTeGi (2305.03495): 6 rounds, beam 4, textual gradients, UCB; row scores are remembered"
    teleprompter = ProTeGi
