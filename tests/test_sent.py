"""What is scored is what was sent: every way in which a call can differ is followed to the token, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy import lm15
from dspy.adapters.baml_adapter import BAMLAdapter
from dspy.clients.call_result import attributes
from dspy.utils.callback import BaseCallback
from scripted_engine import (
    SEED,
    TEMPLATE,
    ScriptedEngine,
    chat_answer,
    exact_match,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
    shared_tokenizer,
    small_model,
    word_tokenizer,
)

from dspy_greater import local_lm
from dspy_greater.errors import CallMismatchError, LayoutError, ProgramError
from dspy_greater.model.engine import Generation
from dspy_greater.objective.evaluator import Evaluator, Instruction, Objective
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.traced_run import trace_calls
from dspy_greater.run.events import SearchStarted, StepTaken
from dspy_greater.run.serialise import to_json
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.problem import Options, prepare
from dspy_greater.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy", "ignore:.*validation rows are also")

ROWS = planted_rows(4)
OTHER = "Please count it."
YES = chat_answer(reasoning="I look.", answer="yes")
LOOK = chat_answer(query="look")
JSON_YES = '{"reasoning": "I look.", "answer": "yes"}'
ANSWERS = dspy.Signature("question -> answer", SEED)
QUERIES = dspy.Signature("question -> query", SEED)
SHOWN = [{"question": "two of pears", "reasoning": "I read it.", "answer": "no"}]


class Asked(ScriptedEngine):
    """Remembers the tokens of every prompt that it was given."""

    def __init__(self, script: Callable[[str], str] | str = YES, *, seed: int = 0, tokenizer: Any = None) -> None:
        tokenizer = tokenizer or shared_tokenizer()
        said = script if callable(script) else lambda prompt: script
        super().__init__(said, model=small_model(tokenizer, context=4096, seed=seed), tokenizer=tokenizer)
        self.asked: list[tuple[int, ...]] = []

    def generate(self, requests: Sequence[Any]) -> list[Generation]:
        self.asked += [tuple(request.prompt) for request in requests]
        return super().generate(requests)


Body = Callable[..., Any]


def program_of(body: Body, signature: Any = ANSWERS, *, module: Any = dspy.ChainOfThought) -> Any:
    """A program with the one predictor `self.p`, and `body` for its forward."""

    class Program(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = module(signature)

        def forward(self, **inputs: Any) -> Any:
            return body(self, **inputs)

    return Program()


def objectives(program: Any, engine: Any, rows: Sequence[Any] = ROWS, **options: Any) -> Iterator[Evaluator]:
    """One for each predictor of the program that can be optimised; its LM is the engine."""
    if all(predictor.lm is None for predictor in program.predictors()):
        program.set_lm(local_lm(engine, cache=False, max_tokens=64))
    problem = prepare(
        program, rows, exact_match, rows, Options(settings=Settings.of(None), step=DefaultStep(), seed=0, **options)
    )
    for target in problem.targets:
        yield Evaluator(
            Objective(
                program=problem.program,
                predictor=target.predictor,
                field=target.field,
                rows=problem.train,
                metric=problem.metric,
                fixed=target.fixed,
            ),
            engine=target.engine,
            settings=problem.settings,
        )


def sequences(objective: Evaluator, evaluated: Evaluation) -> list[Any]:
    return [each for row in evaluated.rows for each in objective.examples.sequences(evaluated.instruction, row)]


def are_as_sent(found: Sequence[Any], asked: Sequence[tuple[int, ...]]) -> bool:
    """Whether every sequence begins with a prompt that the model was given, up to where it writes."""
    return bool(found) and all(
        any(each.token_ids[: len(prompt)] == prompt and len(prompt) <= each.generated.start for prompt in asked)
        for each in found
    )


def check_that_what_is_scored_was_sent(program: Any, engine: Asked, rows: Sequence[Any] = ROWS) -> list[Evaluator]:
    """For every predictor, under its own instruction, another one, and the first one's text moved to the other."""
    found = []
    for objective in objectives(program, engine, rows):
        engine.asked.clear()
        seed, _ = objective.evaluate_seed()
        assert are_as_sent(sequences(objective, seed), engine.asked)
        engine.asked.clear()
        text = f"{objective.layout.edits.fixed} {OTHER}" if objective.layout.edits.fixed else OTHER
        (other,) = objective.evaluate([Instruction(objective.layout.edits.instruction_ids(text), text)])
        assert are_as_sent(sequences(objective, other), engine.asked)
        moved = [each.under(other.token_ids) for each in sequences(objective, seed)]
        assert are_as_sent(moved, engine.asked)
        found.append(objective)
    return found


# ---- what is followed


def inside(adapter: Callable[[], Any]) -> Body:
    def body(program: Any, question: str) -> Any:
        with dspy.context(adapter=adapter()):
            return program.p(question=question)

    return body


def asking(**brought: Any) -> Body:
    return lambda program, question: program.p(question=question, **brought)


def chosen(program: Any, question: str) -> Any:
    """Other demonstrations for each question, on some none at all."""
    shown = [dspy.Example(question=f"maybe {question}", reasoning="I write.", answer="no")]
    return program.p(question=question, demos=shown if "one" in question else [])


def twice(program: Any, question: str) -> Any:
    program.p(question=question, demos=[{"question": "one", "answer": "yes"}])
    return program.p(question=f"always {question}", demos=SHOWN)


def hinted(program: Any, question: str) -> Any:
    signature = program.p.predict.signature.append("hint", dspy.InputField())
    return program.p(question=question, hint="now", signature=signature)


def planned(program: Any, question: str) -> Any:
    return program.p(question=question, signature=program.p.predict.signature.insert(0, "plan", dspy.OutputField()))


def reminded(program: Any, question: str) -> Any:
    past = dspy.History(messages=[{"question": "look", "reasoning": "I read it.", "answer": "no"}])
    return program.p(question=question, past=past)


class WithDefault(dspy.Signature):
    """Please say it now."""

    question: str = dspy.InputField()
    style: str = dspy.InputField(default="brief")
    answer: str = dspy.OutputField()


FOLLOWED = {
    "demonstrations of their own": (chosen, ANSWERS, YES),
    "a demonstration as a mapping": (asking(demos=SHOWN), ANSWERS, YES),
    "two calls with two kinds of demonstrations": (twice, ANSWERS, YES),
    "another input": (hinted, ANSWERS, YES),
    "another output before the gold one": (planned, ANSWERS, chat_answer(plan="a", reasoning="I look.", answer="yes")),
    "JSON inside of forward": (inside(dspy.JSONAdapter), ANSWERS, JSON_YES),
    "XML inside of forward": (
        inside(dspy.XMLAdapter),
        ANSWERS,
        "<reasoning>\nI look.\n</reasoning>\n<answer>\nyes\n</answer>",
    ),
    "an adapter that inherits its methods": (inside(BAMLAdapter), ANSWERS, JSON_YES),
    "two steps inside of forward": (
        inside(lambda: dspy.TwoStepAdapter(dspy.utils.DummyLM([{"reasoning": "look", "answer": "yes"}] * 99))),
        ANSWERS,
        "I look. It is yes.",
    ),
    "settings of the LM": (asking(config={"temperature": 0.9, "max_tokens": 30, "stop": ["END"]}), ANSWERS, YES),
    "several samples": (asking(config={"n": 3}), ANSWERS, YES),
    "tools that the adapter leaves out": (asking(config={"tools": [{"type": "function"}]}), ANSWERS, YES),
    "a default": (asking(), WithDefault, YES),
    "a list": (
        lambda program, question: program.p(question=question, facts=["one", "two"]),
        dspy.Signature("question, facts: list[str] -> answer", SEED),
        YES,
    ),
    "code": (
        lambda program, question: program.p(question=question, code=dspy.Code(code="x = 1")),
        dspy.Signature("question, code: dspy.Code -> answer", SEED),
        YES,
    ),
    "a conversation": (reminded, dspy.Signature("question, past: dspy.History -> answer", SEED), YES),
    "an optional conversation": (reminded, dspy.Signature("question, past: dspy.History | None -> answer", SEED), YES),
    "no conversation yet": (asking(), dspy.Signature("question, past: dspy.History -> answer", SEED), YES),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_a_call_brings_along_is_scored_as_it_was_sent(case: str) -> None:
    body, signature, says = FOLLOWED[case]
    check_that_what_is_scored_was_sent(program_of(body, signature), Asked(says))


def queries(body: Body, signature: Any = QUERIES) -> Any:
    """A program without gold values: the metric alone says whether a query was good."""

    def forward(program: Any, question: str) -> Any:
        return dspy.Prediction(answer="yes" if body(program, question=question).query else "no")

    return program_of(forward, signature, module=dspy.Predict)


@pytest.mark.parametrize("case", ["demonstrations", "samples", "conversation"])
def test_every_call_without_a_gold_value_is_scored_as_it_was_sent(case: str) -> None:
    def shown(program: Any, question: str) -> Any:
        program.p(question=question, demos=[{"question": "one", "query": "look"}])
        return program.p(question=f"always {question}")

    def talking(program: Any, question: str) -> Any:
        told: list[dict[str, Any]] = []
        for turn in ("look", "read"):
            found = program.p(question=turn, past=dspy.History(messages=told))
            told.append({"question": turn, "query": found.query})  # the same list as was sent before
        return found

    body = {"demonstrations": shown, "samples": asking(config={"n": 3}), "conversation": talking}[case]
    signature = dspy.Signature("question, past: dspy.History -> query", SEED) if case == "conversation" else QUERIES
    engine = Asked(LOOK)
    (objective,) = check_that_what_is_scored_was_sent(queries(body, signature), engine)
    seed, _ = objective.evaluate_seed()
    assert [len(row.calls) for row in seed.rows] == [3 if case == "samples" else 2] * len(ROWS)


def lookup(query: str) -> str:
    """Look something up."""
    return query


@pytest.mark.parametrize("kind", [dspy.ReAct, dspy.ReActV2])
def test_an_agents_calls_are_scored_as_they_were_sent(kind: Any) -> None:
    calls = '{"tool_calls": [{"name": "submit", "args": {"answer": "yes"}}]}'
    said = chat_answer(next_thought="look", next_tool_name="finish", next_tool_args="{}", tool_calls=calls)
    script = {"react": said, "extract.predict": YES}

    def says(prompt: str) -> str:
        return script["react" if "next_thought" in prompt.rsplit("<|system|>", 1)[-1] else "extract.predict"]

    check_that_what_is_scored_was_sent(kind(ANSWERS, tools=[lookup]), Asked(says))


class Rewrites(BaseCallback):
    """Changes what a predictor is asked before its adapter writes it."""

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        inputs["inputs"]["question"] += " please"


def test_a_callback_that_changes_what_an_adapter_writes_changes_what_is_scored_too() -> None:
    with dspy.context(callbacks=[Rewrites()]):
        check_that_what_is_scored_was_sent(program_of(asking()), Asked())
    own = inside(lambda: dspy.ChatAdapter(callbacks=[Rewrites()]))
    check_that_what_is_scored_was_sent(program_of(own), Asked())


def test_an_lm_of_the_call_on_the_same_weights_is_as_good_as_the_predictors() -> None:
    engine = Asked()
    warm = local_lm(engine, cache=False, temperature=0.7, max_tokens=40)
    check_that_what_is_scored_was_sent(program_of(asking(lm=warm)), engine)


PARTS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
)
PARTS += "{{ part['text'] }}{% endif %}{% endfor %}{{ '<|end|>' }}{% endfor %}"
PARTS += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
LAST_ONLY = "{{ '<|system|>' + messages[0]['content'] + '<|end|><|user|>' + messages[-1]['content'] + '<|end|>' }}"
LAST_ONLY += "{{ '<|assistant|>' }}"


def templated(template: str, says: str = YES) -> Asked:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return Asked(says, tokenizer=tokenizer)


@pytest.mark.parametrize("template", [PARTS, NO_SYSTEM + PARTS, NO_SYSTEM + TEMPLATE])
def test_templates_without_a_system_role_or_texts_are_followed(template: str) -> None:
    check_that_what_is_scored_was_sent(program_of(asking(demos=SHOWN)), templated(template))


def test_a_template_that_drops_demonstrations_is_refused_only_where_there_are_some() -> None:
    check_that_what_is_scored_was_sent(program_of(asking()), templated(LAST_ONLY))
    (objective,) = objectives(program_of(asking(demos=SHOWN)), templated(LAST_ONLY))
    with pytest.raises(ProgramError, match="drops what an assistant's earlier message says"):
        objective.evaluate_seed()
    program = program_of(asking())
    program.p.predict.demos = SHOWN
    with pytest.raises(LayoutError, match="drops what an assistant's earlier message says.*demonstrations"):
        next(objectives(program, templated(LAST_ONLY)))


# ---- what is refused


def other_signature(program: Any, question: str) -> Any:
    own = dspy.Signature("question, hint -> reasoning, answer", SEED)  # the same words, but not the predictor's
    return program.p(question=question, hint="now", signature=own)


def other_instruction(program: Any, question: str) -> Any:
    return program.p(question=question, signature=program.p.predict.signature.with_instructions("Say no."))


def without_gold(program: Any, question: str) -> Any:
    signature = program.p.predict.signature.delete("answer").append("reply", dspy.OutputField())
    return dspy.Prediction(answer=program.p(question=question, signature=signature).reply)


def now_and_then(program: Any, question: str) -> Any:
    return hinted(program, question) if "one" in question else program.p(question=question)


def now_in_json(program: Any, question: str) -> Any:
    with dspy.context(adapter=dspy.JSONAdapter() if "one" in question else None):
        return program.p(question=question)


class Guards(BaseCallback):
    """Changes messages after they were written."""

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        inputs["messages"].insert(0, {"role": "system", "content": "Be polite."})


class Counting(dspy.ChatAdapter):
    """Writes another prompt every time."""

    written = 0

    def format_user_message_content(self, *args: Any, **kwargs: Any) -> str:
        Counting.written += 1
        return f"{Counting.written}. {super().format_user_message_content(*args, **kwargs)}"


REFUSED = {
    "signature": (other_signature, r"whose instruction is its own.* Build that signature from the predictor's"),
    "instruction": (other_instruction, r"has another instruction: sent was 'Say no.', scored would be 'Please say it"),
    "field": (without_gold, r"does not ask for `answer`"),
    "two signatures": (
        now_and_then,
        r"in 2 of 4 calls .*different signatures: sent was question -> reasoning, answer,",
    ),
    "two adapters": (now_in_json, r"in 2 of 4 calls .*different adapters: sent was ChatAdapter, scored .* JSONAdapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_laid_out_is_refused_before_a_search_with_the_first_difference(case: str) -> None:
    body, text = REFUSED[case]
    engine = Asked(
        lambda prompt: JSON_YES if "JSON object" in prompt else chat_answer(reasoning="I", answer="yes", reply="yes")
    )
    program = program_of(body)
    program.set_lm(local_lm(engine, cache=False))
    heard: list[Any] = []
    with pytest.raises(CallMismatchError, match=rf"(?s)[Pp]redictor `p.predict`.*{text}.*predictors=\[\.\.\.\]"):
        optimizer(listeners=[heard.append]).compile(program, ROWS, valset=ROWS)
    assert heard == []


def test_an_adapter_that_writes_another_prompt_every_time_is_refused() -> None:
    (objective,) = objectives(program_of(inside(Counting)), Asked())
    with pytest.raises(LayoutError, match="Counting or the chat template changes other parts of the prompt"):
        objective.evaluate_seed()


def test_messages_that_a_callback_changes_on_their_way_are_refused() -> None:
    program = program_of(asking())
    lm = local_lm(Asked(), cache=False)
    lm.callbacks = [Guards()]  # heard after those of the settings
    program.set_lm(lm)
    (objective,) = objectives(program, None)
    with pytest.raises(
        CallMismatchError, match=r"message 0 \(system\) differs: sent was 'Be polite.', scored would be"
    ):
        objective.evaluate_seed()


def test_another_model_at_a_call_is_refused_by_name() -> None:
    here, there = Asked(), Asked(seed=7)
    (objective,) = objectives(program_of(asking(lm=local_lm(there, cache=False))), here)
    with pytest.raises(
        CallMismatchError, match=r"another language model answers: sent was 'local/scripted@.* Set that"
    ):
        objective.evaluate_seed()
    again = Asked()  # the same weights once more
    (objective,) = objectives(program_of(asking(lm=local_lm(again, cache=False))), here)
    assert objective.evaluate_seed()[0].score == 0.5


def told_at(heard: Any, word: str) -> list[str]:
    """The files that the warnings with this word point to."""
    return [Path(each.filename).name for each in heard if word in str(each.message)]


@contextmanager
def settings_lm(engine: Any) -> Iterator[Any]:
    lm = local_lm(engine, cache=False, max_tokens=64)
    with dspy.context(lm=lm):
        yield lm


def under(lm: Any) -> Body:
    def body(program: Any, question: str) -> Any:
        with dspy.context(lm=lm):
            return program.p(question=question)

    return body


def test_a_context_with_another_model_is_refused_because_the_search_would_not_hear_it() -> None:
    there = local_lm(Asked(seed=7), cache=False)
    with (
        settings_lm(Asked()),
        pytest.raises(CallMismatchError, match=r"`p.predict` .*inside dspy.context\(lm=\.\.\.\)"),
    ):
        optimizer().compile(program_of(under(there)), ROWS, valset=ROWS)
    with settings_lm(Asked()) as lm:
        optimizer(steps=0).compile(program_of(under(lm)), ROWS, valset=ROWS)
        with pytest.warns(UserWarning, match=r"which changes temperature; the search leaves that") as heard:
            optimizer(steps=0).compile(program_of(under(lm.copy(temperature=0.8))), ROWS, valset=ROWS)
        assert told_at(heard, "temperature") == [Path(__file__).name]
    program = program_of(under(there))
    program.set_lm(local_lm(Asked(), cache=False))  # its own comes before any context
    optimizer(steps=0).compile(program, ROWS, valset=ROWS)


class Both(dspy.Module):
    """A query without and an answer with gold values."""

    def __init__(self, engine: Any, query: Body, answer: Body) -> None:
        super().__init__()
        self.q = dspy.Predict(QUERIES)
        self.p = dspy.ChainOfThought(ANSWERS)
        self.bodies = (query, answer)
        self.set_lm(local_lm(engine, cache=False))

    def forward(self, question: str) -> Any:
        found, query, answer = dspy.Prediction(), *self.bodies
        query(self.q, question)
        found = answer(self.p, question)
        return found


def plainly(predictor: Any, question: str) -> Any:
    return predictor(question=question)


def strangely(predictor: Any, question: str) -> Any:
    inner = getattr(predictor, "predict", predictor)
    return predictor(question=question, signature=inner.signature.with_instructions("Say no."))


def both_script(prompt: str) -> str:
    return LOOK if "`query`" in prompt else YES


def test_a_later_predictor_with_gold_values_is_looked_at_before_the_first_search() -> None:
    heard: list[Any] = []
    with pytest.raises(CallMismatchError, match="`p.predict` sends to its language model is not what would be scored"):
        optimizer(listeners=[heard.append]).compile(Both(Asked(both_script), plainly, strangely), ROWS, valset=ROWS)
    assert heard == []


def test_a_predictor_without_gold_values_that_cannot_be_followed_keeps_its_instruction() -> None:
    with pytest.warns(UserWarning, match="`q` sends to its language model is not .* It keeps its instruction"):
        better = optimizer().compile(Both(Asked(both_script), strangely, plainly), ROWS, valset=ROWS)
    assert [each.name for each in better.detailed_results.predictors] == ["p.predict"]


# ---- one call, one text


def test_of_several_samples_values_and_text_are_those_of_the_first() -> None:
    count = iter(range(99))
    engine = Asked(lambda prompt: chat_answer(reasoning=f"look {next(count)}", answer="yes"))
    program = program_of(asking(), module=lambda signature: dspy.ChainOfThought(signature, n=3))
    program.set_lm(local_lm(engine, cache=False, temperature=1.0))
    (call,) = trace_calls(program, ROWS[0]).calls
    assert call.outputs["reasoning"] == "look 0" and "look 0" in str(call.completion)
    assert [f"look {n}" in str(each.text) for n, each in enumerate(call.samples)] == [True] * 3


def test_of_several_samples_the_one_that_did_not_parse_is_the_calls() -> None:
    said = iter([chat_answer(query="look"), "I do not know."])
    program = queries(asking(config={"n": 2}))
    program.set_lm(local_lm(Asked(lambda prompt: next(said)), cache=False, temperature=1.0))
    (call,) = trace_calls(program, ROWS[0]).calls
    assert call.completion == "I do not know." and call.error is not None and not call.outputs


def test_an_answer_in_another_form_after_one_that_did_not_parse_is_not_taken_for_the_first() -> None:
    engine = Asked(lambda prompt: JSON_YES if "JSON object" in prompt else "I do not know.")
    (objective,) = check_that_what_is_scored_was_sent(program_of(inside(dspy.ChatAdapter)), engine)
    seed, _ = objective.evaluate_seed()
    assert seed.score == 0.5  # what the program made of the second answer
    assert all(row.written == {"reasoning": "I do not know."} and row.unparsed for row in seed.rows)


def test_an_input_that_is_filled_later_is_remembered_as_it_was_sent() -> None:
    def filling(program: Any, question: str) -> Any:
        facts = ["one"]
        found = program.p(question=question, facts=facts)
        facts.append("two")
        return found

    signature = dspy.Signature("question, facts: list[str] -> answer", SEED)
    engine = Asked()
    (objective,) = check_that_what_is_scored_was_sent(program_of(filling, signature), engine)
    assert objective.evaluate_seed()[0].rows[0].inputs["facts"] == ["one"]


@pytest.mark.parametrize("brought", [{"max_tokens": 3}, {"stop": ["END"]}, {}])
def test_no_end_of_the_turn_is_scored_after_a_text_that_was_cut_off(brought: dict[str, Any]) -> None:
    class Cut(Asked):
        def generate(self, requests: Sequence[Any]) -> list[Generation]:
            return [Generation(each.token_ids, "length") for each in super().generate(requests)]

    engine = Cut(LOOK)
    (objective,) = objectives(queries(asking(config=brought)), engine)
    seed, _ = objective.evaluate_seed()
    ends = {each.token_ids[-1] == engine.tokenizer.eos_token_id for each in sequences(objective, seed)}
    assert ends == {not brought}


# ---- the same search


class Polite(dspy.ChatAdapter):
    """Writes another prompt than ChatAdapter, and reads the same answers."""

    def user_message_output_requirements(self, signature: Any) -> str:
        return f"Please look. {super().user_message_output_requirements(signature)}"


def steps_of(program: Any, **settings: Any) -> list[Any]:
    """What a search decided, without what its rows hold: how a call was rendered is told in another place there."""
    better = optimizer(steps=3, **settings).compile(program, planted_rows(8), valset=planted_rows(4))
    return [
        [
            step.reason,
            step.chosen.instruction,
            step.chosen.objective,
            [(each.token, each.gradient, each.forecast, each.realised) for each in step.candidates],
        ]
        for step in better.detailed_results.steps
    ]


def with_own(signature: Any = ANSWERS, demos: Sequence[Any] = ()) -> Any:
    program = program_of(
        lambda program, question: program.p(
            question=question, **({"hint": "now"} if "hint" in signature.fields else {})
        ),
        signature,
    )
    program.p.predict.demos = list(demos)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("case", ["demos", "signature", "adapter"])
def test_what_a_call_brings_along_is_searched_as_if_the_predictor_had_it(case: str) -> None:
    shown = [dspy.Example(each) for each in SHOWN]
    brought, own, adapter = {
        "demos": (program_of(asking(demos=shown)), with_own(demos=shown), None),
        "signature": (program_of(hinted), with_own(ANSWERS.insert(1, "hint", dspy.InputField())), None),
        "adapter": (program_of(inside(Polite)), with_own(), Polite()),
    }[case]
    engine = Asked(obedient_script)
    for program in (brought, own):
        program.set_lm(local_lm(engine, cache=False, max_tokens=64))
    with dspy.context(adapter=adapter):
        expected = steps_of(own)
    assert steps_of(brought) == expected


class Killed(BaseException):
    """Stands for a process that dies."""


@pytest.mark.slow
@pytest.mark.parametrize("body", [chosen, hinted], ids=["demonstrations", "signature"])
def test_a_search_that_follows_its_calls_goes_on_where_it_was_killed(tmp_path: Path, body: Body) -> None:
    def fresh() -> Any:
        program = program_of(body)
        program.set_lm(local_lm(planted_engine(), cache=False, max_tokens=64))
        return program

    def dies(event: Any) -> None:
        if isinstance(event, StepTaken) and event.step == 0:
            raise Killed

    def run(program: Any, **options: Any) -> list[str]:
        better = optimizer(steps=3, **options).compile(program, planted_rows(8), valset=planted_rows(4))
        return [json.dumps(to_json(replace(step, seconds=0.0))) for step in better.detailed_results.steps]

    whole = run(fresh())
    with pytest.raises(Killed):
        run(fresh(), log_dir=tmp_path, listeners=[dies])
    assert run(fresh(), log_dir=tmp_path) == whole
    if body is hinted:
        plain = program_of(asking())
        plain.set_lm(local_lm(planted_engine(), cache=False, max_tokens=64))
        expected = r"as it is now, ChatAdapter; question, hint -> reasoning, answer the"
        with (
            pytest.warns(UserWarning, match="goes on with other code than it was begun with: module"),
            pytest.raises(CallMismatchError, match=expected),
        ):
            run(plain, log_dir=tmp_path)


def test_a_predictor_that_is_called_as_it_stands_costs_no_run_more() -> None:
    engine = Asked()
    (objective,) = objectives(program_of(asking()), engine)
    seed, rollouts = objective.evaluate_seed()
    assert len(engine.asked) == len(rollouts) == len(ROWS)
    assert (objective.called.description, [row.demos for row in seed.rows]) == ("", [None] * len(ROWS))
    (twin,) = objectives(program_of(asking()), Asked())
    assert twin.evaluate([twin.seed()]) == [seed]


# ---- programs that wait


class Waits(dspy.Module):
    """A program that can only be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.p = dspy.ChainOfThought(ANSWERS)

    async def aforward(self, question: str) -> Any:
        return await self.p.acall(question=question)


class Gathers(dspy.Module):
    """Asks twice at a time, and once more."""

    def __init__(self) -> None:
        super().__init__()
        self.q = dspy.Predict(QUERIES)
        self.p = dspy.ChainOfThought(ANSWERS)

    async def aforward(self, question: str) -> Any:
        import asyncio

        asked = [f"{question} {word}" for word in ("now", "then")]
        await asyncio.gather(
            *(self.q.acall(question=each, demos=[{"question": each, "query": "look"}]) for each in asked)
        )
        return await self.p.acall(question=question)


def test_a_program_that_can_only_be_awaited_is_scored_as_it_was_sent() -> None:
    check_that_what_is_scored_was_sent(Waits(), Asked())
    check_that_what_is_scored_was_sent(dspy.syncify(Waits()), Asked())
    check_that_what_is_scored_was_sent(Gathers(), Asked(both_script))


def test_programs_that_wait_move_in_lockstep_like_all_others() -> None:
    engine = Asked()
    (objective,) = objectives(Waits(), engine)
    objective.evaluate_seed()
    assert engine.batches == [len(ROWS)]
    engine = Asked(both_script)
    objective = next(objectives(Gathers(), engine))
    objective.evaluate_seed()
    assert engine.batches == [len(ROWS)] * 3


@pytest.mark.slow
def test_a_program_that_waits_is_searched_as_one_that_does_not() -> None:
    engine = planted_engine()
    waits, own = Waits(), program_of(asking())
    for program in (waits, own):
        program.set_lm(local_lm(engine, cache=False, max_tokens=64))
    assert steps_of(waits) == steps_of(own)


def test_a_program_that_waits_can_be_traced_inside_of_a_loop() -> None:
    import asyncio

    program = Waits()
    program.set_lm(local_lm(Asked(), cache=False))

    async def traced() -> Any:
        return trace_calls(program, ROWS[0])

    trace = asyncio.run(traced())
    assert trace.error is None and trace.prediction.answer == "yes" and len(trace.calls) == 1


# ---- servers


class Served:
    """An engine of DSPy's that stands for a server: what it is asked, and what it answers, with thoughts apart."""

    supports_function_calling = True
    supports_response_schema = False
    supported_params = frozenset({"temperature", "max_tokens"})

    def __init__(self, thoughts: str | None, text: str | None, *, reasons: bool = False) -> None:
        parts = [lm15.ThinkingPart(thoughts)] if thoughts is not None else []
        self.parts = [*parts, *([lm15.TextPart(text)] if text is not None else [])]
        self.supports_reasoning = reasons
        self.requests: list[Any] = []

    def complete(self, request: Any) -> Any:
        self.requests.append(request)
        message = lm15.Message(role="assistant", parts=tuple(self.parts))
        return lm15.Response(id=None, model=request.model, message=message, finish_reason="stop", usage=lm15.Usage())


THINKS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['reasoning_content'] %}"
    "{{ '<think>\n' + m['reasoning_content'] + '\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


class Variables(dspy.BaseLM):
    """A legacy LM, which takes whatever settings a server may be given."""

    def __init__(self, **options: Any) -> None:
        super().__init__("openai/m", cache=False, **options)

    def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        message = {"role": "assistant", "content": YES}
        answer = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {}, "model": "m"}
        return attributes(answer)


def served(program: Any, server: Any, template: str = THINKS) -> tuple[Evaluator, Evaluation]:
    is_lm = isinstance(server, dspy.BaseLM)
    program.set_lm(server if is_lm else dspy.LM("served/m", engine=server, cache=False))
    (objective,) = objectives(program, None, weights=templated(template))
    return objective, objective.evaluate_seed()[0]


def turn(objective: Evaluator, evaluated: Evaluation) -> str:
    """The assistant's turn of the first row, as it is scored."""
    first = sequences(objective, evaluated)[0]
    return objective.layout.tokenizer.decode(list(first.token_ids)).rpartition("<|assistant|>")[2]


def test_thoughts_that_a_server_returns_apart_are_scored_where_the_model_wrote_them() -> None:
    objective, seed = served(program_of(asking()), Served("deep\nthought", f"\n\n{YES}"))
    assert seed.rows[0].preamble == "<think>\ndeep\nthought\n</think>\n\n"
    assert turn(objective, seed).startswith("<think>\ndeep\nthought\n</think>\n\n[[ ## reasoning ## ]]\nI look.\n\n")
    objective, seed = served(queries(asking()), Served("deep", LOOK))
    assert turn(objective, seed) == f"<think>\ndeep\n</think>\n\n{LOOK}<|end|>"


def test_thoughts_that_never_came_to_an_end_are_scored_as_far_as_they_came() -> None:
    program = program_of(asking())
    program.set_lm(dspy.LM("served/m", engine=Served("deep", None), cache=False))
    with pytest.warns(RuntimeWarning, match="failed on all 4 training rows"):
        better = optimizer(steps=0, weights=templated(THINKS)).compile(program, ROWS, valset=ROWS)
    row = better.detailed_results.predictors[0].seed.rows[0]
    assert (row.preamble, row.written) == ("<think>\ndeep\n</think>\n\n", {"reasoning": ""})
    objective, seed = served(queries(asking()), Served("deep", None))
    assert turn(objective, seed) == "<think>\ndeep"


def test_thoughts_without_a_known_place_are_left_out_with_a_warning() -> None:
    program = program_of(asking())
    program.set_lm(dspy.LM("served/m", engine=Served("deep", YES), cache=False))
    with pytest.warns(UserWarning, match=r"`p.predict` returned its thoughts apart .* in 4 of 4 calls") as heard:
        better = optimizer(steps=0, weights=templated(TEMPLATE)).compile(program, ROWS, valset=ROWS)
    assert told_at(heard, "thoughts") == [Path(__file__).name]
    assert better.detailed_results.predictors[0].seed.rows[0].preamble == ""


class Reasons(dspy.Signature):
    """Please say it now."""

    question: str = dspy.InputField()
    reasoning: dspy.Reasoning = dspy.OutputField()
    answer: str = dspy.OutputField()


def test_a_reasoning_field_is_scored_as_the_model_was_asked_for_it() -> None:
    program = program_of(asking(), Reasons, module=dspy.Predict)
    objective, seed = served(program, Served("deep", YES))  # asked for in the text, and thoughts come apart as well
    assert turn(objective, seed).startswith("<think>\ndeep\n</think>\n\n[[ ## reasoning ## ]]\nI look.\n\n")
    server = Served("deep", chat_answer(answer="yes"), reasons=True)  # asked for apart
    objective, seed = served(program_of(asking(), Reasons, module=dspy.Predict), server)
    assert "reasoning" not in str(server.requests[0].system)
    assert objective.called.description == "ChatAdapter; question -> answer"
    assert turn(objective, seed).startswith("<think>\ndeep\n</think>\n\n[[ ## answer ## ]]\n")


LEGACY = pytest.mark.filterwarnings("ignore:Implementing custom LMs through BaseLM.forward:DeprecationWarning")


@LEGACY
def test_variables_of_the_chat_template_are_those_that_the_server_is_given() -> None:
    off = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False, "unknown": 1}}}
    objective, seed = served(program_of(asking()), Variables(**off))
    assert turn(objective, seed).startswith("<think>\n\n</think>\n\n[[ ## reasoning ## ]]\n")
    assert objective.called.template_options == {"enable_thinking": False}

    def varying(program: Any, question: str) -> Any:
        options = {"chat_template_kwargs": {"enable_thinking": "one" in question}}
        return program.p(question=question, config={"extra_body": options})

    with pytest.raises(CallMismatchError, match=r"in 2 of 4 calls .*gets other variables: sent was {'enable_thinking'"):
        served(program_of(varying), Variables())


class Tools(dspy.Signature):
    """Please say it now."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    calls: dspy.ToolCalls = dspy.OutputField()
    answer: str = dspy.OutputField()


def test_tools_are_text_where_the_adapter_writes_them_and_refused_where_the_server_does() -> None:
    def body(program: Any, question: str) -> Any:
        return program.p(question=question, tools=[dspy.Tool(lookup)])

    said = chat_answer(calls='{"tool_calls": []}', answer="yes")
    check_that_what_is_scored_was_sent(program_of(body, Tools, module=dspy.Predict), Asked(said))
    native = dspy.ChatAdapter(use_native_function_calling=True)
    with (
        dspy.context(adapter=native),
        pytest.raises(CallMismatchError, match="the server writes tools into the prompt"),
    ):
        served(program_of(body, Tools, module=dspy.Predict), Served(None, said))


@LEGACY
def test_a_server_of_plain_texts_is_refused() -> None:
    class Texts(dspy.BaseLM):
        def __init__(self) -> None:
            super().__init__("openai/m", model_type="text")

        def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
            answer = {"choices": [{"text": YES, "index": 0, "finish_reason": "stop"}], "usage": {}, "model": "m"}
            return attributes(answer)

    program = program_of(asking())
    program.set_lm(Texts())
    (objective,) = objectives(program, None, weights=Asked())
    with pytest.raises(CallMismatchError, match=r"sent as one text: .*Use a dspy.LM with model_type='chat'"):
        objective.evaluate_seed()


def test_an_image_in_a_field_of_text_is_refused_with_its_kind() -> None:
    def body(program: Any, question: str) -> Any:
        return program.p(question=question, hint=dspy.Image("data:image/png;base64,AAAA"))

    program = program_of(body, dspy.Signature("question, hint -> answer", SEED))
    with pytest.raises(
        CallMismatchError, match=r"part of type 'image_url'.*Use text fields, or leave the predictor out"
    ):
        served(program, Served(None, YES))


def test_how_a_predictor_is_called_is_told_and_kept() -> None:
    heard: list[Any] = []
    program = program_of(hinted)
    program.set_lm(local_lm(Asked(), cache=False))
    optimizer(steps=0, listeners=[heard.append]).compile(program, ROWS, valset=ROWS)
    (started,) = [event for event in heard if isinstance(event, SearchStarted)]
    assert started.called_as == "ChatAdapter; question, hint -> reasoning, answer"
