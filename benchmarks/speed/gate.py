"""Before anything is timed: every arm has to come to the same numbers.

Tokens have to be equal. Gradients may be 1e-5 apart, relative to the largest of them. Losses may be 1e-5 apart in
units of the logits: an answer's cross-entropy is taken of logits over a temperature, which blows up their rounding
just as much, so it is compared times that temperature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.speed.step import Arm, Clock, Reasonings, Step
from benchmarks.speed.work import Work
from dspy_greater.model.engine import Engine

TOLERANCE = 1e-5


def run_gate(engine: Engine, work: Work, arms: Mapping[str, Arm], reference: str = "plain") -> list[str]:
    """What differs between the arms, in words; nothing when they agree.

    Each arm is held against `reference`, or against the first arm where that one does not take part.
    """
    steps = {name: arm(engine, work, Clock(engine)) for name, arm in arms.items()}
    against = reference if reference in steps else next(iter(steps))
    found = [
        f"{name} against {against}: {what}"
        for name, step in steps.items()
        if name != against
        for what in differences(step, steps[against], temperature=work.answer_temperature)
    ]
    short = sorted({len(row) for step in steps.values() for part in step.reasoning.values() for row in part})
    if short != [work.reasoning_tokens]:
        found.append(f"rows wrote {short} tokens of reasoning, not {work.reasoning_tokens}")
    return found


def differences(step: Step, other: Step, *, temperature: float) -> list[str]:
    """How two steps differ beyond rounding; `temperature` is that of the answers' cross-entropy."""
    if step.candidates != other.candidates:
        return [f"candidates {step.candidates}, not {other.candidates}"]
    found = _reasoning("the current instruction", step.current_reasoning, other.current_reasoning)
    found += _gradient(step.gradient, other.gradient)
    if step.selected != other.selected:
        return [*found, f"selected {step.selected}, not {other.selected}"]
    for token in step.selected:
        where = f"candidate {token}"
        found += _reasoning(where, step.reasoning[token], other.reasoning[token])
        one, two = step.losses[token], other.losses[token]
        found += _losses(f"cross-entropy under {where}", one.cross_entropy, two.cross_entropy, temperature)
        found += _losses(f"fluency under {where}", one.fluency_nll, two.fluency_nll, 1.0)
    return found


def _reasoning(where: str, rows: Reasonings, others: Reasonings) -> list[str]:
    if len(rows) != len(others):
        return [f"{len(rows)} rows of reasoning under {where}, not {len(others)}"]
    unequal = [row for row, (one, other) in enumerate(zip(rows, others, strict=True)) if one != other]
    if not unequal:
        return []
    first = unequal[0]
    at = next((i for i, pair in enumerate(zip(rows[first], others[first], strict=False)) if pair[0] != pair[1]), -1)
    return [f"reasoning under {where} differs in {len(unequal)} rows; row {first} from token {at} on"]


def _gradient(rows: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> list[str]:
    """Relative to the largest, per example and summed over the examples."""
    found = []
    summed = [[sum(column) for column in zip(*each, strict=True)] for each in (rows, others)]
    flat = [[value for row in each for value in row] for each in (rows, others)]
    for name, (one, other) in (("gradient", summed), ("per-example gradient", flat)):
        if len(one) != len(other):
            found.append(f"{name}: {len(one)} numbers, not {len(other)}")
            continue
        largest = max(map(abs, other), default=0.0)
        apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
        if not all(each <= TOLERANCE * largest for each in apart):
            worst = _worst(apart)
            found.append(f"{name}: {worst / largest if largest else worst:.1e} apart, relative to the largest")
    return found


def _losses(where: str, values: Sequence[float], others: Sequence[float], temperature: float) -> list[str]:
    if len(values) != len(others):
        return [f"{where}: {len(values)} rows, not {len(others)}"]
    pairs = zip(values, others, strict=True)
    apart = [temperature * abs(a - b) / max(1.0, temperature * abs(b)) for a, b in pairs]
    return [] if all(each <= TOLERANCE for each in apart) else [f"{where}: {_worst(apart):.1e} apart in logits"]


def _worst(apart: Sequence[float]) -> float:
    """The largest; a difference that is not a number is the worst of all."""
    return next((each for each in apart if each != each), max(apart, default=0.0))
