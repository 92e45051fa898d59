"""What is scored is what was sent: a predictor's real calls against the prompts that would be laid out for them.

An adapter, a callback or a setting of the language model may change a prompt on its way, and not everything that a
call brings along can be laid out (`called`). `differences` says, message by message and for an in-process model token
by token, what is left; it is asked on the runs of the seed instruction, before a search begins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy import lm15

from dspy_greater.errors import CallMismatchError, LayoutError
from dspy_greater.lm.local import local_engine
from dspy_greater.notices import warn_caller
from dspy_greater.program.called import (
    CalledAs,
    merged_options,
    own_demos,
    same_signature,
    template_options_of,
)
from dspy_greater.program.inputs import shortened
from dspy_greater.program.predictors import Predictor
from dspy_greater.program.rollout import plain
from dspy_greater.program.tracing import Exchange, PredictorCall
from dspy_greater.prompt.chat_template import content_text
from dspy_greater.prompt.layout import Layout

_AROUND = 30  # characters shown on each side of the first difference
_LEAVE_OUT = "or leave the predictor out: predictors=[...] names those that are optimised"
# What makes a server render the messages in another way than its chat template alone.
_RENDERED_BY_THE_SERVER = ("tools", "functions", "documents", "chat_template", "continue_final_message")


@dataclass(frozen=True)
class Difference:
    """One way in which a call is not what would be scored for it."""

    inputs: str  # of the call, shortened
    what: str
    sent: str
    scored: str
    remedy: str

    def __str__(self) -> str:
        return f"With {self.inputs}, {self.what}: sent was {self.sent}, scored would be {self.scored}. {self.remedy}."


def differences(
    called: CalledAs, layout: Layout, engine: Any, calls: Sequence[PredictorCall], *, supervised: str | None
) -> list[Difference]:
    """What of these calls would not be scored as it was sent, at most one entry a call.

    Args:
        called: how the predictor is called.
        layout: of its prompts.
        engine: the weights that score them.
        calls: those that would be scored.
        supervised: the output field with gold values, if there is one.
    """
    found = [_difference(called, layout, engine, call, supervised) for call in calls]
    return [difference for difference in found if difference is not None]


def refuse_differences(name: str, found: Sequence[Difference], calls: int) -> None:
    """Raises `CallMismatchError` when there are differences, with the first of them."""
    if found:
        raise CallMismatchError(
            f"What predictor `{name}` sends to its language model is not what would be scored, in {len(found)} of "
            f"{calls} calls on the training rows. {found[0]}",
            name,
        )


def refuse_ignored_signature(name: str, asked: str, calls: Sequence[PredictorCall]) -> None:
    """Raises `CallMismatchError` when calls under another instruction did not send it."""
    for call in calls:
        if call.sent is not None and call.sent.signature is not None and call.sent.signature.instructions != asked:
            raise CallMismatchError(
                f"Predictor `{name}` is called with signature=..., whose instruction is its own: another instruction "
                "of the predictor is never sent. Build that signature from the predictor's, as in "
                f"`self.{name}.signature.append(...)`, {_LEAVE_OUT}.",
                name,
            )


def refuse_context_lms(borrowed: Mapping[str, Any], calls: Sequence[PredictorCall]) -> None:
    """The search pins the LM of DSPy's settings to every predictor without one, and a `dspy.context` is not heard.

    Raises `CallMismatchError` when a call is made inside of a `dspy.context` with another model, and warns when it is
    the same model with other settings. `borrowed` are the predictors that have no LM of their own, and the one that
    was pinned to them.
    """
    for call in calls:
        pinned, ambient = borrowed.get(call.predictor), call.context_lm
        if pinned is None or ambient is None or "lm" in call.given:
            continue
        remedy = f"Give the predictor its LM beforehand, as in `program.{call.predictor}.lm = lm`"
        if not _same_model(pinned, ambient):
            raise CallMismatchError(
                f"Predictor `{call.predictor}` is called inside dspy.context(lm=...) with {_name(ambient)}, and the "
                f"search runs it on {_name(pinned)}. {remedy}."
            )
        names = {*pinned.kwargs, *ambient.kwargs} - {"seed"}
        changed = sorted(name for name in names if pinned.kwargs.get(name) != ambient.kwargs.get(name))
        if changed:
            warn_caller(
                f"Predictor `{call.predictor}` is called inside dspy.context(lm=...), which changes "
                f"{', '.join(changed)}; the search leaves that as it is in DSPy's settings. {remedy}.",
            )
            return


def warn_of_lost_thoughts(name: str, layout: Layout, calls: Sequence[PredictorCall]) -> None:
    """Warns, once, when a server returned thoughts apart and there is no place for them in what is scored."""
    apart = sum(any(answer.thoughts for answer in call.samples) for call in calls)
    if apart and layout.thought_tags is None:
        warn_caller(
            f"The language model of predictor `{name}` returned its thoughts apart from the text in {apart} of "
            f"{len(calls)} calls, and the chat template of its weights does not say where they belong: they are left "
            "out of what is scored. Let the server return them inside of the text (without a reasoning parser), or "
            "switch thinking off.",
        )


# ------------------------------------------------------------------ internals


def _difference(
    called: CalledAs, layout: Layout, engine: Any, call: PredictorCall, supervised: str | None
) -> Difference | None:
    predictor, sent = called.predictor, call.sent
    if sent is None:
        return None
    shown = shortened(dict(call.inputs))
    found = _of_the_model(predictor, sent) or _of_the_signature(predictor, sent, supervised)
    found = found or _of_the_rendering(called, sent, str(layout.tokenizer.chat_template))
    if found is None and sent.messages is not None and sent.adapter is not None:
        inputs = {name: plain(value) for name, value in call.inputs.items()}
        laid_out = layout.with_demos(own_demos(predictor, call))
        found = _of_the_messages(laid_out, predictor.instruction, inputs, sent)
        if found is not None and type(sent.adapter) is not type(predictor.adapter):
            kinds = type(sent.adapter).__name__, type(predictor.adapter).__name__
            found = "the calls use different adapters", *kinds, f"Use one adapter for all calls, {_LEAVE_OUT}"
        found = found or _of_the_tokens(laid_out, predictor.instruction, inputs, sent, engine)
    return None if found is None else Difference(shown, *found)


_Found = tuple[str, str, str, str]  # what, sent, scored, remedy


def _of_the_model(predictor: Predictor, sent: Exchange) -> _Found | None:
    if _same_model(predictor.lm, sent.lm):
        return None
    remedy = f"Set that LM on the predictor instead of passing lm= to its call, {_LEAVE_OUT}"
    return "another language model answers", _name(sent.lm), _name(predictor.lm), remedy


def _of_the_signature(predictor: Predictor, sent: Exchange, supervised: str | None) -> _Found | None:
    if sent.signature is None:
        return None
    instruction = sent.signature.instructions
    if instruction != predictor.instruction:
        remedy = f"Leave the predictor's instruction in the signature= of its calls as it is, {_LEAVE_OUT}"
        return "the call has another instruction", *_first_difference(instruction, predictor.instruction), remedy
    if supervised is not None and supervised not in sent.signature.output_fields:
        remedy = f"Keep the field with gold values in the signature of its calls, {_LEAVE_OUT}"
        return f"the call does not ask for `{supervised}`", sent.signature.signature, f"`{supervised}`", remedy
    if not same_signature(sent.signature, predictor.signature):
        remedy = f"Use one signature in all calls, two predictors for two signatures, {_LEAVE_OUT}"
        return "the calls have different signatures", sent.signature.signature, predictor.signature.signature, remedy
    return None


def _of_the_rendering(called: CalledAs, sent: Exchange, template: str) -> _Found | None:
    """Whatever makes a server write the prompt in its own way."""
    variables = template_options_of(sent, template)
    if variables != called.template_options:
        remedy = f"Give every call the same, {_LEAVE_OUT}"
        return "the chat template gets other variables", repr(variables), repr(dict(called.template_options)), remedy
    options = merged_options(sent)
    used = [name for name in _RENDERED_BY_THE_SERVER if options.get(name)]
    if used:
        remedy = f"Leave that out of the call (for tools: an adapter without native function calling), {_LEAVE_OUT}"
        return f"the server writes {used[0]} into the prompt", shortened(options[used[0]]), "nothing", remedy
    if getattr(sent.lm, "model_type", "chat") == "text":
        remedy = f"Use a dspy.LM with model_type='chat', {_LEAVE_OUT}"
        return "the messages are sent as one text", "no chat template", "the chat template of the weights", remedy
    return None


def _of_the_messages(layout: Layout, instruction: str, inputs: Mapping[str, Any], sent: Exchange) -> _Found | None:
    remedy = (
        "A callback, the adapter or the module changes the prompt between the predictor and its language model: take "
        f"that out while compiling, {_LEAVE_OUT}"
    )
    try:
        real = [_read(message) for message in sent.messages or ()]
        scored = [_read(message) for message in layout.messages(instruction, inputs)]
    except LayoutError as error:
        return str(error).rstrip("."), "a message that is not plain text", "text", f"Use text fields, {_LEAVE_OUT}"
    if real == scored:
        return None
    index = next((i for i, (a, b) in enumerate(zip(real, scored, strict=False)) if a != b), min(len(real), len(scored)))
    if index >= min(len(real), len(scored)):
        return "the number of messages differs", f"{len(real)} messages", f"{len(scored)}", remedy
    (role, text, rest), (other_role, other_text, other_rest) = real[index], scored[index]
    if role != other_role or rest != other_rest:
        return f"message {index} differs", f"{role} {rest}", f"{other_role} {other_rest}", remedy
    return f"message {index} ({role}) differs", *_first_difference(text, other_text), remedy


def _of_the_tokens(
    layout: Layout, instruction: str, inputs: Mapping[str, Any], sent: Exchange, engine: Any
) -> _Found | None:
    """Only where the model that answered is the one that scores: the tokens that it read."""
    local = local_engine(sent.lm)
    if local is None or not sent.answers or local.engine.tokenizer is not engine.tokenizer:
        return None
    request = lm15.request_from_openai_chat({"model": sent.lm.model, "messages": list(sent.messages or ())})
    real, scored = local.prompt_ids(request), layout.prompt(instruction, inputs).token_ids
    if real == scored:
        return None
    at = len(os.path.commonprefix([real, scored]))
    pieces = [repr(layout.tokenizer.decode(list(ids[at : at + 8]))) for ids in (real, scored)]
    remedy = f"Report the tokenizer and the chat template, {_LEAVE_OUT}"
    return f"token {at} of {len(real)} differs", pieces[0], pieces[1], remedy


def _same_model(one: Any, other: Any) -> bool:
    if one is other:
        return True
    here, there = local_engine(one), local_engine(other)
    if here is not None and there is not None:  # the same weights may be loaded twice, under two names
        if here.engine is there.engine:  # whose identity may be one that cannot be told
            return True
        return here.engine.identity.rpartition("@")[2] == there.engine.identity.rpartition("@")[2]
    return here is there and _name(one) == _name(other)


def _name(lm: Any) -> str:
    return repr(str(getattr(lm, "model", type(lm).__name__)))


def _read(message: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Role, text, and whatever else a message has."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return str(message.get("role")), content_text(message.get("content")), rest


def _first_difference(sent: str, scored: str) -> tuple[str, str]:
    """Both texts around the first character in which they differ."""
    at = len(os.path.commonprefix([sent, scored]))
    cut = slice(max(0, at - _AROUND), at + _AROUND)
    return repr(sent[cut]), repr(scored[cut])
