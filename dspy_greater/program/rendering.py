"""The messages of a program's predictors, for an example or with named gaps, without asking a language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dspy_greater.errors import DataError, ProgramError
from dspy_greater.program.predictors import predictors_of


@dataclass(frozen=True)
class PredictorPrompt:
    """What a predictor's messages are made of."""

    name: str
    signature: Any
    demos: tuple[Any, ...]
    adapter: Any
    called_as: str = ""  # where its calls are rendered in another way than the predictor itself

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its input fields."""
        return tuple(self.signature.input_fields)

    def messages(self, example: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages for an example that has all inputs; what else it has is left out.

        Raises:
            DataError: an input is missing.
            ProgramError: the predictor's calls bring a signature or an adapter of their own.
        """
        if self.called_as:
            raise ProgramError(
                f"Predictor `{self.name}` is called with a signature, an adapter or variables of its calls "
                f"({self.called_as}), which only a run of the program shows: see `dspy.inspect_history()` after one."
            )
        fields = self.signature.input_fields
        defaults = {name: info.default for name, info in fields.items() if not info.is_required()}
        given = {**defaults, **{name: example[name] for name in self.inputs if name in example}}
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise DataError(
                f"The example has no {', '.join(f'`{name}`' for name in missing)}, which predictor `{self.name}` reads "
                f"(its inputs: {', '.join(self.inputs)}). Give the example these fields; what another predictor of the "
                "program writes has to be given too."
            )
        return [dict(message) for message in self.adapter.format(self.signature, list(self.demos), given)]

    def template(self) -> list[dict[str, Any]]:
        """The messages with a gap such as `{{question}}` for each input.

        Raises:
            ProgramError: see `messages`; or the prompt itself has the text of a gap, or no gap for an input.
        """
        words = {name: f"Zq{place}gapqZ{name}Zq" for place, name in enumerate(self.inputs)}
        messages = self.messages(words)
        for name, word in words.items():
            texts = [message["content"] for message in messages]
            if not all(isinstance(text, str) for text in texts) or not any(word in text for text in texts):
                raise ProgramError(
                    f"Predictor `{self.name}` does not write its input `{name}` into the prompt as plain text, so that "
                    "no template has a gap for it. Use a text field."
                )
            if any(gap(name) in text for text in texts):
                raise ProgramError(
                    f"The prompt of predictor `{self.name}` holds the text {gap(name)} itself, which could not be told "
                    "from the gap. Change the instruction or the demonstration that has it."
                )
            for message in messages:
                message["content"] = message["content"].replace(word, gap(name))
        return messages


@dataclass(frozen=True)
class ProgramPrompts:
    """The prompts of a program, by predictor."""

    predictors: Mapping[str, PredictorPrompt]

    @classmethod
    def of(cls, program: Any, called_as: Mapping[str, str] | None = None) -> ProgramPrompts:
        """Those of a program as it is now, under the adapter that is in force now."""
        found = {
            predictor.name: PredictorPrompt(
                predictor.name,
                predictor.signature,
                predictor.demos,
                predictor.adapter,
                (called_as or {}).get(predictor.name, ""),
            )
            for predictor in predictors_of(program)
        }
        return cls(found)

    def under(self, instructions: Mapping[str, str]) -> ProgramPrompts:
        """The same predictors with other instructions."""
        changed = {
            name: replace(prompt, signature=prompt.signature.with_instructions(instructions[name]))
            for name, prompt in self.predictors.items()
        }
        return ProgramPrompts(changed)

    def prompt(self, example: Mapping[str, Any] | None, predictor: str | None = None) -> list[dict[str, Any]]:
        """The messages of one predictor; with gaps where there is no example.

        Raises:
            ProgramError: there is no such predictor, or several and none is named; see `PredictorPrompt`.
            DataError: the example lacks an input.
        """
        known = ", ".join(f"`{name}`" for name in self.predictors)
        if predictor is None and len(self.predictors) != 1:
            raise ProgramError(
                f"The program has several predictors: {known}. Say which: prompt(example, predictor=...)."
            )
        name = next(iter(self.predictors)) if predictor is None else predictor
        if name not in self.predictors:
            raise ProgramError(f"The program has no predictor `{name}`; it has {known}.")
        found = self.predictors[name]
        return found.template() if example is None else found.messages(example)


def gap(name: str) -> str:
    """The gap for an input.

    >>> gap("question")
    '{{question}}'
    """
    return f"{{{{{name}}}}}"
