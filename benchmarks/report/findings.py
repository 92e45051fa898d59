"""Comparisons -> the verdict in sentences. What the baseline loses is said as plainly as what it wins."""

from __future__ import annotations

from benchmarks.report.comparison import Comparison, Paired, Result
from benchmarks.report.tables import p_value, percent, points

SIGNIFICANT = 0.05


def findings(comparison: Comparison, baseline: str) -> list[str]:
    """One sentence for each peer, and one for each task on which the baseline is not the best."""
    if baseline not in comparison.optimizers:
        return [f"{baseline} was not run, so nothing is compared with it."]
    own = comparison.result(baseline)
    if own is None or own.seeds is None:
        return [f"Every cell of {baseline} failed, so nothing is compared with it."]
    pairs = comparison.paired(baseline)
    if not pairs:
        return [f"No other optimizer has a finished cell in common with {baseline}."]
    ordered = sorted(pairs, key=lambda pair: pair.difference)
    failed = [f"{len(comparison.failures)} of {len(comparison.cells)} cells failed."] if comparison.failures else []
    return [*(_against(baseline, pair) for pair in ordered), *_tasks(comparison, baseline), *failed]


def _against(baseline: str, pair: Paired) -> str:
    counts = (
        f"{pair.wins} wins, {pair.draws} draws, {pair.losses} losses over cells; p {p_value(pair.p_holm)} after Holm"
    )
    if not pair.difference:
        verdict = f"{baseline} and {pair.peer} are even"
    else:
        verb = "beats" if pair.difference > 0 else "loses to"
        verdict = f"{baseline} {verb} {pair.peer} by {points(abs(pair.difference)).lstrip('+')} points"
    known = "" if pair.p_holm < SIGNIFICANT or not pair.difference else ", a difference that may be chance"
    return f"{verdict}{known} ({counts})."


def _tasks(comparison: Comparison, baseline: str) -> list[str]:
    sentences = []
    for task in comparison.tasks:
        results = {name: comparison.result(name, task) for name in comparison.optimizers}
        done = {name: result for name, result in results.items() if result is not None and result.seeds is not None}
        if baseline not in done:
            sentences.append(f"On {task}, {baseline} has no finished cell.")
            continue
        own = done[baseline].pooled
        ahead = sorted((name for name in done if done[name].pooled > own), key=lambda name: -done[name].pooled)
        if ahead:
            listed = ", ".join(f"{name} ({percent(done[name].pooled)})" for name in ahead)
            sentences.append(f"On {task}, {listed} beat{'s' if len(ahead) == 1 else ''} {baseline} ({percent(own)}).")
        elif any(_ties(done[name], own) for name in done if name != baseline):
            sentences.append(
                f"On {task}, no optimizer beats {baseline} ({percent(own)}); at least one is level with it."
            )
        elif len(done) > 1:
            sentences.append(f"On {task}, {baseline} is the best ({percent(own)}).")
    return sentences


def _ties(result: Result, share: float) -> bool:
    return result.pooled == share
