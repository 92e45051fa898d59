"""How a predictor is really called: what its prompts are laid out from, which its calls may bring along.

DSPy lets a call bring demonstrations, a signature or an LM of its own, and the program may put another adapter
around it. Where all calls of a predictor agree, that is how its prompts are laid out; `sent` says whether it is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dspy_greater.lm.local import local_engine
from dspy_greater.program.predictors import Predictor
from dspy_greater.program.rollout import Rollout, plain
from dspy_greater.program.traced_run import calls_of
from dspy_greater.program.tracing import Exchange, PredictorCall
from dspy_greater.prompt.chat_template import with_template_options
from dspy_greater.prompt.layout import Layout

# Variables of chat templates that DSPy passes as settings of the language model.
_TEMPLATE_VARIABLES = ("reasoning_effort",)


@dataclass(frozen=True)
class CalledAs:
    """How a predictor is called: the predictor with its calls' adapter and signature, and variables of the template.

    `description` says how that differs from the predictor itself, as plain text; it is empty where it does not.
    """

    predictor: Predictor
    template_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    description: str = ""

    def layout(self, tokenizer: Any, *, extractor: str | None = None, fixed: str = "") -> Layout:
        """Lays out this predictor's prompts; raises what `Layout` does."""
        return Layout(
            with_template_options(tokenizer, self.template_options),
            self.predictor.adapter,
            self.predictor.signature,
            demos=self.predictor.demos,
            extractor=extractor,
            fixed=fixed,
        )


def called_as(
    predictor: Predictor, calls: Sequence[PredictorCall], template: str, *, supervised: str | None
) -> CalledAs:
    """How the calls of a predictor are to be laid out; whether that is right for all of them, `differences` says.

    The adapter and the signature are those of the first call that has others than the predictor; demonstrations stay
    with each call.

    Args:
        predictor: as it was found in the program.
        calls: those that are scored.
        template: the chat template of the weights.
        supervised: the output field with gold values, which every prompt has to ask for.
    """
    asked = [call.sent for call in calls if call.sent is not None and call.sent.adapter is not None]
    usable = (sent for sent in asked if supervised is None or supervised in sent.signature.output_fields)
    other = next((sent for sent in usable if not _renders_alike(predictor, sent)), None)
    options = template_options_of(asked[0], template) if asked else {}
    if other is None and not options:
        return CalledAs(predictor)
    if other is not None:
        signature = other.signature
        predictor = replace(
            predictor,
            adapter=other.adapter,
            signature=signature,
            input_fields=tuple(signature.input_fields),
            output_fields=tuple(signature.output_fields),
        )
    described = [type(predictor.adapter).__name__, predictor.signature.signature]
    if options:
        described.append(json.dumps(options, default=str))
    return CalledAs(predictor, options, "; ".join(described))


def scored_calls(rollouts: Sequence[Rollout], name: str, *, every: bool) -> list[PredictorCall]:
    """The calls of a predictor that are scored: every one, or the last of each run."""
    if every:
        return [call for rollout in rollouts for call in calls_of(rollout.trace, name)]
    return [rollout.calls[name] for rollout in rollouts if name in rollout.calls]


def brings_a_signature(rollout: Rollout, name: str) -> bool:
    """Whether a call of the predictor in this run was given a signature."""
    return any("signature" in call.given for call in calls_of(rollout.trace, name))


def own_demos(predictor: Predictor, call: PredictorCall) -> tuple[dict[str, object], ...] | None:
    """The demonstrations of a call as plain values, None where they are the predictor's."""
    if call.sent is None or call.sent.adapter is None or not (call.sent.demos or predictor.demos):
        return None
    given = _plain_demos(predictor, call.sent.demos)
    return None if given == _plain_demos(predictor, predictor.demos) else given


def token_limit(call: PredictorCall) -> int | None:
    """The most tokens that the model could write in this call, None if that is not known.

    It is 0 where there are stop strings: what ended the text may have been one of them, and is not in it.
    """
    if call.sent is None:
        return None
    options = merged_options(call.sent)
    limit = options.get("max_tokens") or options.get("max_completion_tokens")
    return 0 if options.get("stop") else limit if isinstance(limit, int) else None


def template_options_of(sent: Exchange, template: str) -> dict[str, Any]:
    """The variables that a server's chat template is given beyond the messages, as far as it reads them."""
    if local_engine(sent.lm) is not None:
        return {}
    options = merged_options(sent)
    found = options.get("chat_template_kwargs")
    named = {name: options[name] for name in _TEMPLATE_VARIABLES if options.get(name) is not None}
    given = {**named, **found} if isinstance(found, Mapping) else named
    return {name: value for name, value in given.items() if name in template}


def merged_options(sent: Exchange) -> dict[str, Any]:
    """The settings that a server is given: the LM's, the call's, and what either has in `extra_body`."""
    options = {**(getattr(sent.lm, "kwargs", None) or {}), **sent.options}
    extra = options.get("extra_body")
    return {**options, **extra} if isinstance(extra, Mapping) else options


def same_signature(one: Any, other: Any) -> bool:
    """Whether two signatures ask for the same; their instructions are compared elsewhere."""
    if one is other:
        return True
    described = [
        [(name, info.annotation, info.json_schema_extra) for name, info in signature.fields.items()]
        for signature in (one, other)
    ]
    return described[0] == described[1]


# ------------------------------------------------------------------ internals


def _renders_alike(predictor: Predictor, sent: Exchange) -> bool:
    """Whether the call renders as the predictor itself would; the demonstrations are another matter."""
    if type(sent.adapter) is not type(predictor.adapter) or not same_signature(sent.signature, predictor.signature):
        return False
    if _configured(sent.adapter) == _configured(predictor.adapter):
        return True
    rendered = [
        adapter.format(predictor.signature, list(sent.demos), dict(sent.inputs))
        for adapter in (sent.adapter, predictor.adapter)
    ]
    return bool(rendered[0] == rendered[1])


def _configured(adapter: Any) -> dict[str, Any]:
    """An adapter's attributes, without the one that does not change what it writes."""
    return {key: value for key, value in vars(adapter).items() if key != "use_json_adapter_fallback"}


def _plain_demos(predictor: Predictor, demos: Sequence[Any]) -> tuple[dict[str, object], ...]:
    fields = predictor.signature.fields
    return tuple({key: plain(value) for key, value in dict(demo).items() if key in fields} for demo in demos)
