"""The handshake: who is let in, what is said to the others, and that every architecture writes the right text."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import other_architectures
import pytest
import tokenizers
import torch
import transformers
from model_calls import generated
from scripted_engine import ScriptedEngine, obedient_script, optimizer, planted_rows, program_on, shared_tokenizer
from test_engine import random_prompts, slow_twin
from test_paper_gradient import POSITION, rows
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from dspy_greater.errors import LayoutError, WeightsError
from dspy_greater.estimators.paper_gradient import paper_gradient
from dspy_greater.model.engine import Engine
from dspy_greater.model.handshake import Handshake, shake_hands
from dspy_greater.model.interface import GenerationRequest
from dspy_greater.model.plain import PlainModel
from dspy_greater.objective.loss import losses
from dspy_greater.prompt.spans import Span, Supervised

ARCHITECTURES = list(other_architectures.ALL)
SLOWER = [*other_architectures.OWN_STATES, *other_architectures.EVEN_ROWS, *other_architectures.NO_CACHE]


@cache
def engine_of(architecture: str) -> Engine:
    return Engine(other_architectures.tiny(architecture), tiny_tokenizer(), name=architecture)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Models without their own kernels say so at length."""
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def expected_memory(architecture: str) -> tuple[bool, bool, bool]:
    """Keys and values alone; states of its own; rows of unequal length together."""
    own = architecture in other_architectures.OWN_STATES or architecture in other_architectures.EVEN_ROWS
    return architecture in other_architectures.KEYS_AND_VALUES, own, architecture not in other_architectures.EVEN_ROWS


# ---- every architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_any_length_that_end_when_they_like_are_what_each_would_be_alone(architecture: str) -> None:
    engine = engine_of(architecture)
    shook = engine.checks.handshake
    assert (shook.keys_and_values, shook.states is not None, shook.ragged) == expected_memory(architecture)
    prompts = [(7,), *random_prompts(5, shared=20, seed=1), (9, 11)]
    ends, stop = [1, 12, 4, 4, 9, 2, 12], frozenset(range(200, 230))
    going = list(ends)

    def ended(row: int, token: int) -> bool:
        going[row] -= 1
        return going[row] == 0

    written = engine.generate(
        [
            GenerationRequest(prompt, 12, stop_token_ids=tuple(sorted(stop)), on_token=partial(ended, row))
            for row, prompt in enumerate(prompts)
        ]
    )
    twins = [slow_twin(engine.model, prompt, stop, most) for prompt, most in zip(prompts, ends, strict=True)]
    assert [row.token_ids for row in written] == twins


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_the_one_that_each_row_has_alone(architecture: str) -> None:
    engine, examples = engine_of(architecture), rows()
    found = slopes(engine, examples)
    assert engine.checks.backward().works and not engine.checks.backward().blocked
    for mine, row in zip(found, examples, strict=True):
        expected = plain_slopes(engine, row)
        assert torch.allclose(mine, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert bool(mine.any())


@pytest.mark.parametrize("architecture", SLOWER)
def test_nothing_is_shared_between_rows_and_scores_are_those_of_rows_read_alone(architecture: str) -> None:
    engine = engine_of(architecture)
    assert engine.checks.cache_reach == 0
    prompts = random_prompts(3, shared=30, seed=2)
    alone = [generated(engine, [prompt], 6, stop_token_ids=())[0] for prompt in prompts]
    drafts = [(prompt, each.token_ids) for prompt, each in zip(prompts, alone, strict=True)]
    with engine.session(drafts) as session:
        together = generated(session, prompts, 6, stop_token_ids=())
        examples = [example(prompt, each.token_ids) for prompt, each in zip(prompts, together, strict=True)]
        scored = losses(session, examples)
        assert session._generated is not None and session._generated.bytes == 0
        assert session._prefixes.kept is None
    assert together == alone
    apart = [losses(PlainModel(engine), [each]) for each in examples]
    for name in ("cross_entropy", "fluency_nll"):
        assert getattr(scored, name) == pytest.approx([getattr(each, name)[0] for each in apart], rel=1e-4)


@pytest.mark.parametrize("architecture", ["Lfm2", "xLSTM", "RecurrentGemma"])
def test_a_row_goes_on_where_a_lack_of_memory_stopped_it_however_the_model_remembers(
    architecture: str, monkeypatch: Any
) -> None:
    prompts = random_prompts(6, seed=3)
    expected = generated(engine_of(architecture), prompts, 8, stop_token_ids=())
    engine = Engine(other_architectures.tiny(architecture), tiny_tokenizer(), name=architecture, max_batch_rows=6)
    forward, calls = engine.model.forward, []

    def starved(*args: Any, **options: Any) -> Any:
        calls.append(options["input_ids"].shape)
        if options["input_ids"].shape[0] > 2 and len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, **options)

    monkeypatch.setattr(engine.model, "forward", copied_signature(starved, forward))
    seen: list[tuple[int, int]] = []
    got = engine.generate(
        [
            GenerationRequest(prompt, 8, stop_token_ids=(), on_token=lambda token, row=row: seen.append((row, token)))
            for row, prompt in enumerate(prompts)
        ]
    )
    assert got == expected
    assert len(seen) == sum(len(row.token_ids) for row in expected)  # no token was reported twice


@pytest.mark.parametrize("architecture", ["Lfm2", "Mamba", "xLSTM", "Rwkv"])
def test_a_sampled_row_does_not_depend_on_its_batch_however_the_model_remembers(architecture: str) -> None:
    engine = engine_of(architecture)
    requests = [
        GenerationRequest(prompt, 8, 1.0, 0.9, seed=at, stop_token_ids=())
        for at, prompt in enumerate(random_prompts(4, seed=4))
    ]
    assert engine.generate(requests) == [engine.generate([request])[0] for request in requests]


def test_tokens_are_counted_for_rows_that_are_written_by_the_states_of_the_model() -> None:
    engine = Engine(other_architectures.tiny("Lfm2"), tiny_tokenizer(), name="lfm2")
    assert engine.counters.forwards == 0  # the handshake is not the user's
    generated(engine, [(5, 6, 7), (8,)], 4, stop_token_ids=())
    spent = engine.counters
    assert (spent.forwards, spent.prefilled_tokens, spent.generated_tokens) == (4, 4, 8)
    assert (spent.padded_tokens, spent.lm_head_rows) == (2, 8)


@pytest.mark.parametrize("architecture", ["Llama", "Mixtral", "Gemma3Text", "Lfm2", "Mamba2", "FalconH1"])
def test_half_precision_does_not_change_how_a_model_remembers(architecture: str) -> None:
    model = other_architectures.tiny(architecture, dtype=torch.bfloat16)
    assert shake_hands(model, tiny_tokenizer(), architecture) == engine_of(architecture).checks.handshake


def plain_gradient(model: Any, row: Any) -> Tensor:
    """One row, its embedding exchanged by a hook, no padding, no prefix, no chosen places: the obvious way."""
    place, layer = row.instruction.start + POSITION, model.get_input_embeddings()
    leaf = layer(torch.tensor(row.token_ids[place])).detach().requires_grad_()

    def exchange(_layer: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        return torch.cat([embedded[:, :place], leaf[None, None], embedded[:, place + 1 :]], 1)

    hook = layer.register_forward_hook(exchange)
    logits = model(input_ids=torch.tensor([row.token_ids]), use_cache=False).logits[0]
    hook.remove()

    def mean_nll(span: Any, heat: float) -> Tensor:
        places, tokens = torch.arange(span.start, span.stop), torch.tensor(row.token_ids[span.start : span.stop])
        return -(logits[places - 1] / heat).log_softmax(-1)[torch.arange(len(tokens)), tokens].mean()

    loss = mean_nll(row.answer, 0.2) + 0.2 * mean_nll(row.instruction, 1.0).exp()
    return torch.autograd.grad(loss, leaf)[0]


def slopes(engine: Engine, examples: Any) -> Tensor:
    """Equation 7 for each example and every token that there is, [N, V]."""
    found = paper_gradient(engine, examples, position=POSITION, candidates=range(len(engine.weights.embedding_matrix)))
    return torch.tensor(found.per_example)


def plain_slopes(engine: Engine, row: Any) -> Tensor:
    """The same from the plain gradient, [V]."""
    return engine.embed(range(len(engine.weights.embedding_matrix))) @ plain_gradient(engine.model, row)


def example(prompt: tuple[int, ...], written: tuple[int, ...]) -> Supervised:
    ids = (*prompt, *written, 9, 17)
    return Supervised(ids, Span(2, 6), Span(len(prompt), len(ids) - 1), Span(len(ids) - 1, len(ids)))


def copied_signature(function: Any, original: Any) -> Any:
    import inspect

    function.__signature__ = inspect.signature(original)
    return function


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Lfm2", "xLSTM", "Rwkv"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")
def test_a_search_runs_on_gradients_of_any_of_them(architecture: str) -> None:
    model = other_architectures.tiny(architecture, vocabulary=len(shared_tokenizer()))
    engine = ScriptedEngine(obedient_script, model=model)
    better = optimizer(steps=2).compile(program_on(engine), planted_rows(8))
    gradients = {each.gradient for step in better.detailed_results.steps for each in step.candidates}
    assert len(gradients - {None, 0.0}) > 2


# ---- caches that do not keep what they promise


class Forgetful(torch.nn.Module):
    """A model whose passes through a cache see something else than those without."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.inner, self.fault = tiny_model(vocab_size=512), fault
        self.config = self.inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> Any:
        if self.fault == "ignores the mask":
            attention_mask = None
        if self.fault == "ignores the cache":
            past_key_values = None
        if self.fault == "counts its steps":
            self.steps = getattr(self, "steps", 0) + 1 if use_cache and input_ids.shape[1] == 1 else 0
            position_ids = None if position_ids is None else position_ids + self.steps // 3
        if self.fault == "raises" and use_cache:
            raise RuntimeError("no cache here")
        options = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return self.inner(input_ids=input_ids, past_key_values=past_key_values, **options)


@pytest.mark.parametrize(
    ("fault", "remembers", "ragged"),
    [
        ("ignores the mask", True, False),
        ("ignores the cache", False, True),
        ("counts its steps", False, True),
        ("raises", False, True),
    ],
)
def test_a_cache_that_gives_another_text_is_not_used(
    fault: str, remembers: bool, ragged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = Engine(Forgetful(fault), tiny_tokenizer(), name="forgetful")
    shook = engine.checks.handshake
    assert (shook.keys_and_values, shook.states is not None, shook.ragged) == (False, remembers, ragged)
    assert ("decoded without: every token reads its whole row again" in caplog.text) is not remembers
    prompts = random_prompts(5, shared=20, seed=5)
    written = generated(engine, prompts, 8, stop_token_ids=())
    assert [row.token_ids for row in written] == [slow_twin(engine.model, p, frozenset(), 8) for p in prompts]


# ---- what it costs, and what it leaves


@pytest.mark.parametrize(
    ("architecture", "most"), [("Llama", 9), ("GPT2", 9), ("Lfm2", 11), ("xLSTM", 21), ("Rwkv", 26)]
)
def test_the_handshake_takes_a_few_passes_over_a_few_tokens(architecture: str, most: int, monkeypatch: Any) -> None:
    model = other_architectures.tiny(architecture)
    forward, sizes = model.forward, []

    def counted(*args: Any, **options: Any) -> Any:
        sizes.append(options["input_ids"].numel())
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", copied_signature(counted, forward))
    shake_hands(model, tiny_tokenizer(), architecture)
    assert len(sizes) <= most
    assert max(sizes) <= 20


@pytest.mark.parametrize("architecture", ["Llama", "Lfm2", "RecurrentGemma"])
def test_mode_flags_weights_and_random_state_are_left_alone(architecture: str) -> None:
    model = other_architectures.tiny(architecture).train()
    list(model.modules())[3].eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = [(each.clone(), each.requires_grad) for each in model.parameters()]
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    Engine(model, tiny_tokenizer(), name="handed in").checks.backward()
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    for (values, flag), now in zip(before, model.parameters(), strict=True):
        assert torch.equal(values, now) and flag == now.requires_grad and now.grad is None


def test_hands_are_shaken_again_when_the_model_has_changed_and_not_before(monkeypatch: Any) -> None:
    engine = Engine(tiny_model(vocab_size=512), tiny_tokenizer(), name="tiny")
    times: list[int] = []

    def counted(*args: Any) -> Handshake:
        times.append(1)
        return shake_hands(*args)

    monkeypatch.setattr("dspy_greater.model.checks.shake_hands", counted)
    identity = engine.checks.renew()
    assert engine.checks.renew() == identity and not times
    with torch.no_grad():
        engine.model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    assert engine.checks.renew() != identity and len(times) == 1
    engine.checks.renew()
    assert len(times) == 1
    engine.model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 64).to("meta")
    with pytest.raises(WeightsError, match="on the meta device"):
        engine.checks.renew()


# ---- who is refused


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertForMaskedLM(config).eval()


def t5() -> Any:
    config = transformers.T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def classifier() -> Any:
    config = copy.deepcopy(tiny_model(vocab_size=512).config)
    return transformers.LlamaForSequenceClassification(config)


def token_classifier() -> Any:
    return transformers.LlamaForTokenClassification(copy.deepcopy(tiny_model(vocab_size=512).config))


def on_meta() -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(tiny_model(vocab_size=512).config)


def half_on_meta() -> Any:
    model = tiny_model(vocab_size=512)
    model.model.layers[1].to("meta")
    return model


def overflowing() -> Any:
    model = tiny_model(vocab_size=512)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    return model


REFUSED = {
    "no head": (
        lambda: tiny_model(vocab_size=512).model,
        r"\(LlamaModel\) has no language-model head.*AutoModelForCausalLM",
    ),
    "classifier": (classifier, r"logits of shape \(2, 2\).*no language-model head.*AutoModelForCausalLM"),
    "token classifier": (token_classifier, r"512 tokens and the model 2 logits.*head is a classifier's"),
    "encoder-decoder": (t5, r"encoder-decoder \(T5ForConditionalGeneration\).*pass a decoder"),
    "encoder": (bert, r"\(BertForMaskedLM\) is not causal.*tokens that come later.*is_decoder=True"),
    "meta": (on_meta, "has no weights: model.embed_tokens.weight is on the meta device. Load it with from_pretrained"),
    "half on meta": (half_on_meta, r"has no weights: model\.layers\.1\..* is on the meta device"),
    "not numbers": (overflowing, "logits of 'odd' are not numbers.*bfloat16"),
    "no model": (object, "is a object, not a transformers causal language model; load it with AutoModelForCausalLM"),
    "swapped": (tiny_tokenizer, "not a transformers causal language model"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
@pytest.mark.filterwarnings("ignore:.*pad_token_id.*")
def test_a_model_that_cannot_work_is_refused_with_the_remedy(kind: str) -> None:
    make, said = REFUSED[kind]
    with pytest.raises(WeightsError, match=said):
        Engine(make(), tiny_tokenizer(), name="odd")


class Processor:
    """As AutoProcessor gives: it has a tokenizer and is none."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.chat_template = self.tokenizer.chat_template

    def decode(self, *args: Any) -> str:
        return self.tokenizer.decode(*args)


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (Processor(), r"is a Processor, .*pass its tokenizer, \(model, processor\.tokenizer\)"),
        (None, r"is a NoneType, .*AutoTokenizer\.from_pretrained"),
        ("Qwen/Qwen3-4B", r"is a str, .*AutoTokenizer\.from_pretrained"),
        (tiny_tokenizer()._tokenizer, r"is a Tokenizer, .*AutoTokenizer\.from_pretrained"),
    ],
)
def test_what_is_no_tokenizer_is_refused_with_the_remedy(tokenizer: Any, said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        Engine(tiny_model(vocab_size=512), tokenizer, name="odd")


def test_tokens_of_text_that_the_model_does_not_know_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xyzzy"])
    with pytest.raises(
        WeightsError, match=r"513 tokens and the model 512 embeddings; 1 of them, such as 'xyzzy' \(512\)"
    ):
        Engine(tiny_model(vocab_size=512), tokenizer, name="odd")
    model = tiny_model(vocab_size=512)
    model.resize_token_embeddings(513)
    assert Engine(model, tokenizer, name="resized").checks.handshake.keys_and_values


def test_a_tokenizer_without_english_is_no_fault() -> None:
    words = {"<unk>": 0, "<|end|>": 1, **{str(number): number + 2 for number in range(10)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>")
    engine = Engine(tiny_model(vocab_size=12, eos_token_id=1), tokenizer, name="digits")
    assert engine.checks.handshake.keys_and_values and engine.checks.backward().works


def test_embeddings_for_more_tokens_than_there_are_are_no_fault() -> None:
    assert Engine(tiny_model(vocab_size=576), tiny_tokenizer(), name="padded").checks.handshake.keys_and_values


def test_special_tokens_beyond_the_embeddings_do_no_harm_until_a_prompt_has_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    engine = Engine(tiny_model(vocab_size=512), tokenizer, name="odd")
    assert tokenizer.pad_token_id == 512
    prompts = random_prompts(3)
    written = generated(engine, prompts, 4, stop_token_ids=())  # padded with another token
    assert [row.token_ids for row in written] == [slow_twin(engine.model, p, frozenset(), 4) for p in prompts]
    with pytest.raises(LayoutError, match=r"token 512 \('<\|new pad\|>'\), and 'odd' has embeddings for 512; .*resize"):
        generated(engine, [(5, 512)], 4)


# ---- vision-language models


def vision_language_model(kind: str) -> Any:
    text = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }
    marks = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "Qwen2_5_VL":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        settings = {"text_config": {**text, "rope_parameters": rope}, "vision_config": vision, **marks}
    elif kind == "Llava":
        vision = transformers.CLIPVisionConfig(**eyes, image_size=28, patch_size=14)
        settings = {"text_config": transformers.LlamaConfig(**text), "vision_config": vision, "image_token_index": 5}
    else:
        vision = {**eyes, "image_size": 28, "patch_size": 14}
        settings = {"text_config": transformers.LlamaConfig(**text), "vision_config": vision, "image_token_id": 5}
        settings["scale_factor"] = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
        return model_class(getattr(transformers, f"{kind}Config")(**settings)).eval()


BFLOAT16 = pytest.mark.parametrize("bfloat16", [False, True], ids=["plain CPU", "CPU with bfloat16"])


@BFLOAT16
@pytest.mark.parametrize("kind", ["Qwen2_5_VL", "Llava", "Idefics3"])
def test_the_folder_of_a_vision_language_model_works_as_model_and_tokenizer_do(
    kind: str, bfloat16: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspy_greater.model.dtypes.computes_bfloat16", lambda: bfloat16)
    model, tokenizer = vision_language_model(kind), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pair, folder = Engine(model, tokenizer, name=kind), Engine.from_pretrained(tmp_path)
    assert type(folder.model) is type(model)
    prompts = random_prompts(4, shared=20)
    written = generated(folder, prompts, 8, stop_token_ids=())
    assert written == generated(pair, prompts, 8, stop_token_ids=())
    assert [row.token_ids for row in written] == [slow_twin(model, p, frozenset(), 8) for p in prompts]
    [found] = slopes(folder, rows()[:1])
    assert torch.allclose(found, plain_slopes(folder, rows()[0]), rtol=1e-3, atol=1e-4)


@BFLOAT16
def test_the_folder_of_an_encoder_decoder_is_refused_for_what_it_is(
    bfloat16: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspy_greater.model.dtypes.computes_bfloat16", lambda: bfloat16)
    t5().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="is an encoder-decoder"):
        Engine.from_pretrained(tmp_path)
