"""`textgrad`: the published package `textgrad` (arXiv 2406.07496) as its prompt-optimisation example uses it.

Followed are the example and the paper's prompt optimisation: batches of 3 training rows, 12 iterations, the losses of a
batch summed, and after every step the whole validation set, on which a prompt that scores less than the one before
it is taken back. The roles of the variables are the example's.

It departs where the comparison asks for it. The program is a `StringBasedFunction` of its instructions and inputs,
in the place of one call of a language model, so that any DSPy program can be optimised; the evaluation is another one,
around the task's metric. Gradients and improvements are the proposer's. An improvement without the tags that textgrad
asks for leaves the prompt as it is; the package would end the run. Instructions and inputs are shown to the proposer
in full, as those of a language model's call are, and not cut short as a function's are. Where the program fails on a
row, textgrad is shown why, and the row scores 0.

The seed decides the batches. textgrad keeps gradients in sets, whose order differs from run to run; here they are put
in order, so that a run repeats as far as the two models do.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dspy
from dspy import lm15

from benchmarks.optimizers.optimizer import Context
from benchmarks.tasks import answers
from dspy_greater.program.traced_run import carrying

BATCH_SIZE = 3
ITERATIONS = 12
_SAMPLING = {"temperature": 0.0, "max_tokens": 2000}

# The example's own words.
_INSTRUCTION = (
    "structured system prompt to a somewhat capable language model that specifies the behavior and strategies for the "
    "QA task"
)
_INPUT = "query to the language model"
_GOLD = "correct answer for the query"
_RESPONSE = "response from the language model"
_EVALUATION = "The runtime of string-based function that checks if the prediction is correct."
_PROGRAM = "Runs a program of language model calls with its system prompts on one query."

if find_spec("textgrad") is None:
    raise ImportError("the package `textgrad` is not installed")


@dataclass(frozen=True)
class _Answered:
    """What the program wrote for one row, and what the metric gave it."""

    row: dspy.Example
    text: str
    score: float


class TextGrad:
    """Textual gradient descent on the instructions of all predictors.

    Args:
        batch_size: training rows per iteration.
        iterations: steps of the optimizer.
    """

    name = "textgrad"
    about = "textgrad 0.1.8 as in its prompt-optimisation example: 12 batches of 3, validation revert on all of dev"

    def __init__(self, *, batch_size: int = BATCH_SIZE, iterations: int = ITERATIONS) -> None:
        self._batch_size, self._iterations = batch_size, iterations

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The program with the last prompts that the validation kept."""
        draws = random.Random(context.seed)
        with _quiet(_library(context.log_dir)) as library:
            descent = _Descent(library, student, context)
            kept = descent.prompts
            kept_score = _validate(student, dev, context)
            for _ in range(self._iterations):
                descent.step(draws.sample(list(train), min(self._batch_size, len(train))))
                score = _validate(student, dev, context)
                if score < kept_score:
                    descent.revert(kept)
                else:
                    kept, kept_score = descent.prompts, score
        return student


class _Descent:
    """textgrad's variables and optimizer over the instructions of a program, which it keeps up to date."""

    def __init__(self, library: Any, program: dspy.Module, context: Context) -> None:
        self._library, self._program, self._context = library, program, context
        self._engine = _ProposerEngine(context.prompt_lm)
        named: list[tuple[str, Any]] = program.named_predictors()
        self._variables = {
            name: _shown_in_full(
                library.Variable(
                    predictor.signature.instructions,
                    requires_grad=True,
                    role_description=_INSTRUCTION + (f" in the program's step `{name}`" if len(named) > 1 else ""),
                )
            )
            for name, predictor in named
        }
        self._optimizer = library.TextualGradientDescent(engine=self._engine, parameters=list(self._variables.values()))

    @property
    def prompts(self) -> dict[str, str]:
        """The instructions as they are now."""
        return {name: variable.value for name, variable in self._variables.items()}

    def revert(self, prompts: Mapping[str, str]) -> None:
        """Take the instructions back to these."""
        for name, variable in self._variables.items():
            variable.set_value(prompts[name])
        self._write()

    def step(self, batch: Sequence[dspy.Example]) -> None:
        """Forward over the batch, backward from the sum of its losses, and one step of the optimizer."""
        self._optimizer.zero_grad()
        with ThreadPoolExecutor(len(batch)) as pool:
            answered = list(pool.map(carrying(self._answer), batch))
        losses = [self._loss(each) for each in answered]
        total = self._library.sum(losses)
        total.predecessors = losses
        total.backward(self._engine)
        for variable in self._variables.values():
            variable.gradients = sorted(variable.gradients, key=lambda each: _place(variable, each))
        before = self.prompts
        try:
            self._optimizer.step()
        except IndexError:  # the answer has no tags around the improved prompt
            self.revert(before)
        self._write()

    def _write(self) -> None:
        named: list[tuple[str, Any]] = self._program.named_predictors()
        for name, predictor in named:
            predictor.signature = predictor.signature.with_instructions(self._variables[name].value)

    def _answer(self, row: dspy.Example) -> _Answered:
        try:
            prediction = self._program(**row.inputs())
        except Exception as error:  # whatever a program raises is its answer
            return _Answered(row, f"The program failed: {error}", 0.0)
        text = "\n".join(f"{name}: {value}" for name, value in prediction.items())
        return _Answered(row, text, self._context.metric(row, prediction))

    def _loss(self, answered: _Answered) -> Any:
        """The row's part of the graph: instructions and inputs -> response -> evaluation."""
        function = self._library.autograd.string_based_ops.StringBasedFunction
        fields = {name: _shown_in_full(self._constant(value, _INPUT)) for name, value in answered.row.inputs().items()}
        prompts = {f"system_prompt_{name}": variable for name, variable in self._variables.items()}
        response = function(lambda **_: answered.text, _PROGRAM)(
            inputs={**prompts, **fields}, response_role_description=_RESPONSE
        )
        response.predecessors = [*prompts.values(), *fields.values()]
        gold = "\n".join(answers.expected(answered.row).values())
        inputs = {"prediction": response, "ground_truth_answer": self._constant(gold, _GOLD)}
        return function(lambda **_: f"{answered.score:g}", _EVALUATION)(inputs=inputs)

    def _constant(self, value: Any, role: str) -> Any:
        return self._library.Variable(str(value), requires_grad=False, role_description=role)


class _ProposerEngine:
    """The proposer as an engine of textgrad: (prompt, system prompt) -> text.

    Where the LM has no settings of its own, those of textgrad's engines hold.
    """

    def __init__(self, lm: dspy.LM) -> None:
        own = {name: lm.kwargs[name] for name in _SAMPLING if lm.kwargs.get(name) is not None}
        self._lm, self._sampling = lm, {**_SAMPLING, **own}
        self.model_string = lm.model

    def generate(self, prompt: str, system_prompt: str | None = None, **_: Any) -> str:
        """The proposer's answer."""
        request = lm15.Request(
            self._lm.model, (lm15.Message.user(prompt),), system=system_prompt, config=lm15.Config(**self._sampling)
        )
        response: Any = self._lm(request)
        return response.text or ""

    __call__ = generate


def _validate(program: dspy.Module, dev: Sequence[dspy.Example], context: Context) -> float:
    evaluate = dspy.Evaluate(devset=list(dev), metric=context.metric, display_progress=False)
    return evaluate(program).score


def _shown_in_full(variable: Any) -> Any:
    """The variable; a function's backward pass shows the first and last ten words of what went into it."""
    variable.get_short_value = lambda *_args, **_kwargs: variable.get_value()
    return variable


def _place(variable: Any, gradient: Any) -> tuple[str, str]:
    """What orders the gradients of a variable: the run that they are about, and their text."""
    about = variable.gradients_context.get(gradient) or {}
    return about.get("context", ""), gradient.value


_importing = threading.Lock()


def _library(directory: Path) -> Any:
    """The package, imported without the file `./logs/*.jsonl` and without LiteLLM's request for a list of prices."""
    settings = {"TEXTGRAD_LOG_DIR": str(directory / "textgrad"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with _importing:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            import textgrad
            import textgrad.autograd.string_based_ops
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
        for handler in textgrad.logger.handlers[:]:
            textgrad.logger.removeHandler(handler)
            handler.close()
    return textgrad


@contextmanager
def _quiet(library: Any) -> Iterator[Any]:
    """Inside, textgrad does not log every prompt."""
    level = library.logger.level
    library.logger.setLevel(logging.CRITICAL)
    try:
        yield library
    finally:
        library.logger.setLevel(level)
