"""The loop of GRAD-SUM (arXiv 2407.12865, figure 1) under a beam search.

generation -> evaluation -> gradients -> summarisation -> editing -> the best prompts go back to generation
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from dspy_greater.errors import BudgetSpent, MalformedAnswer
from dspy_greater.gradsum.ask import Asker, Question
from dspy_greater.gradsum.evaluate import NO_EXPECTED_ANSWER, Evaluator, mean_score
from dspy_greater.gradsum.meter import Meter
from dspy_greater.gradsum.modules import Edit, EditUnaware, Summarise, WriteGradient, WriteGradientOnOnePrompt
from dspy_greater.gradsum.task import Prompts, Task
from dspy_greater.metric import refuse_useless_metric
from dspy_greater.notices import warn_caller
from dspy_greater.program.rollout import Rollout
from dspy_greater.program.validation import warn_of_failed_metric
from dspy_greater.run.events import IterationTaken, MemberEdited, Output, PromptsScored, TextGradient
from dspy_greater.search.seed_run import SeedRun, check_seed_run, kept_as_they_are, refuse_nameless_inputs, unused_error

NO_CRITERIA = "(none but the evaluation)"
ONE_CALL = "(one call only)"


class Loop:
    """The beam search from the student's prompts.

    Args:
        task: what is optimised.
        meter: counts what it costs.
        uncalled: predictors that the student's run in an interrupted beginning did not call.

    Attributes:
        iterations: those that are finished.
        out_of_budget: why the loop ended before its last iteration, if it did.
        uncalled: predictors that the student did not call on any row of the first sample; they are not edited.
    """

    def __init__(self, task: Task, meter: Meter, uncalled: Iterable[str] = ()) -> None:
        settings = task.settings
        self._task, self._meter = task, meter
        self._asker = Asker(meter, task.servers, retries=settings.retries, threads=settings.num_threads)
        self._training = Evaluator(task, task.train, self._asker, meter)
        self.uncalled = frozenset(uncalled)
        self._predictors = {
            predictor.name: predictor for predictor in task.edited if predictor.name not in self.uncalled
        }
        self.iterations: list[IterationTaken] = []
        self.out_of_budget: str | None = None

    @property
    def beam(self) -> tuple[Prompts, ...]:
        """The prompts that the next iteration starts from, best first."""
        return self.iterations[-1].beam if self.iterations else (self._task.seed_prompts,)

    def run(self, recorded: Iterable[IterationTaken] = ()) -> Iterator[tuple[IterationTaken, bool]]:
        """All iterations, each with whether it was taken now and not replayed; ends early at the budget."""
        for iteration in recorded:
            self._recall(iteration)
            self.iterations.append(iteration)
            yield iteration, False
        began = time.monotonic()
        while len(self.iterations) < self._task.settings.iterations:
            try:
                self._refuse_late_start()
                self._reserve_validation()
                taken = self.take_iteration()
            except BudgetSpent as limit:
                self.out_of_budget = str(limit)
                return
            now = time.monotonic()
            taken, began = replace(taken, seconds=now - began), now
            self.iterations.append(taken)
            yield taken, True

    def take_iteration(self) -> IterationTaken:
        """One loop: from the beam's outputs to the next beam."""
        sample, subset = self._draw()
        generated = self._training.evaluate(self.beam, sample)  # generation and evaluation
        if not self.iterations:
            self._heed(SeedRun(self._training.take_runs(), *self._drawn(sample)))
            self._reserve_validation()  # how many calls a run makes is known now
        gradients = self._differentiate(generated)
        summaries = self._summarise(gradients)
        candidates = self._edit(summaries)
        compared, beam = self._select(candidates, subset)
        members = zip(self.beam, generated, gradients, summaries, candidates, strict=True)
        return IterationTaken(
            iteration=len(self.iterations),
            sample=sample,
            subset=subset,
            members=tuple(MemberEdited(*member) for member in members),
            compared=compared,
            beam=beam,
            spent=self._meter.spent(),
        )

    def _drawn(self, sample: Sequence[int]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        task = self._task
        return tuple(task.train[row] for row in sample), tuple(task.numbers[row] for row in sample)

    def _heed(self, run: SeedRun) -> None:
        """What the student's own run says: what cannot work is refused, and what is never called is not edited."""
        check_seed_run(run)
        refuse_nameless_inputs(run, list(self._predictors.values()))
        uncalled = [name for name in self._predictors if name not in run.called]
        if len(uncalled) == len(self._predictors):
            raise unused_error(run, uncalled, self._task.program)
        if uncalled:
            warn_caller(kept_as_they_are(uncalled, len(run.rows)))
        self.uncalled = frozenset(uncalled)
        self._predictors = {
            name: predictor for name, predictor in self._predictors.items() if name not in self.uncalled
        }

    def validate(self, finalists: Sequence[Prompts]) -> tuple[list[tuple[Output, ...]], list[tuple[Rollout, ...]]]:
        """What prompts lead to on the validation rows and the runs behind it, whatever is left of the budget.

        Raises:
            JudgeError: the judge gave no usable verdict.
            MetricError: the metric failed on every row.
            OutageError: a server gave no answer for longer than the run waits.
            ProgramError: the language model never answered.
        """
        self._meter.lift_limits()
        task = self._task
        count = len(task.validation)
        validation = Evaluator(task, task.validation, self._asker, self._meter, floor=count, deployed=True)
        outputs = validation.evaluate(finalists, range(count))
        refuse_useless_metric(*([output.error for output in group] for group in outputs), rows="validation rows")
        taken = validation.take_runs()
        runs = [taken[start : start + count] for start in range(0, len(taken), count)]
        warn_of_failed_metric(task.validation, runs)
        return outputs, runs

    def _draw(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows of this iteration, the same whether or not the run was interrupted before it."""
        settings, rows = self._task.settings, range(len(self._task.train))
        rng = random.Random(f"{self._task.seed}/sample/{len(self.iterations)}")
        sample = sorted(rng.sample(rows, min(settings.sample_size, len(rows))))
        subset = sorted(rng.sample(sample, min(settings.subset_size, len(sample))))
        return tuple(sample), tuple(subset)

    def _differentiate(self, generated: Sequence[Sequence[Output]]) -> list[tuple[TextGradient, ...]]:
        """Module 3: for every output below full score, how the prompts should change."""
        outputs = [
            (member, output)
            for member, group in enumerate(generated)
            for output in group
            if output.evaluation  # empty at full score
        ]
        asked = [(member, output) for member, output in outputs if not self._is_gradient(output)]
        answers = self._asker.ask(
            "gradients", self._task.gradient_lm, [self._gradient_question(*pair) for pair in asked]
        )
        written = {(member, output.row): found for (member, output), found in zip(asked, answers.found, strict=True)}
        gradients: list[list[TextGradient]] = [[] for _ in generated]
        for member, output in outputs:
            if self._is_gradient(output):
                gradients[member].append(TextGradient(output.row, tuple(self._predictors), output.feedback or ""))
            elif (found := written[member, output.row]) is not None:
                gradients[member].append(TextGradient(output.row, *found))
        return [tuple(group) for group in gradients]

    def _is_gradient(self, output: Output) -> bool:
        """Whether the metric's feedback says all: there is one prompt that it can be about, and no other complaint."""
        judge_objects = output.judged is not None and output.judged < 1.0
        return bool(output.feedback) and len(self._task.predictors) == 1 and not judge_objects

    def _gradient_question(self, member: int, output: Output) -> Question[tuple[tuple[str, ...], str]]:
        task, prompts = self._task, self.beam[member]
        signature = WriteGradient if len(self._predictors) > 1 else WriteGradientOnOnePrompt
        inputs = {
            "task_description": task.description,
            "criteria": task.criteria or NO_CRITERIA,
            "prompts": "\n\n".join(f"Predictor `{name}`:\n{text}" for name, text in prompts.items()),
            "inputs": output.inputs,
            "expected": output.expected or NO_EXPECTED_ANSWER,
            "trace": output.trace or ONE_CALL,
            "output": output.written,
            "evaluation": output.evaluation,
        }
        return Question(signature, inputs, self._read_gradient)

    def _read_gradient(self, answer: Any) -> tuple[tuple[str, ...], str]:
        text = _text(answer.feedback, "feedback")
        if len(self._predictors) == 1:
            return tuple(self._predictors), text
        named = {name.strip(" `'\"[]\n") for name in str(answer.concerns).split(",")}
        concerns = tuple(name for name in self._predictors if name in named)
        if not concerns:
            raise MalformedAnswer(f"concerns names none of the predictors {', '.join(self._predictors)}.")
        return concerns, text

    def _summarise(self, gradients: Sequence[Sequence[TextGradient]]) -> list[Prompts]:
        """Module 4: all gradients of a member that concern a predictor -> one paragraph."""
        concerned = [
            (member, name, [gradient.text for gradient in group if name in gradient.concerns])
            for member, group in enumerate(gradients)
            for name in self._predictors
        ]
        concerned = [(member, name, texts) for member, name, texts in concerned if texts]
        if not self._task.settings.summarize:
            summaries = ["\n".join(f"- {text}" for text in texts) for _, _, texts in concerned]
        else:
            questions = [
                Question(
                    Summarise,
                    {
                        "task_description": self._task.description,
                        "prompt": self.beam[member][name],
                        "feedback": texts,
                    },
                    lambda answer: _text(answer.summary, "summary"),
                )
                for member, name, texts in concerned
            ]
            summaries = self._asker.ask("summarisation", self._task.gradient_lm, questions).found
        found: list[Prompts] = [{} for _ in gradients]
        for (member, name, _), summary in zip(concerned, summaries, strict=True):
            if summary is not None:
                found[member][name] = summary
        return found

    def _edit(self, summaries: Sequence[Prompts]) -> list[tuple[Prompts, ...]]:
        """Module 5: candidates from the summary and the task description; the k-th of all predictors go together."""
        asked = [(member, name, text) for member, group in enumerate(summaries) for name, text in group.items()]
        questions = [self._edit_question(*entry) for entry in asked]
        answers = self._asker.ask("editing", self._task.editor_lm, questions)
        versions: list[dict[str, tuple[str, ...]]] = [{} for _ in summaries]
        for (member, name, _), found in zip(asked, answers.found, strict=True):
            versions[member][name] = found or ()
        seen = {tuple(sorted(prompts.items())) for prompts in self.beam}
        candidates = []
        for member, by_name in enumerate(versions):
            fresh = []
            for number in range(max(map(len, by_name.values()), default=0)):
                edited = {name: found[number] for name, found in by_name.items() if number < len(found)}
                prompts = {**self.beam[member], **edited}
                key = tuple(sorted(prompts.items()))
                if key not in seen:
                    seen.add(key)
                    fresh.append(prompts)
            candidates.append(tuple(fresh))
        return candidates

    def _edit_question(self, member: int, name: str, feedback: str) -> Question[tuple[str, ...]]:
        settings, predictor = self._task.settings, self._predictors[name]
        inputs = {
            "task_description": self._task.description,
            "prompt": self.beam[member][name],
            "interface": f"{', '.join(predictor.input_fields)} -> {', '.join(predictor.output_fields)}",
            "feedback": feedback,
            "tried": self._tried(name),
            "number": settings.candidates_per_edit,
        }
        signature = Edit if settings.tried_shown else EditUnaware
        return Question(signature, inputs, lambda answer: self._read_versions(answer, name, self.beam[member][name]))

    def _read_versions(self, answer: Any, name: str, current: str) -> tuple[str, ...]:
        """The versions that an editor wrote; a small one may hand back what it was shown, even with its score."""
        signature = self._predictors[name].signature
        written, shown = [str(text).strip() for text in answer.versions], self._tried(name)
        texts = [text.partition(": ")[2] if text in shown else text for text in written if text and "[[ ##" not in text]
        deployed = [signature.with_instructions(text).instructions for text in texts]
        distinct = tuple(dict.fromkeys(deployed))[: self._task.settings.candidates_per_edit]
        if not distinct:
            raise MalformedAnswer("versions holds no prompt that can be used; give a JSON list of strings.")
        if distinct == (current,):
            raise MalformedAnswer("versions holds the prompt as it is and nothing else; write others.")
        return distinct

    def _tried(self, name: str) -> list[str]:
        """The latest prompts of a predictor that were compared, with their scores there."""
        found: dict[str, str] = {}
        for iteration in self.iterations:
            for scored in iteration.compared:
                found.pop(scored.prompts[name], None)  # the latest score counts
                found[scored.prompts[name]] = f"{scored.score[0]:.2f}: {scored.prompts[name]}"
        return list(found.values())[-self._task.settings.tried_shown :] if self._task.settings.tried_shown else []

    def _select(
        self, candidates: Sequence[Sequence[Prompts]], subset: tuple[int, ...]
    ) -> tuple[tuple[PromptsScored, ...], tuple[Prompts, ...]]:
        """Members and candidates on the same few rows; the best are the next beam, and of equals the earlier."""
        entrants = [*self.beam, *(prompts for group in candidates for prompts in group)]
        outputs = self._training.evaluate(entrants, subset)
        compared = tuple(
            PromptsScored(prompts, group, mean_score(group)) for prompts, group in zip(entrants, outputs, strict=True)
        )
        ranked = sorted(compared, key=lambda scored: scored.score, reverse=True)
        return compared, tuple(scored.prompts for scored in ranked[: self._task.settings.beam_width])

    def _recall(self, iteration: IterationTaken) -> None:
        for member in iteration.members:
            self._training.recall(member.prompts, member.outputs)
        for scored in iteration.compared:
            self._training.recall(scored.prompts, scored.outputs)
        self._meter.recall(iteration.spent)

    def _refuse_late_start(self) -> None:
        limit, taken = self._task.settings.max_seconds, sum(iteration.seconds for iteration in self.iterations)
        if limit is not None and taken >= limit:
            raise BudgetSpent(f"max_seconds={limit:g} was reached with {taken:.1f} seconds.")

    def _reserve_validation(self) -> None:
        self._meter.reserve(self._task.validation_calls(self._meter.calls_per_run()))


def _text(value: Any, name: str) -> str:
    text = str(value or "").strip()
    if not text:
        raise MalformedAnswer(f"{name} is empty.")
    return text
