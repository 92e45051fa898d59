"""`opro`: Optimization by PROmpting, a meta-prompt with the scored history (arXiv 2309.03409)."""

from __future__ import annotations

import re

import dspy

from benchmarks.optimizers.textual import (
    InstructionSearch,
    PaperPeer,
    TextualTeleprompter,
    distinct,
    shown_input,
    shown_label,
)

STEPS, PER_STEP, HISTORY, EXEMPLARS, TEMPERATURE = 200, 8, 20, 3, 1.0
LONGEST_TEXT = 500  # characters

_META = """I have some texts along with their corresponding scores. The texts are arranged in ascending order based on \
their scores, where higher scores indicate better quality.

{history}

The following exemplars show how to apply your text: you replace <INS> in each input with your text, then read the \
input and give an output. We say your output is wrong if your output is different from the given output, and we say \
your output is correct if they are the same.

{exemplars}

Write your new text that is different from the old ones and has a score as high as possible. Write the text in square \
brackets."""


class OptimizationByPrompting(TextualTeleprompter):
    """Instructions proposed by a language model that reads what was tried and how it scored.

    Followed: the meta-prompt of the paper for text-bison with the 20 best instructions in ascending order, of equal
    ones the newest last, scores rounded to integers, 3 random exemplars per step; 8 instructions per step at
    temperature 1, of which those of more than 500 characters or with the placeholder in them are not scored; scores on
    the training rows; the best on these is the result. The instruction stands before the question (`before_Q`), where
    DSPy has it.

    Departures: it ends after 200 steps as in the paper or with the budget, whichever comes first. The request does not
    say that outputs were wrong, as the exemplars are random. An answer without square brackets is taken whole.
    Programs with several predictors: one after the other, each shown the whole program's inputs and outputs.
    """

    def improve(self, search: InstructionSearch) -> str:
        """Ask, score, remember."""
        history = search.scores([search.seed], search.train)
        for _ in range(STEPS):
            request = meta_prompt(history, search.sample(search.train, EXEMPLARS))
            answers = [bracketed(search.ask(request, temperature=TEMPERATURE)) for _ in range(PER_STEP)]
            history |= search.scores(filter(_is_usable, distinct(answers, but=history)), search.train)
        return search.best


def meta_prompt(history: dict[str, float], exemplars: list[dspy.Example]) -> str:
    """The request, with the best of the history in ascending order."""
    shown = sorted(history, key=lambda text: history[text])[-HISTORY:]
    return _META.format(
        history="\n\n".join(f"text:\n{text}\nscore:\n{round(100 * history[text])}" for text in shown),
        exemplars="\n\n".join(
            f"input:\n<INS>\nQ: {shown_input(row)}\nA:\noutput:\n{shown_label(row)}" for row in exemplars
        ),
    )


def bracketed(answer: str) -> str:
    """What stands in the first square brackets of a line, or else all of it.

    Example:
        >>> bracketed("My text: [Think of [each] part.]")
        'Think of [each] part.'
    >>> bracketed("[Think.] It is different from [Answer.]")
    'Think.'
    """
    found = re.search(r"\[((?:[^\[\]\n]|\[[^\[\]\n]*\])*)\]", answer)
    return found[1] if found else answer


def _is_usable(text: str) -> bool:
    return len(text) <= LONGEST_TEXT and "INS" not in text


class Opro(PaperPeer):
    """OPRO in the comparison."""

    name = "opro"
    about = "OPRO (2309.03409): 8 instructions per step from a scored history of 20, up to 200 steps"
    teleprompter = OptimizationByPrompting
