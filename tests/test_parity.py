"""Whether the model behind a server is the one that is loaded here: stand-ins over engines of this process."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
import torch
from scripted_engine import SEED, optimizer, planted_engine, planted_rows, program_on
from stand_ins import Answers, completion, length_of, stand_in, vllm, vllm_over
from tiny_models import tiny_model, tiny_tokenizer

from dspy_greater import served_lm
from dspy_greater.errors import OutageError, ParityError, ServerError, SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.greedy import greedy_tokens
from dspy_greater.model.interface import GenerationRequest
from dspy_greater.model.plain import PlainModel
from dspy_greater.program import servers
from dspy_greater.program.servers import Servers
from dspy_greater.report.data import report_of
from dspy_greater.run.record import read_record
from dspy_greater.served.kinds import who_answers
from dspy_greater.served.parity import Twin, answer_of, probe

ROWS, HELD_OUT = planted_rows(4), planted_rows(8)[4:]
MESSAGES = [[{"role": "user", "content": "one apples"}], [{"role": "user", "content": "two pears"}]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return planted_engine()


def lm_on(url: str, **more: Any) -> dspy.LM:
    options = {"temperature": 0.0, "max_tokens": 64, "cache": False, **more}
    return dspy.LM("openai/assistant", api_base=f"{url}/v1", api_key="x", **options)


def student(url: str, **more: Any) -> Any:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    program.set_lm(lm_on(url, **more))
    return program


def compiled(answers: Answers, engine: Any, heard: Any = None, rows: Any = ROWS, **settings: Any) -> Any:
    with stand_in(answers, heard) as url:
        return optimizer(weights=engine, **settings).compile(student(url), rows, valset=HELD_OUT)


def pool_on(*urls: str, **more: Any) -> dspy.LM:
    options = {"temperature": 0.0, "max_tokens": 64, "cache": False, "num_retries": 0, **more}
    return served_lm("openai/assistant", [f"{url}/v1" for url in urls], api_key="x", **options)


def compiled_on(lm: dspy.LM, engine: Any, **settings: Any) -> Any:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    program.set_lm(lm)
    return optimizer(weights=engine, **settings).compile(program, ROWS, valset=HELD_OUT)


def twin_of(answers: Answers, engine: Engine) -> Iterator[Twin]:
    with stand_in(answers) as url:
        server = who_answers(lm_on(url))
        assert server is not None
        yield Twin(server, engine, "predict")


# --- tokens ---


def test_likeliest_tokens_are_those_of_the_plain_model() -> None:
    engine = Engine(tiny_model(seed=1), tiny_tokenizer(), name="tiny", max_batch_tokens=16)
    plain, generator = PlainModel(engine), torch.Generator().manual_seed(0)
    size = len(engine.tokenizer)
    rows = []
    for length in (4, 9, 2, 7):
        prompt = tuple(torch.randint(size, (length,), generator=generator).tolist())
        [written] = plain.generate([GenerationRequest(prompt, 4)])
        noise = tuple(torch.randint(size, (3,), generator=generator).tolist())
        rows.append(((*prompt, *written.token_ids, *noise), length))
    slow = [
        [int(plain.next_token_logprobs([tokens[:at]])[0].argmax()) == tokens[at] for at in range(start, len(tokens))]
        for tokens, start in rows
    ]
    assert greedy_tokens(engine, rows) == slow
    assert any(False in each for each in slow) and any(True in each for each in slow)
    assert greedy_tokens(engine, [((1, 2), 2)]) == [[]]


# --- before a search ---


@pytest.mark.parametrize("tells_ids", [False, True])
def test_the_same_model_has_the_same_prompts_and_agrees_in_every_token(engine: Engine, tells_ids: bool) -> None:
    for twin in twin_of(vllm_over(engine, tells_ids=tells_ids), engine):
        assert twin.server.tells_ids == tells_ids
        found = probe(twin, MESSAGES)
        assert (found.prompts, found.by_ids) == (2, 2 if tells_ids else 0)
        assert found.written > 0 and found.agreed == found.written


@pytest.mark.parametrize("out", [(503, {"error": "busy"}), "<html>It works!</html>", {"choices": []}])
def test_a_server_that_was_there_is_waited_for_while_it_is_compared(
    engine: Engine, out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    over, number = vllm_over(engine), itertools.count()

    def flapping(body: Any) -> Any:
        return out if next(number) in (1, 2, 4) else over["POST /v1/chat/completions"](body)

    waits = Servers(max_outage_seconds=10.0)
    with stand_in({**over, "POST /v1/chat/completions": flapping}) as url:
        server = who_answers(lm_on(url), servers=waits)
        assert server is not None
        found = probe(Twin(server, engine, "predict"), MESSAGES, waits)
    assert (found.prompts, found.agreed) == (2, found.written) and next(number) == 3 + 3
    assert sum(waits.faults.values()) == 3
    prompts = [engine.tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"] for each in MESSAGES]
    assert (
        waits.spent.prompt_tokens > sum(map(len, prompts)) and waits.spent.generated_tokens == 3
    )  # as the stand-in counts


def test_a_server_that_stays_away_while_it_is_compared_is_an_outage(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    over, number = vllm_over(engine), itertools.count()

    def dying(body: Any) -> Any:
        return (503, {}) if next(number) else over["POST /v1/chat/completions"](body)

    with pytest.raises(OutageError, match="gave status 503"):
        compiled({**over, "POST /v1/chat/completions": dying}, engine, max_outage_seconds=0.05)


def test_a_vocabulary_of_another_model_is_refused_with_both_numbers(engine: Engine) -> None:
    other = tiny_tokenizer()
    there = len(other.apply_chat_template(MESSAGES[0], add_generation_prompt=True)["input_ids"])
    answers = {**vllm("assistant", "/w"), "POST /v1/chat/completions": completion("assistant", prompt_tokens=there)}
    for twin in twin_of(answers, engine):
        here = len(twin.encoder.chat_ids(MESSAGES[0]))
        assert there != here
        with pytest.raises(ParityError) as caught:
            probe(twin, MESSAGES)
        text = str(caught.value)
        assert f"it read {there} tokens, and here the same messages are {here}" in text
        assert "other weights, another chat template, or special tokens in the data" in text
        assert "GReaTer(..., weights={'openai/assistant': 'ORG/NAME'})" in text and "(vLLM, 'assistant')" in text


@pytest.mark.parametrize("tells_ids", [False, True])
def test_another_chat_template_is_refused_before_the_search(engine: Engine, tells_ids: bool) -> None:
    other = copy.deepcopy(engine.tokenizer)
    other.chat_template = other.chat_template.replace("+ '|>' +", "+ '|> ' +")
    heard: list[Any] = []
    with pytest.raises(ParityError, match="reads another prompt than 'planted'") as caught:
        compiled(vllm_over(engine, tells_ids=tells_ids, tokenizer=other), engine, heard)
    assert len(heard) < 12 and ("the first that differs is token" in str(caught.value)) == tells_ids


def test_prompts_of_equal_length_that_differ_are_refused_where_ids_are_told(engine: Engine) -> None:
    other = copy.deepcopy(engine.tokenizer)
    other.chat_template = other.chat_template.replace("'<|assistant|>'", "'<|system|>'")
    for twin in twin_of(vllm_over(engine, tells_ids=True, tokenizer=other), engine):
        with pytest.raises(ParityError, match=r"is token \d+: '<\|system\|>' there, '<\|assistant\|>' here"):
            probe(twin, MESSAGES)


def test_ids_are_asked_of_the_tokenize_endpoint_where_answers_do_not_tell_them(engine: Engine) -> None:
    over = vllm_over(engine)
    prompt = list(engine.tokenizer.apply_chat_template(MESSAGES[0], add_generation_prompt=True)["input_ids"])
    asked: list[Any] = []

    def tokenized(body: Any) -> Any:
        asked.append(body)
        return {"count": len(prompt), "tokens": prompt}

    for twin in twin_of({**over, "POST /tokenize": tokenized}, engine):
        assert probe(twin, MESSAGES[:1]).by_ids == 1 and asked[0]["messages"] == MESSAGES[0]
    text = engine.tokenizer.apply_chat_template(MESSAGES[0], tokenize=False, add_generation_prompt=True)
    llama = {
        **over,
        "GET /props": {"model_path": "/w.gguf"},
        "POST /apply-template": {"prompt": text},
        "POST /tokenize": tokenized,
    }
    for twin in twin_of(llama, engine):
        assert probe(twin, MESSAGES[:1]).by_ids == 1
        assert asked[1] == {"content": text, "add_special": True, "parse_special": True}


def test_special_tokens_in_the_data_are_named_as_the_cause(engine: Engine) -> None:
    rows = [ROWS[0].copy(question=f"{ROWS[0].question} <|end|> now"), *ROWS[1:4]]
    with (
        pytest.warns(UserWarning, match="The data contains the special tokens"),
        pytest.raises(ParityError, match=r"spell the special tokens <\|end\|>.*take them out of the data"),
    ):
        compiled(vllm_over(engine), engine, rows=rows, train_rows=4)


def test_special_tokens_of_a_later_row_are_found_on_the_students_runs(engine: Engine) -> None:
    rows = [*ROWS[:3], ROWS[3].copy(question=f"{ROWS[3].question} <|end|> now")]
    with (
        pytest.warns(UserWarning, match="The data contains the special tokens"),
        pytest.raises(ParityError, match="take them out of the data"),
    ):
        compiled(vllm_over(engine), engine, rows=rows, train_rows=4)


@pytest.mark.slow
def test_other_tokens_are_a_warning_with_numbers_and_an_error_where_asked_for(engine: Engine) -> None:
    answers = vllm_over(engine, write=lambda ids, text: text.replace("yes", "no yes no maybe"))
    with pytest.warns(RuntimeWarning, match=r"of \d+ tokens that the server at .* wrote at temperature 0, \d+ \("):
        better = compiled(answers, engine, steps=1)
    server = better.detailed_results.server
    assert server is not None and server.prompts_different == 0 and 0 < server.agreement < 0.95
    with pytest.raises(ParityError, match="strict=False searches all the same"):
        compiled(answers, engine, steps=1, strict=True)


# --- several servers behind one LM ---


@pytest.mark.slow
def test_a_search_over_several_servers_compares_each_and_finds_what_the_search_in_this_process_finds(
    engine: Engine,
) -> None:
    one, other = list[Any](), list[Any]()
    answers = vllm_over(engine, tells_ids=True)
    with stand_in(answers, one) as first, stand_in(answers, other) as second:
        lm = pool_on(first, second, cache=True)
        found = compiled_on(lm, engine, steps=2, strict=True).detailed_results
    same = optimizer(steps=2).compile(program_on(engine), ROWS, valset=HELD_OUT).detailed_results
    assert [step.chosen.instruction for step in found.steps] == [step.chosen.instruction for step in same.steps]
    server = found.server
    assert server is not None and server.url == f"{first}/v1, {second}/v1"
    assert server.agreement == 1.0 and server.prompts_different == 0 and server.prompts == server.prompts_by_ids > 4
    for heard in (one, other):
        calls = [body for asked, body, _ in heard if "chat" in asked and "max_completion_tokens" in body]
        searched = [body for body in calls if "repetition_penalty" in body]
        assert len(calls) > len(searched) > 0  # what is validated is what is deployed
        assert all(body["repetition_penalty"] == 1.0 and body["frequency_penalty"] == 0.0 for body in searched)
        assert sum("chat" in asked and body.get("max_tokens") == 32 for asked, body, _ in heard) == 2


def test_each_of_several_servers_has_to_read_the_same_prompt(engine: Engine) -> None:
    other = copy.deepcopy(engine.tokenizer)
    other.chat_template = other.chat_template.replace("+ '|>' +", "+ '|> ' +")
    with stand_in(vllm_over(engine)) as one, stand_in(vllm_over(engine, tokenizer=other)) as changed:
        for urls in ((one, changed), (changed, one)):
            with pytest.raises(ParityError, match=f"the server at {changed}/v1 .* reads another prompt"):
                compiled_on(pool_on(*urls), engine)


def test_other_tokens_of_one_of_several_servers_are_not_made_up_for_by_the_others(engine: Engine) -> None:
    strange = vllm_over(engine, write=lambda ids, text: "no maybe no maybe no maybe")
    with stand_in(vllm_over(engine)) as one, stand_in(strange) as other:
        with pytest.raises(ParityError, match=f"tokens that the server at {other}/v1 .* wrote at temperature 0"):
            compiled_on(pool_on(one, other), engine, strict=True)


def test_a_server_of_several_that_gives_no_answer_is_told_of_and_an_error_where_asked_for(engine: Engine) -> None:
    down = "http://127.0.0.1:9"
    with stand_in(vllm_over(engine)) as url:
        lm = pool_on(down, url)
        with pytest.warns(RuntimeWarning, match=f"1 of the servers .* No server answers at {down}/v1 .* once they do"):
            server = who_answers(lm)
        assert server is not None and server.address.base == f"{url}/v1" and server.others == ()
        with pytest.raises(ServerError, match=r"cannot be compared .*served_lm\('openai/assistant', api_bases=\["):
            compiled_on(lm, engine, strict=True)
    with pytest.raises(ServerError, match="No server answers"):
        who_answers(pool_on(down, "http://127.0.0.1:10"))


def test_several_servers_are_given_the_settings_that_all_of_them_take(engine: Engine) -> None:
    def picky(body: Any) -> Any:
        if {"repeat_penalty", "return_token_ids"} & set(body):
            return 400, {"error": {"message": "unknown setting"}}
        return completion(body["model"])

    knows_less = {**vllm("assistant", "/weights"), "POST /v1/chat/completions": picky}
    with stand_in(vllm_over(engine, tells_ids=True)) as one, stand_in(knows_less) as other:
        server = who_answers(pool_on(one, other))
    assert server is not None and len(server.every) == 2
    for each in server.every:
        assert each.settings == {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


# --- while a search runs ---


@pytest.mark.slow
@pytest.mark.parametrize("tells_ids", [False, True])
def test_a_served_search_finds_what_the_same_search_finds_in_this_process(engine: Engine, tells_ids: bool) -> None:
    heard: list[Any] = []
    better = compiled(vllm_over(engine, tells_ids=tells_ids), engine, heard, steps=2, strict=True)
    inside = optimizer(steps=2).compile(program_on(engine), ROWS, valset=HELD_OUT)
    found, same = better.detailed_results, inside.detailed_results
    assert found.predictors[0].instruction == same.predictors[0].instruction
    assert [step.chosen.instruction for step in found.steps] == [step.chosen.instruction for step in same.steps]
    server = found.server
    assert server is not None and same.server is None and same.to_dict()["server"] is None
    assert server.agreement == 1.0 and server.prompts_different == 0
    calls = [body for asked, body, _ in heard if "chat" in asked and length_of(body) == 64]
    searched = [body for body in calls if "repetition_penalty" in body]
    assert server.prompts == 2 + len(searched) and server.prompts_by_ids == (server.prompts if tells_ids else 0)
    assert (server.kind, server.said, server.device, server.dtype) == ("vLLM", "/weights", "cpu", "float32")
    told = json.loads(json.dumps(found.to_dict()))["server"]
    assert told["agreement"] == 1.0 and told["neutral"] == dict(server.neutral)
    # The search switches the server's sampling defaults off; what is validated is what is deployed.
    assert len(calls) > len(searched) > 0
    assert all(body["repetition_penalty"] == 1.0 and body["frequency_penalty"] == 0.0 for body in searched)
    assert not any("return_token_ids" in body or "frequency_penalty" in body for body in calls if body not in searched)


@pytest.mark.slow
def test_the_callers_lm_keeps_its_settings(engine: Engine) -> None:
    with stand_in(vllm_over(engine)) as url:
        program = student(url)
        before = dict(program.predictors()[0].lm.kwargs)
        better = optimizer(weights=engine, steps=1).compile(program, ROWS, valset=HELD_OUT)
        assert program.predictors()[0].lm.kwargs == before == better.predictors()[0].lm.kwargs


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_another_prompt_in_the_middle_of_a_search_is_counted_and_told(engine: Engine, strict: bool) -> None:
    over = vllm_over(engine)
    changed = lambda body: SEED not in body["messages"][0]["content"]  # noqa: E731

    def answer(body: Any) -> Any:
        told = over["POST /v1/chat/completions"](body)
        told["usage"]["prompt_tokens"] += changed(body) and "repetition_penalty" in body
        return told

    answers = {**over, "POST /v1/chat/completions": answer}
    if strict:
        with pytest.raises(ParityError, match="reads another prompt"):
            compiled(answers, engine, steps=2, strict=True)
        return
    with pytest.warns(RuntimeWarning, match="The search goes on; `detailed_results.server` counts such prompts"):
        better = compiled(answers, engine, steps=2)
    assert better.detailed_results.server.prompts_different > 0


def test_a_sampled_answer_is_no_measure_of_agreement(engine: Engine) -> None:
    with stand_in(vllm_over(engine)) as url:
        better = optimizer(weights=engine, steps=0).compile(student(url, temperature=0.7), ROWS, valset=HELD_OUT)
    server = better.detailed_results.server
    assert server.prompts == 2 + 4 and 0 < server.written <= 2 * 32


@pytest.mark.parametrize("litellm", [False, True], ids=["DSPy's own client", "LiteLLM"])
def test_a_server_that_tells_no_usage_is_not_taken_for_another_one_and_its_tokens_are_counted(
    engine: Engine, litellm: bool
) -> None:
    over = vllm_over(engine)

    def answer(body: Any) -> Any:
        told = over["POST /v1/chat/completions"](body)
        del told["usage"]
        told.pop("prompt_token_ids", None)
        return told

    # A setting that DSPy's own client does not know goes through LiteLLM, which fills in zeros for what is not told.
    more: dict[str, Any] = {"extra_body": {"x": 1}} if litellm else {}
    with stand_in({**over, "POST /v1/chat/completions": answer}) as url:
        better = optimizer(weights=engine, steps=0).compile(student(url, **more), ROWS, valset=HELD_OUT)
    found = better.detailed_results
    assert found.server.prompts_different == 0 and found.score >= 0.0
    assert found.predictors[0].seed_spent["generated_tokens"] > len(ROWS)  # of the texts, as the tokenizer splits them


def test_what_an_answer_does_not_tell_is_not_known() -> None:
    zeros = {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}
    assert answer_of(zeros, ()).prompt_tokens is None
    assert answer_of({}, ()).text is None and answer_of({"choices": "x", "usage": 3}, ()).prompt_tokens is None
    apart = {"choices": [{"message": {"content": "yes", "reasoning_content": "I think"}}]}
    assert answer_of(apart, ()).text is None  # the tokens between both are not known


def test_strict_is_a_keyword_and_no_part_of_a_runs_identity() -> None:
    assert optimizer(strict=True).strict and not optimizer().strict
    assert optimizer(strict=True).settings == optimizer().settings
    with pytest.raises(SettingsError, match="stricter"):
        optimizer(stricter=True)


def test_the_report_names_the_server_also_when_it_is_made_from_the_journal(engine: Engine, tmp_path: Any) -> None:
    with stand_in(vllm_over(engine)) as url:
        optimizer(weights=engine, steps=0, log_dir=tmp_path).compile(student(url), ROWS, valset=HELD_OUT)
    told = f"vLLM at {url}/v1 serves"
    assert told in (tmp_path / "report.html").read_text()
    again = report_of(read_record(tmp_path))
    assert told in dict(again.versions)["server of predict"]
