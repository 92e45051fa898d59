"""Searches on a real server: `transformers serve` over the model that ships with the package, on this machine."""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from serving import Served, needs_serving, pocket_server, transformers_serve
from tiny_models import save_tiny

from dspy_greater import GReaTer, local_lm, pocket
from dspy_greater.errors import ParityError, ServerError
from dspy_greater.model.engine import Engine
from dspy_greater.pocket.tasks import generate, work_out
from dspy_greater.served.kinds import who_answers
from dspy_greater.served.parity import Twin, probe

__all__ = ["pocket_server"]  # a fixture

pytestmark = [pytest.mark.slow, needs_serving]
TASK = "object_counting"


def rows_of(count: int, seed: int) -> list[dspy.Example]:
    drawn = random.Random(seed)
    questions = [generate(TASK, drawn) for _ in range(count)]
    return [
        dspy.Example(question=each, answer=work_out(TASK, each).answer).with_inputs("question") for each in questions
    ]


def exact_match(example: Any, prediction: Any, trace: object = None) -> bool:
    return prediction.answer == example.answer


def lm_on(served: Served, **options: Any) -> dspy.LM:
    usual = {"api_base": served.url, "api_key": "x", "temperature": 0.0, "max_tokens": 160, "cache": False}
    return dspy.LM(served.lm, **{**usual, **options})


def compiled(lm: Any, rows: Any = None, **settings: Any) -> Any:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", "Answer the question."))
    program.set_lm(lm)
    quick = {"steps": 2, "train_rows": 4, "validation_rows": 4, "progress": False, "strict": True, **settings}
    return GReaTer(exact_match, **quick).compile(program, rows or rows_of(4, 0), valset=rows_of(4, 1))


def test_a_search_on_the_server_finds_what_it_finds_in_this_process(
    pocket_server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dspy_greater.served"):
        there = compiled(lm_on(pocket_server)).detailed_results
    here = compiled(local_lm("pocket", dtype="float32", max_tokens=160)).detailed_results
    found = [[step.chosen.instruction for step in each.steps] for each in (there, here)]
    assert found[0] == found[1] and there.predictors[0].instruction == here.predictors[0].instruction
    assert there.val_subscores == here.val_subscores
    server = there.server
    assert here.server is None and server is not None
    assert (server.kind, server.said, server.agreement) == ("transformers serve", pocket_server.model, 1.0)
    assert server.prompts >= 2 + 4 and server.prompts_different == 0 and server.written > 100
    assert dict(server.neutral)["frequency_penalty"] == 0.0  # which is how this server is told a repetition penalty
    assert f"transformers serve at {pocket_server.url} serves {pocket_server.model!r}" in caplog.text
    assert "on cpu in float32" in caplog.text


def test_other_weights_than_the_served_ones_are_refused(pocket_server: Served, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other")
    with pytest.raises(ParityError, match=r"it read \d+ tokens, and here the same messages are \d+.*other weights"):
        compiled(lm_on(pocket_server), weights=other)


def test_another_chat_template_than_the_servers_is_refused(pocket_server: Served) -> None:
    own = Engine.from_pretrained("pocket", dtype="float32")
    own.tokenizer.chat_template = "{{ 'Be brief. ' }}" + own.tokenizer.chat_template
    with pytest.raises(ParityError, match="another chat template"):
        compiled(lm_on(pocket_server), weights=own)


def test_a_special_token_in_the_data_is_refused(pocket_server: Served) -> None:
    special = Engine.from_pretrained("pocket").tokenizer.all_special_tokens[0]
    rows = [each.copy(question=f"{each.question} {special}") for each in rows_of(4, 0)]
    with (
        pytest.warns(UserWarning, match="special tokens"),
        pytest.raises(ParityError, match="take them out of the data"),
    ):
        compiled(lm_on(pocket_server), rows)


def test_a_repetition_penalty_of_the_servers_own_does_not_count(tmp_path: Path) -> None:
    weights = Path(shutil.copytree(pocket.path(), tmp_path / "weights"))
    config = json.loads((weights / "generation_config.json").read_text())
    (weights / "generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 1.5}))
    asked = dspy.ChainOfThought(dspy.Signature("question -> answer", "Count each item in turn and add.")).predict
    prompts = [dspy.ChatAdapter().format(asked.signature, [], dict(each.inputs())) for each in rows_of(2, 0)]
    with transformers_serve(weights) as served:
        server = who_answers(lm_on(served))
        assert server is not None and server.said == str(weights)
        twin = Twin(server, Engine.from_pretrained(weights, dtype="float32"), "predict")
        neutral, as_it_is = probe(twin, prompts), probe(replaced(twin, neutral={}), prompts)
    assert neutral.agreed == neutral.written > 0
    assert as_it_is.agreed < as_it_is.written


def replaced(twin: Twin, **changes: Any) -> Twin:
    return Twin(replace(twin.server, **changes), twin.engine, twin.predictor)


def test_a_wrong_name_and_a_wrong_address_are_told_apart(pocket_server: Served) -> None:
    with pytest.raises(ServerError, match=r"does not serve 'pocket'.*pinned to"):
        compiled(dspy.LM("openai/pocket", api_base=pocket_server.url, api_key="x"))
    base = pocket_server.url.removesuffix("/v1")
    with pytest.raises(ServerError, match=rf"lacks /v1.*api_base='{pocket_server.url}'"):
        compiled(lm_on(pocket_server, api_base=base))


def test_an_address_of_the_environment_is_the_servers(pocket_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_BASE", pocket_server.url)
    better = compiled(lm_on(pocket_server, api_base=None), steps=0)
    assert better.detailed_results.server.url == pocket_server.url
