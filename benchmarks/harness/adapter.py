"""How prompts are written while an optimizer runs: the program's as they are scored, others as DSPy does by default."""

from __future__ import annotations

from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError

Fields = tuple[tuple[str, ...], tuple[str, ...]]


def fields(signature: Any) -> Fields:
    """Names of a signature's inputs and outputs, which an optimizer leaves as they are.

    >>> fields(dspy.Signature("question -> answer"))
    (('question',), ('answer',))
    """
    return tuple(signature.input_fields), tuple(signature.output_fields)


class _Readable:
    """Of several samples keeps those that can be read; an error only where none can.

    DSPy gives up all of them for one. COPRO asks for nine at a temperature of 1.4, where a small proposer often leaves
    the format.
    """

    def _call_postprocess(
        self, processed_signature: Any, original_signature: Any, outputs: list[Any], lm: Any, lm_kwargs: Any
    ) -> list[dict[str, Any]]:
        read: Any = super()._call_postprocess  # pyright: ignore[reportAttributeAccessIssue]
        found: list[dict[str, Any]] = []
        refused: AdapterParseError | None = None
        for output in outputs:
            try:
                found += read(processed_signature, original_signature, [output], lm, lm_kwargs)
            except AdapterParseError as error:
                refused = error
        if refused is not None and not found:
            raise refused
        return found


class _InJson(_Readable, dspy.JSONAdapter):
    pass


class _InChat(_Readable, dspy.ChatAdapter):
    def _make_json_adapter_fallback(self) -> dspy.JSONAdapter:
        native, parallel = self.use_native_function_calling, self.parallel_tool_calls
        return _InJson(use_native_function_calling=native, parallel_tool_calls=parallel)


class SearchAdapter(dspy.ChatAdapter):
    """A ChatAdapter that asks again in JSON for what an optimizer asks, and not for the program.

    A program is judged by its answer to one prompt. What writes instructions for it is not judged, and an optimizer
    such as MIPROv2 ends with an error where an answer cannot be read, which a small proposer's often cannot. Of
    several samples that an optimizer asks for at once, those that can be read count.

    Args:
        program: that is optimised.
    """

    def __init__(self, program: dspy.Module) -> None:
        super().__init__(use_json_adapter_fallback=False)
        self._program = {fields(predictor.signature) for predictor in program.predictors()}
        self._others = _InChat()

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
