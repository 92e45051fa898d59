"""Parity while a search runs: each call to a server is compared with the weights that are loaded here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dspy_greater.errors import GreaterError, LayoutError, OutageError, ParityError, ServerError
from dspy_greater.lm.served import with_settings
from dspy_greater.notices import warn_caller
from dspy_greater.program.called import merged_options
from dspy_greater.program.copies import with_instructions
from dspy_greater.program.predictors import Predictor
from dspy_greater.program.rollout import Rollout
from dspy_greater.program.servers import Servers
from dspy_greater.program.tracing import Exchange
from dspy_greater.prompt.chat_template import content_text
from dspy_greater.prompt.layout import Layout
from dspy_greater.served.kinds import not_waiting, tell_of_silent
from dspy_greater.served.parity import Probed, Twin, Written, answer_of, probe, too_little
from dspy_greater.served.record import ServedModel

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine
    from dspy_greater.served.kinds import Server

_LOG = logging.getLogger(__name__)
_COMPARED = 2  # rows before a search
_READ = 4  # answers of a batch of runs that are read here for the agreement: one short pass, whatever the batch


class Watch:
    """Compares a server with the weights that are loaded here: before a search on some rows, then on its runs.

    Prompts are compared in every run. Tokens are compared in a few runs of each batch: that is a forward pass.

    Args:
        server: what answers.
        engine: the weights.
        predictor: whose LM it is.
        strict: whether low agreement is an error, and so is another prompt in the middle of a search.
    """

    def __init__(self, server: Server, engine: Engine, predictor: str, *, strict: bool = False) -> None:
        self._twin, self._strict = Twin(server, engine, predictor), strict
        # Which of several servers answered a run is not known.
        place = replace(server.address, base=" or ".join(each.address.base for each in server.every))
        self._any = Twin(replace(server, address=place), engine, predictor)
        self._found = Probed(0, 0, 0, 0)
        self._different, self._warned = 0, False

    def begin(self, predictor: Predictor, layout: Layout, rows: Sequence[Any], servers: Servers) -> None:
        """Compare on two of these rows, before anything is searched, and log who answers.

        Of several servers each is compared. Where some give no answer, a warning says so; with `strict`, an error.

        Raises:
            OutageError: the server gave no answer for longer than `servers` waits.
            ParityError: a server reads another prompt; with `strict`, or its tokens are not those of the weights.
            ServerError: it does not take what a row asks.
        """
        _LOG.info("Predictor `%s`: %s", predictor.name, self.record())
        asked = [_messages(predictor, layout, row) for row in rows[:_COMPARED]]
        every, silent = self._twin.server.every, list[GreaterError]()
        for server in every if len(every) > 1 else ():
            twin = Twin(server, self._twin.engine, predictor.name)
            with not_waiting(servers) as at_once:
                try:
                    found = probe(twin, asked, at_once)
                except ParityError:
                    raise
                except (OutageError, ServerError) as error:
                    silent.append(error)
                    continue
            self._add(found, different=0)
            self._judge(too_little(twin, found.agreed, found.written))
        if len(silent) == len(every) or len(every) == 1:
            self._add(probe(self._twin, asked, servers), different=0)
            self._judge(self._too_little())
        elif silent:
            tell_of_silent(silent, strict=self._strict)

    def heard(self, rollouts: Sequence[Rollout], *, before: bool) -> None:
        """Compare on runs of the program, `before` the search or in it.

        Raises:
            ParityError: the server read another prompt, before the search or with `strict`; or with `strict` its
                tokens are not those of the weights.
        """
        twin = self._any
        calls = [call.sent for rollout in rollouts for call in rollout.trace if call.predictor == twin.predictor]
        asked = [sent for sent in calls if sent is not None and sent.messages]
        told, by_ids, different = 0, 0, 0
        readable: list[Written] = []
        for sent, written in _answers(asked):
            try:
                difference = twin.different(written)
            except LayoutError:
                continue  # what cannot be laid out here is refused elsewhere
            told += written.prompt_ids is not None or written.prompt_tokens is not None
            by_ids += written.prompt_ids is not None
            if difference is not None:
                different += 1
                self._refuse(twin.refusal(written, difference), before)
            elif merged_options(sent).get("temperature") == 0 and (written.text or written.token_ids):
                readable.append(written)
        spread = readable[:: max(1, -(-len(readable) // _READ))]
        agreed, compared = twin.agreement(spread)
        self._add(Probed(told, by_ids, compared, agreed), different)
        self._judge(self._too_little())

    @property
    def settings(self) -> dict[str, Any]:
        """What the LM is given while a search runs."""
        return self._twin.server.settings

    def record(self) -> ServedModel:
        """What is known up to now."""
        twin, found = self._twin, self._found
        server, weights = twin.server, twin.engine.weights
        return ServedModel(
            predictor=twin.predictor,
            kind=server.kind,
            url=", ".join(each.address.base for each in server.every),
            model=server.address.model,
            said=server.said,
            weights=twin.engine.identity,
            device=str(weights.device),
            dtype=str(weights.dtype).removeprefix("torch."),
            neutral=tuple(server.neutral.items()),
            prompts=found.prompts,
            prompts_by_ids=found.by_ids,
            prompts_different=self._different,
            written=found.written,
            agreed=found.agreed,
        )

    def _add(self, more: Probed, different: int) -> None:
        now = self._found
        self._found = Probed(
            now.prompts + more.prompts,
            now.by_ids + more.by_ids,
            now.written + more.written,
            now.agreed + more.agreed,
        )
        self._different += different

    def _refuse(self, text: str, before: bool) -> None:
        if before or self._strict:
            raise ParityError(text)
        if self._different == 0:
            warn_caller(f"{text} The search goes on; `detailed_results.server` counts such prompts.", RuntimeWarning)

    def _too_little(self) -> str | None:
        return too_little(self._any, self._found.agreed, self._found.written)

    def _judge(self, text: str | None) -> None:
        if text is None or self._warned:
            return
        self._warned = True
        if self._strict:
            raise ParityError(f"{text} strict=False searches all the same.")
        warn_caller(text, RuntimeWarning)


def neutral(program: Any, watches: Mapping[str, Watch | None]) -> Any:
    """A copy of the program whose LMs are given each watch's `settings`; the program itself where there are none.

    Predictors that share an LM go on sharing it.
    """
    settings = {name: watch.settings for name, watch in watches.items() if watch is not None and watch.settings}
    if not settings:
        return program
    copied, made = with_instructions(program, {}), dict[tuple[int, str], Any]()
    for name, predictor in copied.named_predictors():
        if name in settings:
            key = (id(predictor.lm), repr(settings[name]))
            if key not in made:
                made[key] = with_settings(predictor.lm, settings[name])
            predictor.lm = made[key]
    return copied


def _messages(predictor: Predictor, layout: Layout, row: Any) -> list[dict[str, Any]]:
    """What the predictor sends for a row; where the program makes its inputs, the row's own values as one message."""
    inputs = dict(row.inputs())
    if all(name in inputs for name in predictor.input_fields):
        return layout.messages(predictor.instruction, {name: inputs[name] for name in predictor.input_fields})
    return [{"role": "user", "content": "\n".join(map(str, inputs.values()))}]


def _answers(asked: Sequence[Exchange]) -> Iterator[tuple[Exchange, Written]]:
    """Each exchange with what the server told of it, as the history of its LM has it."""
    histories: dict[int, dict[str, Written]] = {}
    for sent in asked:
        history = histories.get(id(sent.lm))
        if history is None:
            history = histories[id(sent.lm)] = _history(sent.lm)
        known = history.get(_key(sent.messages))
        alone = sent.answers[0] if len(sent.answers) == 1 else None
        text = None if alone is None or alone.thoughts else alone.text
        told = (None, None, None) if known is None else (known.prompt_tokens, known.prompt_ids, known.token_ids)
        yield sent, Written(tuple(sent.messages or ()), text, told[0], told[1], told[2] if alone else None)


def _history(lm: Any) -> dict[str, Written]:
    """What servers told, by the messages; an answer from a cache tells nothing of its prompt."""
    found: dict[str, Written] = {}
    for entry in list(getattr(lm, "history", None) or ()):
        messages = entry.get("messages")
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            continue
        data = _as_mapping(entry.get("response"))
        usage = entry.get("usage")
        written = answer_of({**data, "usage": usage} if usage else data, ())
        if written.prompt_tokens is not None or written.prompt_ids is not None:
            found[_key(messages)] = written
    return found


def _as_mapping(response: Any) -> Mapping[str, Any]:
    """An answer as plain values: LiteLLM's, or what DSPy's own engine keeps of what the server sent."""
    dump = getattr(response, "model_dump", None)
    found = dump() if callable(dump) else getattr(response, "provider_data", response)
    if not isinstance(found, Mapping):
        return {}
    choices = found.get("choices")
    if not isinstance(choices, list):
        return found
    lifted = [
        {**(choice.get("provider_specific_fields") or {}), **choice} if isinstance(choice, Mapping) else choice
        for choice in choices
    ]
    return {**(found.get("provider_specific_fields") or {}), **found, "choices": lifted}


def _key(messages: Any) -> str:
    return repr([(message.get("role"), content_text(message.get("content"))) for message in messages or ()])
