"""The five modules of GRAD-SUM, as the prompts that they are.

1. Generation is the user's own program.
2. Evaluation: `Judge`, or the user's metric.
3. Gradients: `WriteGradient`, once per output below full score.
4. Summarisation: `Summarise`, once per member of the beam.
5. Editing: `Edit`, once per member of the beam.

The paper's own module prompts are not public; these are this package's.
"""

from __future__ import annotations

import dspy


class Judge(dspy.Signature):
    """Judge one output of a program by the criteria, and by nothing else.

    Where an expected answer is given, take it as correct. First explain what is good and what is wrong about the
    output, then give the score.
    """

    task_description: str = dspy.InputField(desc="what the program is for")
    criteria: str = dspy.InputField(desc="what a good output is")
    inputs: str = dspy.InputField(desc="what the program was given")
    expected: str = dspy.InputField(desc="the expected answer, if there is one")
    output: str = dspy.InputField(desc="what the program wrote")
    scale: str = dspy.InputField(desc="the scores to choose from")
    explanation: str = dspy.OutputField(desc="what is good and what is wrong, by the criteria")
    score: str = dspy.OutputField(desc="one whole number of the scale and nothing else")


class WriteGradient(dspy.Signature):
    """Say how the prompts of a program should change, so that an output like this one gets full score.

    The prompts are instructions to language models. Name what in them, or missing from them, led to what the evaluation
    complains of, and how to change it. Do not write new prompts, and do not tell the answer to this one input.
    """

    task_description: str = dspy.InputField(desc="what the program is for")
    criteria: str = dspy.InputField(desc="what a good output is")
    prompts: str = dspy.InputField(desc="the program's prompts by predictor name")
    inputs: str = dspy.InputField(desc="what the program was given")
    expected: str = dspy.InputField(desc="the expected answer, if there is one")
    trace: str = dspy.InputField(desc="what each predictor was given and wrote")
    output: str = dspy.InputField(desc="what the program wrote")
    evaluation: str = dspy.InputField(desc="why the output does not have full score")
    feedback: str = dspy.OutputField(desc="how the prompts should change")
    concerns: str = dspy.OutputField(
        desc="the names of the predictors whose prompts should change, with commas between"
    )


class Summarise(dspy.Signature):
    """Summarise feedback on a prompt into one general paragraph that applies to the dataset as a whole.

    Each piece of feedback comes from one example. Keep what recurs and what would help on examples that nobody has
    seen; leave out what is about one example only: its names, its numbers, its answer.
    """

    task_description: str = dspy.InputField(desc="what the program is for")
    prompt: str = dspy.InputField(desc="the prompt that the feedback is about")
    feedback: list[str] = dspy.InputField(desc="one piece for each example that went wrong")
    summary: str = dspy.OutputField(desc="one paragraph")


class Edit(dspy.Signature):
    """Write better versions of a prompt, following the feedback.

    The prompt instructs a language model that is given the inputs and writes the outputs named below. Each version
    is a complete prompt of its own, for any input of the task. Versions differ in how they follow the feedback, and
    from what was tried before.
    """

    task_description: str = dspy.InputField(desc="what the program is for")
    prompt: str = dspy.InputField(desc="the prompt to improve")
    interface: str = dspy.InputField(desc="inputs -> outputs of the language model that is prompted")
    feedback: str = dspy.InputField(desc="how the prompt should change")
    tried: list[str] = dspy.InputField(desc="prompts that were tried before, with their scores")
    number: int = dspy.InputField(desc="how many versions to write")
    versions: list[str] = dspy.OutputField(desc="as many complete prompts, as a JSON list of strings")


WriteGradientOnOnePrompt = WriteGradient.delete("concerns")
EditUnaware = Edit.delete("tried")  # of what was tried before, as in the paper
