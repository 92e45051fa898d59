"""The pocket model: its rows are right, its prompts are DSPy's, its training learns, its weights obey instructions."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Literal

import dspy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pocket import evaluate, grammar, train, transcript, vocabulary
from dspy_greater import pocket
from dspy_greater.errors import DataError
from dspy_greater.pocket import tasks

BENCHMARK = Path(os.environ.get("BBH", Path(__file__).parents[2] / "shared" / "data" / "bbh"))
needs_benchmark = pytest.mark.skipif(
    not BENCHMARK.is_dir(), reason="set BBH to a directory with the BIG-Bench Hard files"
)
TASK = st.sampled_from(tasks.TASKS)
SEED = st.integers(0, 2**32)


# --------------------------------------------------------------------------- rows


def solved_independently(task: str, question: str) -> str:
    """The answer by another way than the one that writes the reasoning."""
    if task == "boolean_expressions":
        return str(eval(question.removesuffix(" is")))
    if task == "web_of_lies":
        lies = question.count(" lies")  # each lie flips the truth of the one before
        return "No" if lies % 2 else "Yes"
    if task == "object_counting":
        number = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
        listing, kind = re.fullmatch(r"I have (.*)\. How many (.*) do I have\?", question).groups()
        members = {name.split(" ", 1)[1] for name in tasks._KINDS[kind]} | set(tasks._KINDS[kind].values())
        parts = [part.split(" ", 1) for part in re.split(r", and |, | and ", listing)]
        return str(sum(number[count] for count, name in parts if name in members))
    place, heading = 0 + 0j, 1j
    for move in re.findall(r"(?:Take|Turn) [^.]*", question):
        words = move.split()
        if words[0] == "Turn":
            heading *= {"left": 1j, "right": -1j, "around": -1}[words[1]]
        else:
            side = {"forward": 1, "left": 1j, "right": -1j, "backward": -1}[words[3] if len(words) > 3 else "forward"]
            place += int(words[1]) * heading * side
    return "Yes" if place == 0 else "No"


@pytest.mark.slow
@given(TASK, SEED)
@settings(max_examples=400, deadline=None)
def test_the_reasoning_of_a_generated_row_ends_in_its_right_answer(task: str, seed: int) -> None:
    question = tasks.generate(task, random.Random(seed))
    assert tasks.work_out(task, question).answer == solved_independently(task, question)


@given(TASK, SEED)
@settings(max_examples=200, deadline=None)
def test_no_generated_row_is_a_row_of_the_benchmark(task: str, seed: int) -> None:
    question = tasks.generate(task, random.Random(seed))
    assert tasks.fingerprint(question) not in tasks.benchmark_fingerprints()


@needs_benchmark
@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_real_benchmark_row_is_worked_out_to_its_target_and_fingerprinted(task: str) -> None:
    rows = evaluate.benchmark_rows(BENCHMARK, task)
    assert len(rows) == 250
    assert [tasks.work_out(task, question).answer for question, _ in rows] == [gold for _, gold in rows]
    assert {tasks.fingerprint(question) for question, _ in rows} <= tasks.benchmark_fingerprints()


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_question_of_another_format_is_refused(task: str) -> None:
    with pytest.raises((DataError, KeyError, IndexError)):
        tasks.work_out(task, "What is the capital of France?")


# --------------------------------------------------------------------------- instructions


@pytest.mark.parametrize("task", tasks.TASKS)
def test_fitting_instructions_ask_for_everything_and_plain_ones_for_nothing(task: str) -> None:
    rng = random.Random(0)
    assert all(grammar.strength(grammar.fitting(task, rng), task) >= 3 for _ in range(300))
    assert all(grammar.strength(grammar.plain(rng), task) == 0 for _ in range(300))
    assert grammar.strength(evaluate.FITTING[task], task) >= 3
    assert grammar.strength(grammar.DSPY_DEFAULT, task) == 0


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_instruction_that_fits_another_task_hardly_helps(task: str) -> None:
    rng = random.Random(0)
    others = [other for other in tasks.TASKS if other != task]
    strengths = [grammar.strength(grammar.fitting(rng.choice(others), rng), task) for _ in range(600)]
    assert max(strengths) <= 1


@given(
    TASK,
    st.lists(
        st.sampled_from([*grammar._FILLER, *(word for pool in grammar._WORD_POOL.values() for word in pool)]),
        max_size=8,
    ),
    SEED,
)
@settings(max_examples=300, deadline=None)
def test_a_further_word_never_makes_an_instruction_weaker(task: str, words: list[str], seed: int) -> None:
    rng = random.Random(seed)
    more = list(words)
    more.insert(rng.randint(0, len(words)), rng.choice(grammar._WORD_POOL[task]))
    assert grammar.strength(" ".join(more), task) >= grammar.strength(" ".join(words), task)


def test_a_stronger_instruction_makes_more_questions_be_worked_out() -> None:
    rank = {"direct": 0, "sketch": 1, "full": 2}
    for difficulty in (1, 2, 3):
        ranks = [rank[grammar.style(strength, difficulty)] for strength in range(5)]
        assert ranks == sorted(ranks)
        assert (ranks[0], ranks[-1]) == (0, 2)


# --------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize(
    ("answer_type", "python_type"), [("str", str), ("yes_no", Literal["Yes", "No"]), ("int", int), ("bool", bool)]
)
def test_training_prompts_are_what_dspy_sends(answer_type: str, python_type: type, reasoning: bool) -> None:
    signature = dspy.Signature("question -> answer").with_updated_fields("answer", type_=python_type)
    signature = signature.with_instructions("Add them up.")
    signature = (dspy.ChainOfThought(signature).predict if reasoning else dspy.Predict(signature)).signature
    system, user = dspy.ChatAdapter().format(signature, [], {"question": "How many?"})
    assert system["content"] == transcript.system_head(reasoning, answer_type) + "Add them up."
    assert user["content"] == transcript.user_message("How many?", reasoning, answer_type)


def test_a_training_chat_is_parsed_by_dspy_to_its_reasoning_and_answer() -> None:
    rng = random.Random(3)
    question = tasks.generate("navigate", rng)
    *_, written = transcript.chat("navigate", question, evaluate.FITTING["navigate"], rng)
    signature = dspy.ChainOfThought("question -> answer").predict.signature
    parsed = dspy.ChatAdapter().parse(signature, written.text.removesuffix(transcript.END))
    working = tasks.work_out("navigate", question)
    assert parsed == {"reasoning": working.full, "answer": working.answer}


def test_the_chat_template_writes_the_transcript_that_was_trained_on() -> None:
    tokenizer = vocabulary.train_tokenizer(size=600, samples_per_task=20)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|system|>S<|end|><|user|>U<|end|><|assistant|>"


# --------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_learns_and_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    losses = train.train(train.SMOKE, tmp_path / "whole", save_seconds=1e9)
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert state.equal(torch.random.get_rng_state())

    half = train.TrainSettings(**{**vars(train.SMOKE), "steps": 30, "decay_from": 0.999})
    rest = train.TrainSettings(**{**vars(train.SMOKE), "steps": 60, "decay_from": 0.999})
    train.train(half, tmp_path / "half", save_seconds=1e9)
    resumed = train.train(rest, tmp_path / "resumed", resume=tmp_path / "half" / "checkpoint.pt", save_seconds=1e9)
    straight = train.train(rest, tmp_path / "straight", save_seconds=1e9)
    assert resumed == straight[30:]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template == transcript.CHAT_TEMPLATE
    assert len(evaluate.complete(model, tokenizer, ["<|user|>Hello<|end|><|assistant|>"])) == 1


def test_the_loss_is_taken_on_what_the_model_writes_only() -> None:
    tokenizer = vocabulary.train_tokenizer(size=800, samples_per_task=50)
    parts = transcript.draw("navigate", random.Random(0), procedures_only=True)
    ids, weights = train.encode(parts, tokenizer)
    taught = tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight > 0])
    assert taught == parts[-1].text
    assert tokenizer.decode(ids) == "".join(part.text for part in parts)


# --------------------------------------------------------------------------- the weights that ship


@pytest.mark.slow
def test_the_weights_are_small_and_their_tokenizer_is_the_one_that_is_learned() -> None:
    assert (pocket.path() / "model.safetensors").stat().st_size <= 12 * 2**20
    shipped = AutoTokenizer.from_pretrained(pocket.path())
    learned = vocabulary.train_tokenizer()
    assert shipped.get_vocab() == learned.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_pocket_model_answers_generated_rows_under_a_fitting_instruction_only(task: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.path())
    model = AutoModelForCausalLM.from_pretrained(pocket.path(), dtype=torch.float32).eval()
    rows = evaluate.generated_rows(task, 60, seed=1)
    fitting, _ = evaluate.accuracy(model, tokenizer, rows, evaluate.FITTING[task])
    plain, _ = evaluate.accuracy(model, tokenizer, rows, evaluate.PLAIN)
    assert fitting >= plain + 0.2


def test_the_model_card_states_the_figures_that_were_measured() -> None:
    card = (pocket.path() / "README.md").read_text()
    assert "model organism" in card
    for task in tasks.TASKS:
        assert re.search(rf"\| {task} \| \d", card), f"no measured row for {task}"
    assert json.loads((pocket.path() / "config.json").read_text())["model_type"] == "llama"
