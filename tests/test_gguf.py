"""GGUF files: what is read from one is the model that was written into it, or an error that says why not."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from stand_ins import llama_cpp, ollama, stand_in
from test_lm import engine_of
from tiny_models import save_tiny, tiny_model, tiny_tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from dspy_greater.errors import WeightsError
from dspy_greater.lm.local import local_lm
from dspy_greater.model import gguf
from dspy_greater.model.engine import Engine
from dspy_greater.model.gguf import digest, find_gguf, load_gguf, read_header
from dspy_greater.model.gguf_meaning import tokenizer_of
from dspy_greater.model.registry import shared_engine
from dspy_greater.model.unpacked_cache import VARIABLE, cache_folder
from dspy_greater.served.kinds import who_answers
from dspy_greater.served.weights import weights_behind

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 256}
YARN_FIELDS = {
    ".rope.scaling.type": "yarn",
    ".rope.scaling.factor": 4.0,
    ".rope.scaling.original_context_length": 256,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LINEAR_FIELDS = {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NEAR_AND_FAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 16, "layers": 7}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}, {}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}, LINEAR_FIELDS),
    "llama, linear as it was once written": ("llama", {"rope_parameters": LINEAR}, {".rope.scale_linear": 4.0}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}, YARN_FIELDS),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2, untied, yarn": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": YARN}, YARN_FIELDS),
    "qwen3": ("qwen3", {"head_dim": 128}, {}),
    "gemma2": ("gemma2", {"sliding_window": 24, "layers": 3}, {".attn_logit_softcapping": 50.0}),
    "gemma3": ("gemma3", {"sliding_window": 24, **GEMMA3}, {".rope.freq_base_swa": 10_000.0}),
    "gemma3, linear": (
        "gemma3",
        {"rope_parameters": NEAR_AND_FAR, **GEMMA3},
        {".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0, ".attention.sliding_window_pattern": 6},
    ),
}
OTHERS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM)}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody's own cache is touched, and no test meets what another one kept."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(VARIABLE, str(place))
    yield place / "gguf"
    shutil.rmtree(place)


def model_of(architecture: str = "llama", **settings: Any) -> Any:
    """A tiny model whose norms and biases are not the ones and zeros they begin as."""
    size = len(tiny_tokenizer())
    if architecture in OTHERS:
        config_class, model_class = OTHERS[architecture]
        settings["num_hidden_layers"] = settings.pop("layers", 2)
        sizes = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 1024}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        config: Any = config_class(**sizes, **heads, initializer_range=0.2, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = model_class(config).eval()
    else:
        model = tiny_model(architecture, size, **settings)  # pyright: ignore[reportArgumentType]
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=source) * 0.2)
    return model


def write(path: Path, architecture: str = "llama", *, model: Any = None, **options: Any) -> Path:
    made = model_of(architecture) if model is None else model
    return write_gguf(path, made, tiny_tokenizer(), architecture, **options)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, model.config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits


def read(path: Path, **options: Any) -> tuple[Any, Any]:
    return load_gguf(path, target=CPU, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "plain.gguf")


# --- the weights ---


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_an_unquantised_file_is_the_model_that_was_written_also_when_it_comes_from_the_cache(
    case: str, tmp_path: Path, cache: Path
) -> None:
    architecture, settings, fields = CASES[case]
    model, tensors = model_of(architecture, **settings), {}
    if case == "llama 3":  # the converter writes what the frequencies are divided by, and nothing else
        plainly = model_of(architecture, head_dim=16).model.rotary_emb.inv_freq
        tensors = {"rope_freqs.weight": (plainly / model.model.rotary_emb.inv_freq).numpy()}
    path = write(tmp_path / "model.gguf", architecture, model=model, fields=fields, tensors=tensors)
    found, _ = read(path, dtype="float32")
    again, _ = read(path, dtype="float32")
    assert len(list(cache.iterdir())) == 1
    assert torch.allclose(logits(found), logits(model), atol=1e-6, rtol=1e-6)
    assert torch.equal(logits(again), logits(found))
    assert not torch.allclose(
        logits(found), logits(model_of(architecture, **settings | {"seed": 3}))[0], atol=1e-2
    ) or (architecture in OTHERS)


@pytest.mark.parametrize("stored", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_a_narrower_file_is_the_model_to_its_own_rounding(architecture: str, stored: str, tmp_path: Path) -> None:
    model = model_of(architecture)
    found, _ = read(write(tmp_path / "model.gguf", architecture, model=model, stored=stored), dtype="float32")
    largest = {"F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 250, "Q4_0": 1 / 7}[stored]  # of the largest in a block
    for (name, weight), (other, read_weight) in zip(found.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        limit = 1e-6 if weight.dim() == 1 else largest * read_weight.abs().max()
        assert (weight - read_weight).abs().max() <= limit, name


def test_what_is_loaded_is_an_ordinary_model_that_says_where_it_is_from(plain: Path) -> None:
    for _ in ("unpacked", "kept"):
        model, tokenizer = read(plain)
        assert type(model) is type(model_of()) and getattr(model.config, "quantization_config", None) is None
        assert model.config.name_or_path == model.name_or_path == tokenizer.name_or_path == str(plain)
        ids = torch.tensor([[1, 5, 6]])
        assert model(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_()).logits.requires_grad


def test_weights_are_unpacked_to_the_type_that_is_asked_for(plain: Path, tmp_path: Path) -> None:
    for _ in ("unpacked", "kept"):
        assert read(plain, dtype="bfloat16")[0].dtype == torch.bfloat16
        assert read(plain, dtype=torch.float64)[0].dtype == torch.float64
        assert read(plain, dtype="auto")[0].dtype == torch.float32
    assert read(write(tmp_path / "q.gguf", stored="Q8_0"), dtype="auto")[0].dtype == torch.bfloat16
    with pytest.raises(WeightsError, match="dtype is 'int4'; it has to be a floating type"):
        read(plain, dtype="int4")


def test_arguments_of_from_pretrained_reach_the_model_however_it_is_loaded(plain: Path) -> None:
    for _ in ("unpacked", "kept"):
        assert read(plain, attn_implementation="eager")[0].config._attn_implementation == "eager"
        assert read(plain)[0].config._attn_implementation == "sdpa"


def test_reading_leaves_the_global_random_state_alone(plain: Path) -> None:
    state = torch.get_rng_state()
    read(plain)
    assert torch.equal(torch.get_rng_state(), state)


# --- the vocabulary ---

TEXTS = [
    "Answer the question.",
    "  two  blanks\n\n\tand  tabs ",
    "don't, WE'LL; x=12345",
    "naïve café — 日本語 🙂",
    "<|eot|>user\nhi<|eot|>",
]


def test_the_byte_level_vocabulary_reads_and_writes_as_the_one_that_was_written(plain: Path) -> None:
    tokenizer = tiny_tokenizer()
    for _ in ("unpacked", "kept"):
        _, found = read(plain)
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert found(text)["input_ids"] == ids and found.decode(ids) == tokenizer.decode(ids)
        assert found.chat_template == tokenizer.chat_template
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 0)
        special = {i for i, token in found.added_tokens_decoder.items() if token.special}
        assert special == {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("adds", [True, False])
def test_a_begin_token_is_written_before_a_text_where_the_file_says_so(adds: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", fields={"tokenizer.ggml.add_bos_token": adds})
    for _ in ("unpacked", "kept"):
        assert (read(path)[1]("hi")["input_ids"][0] == 1) is adds


def test_tokens_that_end_a_turn_end_what_is_written(tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.eot_token_id": 300, "tokenizer.ggml.eom_token_id": 301}
    path = write(tmp_path / "model.gguf", fields=fields)
    for _ in ("unpacked", "kept"):
        engine = Engine.from_pretrained(path)
        assert engine.weights.stop_token_ids >= {2, 4, 300, 301}  # 4 ends the assistant's turn in the template
        assert engine.model.generation_config.eos_token_id == [2, 300, 301]


PIECES = {  # what "I'LL pay 12345  x" is cut into before anything is merged
    "llama-bpe": ["I", "'LL", "Ġpay", "Ġ", "123", "45", "Ġ", "Ġx"],
    "qwen2": ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx"],
    "tekken": ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx"],
    "smollm": ["I", "'", "LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx"],
    "gpt-2": ["I", "'", "LL", "Ġpay", "Ġ12345", "Ġ", "Ġx"],
}


@pytest.mark.parametrize("cut", list(PIECES))
def test_text_is_cut_as_the_model_was_trained_to_read_it(cut: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", fields={"tokenizer.ggml.pre": cut})
    for _ in ("unpacked", "kept"):
        core = read(path)[1].backend_tokenizer
        assert [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str("I'LL pay 12345  x")] == PIECES[cut]


@pytest.mark.parametrize("cut", ["poro-chat", None])
def test_a_way_of_cutting_text_that_is_not_known_is_refused(cut: str | None, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", fields={"tokenizer.ggml.pre": cut})
    refused(path, f"cuts text in the way '{cut or 'default'}' before it merges tokens, .* known: .*qwen2")


def test_qwen_reads_a_letter_and_its_accent_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", fields={"tokenizer.ggml.pre": "qwen2"})
    for _ in ("unpacked", "kept"):
        tokenizer = read(path)[1]
        assert tokenizer("cafe\u0301")["input_ids"] == tokenizer("café")["input_ids"]


def sentencepiece_fields(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary of single characters and what they merge to, with bytes for the rest."""
    words = ["▁the", "▁t", "the", "he", "th", "▁a", "▁▁", "at", "▁at", "hat", "that", "▁that"]
    characters = sorted({*"abcdefghijklmnopqrstuvwxyz.,▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *characters, "[INST]"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(characters)), 3]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-100.0] * len(characters) + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.add_bos_token": None,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def slow_sentencepiece(text: str, fields: dict[str, Any]) -> list[str]:
    """Merge the two neighbours that make the best-scored token, the leftmost first, until there are none."""
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    pieces = list(text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        pairs = [(-scores[pair], place) for place, pair in enumerate(joined) if pair in scores]
        if not pairs:
            break
        _, place = min(pairs)
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    return [p for piece in pieces for p in ([piece] if piece in scores else [f"<0x{b:02X}>" for b in piece.encode()])]


@pytest.mark.parametrize("prefix", [True, False, None])
def test_a_sentencepiece_vocabulary_merges_the_best_scored_pair_first(prefix: bool | None, tmp_path: Path) -> None:
    fields = sentencepiece_fields(add_space_prefix=prefix)
    tokenizer = tokenizer_of(read_header(write(tmp_path / "model.gguf", fields=fields)))
    source = random.Random(0)
    for _ in range(200):
        text = "".join(source.choice("that  theathaté") for _ in range(source.randrange(1, 20)))
        expected = slow_sentencepiece(text if prefix is False else f" {text}", fields)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == expected
        assert tokenizer.decode(ids) == text
    assert tokenizer("a")["input_ids"][0] == 1  # unless the file says otherwise, a text begins with <s>
    after = tokenizer.convert_ids_to_tokens(tokenizer("[INST]at", add_special_tokens=False)["input_ids"])
    assert after == ["[INST]", "at" if prefix is False else "▁at"]


# --- what a file is called, and which version it is ---


def test_a_file_and_the_folder_that_holds_it_are_one_engine(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = Path(shutil.copy(plain, folder / "weights.gguf"))
    by_file = engine_of(local_lm(str(path))).engine
    assert engine_of(local_lm(path)).engine is by_file
    assert engine_of(local_lm(folder)).engine.checks.revision == by_file.checks.revision == digest(plain)[:12]
    assert len(local_lm(path, max_tokens=3, cache=False)("Hi")) == 1


def test_a_file_stands_behind_an_lm_wherever_a_directory_would(plain: Path, tmp_path: Path) -> None:
    nameless = shutil.copy(plain, tmp_path / "sha256-0123")  # as Ollama keeps them
    served = dspy.LM("openai/anything", api_key="x")
    engine = weights_behind(served, weights=str(nameless))
    assert engine.name == str(nameless)
    assert weights_behind(served, weights={"hop": str(nameless)}, predictor_name="hop") is engine
    assert weights_behind(dspy.LM(f"openai/{nameless}", api_key="x")) is engine
    with stand_in(llama_cpp("alias", str(nameless))) as url:
        lm = dspy.LM("openai/alias", api_base=f"{url}/v1", api_key="x")
        assert weights_behind(lm, server=who_answers(lm)) is engine
    with stand_in(ollama("tag:1b", str(nameless))) as url:
        lm = dspy.LM("ollama_chat/tag:1b", api_base=url)
        assert weights_behind(lm, server=who_answers(lm)) is engine


def test_a_file_is_found_from_whatever_folder_one_works_in(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plain.parent)
    assert torch.equal(logits(read(Path(plain.name))[0]), logits(model_of()))


def test_a_template_of_ones_own_is_set_on_what_was_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", fields={"tokenizer.chat_template": None})
    engine = shared_engine(path)
    engine.tokenizer.chat_template = tiny_tokenizer().chat_template
    lm = local_lm((engine.model, engine.tokenizer), max_tokens=3)
    assert lm.model.startswith(f"local/{path}@") and digest(path)[:12] not in lm.model  # answers of another template
    assert len(lm("Hi")) == 1


@pytest.mark.slow
def test_identity_follows_the_bytes_of_the_file_and_the_type(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    first = shared_engine(path)
    assert first.identity == f"{path}@{digest(path)[:12]}:float32"
    assert local_lm(path).model == f"local/{first.identity}"
    assert shared_engine(path, dtype="bfloat16").identity == f"{path}@{digest(path)[:12]}:bfloat16"
    write(path, model=model_of("llama", seed=1))
    second = shared_engine(path)
    assert second is not first and second.identity != first.identity


def test_a_saved_program_finds_its_file_again_and_refuses_another(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    program = dspy.Predict("question -> answer")
    program.lm = local_lm(path)
    state = engine_of(program.lm).dump_state()
    assert state["origin"] == {"name_or_path": str(path), "dtype": "float32", "revision": digest(path)[:12]}
    load = type(engine_of(program.lm)).load_state
    assert load(state).engine is engine_of(program.lm).engine
    program.lm = None
    write(path, model=model_of("llama", seed=1))
    with pytest.raises(WeightsError, match=r"has the SHA-256 .*, not .*: it has changed"):
        load(state)


def test_the_digest_is_computed_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"GGUF" + bytes(100))
    first = digest(path)
    monkeypatch.setattr(gguf, "hashlib", None)
    assert digest(path) == first
    monkeypatch.undo()
    path.write_bytes(b"GGUF" + bytes(101))
    assert digest(path) != first


# --- what is refused ---


def refused(path: Path, match: str) -> None:
    with pytest.raises(WeightsError, match=match):
        local_lm(path)


def test_a_file_that_is_cut_off_anywhere_says_so(plain: Path, tmp_path: Path) -> None:
    data, short = plain.read_bytes(), tmp_path / "short.gguf"
    for length in {*range(4, 120, 7), *range(4, len(data), len(data) // 60), len(data) - 1}:
        short.write_bytes(data[:length])
        refused(short, r"short\.gguf' is cut off or damaged.* it has \d+ bytes\. Download it again")


@pytest.mark.slow
def test_a_damaged_header_is_an_error_of_ours_or_harmless(plain: Path, tmp_path: Path) -> None:
    data, path, source = plain.read_bytes(), tmp_path / "damaged.gguf", random.Random(0)
    fields = [data.find(key.encode()) for key in read_header(plain).fields]
    for _ in range(40):
        damaged = bytearray(data)
        damaged[source.choice(fields) + source.randrange(60)] = source.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(WeightsError):
            read(path)


def test_what_is_no_gguf_file_says_what_to_pass(tmp_path: Path, plain: Path) -> None:
    refused(tmp_path / "absent.gguf", r"There is no file '.*absent\.gguf'")
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    refused(tmp_path / "model.bin", "begin with the letters GGUF")
    swapped = bytearray(plain.read_bytes())
    swapped[4:8] = b"\0\0\0\3"
    (tmp_path / "big.gguf").write_bytes(swapped)
    refused(tmp_path / "big.gguf", r"or of a version that is not read: .*GGUF v50331648")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(plain, rf"cannot be read without further packages \(.*{package}.*pip install 'dspy-greater\[gguf\]'")


def test_a_folder_with_several_files_lists_them(tmp_path: Path, plain: Path) -> None:
    for name in ("b-q8_0.gguf", "a-q4_k_m.GGUF"):
        shutil.copy(plain, tmp_path / name)
    refused(tmp_path, r"holds 2 GGUF files; pass the path of one of them: a-q4_k_m\.GGUF, b-q8_0\.gguf")


def test_the_projector_of_a_vision_model_is_passed_over_in_a_folder_and_refused_by_name(
    tmp_path: Path, plain: Path
) -> None:
    shutil.copy(plain, tmp_path / "model.gguf")
    projector = write(tmp_path / "mmproj-model.gguf", fields={"general.type": "mmproj"})
    assert find_gguf(tmp_path) == tmp_path / "model.gguf"
    refused(projector, "is the vision or audio projector of a model")


def test_safetensors_in_a_folder_come_before_a_gguf_file(tmp_path: Path, plain: Path) -> None:
    save_tiny(tmp_path)
    shutil.copy(plain, tmp_path / "model.gguf")
    assert find_gguf(tmp_path) is None
    assert shared_engine(tmp_path).checks.revision != digest(plain)[:12]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"split.count": 3, "split.no": 0}, r"is one of 3 parts; join them first: llama-gguf-split --merge"),
        ({"tokenizer.chat_template": None}, "has no chat template.*set engine.tokenizer.chat_template"),
        ({"tokenizer.ggml.model": None}, "could not be loaded by transformers"),
        ({"tokenizer.ggml.model": "bert"}, "could not be loaded by transformers .*'bert'"),
        ({"tokenizer.ggml.merges": ["never seen"]}, "could not be loaded by transformers"),
        ({"tokenizer.ggml.bos_token_id": 100_000}, "could not be loaded by transformers"),
        ({".expert_count": 8}, "sets llama.expert_count to 8, which transformers would leave out"),
        ({".attention.causal": False}, "sets llama.attention.causal to False"),
        ({".attention.sliding_window": 16}, "sets llama.attention.sliding_window to 16"),
        ({".logit_scale": 0.5}, "sets llama.logit_scale to 0.5"),
        ({".rope.scaling.type": "longrope", ".rope.scaling.factor": 4.0}, "positions in the way 'longrope'"),
        ({".attention.value_length": 4}, "sets llama.attention.value_length to 4"),
        ({".block_count": 3}, "does not fit its architecture 'llama': .* missing keys, such as model.layers.2"),
        ({".feed_forward_length": 48}, "could not be loaded by transformers|does not fit its architecture"),
    ],
)
def test_what_would_be_left_out_is_refused_and_says_why(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "model.gguf", fields=fields), match)


def test_a_token_that_would_be_read_as_another_is_refused(tmp_path: Path) -> None:
    tokens = tiny_tokenizer().convert_ids_to_tokens(list(range(len(tiny_tokenizer()))))
    tokens[3] = "<｜User｜>"  # letters that no byte is written with
    path = write(tmp_path / "model.gguf", fields={"tokenizer.ggml.tokens": tokens})
    refused(path, r"has the token '<｜User｜>' as 3, which transformers reads as \[")


def test_an_architecture_that_is_not_read_names_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "qwen2")
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"qwenX"))
    refused(path, r"architecture 'qwenX'; transformers reads .*gemma3, .*qwen2, .* from GGUF.*\*\.safetensors")


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "blk.1.attn_q.bias", "output.bias", "odd"])
def test_a_tensor_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", tensors={name: np.zeros(32, np.float32)})
    refused(path, f"has a tensor '{name}', which transformers would leave out")


def test_frequencies_that_are_not_those_of_llama_3_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", tensors={"rope_freqs.weight": np.asarray([1, 2, 3, 4], np.float32)})
    refused(path, "scales its positions by rope_freqs.weight in a way that is not Llama 3's")


def test_the_eyes_of_a_model_that_came_in_one_file_are_left_out(tmp_path: Path, plain: Path) -> None:
    fields = {".vision.block_count": 3}
    path = write(tmp_path / "model.gguf", fields=fields, tensors={"v.blk.0.attn_q.weight": np.zeros(32, np.float32)})
    assert torch.equal(logits(read(path)[0]), logits(read(plain)[0]))


def test_a_missing_tensor_is_refused(tmp_path: Path, plain: Path, cache: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(plain.read_bytes().replace(b"blk.1.ffn_up", b"v.lk1.ffn_up"))
    refused(tmp_path / "model.gguf", r"1 missing keys, such as model\.layers\.1\.mlp\.up_proj\.weight")
    assert not cache.exists()  # nothing is kept of a file that is refused


# --- the floating type ---


def test_a_processor_with_bfloat16_takes_quantised_weights_in_it(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspy_greater.model.dtypes.computes_bfloat16", lambda: True)
    small = write(tmp_path / "q.gguf", stored="Q8_0")
    assert read(small)[0].dtype == torch.float32
    monkeypatch.setattr("dspy_greater.model.dtypes.SMALL", 1000)
    assert read(small)[0].dtype == torch.bfloat16
    assert read(plain)[0].dtype == torch.float32  # stored in 32 bits
    assert read(small, dtype="float32")[0].dtype == torch.float32


# --- what is kept ---


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the file was unpacked again")

    monkeypatch.setattr(gguf, "_unpack", never)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_kept_is_what_was_unpacked_bit_by_bit(
    architecture: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(architecture, **(GEMMA3 if architecture == "gemma3" else {}))
    path = write(tmp_path / "model.gguf", architecture, model=model, stored="Q8_0")
    (first, tokenizer), state = read(path, dtype=dtype), torch.get_rng_state()
    no_reading(monkeypatch)
    second, again = read(path, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, weight in first.state_dict().items():
        assert weight.dtype == second.state_dict()[name].dtype and torch.equal(weight, second.state_dict()[name])
    assert torch.equal(logits(first), logits(second))
    assert {**first.config.to_dict(), "architectures": None} == {**second.config.to_dict(), "architectures": None}
    assert first.generation_config.to_dict() == second.generation_config.to_dict()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.special_tokens_map == tokenizer.special_tokens_map and again.chat_template == tokenizer.chat_template
    assert (
        Engine(first, tokenizer, name="x").weights.stop_token_ids
        == Engine(second, again, name="x").weights.stop_token_ids
    )


def test_each_type_and_each_file_has_a_folder_of_its_own(tmp_path: Path, plain: Path, cache: Path) -> None:
    read(plain)
    read(plain, dtype="bfloat16")
    read(write(tmp_path / "other.gguf", model=model_of(seed=5)))
    names = sorted(each.name for each in cache.iterdir())
    assert len(names) == 3 and sum(name.startswith(f"{digest(plain)[:16]}-") for name in names) == 2
    shutil.copy(plain, tmp_path / "copy.gguf")  # the same bytes under another name
    read(tmp_path / "copy.gguf")
    assert sorted(each.name for each in cache.iterdir()) == names


def test_unpacking_says_so_and_where_it_is_kept_and_loading_again_says_nothing(plain: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "dspy_greater")
    read(plain)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dspy_greater")]
    assert said[0].startswith(f"Unpacking {plain} to float32") and "kept in" in said[1] and len(said) == 2
    caplog.clear()
    read(plain)
    assert not [record for record in caplog.records if record.name.startswith("dspy_greater")]


@pytest.mark.parametrize("damage", ["cut off", "missing", "garbled", "no sizes", "foreign weights", "empty"])
def test_a_damaged_folder_is_written_anew(damage: str, plain: Path, cache: Path, caplog: Any) -> None:
    expected = logits(read(plain)[0])
    [folder] = cache.iterdir()
    weights = folder / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "garbled":
        weights.write_bytes(b"?" * weights.stat().st_size)
    elif damage == "no sizes":
        (folder / "sizes.json").unlink()
    elif damage == "foreign weights":
        weights.write_bytes(weights.read_bytes().replace(b"layers.1.mlp.up", b"layers.7.mlp.up"))
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert torch.equal(logits(read(plain)[0]), expected)
    assert "cannot be used" in caplog.text and list(cache.iterdir()) == [folder]
    caplog.clear()
    assert torch.equal(logits(read(plain)[0]), expected) and not caplog.text


def test_nothing_is_kept_where_it_is_switched_off_or_cannot_be_written(
    plain: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    expected = logits(read(plain)[0])
    shutil.rmtree(cache)
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_folder("0" * 64, torch.float32) is None
    assert torch.equal(logits(read(plain)[0]), expected) and not cache.exists()
    (tmp_path / "a file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "a file"))
    assert torch.equal(logits(read(plain)[0]), expected) and "could not be kept" in caplog.text


def test_an_unpacking_that_breaks_off_leaves_nothing_behind(
    plain: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        read(plain)
    assert list(cache.iterdir()) == []
    read(plain)
    assert len(list(cache.iterdir())) == 1


def test_the_cache_lies_in_the_users_own_unless_a_variable_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "0123456789abcdef-bfloat16-"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    found = cache_folder("0123456789abcdef" * 4, torch.bfloat16)
    assert found and found.parent == Path.home() / ".cache" / "dspy_greater" / "gguf" and found.name.startswith(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cache_folder("0123456789abcdef" * 4, torch.bfloat16)
    assert found and found.parent == tmp_path / "dspy_greater" / "gguf"
