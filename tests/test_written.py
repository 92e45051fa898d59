"""What a model wrote, as tokens: for every call of a run the ids that it read and wrote."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import dspy
import pytest

from dspy_greater import local_lm
from dspy_greater.metric import RowMetric
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Generation, GenerationRequest
from dspy_greater.program.predictors import predictors_of
from dspy_greater.program.rollout import Running, roll_out, searching_copy
from dspy_greater.program.traced_run import calls_of, trace_calls
from dspy_greater.program.tracing import PredictorCall
from dspy_greater.prompt.layout import Layout, Span
from dspy_greater.prompt.spans import Written
from tests.chat_families import KINDS, TEMPLATES, family_tokenizer
from tests.model_calls import generated
from tests.scripted_engine import ScriptedEngine, chat_answer, shared_tokenizer, small_model, value_in
from tests.test_layout import ROW_MERGES

ROW = {"question": "How many?\n2 + 2"}
SIGNATURE = dspy.Signature("question -> reasoning, answer", "Answer the question.")
COMPLETION = "[[ ## reasoning ## ]]\n2 and 2 is four.\n\n[[ ## answer ## ]]\nfour\n\n[[ ## completed ## ]]"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")


class Recording(ScriptedEngine):
    """Remembers every prompt and what was written after it, with the token that ended it."""

    def __init__(self, script: Callable[[str], str]) -> None:
        tokenizer = shared_tokenizer()
        super().__init__(script, model=small_model(tokenizer, context=4096), tokenizer=tokenizer)
        self.said: list[tuple[int, ...]] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        found = super().generate(requests)
        end = self.tokenizer.eos_token_id
        self.said += [(*each.prompt, *one.token_ids, end) for each, one in zip(requests, found, strict=True)]
        return found


def laid_out(program: Any, calls: Sequence[PredictorCall], tokenizer: Any, adapter: Any = None) -> list[Written]:
    with dspy.context(adapter=adapter):
        predictors = {predictor.name: predictor for predictor in predictors_of(program)}
    found = []
    for call in calls:
        predictor = predictors[call.predictor]
        layout = Layout(tokenizer, predictor.adapter, predictor.signature, demos=predictor.demos)
        found.append(layout.written(predictor.instruction, call.inputs, call.completion or ""))
    return found


# ---- the tokens


@pytest.mark.parametrize("completion", [COMPLETION, "", "\n\nfour", " four", "é – 漢 <b>", "four\n"])
@pytest.mark.parametrize("kind,template", sorted(set(itertools.product(KINDS, TEMPLATES)) - ROW_MERGES))
def test_what_was_written_follows_the_prompt_as_the_model_read_it(kind: str, template: str, completion: str) -> None:
    layout = Layout(family_tokenizer(kind, template), dspy.ChatAdapter(), SIGNATURE)
    prompt = layout.prompt("Answer the question.", ROW)
    written = layout.written("Answer the question.", ROW, completion)
    end = layout.tokenizer.convert_tokens_to_ids("<|end|>" if template == "mistral" else "<|eot|>")
    assert written.token_ids[: len(prompt.token_ids)] == prompt.token_ids
    assert written.instruction == prompt.instruction
    assert written.completion == Span(len(prompt.token_ids), len(written.token_ids))
    assert written.token_ids[-1] == end
    text = layout.encoder.decode(written.token_ids[written.completion.start : -1])
    if "unigram" not in kind or "\u6f22" not in completion:  # a character that this vocabulary does not have
        assert text == completion


def test_a_completion_that_was_cut_off_has_no_end_of_the_turn() -> None:
    layout = Layout(family_tokenizer("byte-level"), dspy.ChatAdapter(), SIGNATURE)
    whole = layout.written("Answer.", ROW, COMPLETION)
    length = len(whole.completion) - 1
    assert layout.written("Answer.", ROW, COMPLETION, limit=length + 1) == whole
    cut = layout.written("Answer.", ROW, COMPLETION, limit=length)
    assert cut.token_ids == whole.token_ids[:-1]
    assert len(cut.completion) == length


def test_special_tokens_in_what_was_written_are_plain_text() -> None:
    layout = Layout(family_tokenizer("byte-level"), dspy.ChatAdapter(), SIGNATURE)
    end = layout.tokenizer.convert_tokens_to_ids("<|eot|>")
    prompt = layout.prompt("Answer.", ROW)
    written = layout.written("Answer.", ROW, "<|eot|> a <|turn|>")
    inside = written.token_ids[written.completion.start : -1]
    assert end not in inside and written.token_ids[-1] == end
    assert layout.encoder.decode(inside) == "<|eot|> a <|turn|>"
    assert written.token_ids[: len(prompt.token_ids)] == prompt.token_ids


def test_a_model_without_an_end_of_turn_ends_with_its_end_of_text_or_nothing() -> None:
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    tokenizer = family_tokenizer("byte-level", template + "{{ 'assistant: ' if add_generation_prompt }}")
    written = Layout(tokenizer, dspy.ChatAdapter(), SIGNATURE).written("Answer.", ROW, "four")
    assert written.token_ids[-1] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    endless = Layout(tokenizer, dspy.ChatAdapter(), SIGNATURE).written("Answer.", ROW, "four")
    assert endless.token_ids == written.token_ids[:-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_pocket_models_own_tokens_come_back(temperature: float) -> None:
    engine = Engine.from_pretrained("pocket")
    layout = Layout(engine.tokenizer, dspy.ChatAdapter(), predictors_of(dspy.ChainOfThought(SIGNATURE))[0].signature)
    rows = [
        {"question": f"I have {n} apples and two pears. How many fruits do I have?"} for n in ("three", "four", "a")
    ]
    prompts = [layout.prompt("List each item.", row).token_ids for row in rows]
    for most in (100, 12):
        found = generated(engine, prompts, most, temperature=temperature)
        for row, prompt, one in zip(rows, prompts, found, strict=True):
            end = (engine.tokenizer.eos_token_id,) if one.finish_reason == "stop" else ()
            text = engine.tokenizer.decode(list(one.token_ids), skip_special_tokens=True)
            written = layout.written("List each item.", row, text, limit=most)
            assert written.token_ids == (*prompt, *one.token_ids, *end)


# ---- the calls of a run


class Hops(dspy.Module):
    """A loop over one predictor, then another inside a module inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.query = dspy.Predict(dspy.Signature("question -> query", "Write a query."))
        self.parts = [Inner()]

    def forward(self, question: str) -> Any:
        query = question
        for _ in range(question.count(" ")):
            query = self.query(question=query).query
        return self.parts[0](question=question, query=query)


class Inner(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = {"answer": dspy.ChainOfThought(dspy.Signature("question, query -> answer", "Answer."))}

    def forward(self, question: str, query: str) -> Any:
        return self.held["answer"](question=question, query=query)


class Side(Hops):
    """The same predictor four times at once."""

    def forward(self, question: str) -> Any:
        rows = [dspy.Example(question=f"{word} {question}").with_inputs("question") for word in "abcd"]
        found = dspy.Parallel(num_threads=4, disable_progress_bar=True)([(self.query, row) for row in rows])
        return self.parts[0](question=question, query=found[0].query)


class Shared(Hops):
    """One predictor by two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.query

    def forward(self, question: str) -> Any:
        query = self.again(question=self.query(question=question).query).query
        return self.parts[0](question=question, query=query)


def hops_script(prompt: str) -> str:
    if "`answer`" in prompt:
        return chat_answer(reasoning="I look.", answer="yes")
    return chat_answer(query=f"more of {value_in(prompt)}")


def json_script(prompt: str) -> str:
    return json.dumps(
        {"reasoning": "I look.", "answer": "yes"} if "`answer`" in prompt else {"query": "more"}, indent=1
    )


def look(query: str) -> str:
    """Looks {something} up."""
    return f"found {query}"


def react_script(prompt: str) -> str:
    if "next_tool_name" not in prompt:
        return chat_answer(reasoning="It was found.", answer="yes")
    steps = prompt.rsplit("<|user|>", 1)[-1].count("## observation_")
    name, arguments = ("look", {"query": "it"}) if steps < 2 else ("finish", {})
    return chat_answer(next_thought="Now.", next_tool_name=name, next_tool_args=json.dumps(arguments))


def react() -> Any:
    return dspy.ReAct(dspy.Signature("question -> answer", "Answer."), tools=[look], max_iters=5)


def with_demos(program: Any) -> Any:
    program.query.demos = [dspy.Example(question="one", query="two"), dspy.Example(question="<|end|>", query="x")]
    return program


RUNS = {
    "a loop and nested modules": (
        Hops(),
        hops_script,
        dspy.ChatAdapter(),
        {"query": 2, "parts[0].held['answer'].predict": 1},
    ),
    "in JSON": (Hops(), json_script, dspy.JSONAdapter(), {"query": 2, "parts[0].held['answer'].predict": 1}),
    "with demonstrations": (with_demos(Hops()), hops_script, dspy.ChatAdapter(), {"query": 2}),
    "in parallel": (Side(), hops_script, dspy.ChatAdapter(), {"query": 4}),
    "shared": (Shared(), hops_script, dspy.ChatAdapter(), {"query": 2, "again": 0}),
    "an agent": (react(), react_script, dspy.ChatAdapter(), {"react": 3, "extract.predict": 1}),
}


@pytest.mark.filterwarnings("ignore:The data contains the special tokens")
@pytest.mark.parametrize("name", RUNS)
def test_every_call_of_a_run_is_laid_out_as_it_was_sent_and_answered(name: str) -> None:
    program, script, adapter, expected = RUNS[name]
    engine = Recording(script)
    row = dspy.Example(question="one of apples").with_inputs("question")
    with dspy.context(lm=local_lm(engine, cache=False, max_tokens=400), adapter=adapter):
        trace = trace_calls(program, row)
    assert trace.error is None, trace.error
    assert {called: len(calls_of(trace.calls, called)) for called in expected} == expected
    written = laid_out(program, trace.calls, engine.tokenizer, adapter)
    assert sorted(each.token_ids for each in written) == sorted(engine.said)


def test_the_rollouts_of_a_search_hold_every_call_too() -> None:
    engine = Recording(hops_script)
    program = Shared()
    program.set_lm(local_lm(engine, cache=False, max_tokens=400))
    rows = [dspy.Example(question=f"{n} of apples").with_inputs("question") for n in ("one", "two")]
    copied = searching_copy(program, {"query": "Say more."})
    assert copied.again is copied.query
    [rollouts] = roll_out([copied], rows, RowMetric(lambda example, prediction: 1.0), Running(2))
    assert [len(calls_of(each.trace, "query")) for each in rollouts] == [2, 2]
    every = [call for each in rollouts for call in each.trace]
    assert sorted(one.token_ids for one in laid_out(copied, every, engine.tokenizer)) == sorted(engine.said)


def test_a_call_that_did_not_parse_is_laid_out_like_the_others() -> None:
    engine = Recording(lambda prompt: "I cannot say.")
    program = dspy.Predict(SIGNATURE)
    program.set_lm(local_lm(engine, cache=False))
    trace = trace_calls(program, dspy.Example(**ROW).with_inputs("question"))
    assert trace.failure == "parse"
    (call,) = calls_of(trace.calls, "self")
    assert call.completion is not None and call.error is not None
    (written,) = laid_out(program, [call], engine.tokenizer)
    assert [written.token_ids] == engine.said
