"""`pe2`: prompt engineering a prompt engineer, a detailed meta-prompt over hard negatives (arXiv 2311.05661)."""

from __future__ import annotations

from benchmarks.optimizers.textual import (
    InstructionSearch,
    Outcome,
    PaperPeer,
    TextualTeleprompter,
    distinct,
    ranked,
    shown_input,
    shown_label,
)

STEPS, BEAM, PROPOSALS, BATCH, TEMPERATURE = 3, 4, 4, 2, 0.7
ENOUGH_FAILURES = 4  # of a prompt, that its proposals learn from
SCANNED = 10  # rows that are run at a time to find them
LONGEST_PROMPT = 200  # words

_INSPECT = """A prompt is a text paragraph that outlines the expected actions and instructs the model to generate a \
specific output. This prompt is concatenated with the input text, and the model then creates the required output.

In our collaboration, we'll work together to refine a prompt. The process consists of two main steps:

## Step 1
I will provide you with the current prompt, how the prompt is concatenated with the input text (i.e., "full \
template"), along with {count} example(s) that are associated with this prompt. Each example contains the input, the \
reasoning and the final answer produced by the model, and the ground-truth label to the input. Your task is to analyze \
the examples, \
determining whether the existing prompt is describing the task reflected by these examples precisely, and suggest \
changes to the prompt.

## Step 2
Next, you will carefully review your reasoning in step 1, integrate the insights to craft a new, optimized prompt.

## Prompt
{prompt}

## Full Template
{template}

## Examples
{examples}

## Instructions
For some of these examples, the output does not match with the label. This may be due to the prompt being misleading \
or not describing the task precisely.

Please examine the example(s) carefully. Note that the ground-truth labels are __absolutely correct__, but the prompts \
(task descriptions) may be incorrect and need modification. For each example, provide reasoning according to the \
following template:

### Example <id>
Input: <input>
Output: <output>
Label: <label>
Is the output correct compared to the label: <yes or no, and your reasoning>
Is the output correctly following the given prompt: <yes or no, and your reasoning>
Is the prompt correctly describing the task shown by the input-label pair: <yes or no, and your reasoning>
To output the correct label, is it necessary to edit the prompt: <yes or no, and your reasoning>
If yes, provide detailed analysis and actionable suggestions to edit the prompt: <analysis and suggestions>"""

_REFINE = """{inspection}

## Your reasoning in Step 1
{reasoning}

Now please carefully review your reasoning in Step 1 and help with Step 2: refining the prompt.

## Current Prompt
{prompt}

## Instructions
- The total length of the prompt should be less than {longest} words.
- Please help edit the prompt so that the updated prompt will not fail on these examples anymore.
- Reply with the prompt. Do not include other text."""


class PromptEngineer(TextualTeleprompter):
    """A proposer that inspects failures step by step before it refines the prompt.

    Followed: the meta-prompt with its two-step task description, the full template as context and the step-by-step
    reasoning template; 2 failures per batch (hard negatives), of 4 that are looked for in random rows; 3 steps with a
    beam of 4 and 4 proposals per prompt; backtracking, in which the beam is the best of all prompts so far and not
    only of the latest; selection on validation rows. The optional parts (history of refinements, step size) are left
    out.

    Departures: both steps are one request each, the second of which repeats the first and its answer instead of
    continuing a chat. A prompt that fails on no training row is inspected with rows that it gets right. Programs with
    several predictors: one after the other.
    """

    def improve(self, search: InstructionSearch) -> str:
        """Propose from failures, keep the best of all so far."""
        known = search.scores([search.seed], search.dev)
        for _ in range(STEPS):
            for parent in ranked(known)[:BEAM]:
                negatives = hard_negatives(search, parent)
                proposals = [refine(search, parent, negatives) for _ in range(PROPOSALS)]
                known.update(search.scores(distinct(proposals, but=known), search.dev))
        return search.best


def hard_negatives(search: InstructionSearch, prompt: str) -> list[Outcome]:
    """Training rows that the prompt fails on: some at a time, in random order, until there are enough.

    Where it fails on none, those that it gets right.
    """
    rows, seen, failures = search.sample(search.train, len(search.train)), [], []
    for start in range(0, len(rows), SCANNED):
        seen += search.outcomes(prompt, rows[start : start + SCANNED])
        failures = [outcome for outcome in seen if not outcome.is_right]
        if len(failures) >= ENOUGH_FAILURES:
            break
    return failures or seen


def refine(search: InstructionSearch, prompt: str, outcomes: list[Outcome]) -> str:
    """One proposal: inspect a batch of these outcomes, then rewrite the prompt."""
    inspection = _INSPECT.format(
        count=BATCH,
        prompt=prompt,
        template=search.template(prompt),
        examples=show_examples(search, search.sample(outcomes, BATCH)),
    )
    reasoning = search.ask(inspection, temperature=TEMPERATURE)
    request = _REFINE.format(inspection=inspection, reasoning=reasoning, prompt=prompt, longest=LONGEST_PROMPT)
    return search.ask(request, temperature=TEMPERATURE)


def show_examples(search: InstructionSearch, outcomes: list[Outcome]) -> str:
    """Rows with what the model reasoned and answered, and what is right."""
    shown: list[str] = []
    for number, each in enumerate(outcomes, start=1):
        lines = [f"### Example {number}", f"Input: {shown_input(each.row)}"]
        lines += [f"Reasoning: {reasoned}"] if (reasoned := search.reasoned(each)) else []
        shown.append("\n".join([*lines, f"Output: {search.said(each)}", f"Label: {shown_label(each.row)}"]))
    return "\n\n".join(shown)


class PE2(PaperPeer):
    """PE2 in the comparison."""

    name = "pe2"
    about = "PE2 (2311.05661): step-by-step inspection of failures, 3 steps, beam 4, backtracking; no history"
    teleprompter = PromptEngineer
