"""How prompts are written while an optimizer runs: the program's as they are scored, others as DSPy does by default."""

from __future__ import annotations

from typing import Any

import dspy

Fields = tuple[tuple[str, ...], tuple[str, ...]]


def fields(signature: Any) -> Fields:
    """Names of a signature's inputs and outputs, which an optimizer leaves as they are.

    >>> fields(dspy.Signature("question -> answer"))
    (('question',), ('answer',))
    """
    return tuple(signature.input_fields), tuple(signature.output_fields)


class SearchAdapter(dspy.ChatAdapter):
    """A ChatAdapter that asks again in JSON for what an optimizer asks, and not for the program.

    A program is judged by its answer to one prompt. What writes instructions for it is not judged, and an optimizer
    such as MIPROv2 ends with an error where an answer cannot be read, which a small proposer's often cannot.

    Args:
        program: that is optimised.
    """

    def __init__(self, program: dspy.Module) -> None:
        super().__init__(use_json_adapter_fallback=False)
        self._program = {fields(predictor.signature) for predictor in program.predictors()}
        self._others = dspy.ChatAdapter()

    def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        """The answers, as dictionaries of the signature's outputs."""
        if fields(signature) in self._program:
            return super().__call__(lm, lm_kwargs, signature, demos, inputs)
        return self._others(lm, lm_kwargs, signature, demos, inputs)

    async def acall(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        """The same, awaited."""
        if fields(signature) in self._program:
            return await super().acall(lm, lm_kwargs, signature, demos, inputs)
        return await self._others.acall(lm, lm_kwargs, signature, demos, inputs)
