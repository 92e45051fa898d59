"""What the model computed for in a light search: samples of its stacks (4 a second, `py-spy record`), by what asked.

Threads that only wait for a batch are left out.

python benchmarks/results/light-0.5b-2026-12-01/shares.py
"""

from collections import Counter
from pathlib import Path

FORECASTS = ("_look_ahead", "_replay", "_forecaster", "_shortlist", "race", "of_edits", "_tried", "_glance")


def purpose(stack: str) -> str:
    """Runs are computed by threads of their own, everything else by the thread of the search."""
    if any(f"{name} (search/default_step)" in stack for name in FORECASTS):
        return "gradients, forecasts and proposals of edits"
    if "(search/default_step)" in stack:
        return "writing whole instructions"
    return "runs of the program" if "generate (model/" in stack else "the rest (loading, the estimate's probe)"


samples: Counter[str] = Counter()
for line in (Path(__file__).parent / "stacks.txt").read_text(encoding="utf-8").splitlines():
    stack, _, count = line.rpartition(" ")
    samples[purpose(stack)] += int(count)
for name, count in samples.most_common():
    print(f"{100 * count / samples.total():5.1f} %  {name}")
