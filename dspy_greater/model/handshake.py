"""The handshake: whether model and tokenizer are what the rest relies on, tried out before anything else.

Once for each engine, and again when its weights have changed, in this order:

1. Model and tokenizer are a decoder with a head over the tokenizer's vocabulary, and a tokenizer.
2. A plain pass gives numbers, and what it predicts does not depend on what comes later, nor on other rows.
3. How the model remembers what it has read. Two rows of unequal length, one of which ends early, have to get the
   same predictions as in the plain pass: through a cache of keys and values (all fast paths rely on it), or else
   through whatever states the model hands out, or else without any cache.

What fails 1 or 2 is refused. What fails the first part of 3 is decoded by `incremental`, and nothing that its rows have
in common is read once for all. Whether gradients come back is asked later, by those who need them: `backward_probe`.

Cost: 9 forward passes over at most 2 x 10 tokens for a model that keeps keys and values, at most 26 for others.

Shapes: T = 10 tokens of a row, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import DynamicCache

from dspy_greater.errors import WeightsError
from dspy_greater.model.frozen import frozen
from dspy_greater.model.incremental import (
    KeysAndValues,
    Memory,
    NoCache,
    OwnStates,
    StateFormat,
    row_axes,
    state_names,
    uncached,
)
from dspy_greater.model.kv_cache import tokens_held
from dspy_greater.model.placement import input_device

_TEXT = "One two three four five six seven eight nine ten eleven twelve. Which of these numbers are even, and why?"
_LENGTH, _CHANGED = 10, 2  # tokens of a row; those that are swapped to see how far they reach
_EXACT, _COARSE = (0.02, 2e-5), (0.2, 0.02)  # tolerated: share of what earlier tokens do to the logits, and at least

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handshake:
    """How a model remembers what it has read."""

    keys_and_values: bool  # and nothing else: prefixes, drafts and states of rows may be shared
    states: StateFormat | None = None  # otherwise, how it hands out what it keeps; None: no cache gives the same text

    @property
    def ragged(self) -> bool:
        """Whether rows of unequal length may be read together."""
        return self.states is None or self.states.ragged

    def memory(self, model: Any, **options: Any) -> Memory:
        """A new memory for rows of a model that does not keep keys and values alone."""
        return NoCache(model, **options) if self.states is None else OwnStates(model, self.states, **options)


def shake_hands(model: Any, tokenizer: Any, name: str) -> Handshake:
    """Try the model out; see above. It and the random state are left as they were.

    Raises:
        WeightsError: it cannot be used; says why, and what to pass instead.

    >>> from dspy_greater.model.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> shake_hands(engine.model, engine.tokenizer, "pocket").keys_and_values
    True
    """
    refuse_strangers(model, tokenizer, name)
    with left_alone(model), torch.no_grad():
        rows = sample_rows(model, tokenizer)
        plain = _plain_pass(model, tokenizer, name, rows)
        found = _how_it_remembers(model, rows, plain)
    if not found.keys_and_values and found.states is None:
        _log.warning(
            "The cache of %r does not give the text that the model writes without it. It is decoded without: every "
            "token reads its whole row again, which is slow.",
            name,
        )
    return found


# ---- 1: the right kind of thing


def refuse_strangers(model: Any, tokenizer: Any, name: str) -> None:
    """Raises `WeightsError` for what can be seen without a pass through the model."""
    _refuse_what_is_no_tokenizer(tokenizer, name)
    if not callable(getattr(model, "get_input_embeddings", None)) or not hasattr(model, "config"):
        raise WeightsError(
            f"The model of {name!r} is a {type(model).__name__}, not a transformers causal language "
            "model; load it with AutoModelForCausalLM, or pass its name or path instead."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise WeightsError(
            f"The model of {name!r} is an encoder-decoder ({type(model).__name__}). Prompts are optimised for models "
            "that read and write one sequence; pass a decoder, such as AutoModelForCausalLM loads."
        )
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        raise WeightsError(
            f"The input embeddings of {name!r} ({type(model).__name__}) have no weight matrix over a vocabulary; pass "
            "a language model that reads token ids, such as AutoModelForCausalLM loads."
        )
    empty = [
        parameter_name
        for parameter_name, part in model.named_parameters()
        if part.is_meta and not _is_offloaded(model, parameter_name)
    ]
    if empty or input_device(model).type == "meta":
        raise WeightsError(
            f"The model of {name!r} has no weights: {(empty or ['its embeddings'])[0]} is on the meta device. Load it "
            "with from_pretrained, outside torch.device('meta') and init_empty_weights()."
        )
    remedy = (
        "Pass the tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) and train "
        "the new embeddings."
    )
    _refuse_tokens_beyond(tokenizer, weight.shape[0], name, "embeddings", remedy)


def _refuse_what_is_no_tokenizer(tokenizer: Any, name: str) -> None:
    if all(hasattr(tokenizer, method) for method in ("encode", "get_vocab", "__len__")):
        return
    inner = getattr(tokenizer, "tokenizer", None)
    hint = (
        f"it is a processor: pass its tokenizer, (model, processor.tokenizer), a {type(inner).__name__}"
        if inner is not None
        else "pass (model, tokenizer) with what AutoTokenizer.from_pretrained loads"
    )
    kind = type(tokenizer).__name__
    raise WeightsError(f"The tokenizer of {name!r} is a {kind}, not a transformers tokenizer; {hint}.")


def _is_offloaded(model: Any, parameter: str) -> bool:
    """Whether accelerate brings it to the device when it is needed."""
    return hasattr(model.get_submodule(parameter.rpartition(".")[0]), "_hf_hook")


def _refuse_tokens_beyond(tokenizer: Any, count: int, name: str, what: str, remedy: str) -> None:
    """Refuse tokens of ordinary text with ids of `count` or more; special ones may be there and never be used."""
    if len(tokenizer) <= count and getattr(tokenizer, "vocab_size", 0) <= count:
        return
    added = getattr(tokenizer, "added_tokens_decoder", {})
    beyond = {number: text for text, number in tokenizer.get_vocab().items() if number >= count}
    ordinary = [number for number in sorted(beyond) if not getattr(added.get(number), "special", False)]
    if ordinary:
        raise WeightsError(
            f"The tokenizer of {name!r} has {len(tokenizer)} tokens and the model {count} {what}; {len(ordinary)} of "
            f"them, such as {beyond[ordinary[0]]!r} ({ordinary[0]}), are unknown to it. {remedy}"
        )


# ---- 2: a plain pass


@dataclass(frozen=True, eq=False)
class _Plain:
    """What the model predicts without a cache, and what another way of reading may differ by."""

    logits: Tensor  # [2, T, V]
    tolerated: Tensor  # [2, T]


def sample_rows(model: Any, tokenizer: Any) -> Tensor:
    """[2, T] tokens of ordinary text, on the CPU."""
    count = model.get_input_embeddings().weight.shape[0]
    known = [token for token in tokenizer.encode(_TEXT, add_special_tokens=False) if token < count]
    if len(set(known)) < 2:  # no English: all of it is one unknown token
        known = torch.linspace(0, count - 1, 2 * _LENGTH).long().tolist()
    return torch.tensor(list(itertools.islice(itertools.cycle(known), 2 * _LENGTH))).reshape(2, _LENGTH)


def _plain_pass(model: Any, tokenizer: Any, name: str, rows: Tensor) -> _Plain:
    """Raises `WeightsError` where there are no logits, or logits that look ahead or at other rows."""
    try:
        logits = uncached(model, rows)
        swapped = uncached(model, torch.cat([rows.flip(0)[:, :_CHANGED], rows[:, _CHANGED:]], 1))
        alone = [uncached(model, rows[row : row + 1, :stop]) for row, stop in enumerate((7, 4))]
    except Exception as error:
        if isinstance(error, AttributeError) and "'logits'" in str(error):
            raise WeightsError(
                f"The model of {name!r} ({type(model).__name__}) has no language-model head: {error}. Load it with "
                "AutoModelForCausalLM instead of AutoModel, and return_dict=True."
            ) from error
        raise WeightsError(
            f"A pass of the model of {name!r} ({type(model).__name__}) over {rows.numel()} tokens failed: "
            f"{type(error).__name__}: {error}. Pass a causal language model that reads input_ids alone."
        ) from error
    if logits.ndim != 3 or logits.shape[:2] != rows.shape:
        raise WeightsError(
            f"The model of {name!r} ({type(model).__name__}) gives logits of shape {tuple(logits.shape)} for "
            f"{tuple(rows.shape)} tokens: it has no language-model head. Load it with AutoModelForCausalLM."
        )
    remedy = "If its head is a classifier's, load it with AutoModelForCausalLM; otherwise resize its output layer."
    _refuse_tokens_beyond(tokenizer, logits.shape[-1], name, "logits", remedy)
    if not bool(_numbers(logits).any(-1).all()):
        raise WeightsError(
            f"The logits of {name!r} are not numbers on ordinary text. In float16 that is an overflow: load it with "
            "dtype='bfloat16' or 'float32'."
        )
    share, least = _EXACT if _is_exact(model) else _COARSE
    reached = _distance(swapped, logits)  # [2, T]: what the first tokens do to predictions further on
    allowed = (share * reached).clamp(min=least)
    noise = [_distance(part[0], logits[row, : part.shape[1]]) for row, part in enumerate(alone)]
    worst = max(float(distance.max()) for distance in noise)
    if any(bool((distance > allowed[row, : len(distance)]).any()) for row, distance in enumerate(noise)):
        raise WeightsError(
            f"The model of {name!r} ({type(model).__name__}) is not causal: what it predicts after the first tokens "
            "of a row changes with the tokens that come later, or with other rows. Pass a decoder; a BERT-like model "
            "is one with config.is_decoder=True only."
        )
    return _Plain(logits, allowed.clamp(min=4 * worst))


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """[..., V] -> [...]: how far predictions lie apart, against how much they vary over the vocabulary."""
    usable = _numbers(one) & _numbers(other)
    count = usable.sum(-1, keepdim=True).clamp(min=1)
    apart, spread = (
        logits - (logits * usable).sum(-1, keepdim=True) / count
        for logits in ((one.float() - other.float()).masked_fill(~usable, 0), other.float().masked_fill(~usable, 0))
    )
    apart, spread = (apart * usable).norm(dim=-1), (spread * usable).norm(dim=-1)
    return (apart / spread.clamp(min=torch.finfo(torch.float32).tiny)).masked_fill(~usable.any(-1), torch.inf)


def _numbers(logits: Tensor) -> Tensor:
    """Where they are numbers, and not the -inf or the like of a token that must not be written."""
    return logits.isfinite() & (logits.abs() < 1e30)


def _is_exact(model: Any) -> bool:
    """Whether it computes in single precision or better; a quantised model does not."""
    return all(
        type(parameter) in (Tensor, Parameter) and parameter.dtype in (torch.float32, torch.float64)
        for parameter in model.parameters()
    )


# ---- 3: what it remembers


def _how_it_remembers(model: Any, rows: Tensor, plain: _Plain) -> Handshake:
    if _keeps_every_token(model) and _agrees(KeysAndValues(model), rows, plain, ragged=True):
        return Handshake(keys_and_values=True)
    names, axes = _own_states(model, rows)
    for ragged, mask_in_steps in ((True, True), (True, False), (False, False)) if names else ():
        states = StateFormat(names, axes, ragged, mask_in_steps)
        if _agrees(OwnStates(model, states), rows, plain, ragged=ragged):
            return Handshake(keys_and_values=False, states=states)
    return Handshake(keys_and_values=False)


def _keeps_every_token(model: Any) -> bool:
    """Whether the cache that its configuration asks for holds keys and values, of all tokens of a row."""
    try:
        return tokens_held(DynamicCache(config=model.config)) >= _LENGTH
    except Exception:  # whatever the configuration lacks
        return False


def _own_states(model: Any, rows: Tensor) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Under which names the model hands its states out and takes them back, and where in them the rows are."""
    device = input_device(model)
    try:
        several, one = (model(input_ids=part.to(device), use_cache=True) for part in (rows, rows[:1]))
        names = state_names(model, several)
        return names, row_axes({name: one[name] for name in names}, {name: several[name] for name in names})
    except Exception:  # whatever it is that the model needs for a cache: it does without
        return (), {}


def _agrees(memory: Memory, rows: Tensor, plain: _Plain, *, ragged: bool) -> bool:
    """Whether two rows, the first of which ends early, get the predictions of the plain pass."""
    try:
        return all(
            bool((_distance(logits, plain.logits[at]) <= plain.tolerated[at]).all())
            for at, logits in _token_by_token(memory, rows, (3, 6) if ragged else (6, 6))
        )
    except Exception as error:  # a cache that is not for this model fails in its own way
        _log.debug("%s does not work: %s", type(memory).__name__, error)
        return False


def _token_by_token(memory: Memory, rows: Tensor, read: tuple[int, int]) -> Iterator[tuple[tuple[Any, Any], Tensor]]:
    """Reads so many tokens of the two rows, and then one by one; yields places in [2, T] and the logits there."""
    both, first = torch.arange(2), torch.tensor(read)
    yield (both, first - 1), memory.read([rows[row, :count].tolist() for row, count in enumerate(read)])
    for step in range(2):
        yield (both, first + step), memory.step(rows[both, first + step].tolist())
    memory.keep([1])
    for place in range(read[1] + 2, _LENGTH):
        yield (both[1:], torch.tensor([place])), memory.step([int(rows[1, place])])


@contextmanager
def left_alone(model: Any) -> Iterator[None]:
    """Mode, flags and random state are afterwards as they were."""
    device = input_device(model)
    with frozen(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
