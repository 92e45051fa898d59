"""Generation and evaluation: prompts on rows -> what the program wrote, and how good that is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import dspy

from dspy_greater.errors import JudgeError, MalformedAnswer
from dspy_greater.gradsum.ask import Asker, Question
from dspy_greater.gradsum.meter import Meter
from dspy_greater.gradsum.modules import Judge
from dspy_greater.gradsum.task import Prompts, Task
from dspy_greater.program.rollout import (
    Rollout,
    answered,
    refuse_dead_lm,
    run_pairs,
    run_uncached,
    searching_copy,
    unscored,
)
from dspy_greater.prompt.gold import labels_as_text
from dspy_greater.run.events import Output
from dspy_greater.stats import mean

NO_EXPECTED_ANSWER = "(none is known)"
_WHOLE_NUMBER = re.compile(r"(-?\d+)(?:\.0+)?(?:\s*(?:/|out of)\s*\d+)?\.?")


class Evaluator:
    """Runs and scores prompts on rows; the same prompts are run on a row once.

    Args:
        task: program, rows, criteria and metric.
        rows: the rows that indices refer to.
        floor: how many of the rows that are asked for first may not stay without an answer.
        deployed: run the program as it will be used, with the adapter's fallback to JSON; see `roll_out`. The metric
            has proven itself by then.
    """

    def __init__(
        self,
        task: Task,
        rows: Sequence[Any],
        asker: Asker,
        meter: Meter,
        *,
        floor: int = 0,
        deployed: bool = False,
    ) -> None:
        self._task, self._rows, self._asker, self._meter = task, rows, asker, meter
        self._floor, self._deployed = range(floor), deployed
        fields = [field for predictor in task.predictors for field in predictor.signature.output_fields.items()]
        self._annotations = {name: info.annotation for name, info in fields}
        self._latest: tuple[Rollout, ...] = ()
        self._known: dict[tuple[tuple[tuple[str, str], ...], int], Output] = {}

    def recall(self, prompts: Prompts, outputs: Iterable[Output]) -> None:
        """Remember outputs of an interrupted run."""
        self._known.update({(_key(prompts), output.row): output for output in outputs})

    def take_runs(self) -> tuple[Rollout, ...]:
        """The runs that the latest evaluation made, members and their rows in order; they are forgotten here."""
        runs, self._latest = self._latest, ()
        return runs

    def evaluate(self, beam: Sequence[Prompts], rows: Sequence[int]) -> list[tuple[Output, ...]]:
        """For each member its outputs on the rows, in their order.

        Raises:
            BudgetSpent: they do not fit into the budget.
            JudgeError: the judge gave no usable verdict on any of them.
            MetricError: the metric returned something that is not a score, the first time; later that is a mistake.
            OutageError: a server gave no answer for longer than the run waits.
            ProgramError: the program's language model could not be called, not even once, nor where it had answered.
        """
        wanted = [(prompts, row) for prompts in beam for row in rows]
        new = [pair for pair in wanted if (_key(pair[0]), pair[1]) not in self._known]
        outputs = self._judge(self._generate(new))
        for (prompts, row), output in zip(new, outputs, strict=True):
            self._known[_key(prompts), row] = output
        return [tuple(self._known[_key(prompts), row] for row in rows) for prompts in beam]

    def _generate(self, pairs: Sequence[tuple[Prompts, int]]) -> list[Output]:
        """Module 1: the program itself."""
        task, meter = self._task, self._meter
        meter.admit(len(pairs) * task.calls_per_output(meter.calls_per_run(unknown=len(task.predictors))))
        programs = {_key(prompts): searching_copy(task.program, prompts) for prompts, _ in pairs}
        runs = [(programs[_key(prompts)], self._rows[row]) for prompts, row in pairs]
        proven = self._deployed or bool(self._known)
        metric = unscored if task.metric is None else task.metric.late if proven else task.metric
        with meter.counting("generation"):
            run = partial(
                run_pairs,
                metric=metric,
                threads=task.settings.num_threads,
                deployed=self._deployed,
                failure_score=task.settings.failure_score,
            )
            done = answered(runs, run, task.servers, probe=self._probe(), must=self._floor)
            refuse_dead_lm(done, len({row for _, row in pairs}), self._probe())
        meter.add("generation", runs=len(runs), predictor_calls=sum(len(rollout.trace) for rollout in done))
        self._latest = tuple(done)
        return [self._output(row, rollout) for (_, row), rollout in zip(pairs, done, strict=True)]

    def _probe(self) -> Callable[[], Rollout] | None:
        """Runs again what worked before, if anything did: not a row, nor prompts, that may be too long."""
        worked = next((known for known, output in self._known.items() if output.error is None), None)
        if worked is None:
            return None
        prompts, row = worked

        def probe() -> Rollout:
            program = searching_copy(self._task.program, dict(prompts))
            return run_uncached(program, self._rows[row], threads=self._task.settings.num_threads)

        return probe

    def _output(self, row: int, rollout: Rollout) -> Output:
        task, example = self._task, self._rows[row]
        metric = None if task.metric is None else rollout.score
        problems = []
        if rollout.lm_failed:
            pass  # no prompt mends that
        elif rollout.error is not None:
            problems.append(f"It failed: {rollout.error}")
        elif metric is not None and metric < task.settings.full_score:
            problems.append(f"The metric gave it {metric:g}, and {task.settings.full_score:g} is full score.")
        if rollout.feedback is not None and problems:
            problems.append(rollout.feedback)
        return Output(
            row=row,
            inputs=self._text(example.inputs().items()),
            expected=self._text(labels_as_text(example.labels().toDict(), self._annotations).items()),
            written=self._written(rollout),
            trace=self._trace(rollout),
            metric=metric,
            judged=None if task.criteria is None else 0.0,
            evaluation="\n".join(problems),
            feedback=rollout.feedback,
            error=rollout.error,
        )

    def _judge(self, outputs: Sequence[Output]) -> list[Output]:
        """Module 2: the judge's verdict on every output that there is; a run that failed has the worst."""
        task = self._task
        asked = [index for index, output in enumerate(outputs) if output.error is None and task.criteria is not None]
        questions = [Question(Judge, self._case(outputs[index]), self._verdict) for index in asked]
        answers = self._asker.ask(
            "evaluation", task.judge_lm, questions, must=[at for at, index in enumerate(asked) if index in self._floor]
        )
        if asked and not self._meter.spent()["evaluation"]["answered"]:
            raise JudgeError(
                f"The judge gave no usable verdict on any of {len(asked)} outputs, each asked "
                f"{task.settings.retries + 1} times; on the first, {answers.failures[0]} Use another judge_lm, or a "
                "simpler judge_scale such as (0, 1)."
            )
        judged = list(outputs)
        for place, (index, verdict) in enumerate(zip(asked, answers.found, strict=True)):
            judged[index] = _with_verdict(outputs[index], verdict, answers.failures.get(place, ""))
        return judged

    def _case(self, output: Output) -> dict[str, str]:
        low, high = self._task.settings.judge_scale
        return {
            "task_description": self._task.description,
            "criteria": self._task.criteria or "",
            "inputs": output.inputs,
            "expected": output.expected or NO_EXPECTED_ANSWER,
            "output": output.written,
            "scale": f"whole numbers from {low} (worst) to {high} (best)",
        }

    def _verdict(self, answer: Any) -> tuple[float, str]:
        low, high = self._task.settings.judge_scale
        found = _WHOLE_NUMBER.fullmatch(str(answer.score).strip())
        if found is None or not low <= int(found[1]) <= high:
            raise MalformedAnswer(f"the score {str(answer.score)[:80]!r} is not a whole number from {low} to {high}.")
        score = (int(found[1]) - low) / (high - low)
        explanation = str(answer.explanation or "").strip()
        if not explanation and score < 1.0:
            raise MalformedAnswer("the explanation is empty, and the score is not the best one.")
        return score, explanation

    def _written(self, rollout: Rollout) -> str:
        """The prediction; where a run failed, what its last call wrote."""
        if rollout.prediction is not None:
            fields = rollout.prediction
            return self._text(fields.items()) if isinstance(fields, dspy.Prediction) else self._clipped(str(fields))
        completions = [call.completion or "" for call in rollout.trace[-1:]]
        return self._clipped("".join(completions))

    def _trace(self, rollout: Rollout) -> str:
        if len(rollout.trace) < 2:
            return ""
        calls = [
            f"Predictor `{call.predictor}` was given\n{self._text(call.inputs.items())}\nand wrote\n"
            + (self._text(call.outputs.items()) or self._clipped(call.completion or ""))
            for call in rollout.trace
        ]
        return self._clipped("\n\n".join(calls))

    def _text(self, items: Iterable[tuple[str, Any]]) -> str:
        return self._clipped("\n".join(f"{name}: {value}" for name, value in items))

    def _clipped(self, text: str) -> str:
        longest = self._task.settings.longest_text
        left_out = len(text) - longest
        return text if left_out <= 0 else f"{text[:longest]} ... ({left_out} more characters)"


def mean_score(outputs: Sequence[Output]) -> tuple[float, ...]:
    """The means of the metric's and the judge's scores; the metric's decides, the judge's where that is equal."""
    columns = zip(*(output.score for output in outputs), strict=True)
    return tuple(mean(column) for column in columns)


def _with_verdict(output: Output, verdict: tuple[float, str] | None, problem: str) -> Output:
    if verdict is None:
        return replace(output, error=f"the judge gave no usable verdict: {problem}")
    score, explanation = verdict
    if score >= 1.0:
        return replace(output, judged=score)
    return replace(output, judged=score, evaluation="\n".join(filter(None, [output.evaluation, explanation])))


def _key(prompts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(prompts.items()))
