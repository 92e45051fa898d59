"""A planted model and a scripted engine: programs whose best instruction is known beforehand.

`PlantedModel` is a real torch model without training: some words of the instruction make it obey, some
questions are harder than others, it writes DSPy's ChatAdapter format, what it reasons depends on how far it
obeys, and its answer on both. `ScriptedEngine` keeps a real model for losses, gradients and proposals, and
lets a Python function say what it writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import dspy
import torch
from tiny_models import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.session import Session
from dspy_greater.model.interface import Generation, GenerationRequest, Tokens

RUN_FILES = ["best.json", "best_program.json", "journal.jsonl", "journal.lock", "report.html"]  # of a log_dir
PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# How much a word makes the model obey; the seed instruction of the tests is worth nothing.
WORTH = {"count": 1.0, "add": 0.5, "list": 0.25, "guess": -0.5, "hurry": -1.0}
NEUTRAL = (
    "look",
    "read",
    "write",
    "think",
    "maybe",
    "please",
    "always",
    "never",
    "then",
    "now",
    "here",
    "say",
)
HARD = {"one": 0.1, "two": 0.35, "three": 0.6, "four": 0.85}  # how much obedience a question takes
GOLD = {"apples": ("yes", 1.0), "pears": ("no", -1.0)}
SEED = "Please say it now."
BEST = "count"

_DSPY_TEXT = [
    "Your input fields are:\n1. `question` (str):\nYour output fields are:\n1. `reasoning` (str):\n2. `answer` (str):\n"
    "All interactions will be structured in the following way, with the appropriate values filled in.\n\n"
    "[[ ## question ## ]]\n{question}\n\n[[ ## reasoning ## ]]\n{reasoning}\n\n[[ ## answer ## ]]\n{answer}\n\n"
    "[[ ## completed ## ]]\nIn adhering to this structure, your objective is: \n        ",
    "Respond with the corresponding output fields, starting with the field `[[ ## reasoning ## ]]`, "
    "then `[[ ## answer ## ]]`, and then ending with the marker for `[[ ## completed ## ]]`.",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that has a token of its own for every word of this file, with a blank before it."""
    words = [
        *WORTH,
        *NEUTRAL,
        *HARD,
        *(word for word in GOLD),
        "yes",
        "no",
        "carefully",
        "quickly",
        "of",
        "it",
    ]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, END, SYSTEM, USER, ASSISTANT)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spelled = [form for word in words for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}")]
    core.train_from_iterator([*_DSPY_TEXT * 3, *spelled * 3], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class PlantedModel(torch.nn.Module):
    """A causal language model with planted obedience, in the manner of `transformers`.

    Three coordinates of its embeddings carry meaning: how much a word makes it obey, how much obedience a
    question takes, and which answer is right. They are summed over everything that was read.
    """

    def __init__(self, tokenizer: Any, *, seed: int = 0, size: int = 16, sharpness: float = 4.0) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id,
        )
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.nn.Embedding(len(tokenizer), size, _weight=self._table(tokenizer, generator, size))
        self._mark = tokenizer.convert_tokens_to_ids(ASSISTANT)
        self.prior = torch.nn.Parameter(torch.randn(size, len(tokenizer), generator=generator) * 0.3)
        self._plant_writing(tokenizer, sharpness)

    @staticmethod
    def _table(tokenizer: Any, generator: torch.Generator, size: int) -> Tensor:
        table = torch.randn(len(tokenizer), size, generator=generator)
        table[:, :3] = 0.0
        meanings = [(word, 0, worth) for word, worth in WORTH.items()]
        meanings += [(word, 1, hardness) for word, hardness in HARD.items()]
        meanings += [(word, 2, sign) for word, (_, sign) in GOLD.items()]
        meanings += [("carefully", 0, 0.1), ("quickly", 0, -0.1)]  # what it reasons counts as well
        for word, column, value in meanings:
            for form in _forms(word):
                table[word_id(tokenizer, form), column] = value
        return table

    def _plant_writing(self, tokenizer: Any, sharpness: float) -> None:
        """What follows after k tokens of the assistant's turn; style and answer depend on what was read."""
        before = ids_of(tokenizer, "[[ ## reasoning ## ]]\nread it")
        middle = ids_of(tokenizer, "\n\n[[ ## answer ## ]]\n")
        after = [*ids_of(tokenizer, "\n\n[[ ## completed ## ]]"), tokenizer.eos_token_id]
        length = len(before) + 1 + len(middle) + 1 + len(after)
        fixed = torch.zeros(length + 1, len(tokenizer))  # [K, V]
        style, answer = torch.zeros_like(fixed), torch.zeros_like(fixed)
        for place, token in enumerate([*before, -1, *middle, -1, *after, after[-1]]):
            if token >= 0:
                fixed[place, token] = 30.0
        words = {word: word_id(tokenizer, word) for word in (" carefully", " quickly", "yes", "no")}
        at = len(before)
        fixed[at, [words[" carefully"], words[" quickly"]]] = 30.0
        style[at, words[" carefully"]], style[at, words[" quickly"]] = sharpness, -sharpness
        at = len(before) + 1 + len(middle)
        fixed[at, [words["yes"], words["no"]]] = 30.0
        answer[at, words["yes"]], answer[at, words["no"]] = sharpness, -sharpness
        bias = torch.zeros(len(tokenizer))
        bias[[word_id(tokenizer, f" {word}") for word in (*WORTH, *NEUTRAL)]] = 6.0
        bias[word_id(tokenizer, ".")] = 5.0
        for name, table in (("fixed", fixed), ("style", style), ("answer", answer), ("bias", bias)):
            self.register_buffer(name, table)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        if input_ids is None:
            input_ids = torch.cdist(inputs_embeds.detach(), self.embedding.weight.detach()).argmin(-1)
            embedded = inputs_embeds
        else:
            embedded = self.embedding(input_ids)  # [N, T, d]
        new = input_ids.shape[1]
        ids = input_ids
        newest = embedded
        if past_key_values is not None:
            keys, values = past_key_values.update(ids.float()[:, None, :, None], embedded[:, None], 0)
            ids, embedded = keys[:, 0, :, 0].long(), values[:, 0]
        read = torch.ones_like(ids) if attention_mask is None else attention_mask
        summed = (embedded[..., :3] * read[..., None]).cumsum(1)[:, -new:]  # [N, T, 3]
        marks = ((ids == self._mark) & (read == 1)).long()
        writing = (marks.cumsum(1) > 0) & (read == 1)
        written = (writing.long().cumsum(1) - 1).clamp(0, len(self.fixed) - 1)[:, -new:]  # [N, T]
        obedience = (summed[..., 0] - summed[..., 1])[..., None]
        right = torch.tanh(3.0 * summed[..., 2])[..., None]
        says = self.fixed[written] + obedience * (self.style[written] + right * self.answer[written])
        reads = newest @ self.prior + self.bias
        return SimpleNamespace(logits=torch.where(writing[:, -new:, None], says, reads))  # [N, T, V]


def _forms(word: str) -> tuple[str, ...]:
    return word, f" {word}", word.capitalize(), f" {word.capitalize()}"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def word_id(tokenizer: Any, text: str) -> int:
    (found,) = ids_of(tokenizer, text)
    return found


_TOKENIZER: list[Any] = []


def shared_tokenizer() -> Any:
    """One tokenizer for tests that do not look at it."""
    if not _TOKENIZER:
        _TOKENIZER.append(word_tokenizer())
    return _TOKENIZER[0]


def planted_engine(**settings: Any) -> Engine:
    tokenizer = shared_tokenizer()
    return Engine(PlantedModel(tokenizer, **settings), tokenizer, name="planted")


Script = Callable[[str], str]


class ScriptedEngine(Engine):
    """Writes what `script(prompt)` says; everything else is its model's.

    `prompts` keeps what it was asked, `batches` how many prompts came together.
    """

    def __init__(self, script: Script, *, model: Any = None, tokenizer: Any = None, name: str = "scripted") -> None:
        tokenizer = tokenizer or shared_tokenizer()
        super().__init__(model or small_model(tokenizer), tokenizer, name=name)
        self.script = script
        self.prompts: list[str] = []
        self.batches: list[int] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        self.batches.append(len(requests))
        return [self._write(request) for request in requests]

    @contextmanager
    def session(self, expected: Iterable[tuple[Tokens, Tokens]] = ()) -> Iterator[Session]:
        with super().session(expected) as opened:
            opened.generate = self.generate
            yield opened

    def _write(self, request: Any) -> Generation:
        prompt = self.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
        self.prompts.append(prompt)
        tokens = ids_of(self.tokenizer, self.script(prompt))
        for token in tokens:
            if request.on_token is not None:
                request.on_token(token)
        self.tally.add(forwards=1, prefilled_tokens=len(request.prompt), generated_tokens=len(tokens))
        return Generation(tuple(tokens), "stop")


def small_model(tokenizer: Any, *, seed: int = 0, **settings: Any) -> Any:
    """A random Llama over the word tokenizer's vocabulary."""
    shape = {"hidden_size": 16, "layers": 1, **settings}
    end = tokenizer.eos_token_id
    return tiny_model(vocab_size=len(tokenizer), seed=seed, eos_token_id=[end], **shape)


def instruction_in(prompt: str) -> str:
    """The instruction of a ChatAdapter prompt, without the adapter's indentation."""
    found = re.search(r"your objective is: *\n(.*?)<\|end\|>", prompt, re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


def value_in(prompt: str, field: str = "question") -> str:
    """The input field of the last user message of a ChatAdapter prompt."""
    asked = prompt.rsplit("<|user|>", 1)[-1]
    found = re.search(rf"\[\[ ## {field} ## \]\]\n(.*?)\n\n", asked, re.DOTALL)
    return found.group(1) if found else ""


def worth_of(instruction: str) -> float:
    words = re.findall(r"[a-z]+", instruction.lower())
    return sum(WORTH.get(word, 0.0) for word in words)


def obedient_script(prompt: str) -> str:
    """Answers rightly the questions that the instruction's words are worth enough for."""
    question = value_in(prompt)
    fruit = next((fruit for fruit in GOLD if fruit in question), "apples")
    hardness = next((value for word, value in HARD.items() if word in question), 0.0)
    right = GOLD[fruit][0]
    wrong = "no" if right == "yes" else "yes"
    answer = right if worth_of(instruction_in(prompt)) > hardness else wrong
    return chat_answer(reasoning="I look.", answer=answer)


def chat_answer(**fields: object) -> str:
    parts = [f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in fields.items()]
    return "".join(parts) + "[[ ## completed ## ]]"


def planted_rows(count: int = 8) -> list[Any]:
    """Questions of every hardness and both answers, in a fixed order, all different up to 24."""
    kinds = [(hard, fruit) for hard in HARD for fruit in GOLD]
    prefixes = ("", "maybe ", "always ")
    rows = [(prefix, *kind) for prefix in prefixes for kind in kinds]
    return [
        dspy.Example(question=f"{prefix}{hard} of {fruit}", answer=GOLD[fruit][0]).with_inputs("question")
        for prefix, hard, fruit in (rows[index % len(rows)] for index in range(count))
    ]


def exact_match(example: Any, prediction: Any, trace: object = None) -> bool:
    return prediction.answer == example.answer


def program_on(
    engine: Any, *, instruction: str = SEED, signature: str = "question -> answer", max_tokens: int = 64
) -> Any:
    """A chain of thought that carries its own LM, so that no test depends on DSPy's settings."""
    program = dspy.ChainOfThought(dspy.Signature(signature, instruction))
    program.set_lm(local_lm(engine, cache=False, max_tokens=max_tokens))
    return program


def optimizer(**settings: Any) -> GReaTerTeleprompter:
    """A quick search: few steps, few rows, single tokens; scripts know no other requests than the program's."""
    quick = {"auto": None, "steps": 2, "train_rows": 4, "validation_rows": 4, "progress": False}
    quick |= {"phrases": 0, "written": 0, "forecast_share": 0} if settings.get("variant") != "paper" else {}
    return GReaTerTeleprompter(**{"metric": exact_match, **quick, **settings})


def instruction_of(program: Any) -> str:
    return program.predictors()[0].signature.instructions


class Checked(dspy.Module):
    """An answer and a verdict on it, each of them a predictor's; `checked_rows` have gold values for both."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.first = program_on(engine)
        self.second = program_on(engine, signature="question -> verdict")

    def forward(self, question: str) -> Any:
        return dspy.Prediction(answer=self.first(question=question).answer, verdict=self.second(question=question))


def checked_engine(model: Any) -> ScriptedEngine:
    """Obeys under both of the program's fields."""

    def write(prompt: str) -> str:
        field = "verdict" if "`verdict`" in prompt else "answer"
        return obedient_script(prompt).replace("## answer ##", f"## {field} ##")

    return ScriptedEngine(write, model=model)


def checked_rows(rows: Sequence[Any]) -> list[Any]:
    """The rows with a gold verdict each."""
    return [dspy.Example(**row.toDict(), verdict=row.answer).with_inputs("question") for row in rows]
