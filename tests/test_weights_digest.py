"""Labels follow the weights: whatever changes them changes the label, and nothing else does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import dspy
import pytest
import torch
from scripted_engine import ScriptedEngine, obedient_script, optimizer, planted_rows, program_on
from tiny_models import save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn import Parameter

from dspy_greater import GradSumTeleprompter, local_lm
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import GenerationRequest
from dspy_greater.model.registry import shared_engine
from dspy_greater.model.weights_digest import WeightsDigest
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.problem import Options, prepare
from dspy_greater.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")

LABEL = r"[0-9a-f]{12}"


def digest_of(model: Any, **options: Any) -> WeightsDigest:
    return WeightsDigest(model, tiny_tokenizer(), **options)


# ---- what changes the label


def _one_number(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


def _all_a_little(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4)


def _a_row_behind_the_counter(model: Any) -> None:
    model.get_input_embeddings().weight.data[77] += 1.0


def _a_step_of_training(model: Any) -> None:
    chosen = torch.optim.SGD([model.model.norm.weight], lr=0.1)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    chosen.step()


def _other_weights_loaded(model: Any) -> None:
    model.load_state_dict(tiny_model(vocab_size=512, seed=3).state_dict())


def _a_layer_exchanged(model: Any) -> None:
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(64, 32, bias=False)


def _a_parameter_exchanged(model: Any) -> None:
    model.model.norm.weight = Parameter(torch.full((32,), 0.9))


def _data_exchanged(model: Any) -> None:
    model.model.norm.weight.data = torch.full((32,), 0.9)


def _resized(model: Any) -> None:
    model.resize_token_embeddings(520)


class PackedAway(torch.nn.Module):
    """In the manner of `torch.ao`: its weights are no parameters, and show only where it is saved."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.object = [weight]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}packed"] = (self.object[0], None)


def _a_layer_packed(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.up_proj = PackedAway(layer.up_proj.weight.detach())


def _an_adapter_switched(model: Any) -> None:
    model.model.layers[0].mlp.active_adapters = ["other"]


CHANGES: list[Callable[[Any], None]] = [
    _one_number,
    _all_a_little,
    _a_row_behind_the_counter,
    _a_step_of_training,
    _other_weights_loaded,
    _a_layer_exchanged,
    _a_parameter_exchanged,
    _data_exchanged,
    _resized,
    _a_layer_packed,
    _an_adapter_switched,
]


@pytest.mark.parametrize("known", [None, "a-commit"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*mean_resizing.*")
def test_whatever_changes_the_weights_changes_the_label_once(change: Callable[[Any], None], known: str | None) -> None:
    model = tiny_model(vocab_size=512)
    digest = digest_of(model, known=known)
    before = digest.label()
    assert before == digest.first == digest.label()
    change(model)
    after = digest.label()
    assert after != before and after == digest.label()


def test_a_second_change_that_no_sample_shows_changes_the_label_again_and_undoing_it_brings_it_back() -> None:
    model = tiny_model(vocab_size=512)
    digest, weight = digest_of(model), model.model.layers[1].mlp.up_proj.weight
    labels, before = [digest.label()], weight[4, 6].item()
    for place in ((3, 5), (4, 6)):
        with torch.no_grad():
            weight[place] += 1.0
        labels.append(digest.label())
    with torch.no_grad():
        weight[4, 6] = before
    assert len(set(labels)) == 3
    assert digest.label() == labels[1]


def test_a_changed_chat_template_is_another_label() -> None:
    model, tokenizer = tiny_model(vocab_size=512), tiny_tokenizer()
    digest = WeightsDigest(model, tokenizer, known="a-commit")
    assert digest.label() == "a-commit"
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    assert digest.label() != "a-commit"


def test_using_a_model_does_not_change_its_label() -> None:
    engine = Engine(tiny_model(vocab_size=512), tiny_tokenizer(), name="tiny")
    before = engine.identity
    engine.generate([GenerationRequest(prompt, 4) for prompt in ((5, 6, 7), (8,))])
    assert engine.checks.backward().works
    engine.model.train()
    engine.model.requires_grad_(False)
    assert engine.identity == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_have_the_same_label_wherever_they_are_loaded(dtype: torch.dtype) -> None:
    one, other = (digest_of(tiny_model(vocab_size=512, dtype=dtype)).label() for _ in range(2))
    assert one == other


def test_a_large_matrix_is_sampled_in_every_row() -> None:
    model = torch.nn.Linear(64, 5000, bias=False)
    digest = digest_of(model)
    labels = {digest.label()}
    for row in (0, 17, 4999):
        model.weight.data[row] += 1.0  # behind the counter
        labels.add(digest.label())
    assert len(labels) == 4


# ---- every kind of tensor


class RefusedByTensor(NotImplementedError):  # torchao's own tensors raise this type; no work is left undone here
    """What tensors of torchao and packed weights raise, by this very type, at a function that they do not know."""


class Sealed(Tensor):
    """A tensor that is none, with two plain ones behind it, few operations, and nothing that tells of its inside."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, mode: str = "weight only") -> Sealed:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, mode: str = "weight only") -> None:
        self.codes, self.scale, self.mode = codes, scale, mode

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].mode)
        raise RefusedByTensor(function)


class Wrapped(Sealed):
    """In the manner of torchao: it says which plain tensors are behind it."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], {"mode": self.mode}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, settings: Any, size: Any, stride: Any) -> Wrapped:
        return cls(inner["codes"], inner["scale"], settings["mode"])


class Failing(Wrapped):
    """Would say it, and cannot."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        raise RuntimeError("the scales are on another device")


class Packed(Tensor):
    """In the manner of GGUF: bytes that no function of torch may be called on."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("__get__", "__set__", "detach", "untyped_storage", "requires_grad_", "__repr__", "numel", "size"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise RefusedByTensor(name)


def linear_with(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(8, 4, bias=False)
    layer._parameters["weight"] = Parameter(weight, requires_grad=False)
    return layer


def wrapped(seed: int, mode: str = "weight only", kind: type[Sealed] = Wrapped) -> Sealed:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (4, 8), generator=generator, dtype=torch.int8)
    return kind(codes, torch.ones(4, 1), mode)


def test_a_wrapper_is_told_by_its_parts_and_its_settings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = [digest_of(linear_with(wrapped(*about))).label() for about in ((0,), (0,), (1,), (0, "dynamic"))]
        layer = linear_with(wrapped(0))
        digest = digest_of(layer)
        layer.weight.scale[2] = 3.0  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        labels.append(digest.label())
    assert labels[0] == labels[1] and len(set(labels)) == 4


def test_bytes_that_no_function_may_read_are_told_by_their_memory() -> None:
    def packed(fill: int) -> Tensor:
        return torch.full((40,), fill, dtype=torch.uint8).as_subclass(Packed)

    assert digest_of(linear_with(packed(1))).label() == digest_of(linear_with(packed(1))).label()
    assert digest_of(linear_with(packed(1))).label() != digest_of(linear_with(packed(2))).label()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.bfloat16]
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 4)])
def test_numbers_of_any_type_and_shape_can_be_told_apart(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def label(fill: int) -> str:
        layer = torch.nn.Module()
        layer.register_buffer("codes", torch.full(shape, fill, dtype=torch.float32).to(dtype))
        return digest_of(layer).label()

    assert label(1) == label(1)
    assert (label(1) != label(0)) is (0 not in shape)


def test_weights_that_are_packed_away_are_told_apart() -> None:
    labels = [digest_of(PackedAway(torch.full((3, 4), float(fill)))).label() for fill in (1, 1, 2)]
    assert labels[0] == labels[1] != labels[2]


def test_quantised_buffers_are_weights_and_temporary_ones_are_not() -> None:
    layer = torch.nn.Module()
    layer.register_buffer("codes", torch.zeros(3, 4, dtype=torch.int32))
    layer.register_buffer("angles", torch.zeros(3), persistent=False)
    digest = digest_of(layer)
    before = digest.label()
    layer.angles += 1
    assert digest.label() == before
    layer.codes += 1
    assert digest.label() != before


@pytest.mark.parametrize("kind", [Sealed, Failing])
def test_weights_that_cannot_be_read_are_loaded_under_a_name_that_never_comes_again(kind: type[Sealed]) -> None:
    layer = linear_with(wrapped(0, kind=kind))
    with pytest.warns(RuntimeWarning, match=r"weights of Linear cannot be read .*new name each time.*DSPy's cache"):
        digest = digest_of(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        labels = {digest.label() for _ in range(5)} | {digest.first}
    assert len(labels) == 6


@pytest.mark.filterwarnings("ignore:The weights of .* cannot be read:RuntimeWarning")
@pytest.mark.parametrize("kind", [Sealed, Failing])
def test_an_identity_that_cannot_be_told_stops_neither_a_load_nor_a_search(kind: type[Sealed]) -> None:
    engine = ScriptedEngine(obedient_script)
    engine.model.model.layers[0].register_parameter("spare", Parameter(wrapped(0, kind=kind), requires_grad=False))
    sealed = ScriptedEngine(obedient_script, model=engine.model)
    program = program_on(sealed)
    lm = program.predictors()[0].lm
    assert lm.model != f"local/{sealed.identity}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The weights behind")  # nobody has changed them
        searched = posed(program, planted_rows(4)).program.predictors()[0].lm
    assert (searched.model, searched.engine) == (lm.model, lm.engine)
    assert optimizer(steps=1).compile(program, planted_rows(8)).detailed_results.steps


# ---- what goes by the label


def tiny_pair() -> tuple[Any, Any]:
    return tiny_model(vocab_size=512), tiny_tokenizer()


def test_an_answer_of_other_weights_never_comes_from_the_cache() -> None:
    pair = tiny_pair()
    first = local_lm(pair, max_tokens=6)
    answer = first("Think step by step")
    _all_a_little(pair[0])
    second = local_lm(pair, max_tokens=6)
    assert second.model != first.model and second.engine is first.engine
    dspy.cache.reset_memory_cache()
    with torch.no_grad():
        for parameter in pair[0].parameters():
            parameter.mul_(-1.5)
    third = local_lm(pair, max_tokens=6)
    assert third("Think step by step") == third("Think step by step", cache=False) != answer


def test_weights_that_were_trained_before_they_were_handed_in_do_not_go_by_their_commit() -> None:
    model, tokenizer = tiny_pair()
    model.config._commit_hash = "0123abcd"
    _one_number(model)
    assert "0123abcd" not in local_lm((model, tokenizer)).model


def test_a_directory_that_was_written_anew_is_loaded_anew(tmp_path: Any) -> None:
    path = save_tiny(tmp_path / "model")
    first = shared_engine(path)
    assert shared_engine(path) is first
    tiny_model(vocab_size=512, seed=5).save_pretrained(path)
    second = shared_engine(path)
    assert second is not first and second.identity != first.identity
    assert local_lm(path).model == f"local/{second.identity}"


def test_weights_that_somebody_has_changed_do_not_stand_in_for_those_on_disk(tmp_path: Any) -> None:
    path = save_tiny(tmp_path / "model")
    first = shared_engine(path)
    identity = first.identity
    _all_a_little(first.model)
    again = shared_engine(path, trust_remote_code=True)  # another spelling of the same weights
    assert again is not first and again.identity == identity != first.identity


def test_a_search_takes_the_identity_anew_and_says_so_where_an_lm_goes_by_an_old_one() -> None:
    engine = ScriptedEngine(obedient_script)
    program = program_on(engine)
    program.set_lm(local_lm(engine, max_tokens=64))
    rows = planted_rows(4)
    before = posed(program, rows).identity()
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[5] += 1e-3
    with pytest.warns(UserWarning, match=r"weights behind 'local/scripted@.* have changed.*a new one with local_lm"):
        after = posed(program, rows).identity()
    then, now = before["predictors"]["predict"], after["predictors"]["predict"]
    assert then["weights"] != now["weights"] and then["lm"] != now["lm"] == f"local/{engine.identity}"
    assert program.predictors()[0].lm.model == then["lm"]  # the caller's LM is left as it was
    program.set_lm(local_lm(engine, max_tokens=64))
    assert posed(program, rows).identity() == after


def posed(program: Any, rows: Any) -> Any:
    def metric(example: Any, prediction: Any, trace: object = None) -> bool:
        return True

    return prepare(
        program,
        rows,
        metric,
        rows[:0] or planted_rows(8)[4:],
        Options(settings=Settings.of(None), step=DefaultStep(), seed=0),
    )


def test_a_run_that_was_interrupted_is_not_resumed_on_other_weights(tmp_path: Any) -> None:
    engine = ScriptedEngine(obedient_script)
    search = optimizer(log_dir=tmp_path, steps=1)
    search.compile(program_on(engine), planted_rows(8))
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[5] += 1e-3
    with pytest.raises(OSError, match=r"(?s)weights"):
        search.compile(program_on(engine), planted_rows(8))


def test_gradsum_goes_by_the_weights_of_now_as_well() -> None:
    from dspy_greater.gradsum.task import Options as GradSumOptions
    from dspy_greater.gradsum.task import prepare as prepare_gradsum

    engine = ScriptedEngine(obedient_script)
    program = program_on(engine)
    gradsum = GradSumTeleprompter("Answer.", metric=lambda example, prediction, trace=None: 1.0)

    def task() -> Any:
        lms, settings = (program.predictors()[0].lm,) * 3, gradsum.settings
        options = GradSumOptions("Answer.", criteria=None, lms=lms, settings=settings, seed=0)
        return prepare_gradsum(program, planted_rows(4), gradsum.metric, planted_rows(8)[4:], options).identity()

    before = task()
    assert task() == before
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[5] += 1e-3
    after = task()
    assert {name for name in before if before[name] != after[name]} == {
        "predictors",
        "judge_lm",
        "gradient_lm",
        "editor_lm",
    }
