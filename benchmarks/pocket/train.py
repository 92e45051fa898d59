"""Train the pocket model from nothing: `python -m benchmarks.pocket.train --out DIR`.

Needs torch, transformers and tokenizers alone. Two phases on one schedule: first
procedures only (a fitting instruction, every step written down), so that copying and
running totals form; then the full mix of instructions, styles and proposals. Weight
matrices are trained with Muon, embeddings and norms with AdamW. Checkpoints can be
resumed (`--resume`), which continues the same sequence of samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.pocket.transcript import END, PAD, draw
from benchmarks.pocket.vocabulary import train_tokenizer
from dspy_greater.errors import LossError
from dspy_greater.pocket.tasks import TASKS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the result of a training run."""

    hidden_size: int = 192
    layers: int = 5
    heads: int = 6
    feed_forward_size: int = 512
    context_length: int = 1024
    vocabulary_size: int = 2816
    vocabulary_samples: int = 3000
    steps: int = 7000
    procedure_steps: int = 2000
    procedure_share_after: float = 0.5
    rows: int = 48
    row_groups: int = 3  # rows are sorted by length and padded in that many groups
    peak_muon_rate: float = 0.02
    peak_adam_rate: float = 0.003
    warmup_steps: int = 100
    decay_from: float = 0.64  # share of the steps after which the rates fall linearly to zero
    seed: int = 0


SMOKE = TrainSettings(
    hidden_size=32, layers=2, heads=2, feed_forward_size=64, vocabulary_size=800, vocabulary_samples=100,
    steps=60, procedure_steps=30, rows=8, warmup_steps=5,
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Rows of similar length, right-padded. Token t is predicted from the tokens before it with weight t."""

    token_ids: Tensor  # [rows, length]
    weights: Tensor  # [rows, length]
    share: float  # of the whole step's weight


def encode(parts: list, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Joint tokens of a transcript and each one's weight: that of the part in which it ends."""
    text = "".join(part.text for part in parts)
    ends, total = [], 0
    for part in parts:
        total += len(part.text)
        ends.append(total)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    weights, current = [], 0
    for _, stop in encoded["offset_mapping"]:
        while stop > ends[current]:
            current += 1
        weights.append(parts[current].weight)
    return encoded["input_ids"], weights


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a special token."""
    return tokenizer.get_vocab()[token]


def steps(settings: TrainSettings, tokenizer: PreTrainedTokenizerFast, first: int = 0) -> Iterator[list[Group]]:
    """The rows of each step; step n is the same whether or not the run was resumed before it."""
    pad = token_id(tokenizer, PAD)
    for step in range(first, settings.steps):
        rng = random.Random(f"{settings.seed}/{step}")
        rows = []
        for row in range(settings.rows):
            procedures_only = step < settings.procedure_steps or rng.random() < settings.procedure_share_after
            parts = draw(TASKS[row % len(TASKS)], rng, procedures_only=procedures_only)
            rows.append(encode(parts, tokenizer))
        yield group(rows, settings.row_groups, pad)


def group(rows: list[tuple[list[int], list[float]]], groups: int, pad: int) -> list[Group]:
    """Sort rows by length, cut into groups and pad each on its own."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    size = math.ceil(len(rows) / groups)
    total = sum(sum(weights[1:]) for _, weights in rows)
    padded = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        length = len(part[-1][0])
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in part])
        weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in part])
        padded.append(Group(ids, weights, float(weights[:, 1:].sum()) / total))
    return padded


def weighted_loss(model: LlamaForCausalLM, rows: Group) -> Tensor:
    """Mean next-token cross-entropy over the weighted tokens only; the head sees no other token."""
    hidden = model.model(input_ids=rows.token_ids[:, :-1], use_cache=False).last_hidden_state  # [rows, length - 1, d]
    weights = rows.weights[:, 1:]
    chosen = weights > 0
    logits = model.lm_head(hidden[chosen]).float()  # [weighted tokens, V]
    losses = torch.nn.functional.cross_entropy(logits, rows.token_ids[:, 1:][chosen], reduction="none")
    return (losses * weights[chosen]).sum() / weights.sum()


def new_model(settings: TrainSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised Llama of the settings' shape."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden_size, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        intermediate_size=settings.feed_forward_size, max_position_embeddings=settings.context_length,
        tie_word_embeddings=True, eos_token_id=token_id(tokenizer, END), bos_token_id=None,
        pad_token_id=token_id(tokenizer, PAD), initializer_range=0.03,
    )  # fmt: skip
    # On CPU the plain attention trains twice as fast as the fused one at these lengths.
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=settings.peak_muon_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=settings.peak_adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, constant, linear fall to zero."""
    falling_steps = settings.steps * (1 - settings.decay_from)
    falling = (settings.steps - step) / falling_steps if falling_steps else 1.0
    return max(0.0, min(1.0, (step + 1) / settings.warmup_steps, falling))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model in bfloat16 with its tokenizer, as `from_pretrained` reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state)
    config = json.loads((directory / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(directory)


def train_step(model: LlamaForCausalLM, groups: list[Group], pair: list[torch.optim.Optimizer]) -> float:
    """One update of the weights; returns the loss before it."""
    total = 0.0
    for rows in groups:
        rows = Group(rows.token_ids.to(model.device), rows.weights.to(model.device), rows.share)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss = weighted_loss(model, rows) * rows.share
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in pair:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def train(
    settings: TrainSettings, out: Path, *, resume: Path | None = None, save_seconds: float = 300.0
) -> list[float]:
    """Run the schedule and return the loss of every step; writes model and checkpoint under `out`."""
    tokenizer = train_tokenizer(size=settings.vocabulary_size, samples_per_task=settings.vocabulary_samples)
    model = new_model(settings, tokenizer)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    pair = optimizers(model, settings)
    first = 0
    if resume is not None:
        saved = torch.load(resume, weights_only=True, map_location=model.device)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(pair, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    peaks = (settings.peak_muon_rate, settings.peak_adam_rate)
    losses: list[float] = []
    started = last_saved = time.monotonic()
    for step, groups in enumerate(steps(settings, tokenizer, first), start=first):
        for optimizer, peak in zip(pair, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_factor(step, settings)
        losses.append(train_step(model, groups, pair))
        if not math.isfinite(losses[-1]):
            raise LossError(f"loss {losses[-1]} at step {step}: lower --peak-muon-rate or --peak-adam-rate")
        if step % 50 == 49:
            rate = len(losses) / (time.monotonic() - started)
            logger.info("step %d loss %.4f, %.2f steps/s", step + 1, sum(losses[-50:]) / len(losses[-50:]), rate)
        if time.monotonic() - last_saved > save_seconds or step + 1 == settings.steps:
            save(model, tokenizer, out)
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in pair],
                "step": step + 1,
            }
            torch.save(state, out / "checkpoint.pt")
            last_saved = time.monotonic()
    return losses


def main() -> None:
    """Command line: every field of `TrainSettings` is a flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="a checkpoint.pt of the same settings")
    parser.add_argument("--smoke", action="store_true", help="a tiny configuration that trains in seconds")
    defaults = asdict(TrainSettings())
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    base = asdict(SMOKE) if arguments.smoke else defaults
    chosen = {name: getattr(arguments, name) for name in defaults if getattr(arguments, name) is not None}
    train(TrainSettings(**{**base, **chosen}), arguments.out, resume=arguments.resume)


if __name__ == "__main__":
    main()
