"""What the model computed for in two light searches: samples of stacks (4 a second, `py-spy record`), by what asked.

python benchmarks/results/light-0.5b-2026-11-30/shares.py
"""

from collections import Counter
from pathlib import Path

RESULTS = Path(__file__).parents[1]
FORECASTS = ("_look_ahead", "_replay", "_forecaster", "_shortlist", "race", "of_edits", "_tried", "_glance")


def purpose(stack: str) -> str:
    """Runs are computed by threads of their own, everything else by the thread of the search."""
    if any(f"{name} (search/default_step)" in stack for name in FORECASTS):
        return "gradients, forecasts and proposals of edits"
    if "(search/default_step)" in stack:
        return "writing whole instructions" if "(search/written)" in stack else "losses of what was tried"
    return "runs of the program" if "generate (model/" in stack else "the rest (loading, the estimate's probe)"


for directory in ("light-0.5b-2026-11-30", "light-0.5b-2026-12-01"):
    samples: Counter[str] = Counter()
    for line in (RESULTS / directory / "stacks.txt").read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        samples[purpose(stack)] += int(count)
    print(directory)
    for name, count in samples.most_common():
        print(f"{100 * count / samples.total():5.1f} %  {name}")
