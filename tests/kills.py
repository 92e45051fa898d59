"""Kills searches at random moments, goes on with them, and compares what comes out with searches left alone.

`python -m tests.kills --kills 200 --terms 40` from the root of the repository, on a system that can fork; it ends with
figures, and with an error where one bit differs. `--seed` chooses other moments.

A killed search may be killed again before it comes to its end. SIGKILL comes from the process itself, before, within
and after the write of a journal's line, or from outside at any moment. SIGTERM comes from outside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import dspy
import golden_runs
import scripted_engine as planted
import scripted_gradsum as scripted

from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.run import lines
from dspy_greater.run.best import NAME, PROGRAM_NAME
from dspy_greater.run.journal import Journal
from dspy_greater.run.serialise import to_json

MOMENTS = ("before the write", "within the write", "after the write", "at any moment")
MOST_IN_A_ROW = 4  # kills of one search


# --- the searches: what each is given besides `options`, and the program that comes out ---


def planted_default(**options: Any) -> Any:
    return _planted(planted.program_on(planted.planted_engine()), steps=6, **options)


def planted_paper(**options: Any) -> Any:
    return _planted(planted.program_on(planted.planted_engine()), steps=5, variant="paper", **options)


def two_predictors(**options: Any) -> Any:
    program = planted.Checked(planted.checked_engine(planted.planted_engine().model))
    return planted.optimizer(steps=3, **options).compile(program, planted.checked_rows(planted.planted_rows(8)))


def pocket(**options: Any) -> Any:
    rows = golden_runs.rows("navigate", 4)
    optimizer = GReaTerTeleprompter(
        metric=golden_runs.exact_match, auto=None, steps=2, train_rows=2, validation_rows=2, progress=False, **options
    )
    program = golden_runs.plain()
    program.set_lm(local_lm("pocket", cache=False, max_tokens=40))
    return optimizer.compile(program, rows[:2], valset=rows[2:])


def gradsum(**options: Any) -> Any:
    program = scripted.program()
    lm = program.predict.lm
    program.set_lm(None)  # a scripted one cannot be saved
    with dspy.context(lm=lm):
        return scripted.optimizer(iterations=4, **options).compile(
            program, scripted.ROWS[:6], valset=scripted.ROWS[8:12]
        )


def _planted(program: Any, **options: Any) -> Any:
    rows = planted.planted_rows(24)
    return planted.optimizer(**options).compile(program, rows[:4], valset=rows[8:12])


SEARCHES: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (planted_default, planted_paper, two_predictors, pocket, gradsum)
}


def told(program: Any, folder: Path) -> dict[str, Any]:
    """Everything that a search decided, as text that shows every bit, and the program that lies on disk."""
    details = program.detailed_results
    if hasattr(details, "predictors"):
        steps = [to_json(replace(step, seconds=0.0)) for step in details.steps]
        parts = [[getattr(each, at.name) for at in fields(each) if at.name != "steps"] for each in details.predictors]
    else:
        steps = [to_json(replace(step, seconds=0.0)) for step in details.iterations]
        parts = [details.finalists, details.validation, details.subscores, details.winner, details.spent_by_module]
    decided = json.dumps([steps, repr(parts), repr(program.score)])
    return {
        "decided": hashlib.sha256(decided.encode()).hexdigest(),
        "instructions": {name: each.signature.instructions for name, each in program.named_predictors()},
        "on disk": hashlib.sha256((folder / PROGRAM_NAME).read_bytes()).hexdigest(),
        "stopped by": details.stopped_by,
    }


# --- one life of a search, in a process of its own ---


@dataclass(frozen=True)
class Life:
    """How one process ended: by which signal, or with which result. `events` were recorded when it began and ended.

    `heard` were told of, so that they had to be on disk, and `seconds` it took.
    """

    signal: int
    result: dict[str, Any]
    before: int
    after: int
    heard: int
    seconds: float


def live(name: str, folder: Path, *, moment: str = "", at: float = 0.0, by: int = signal.SIGKILL) -> Life:
    """Start or resume a search in a forked process, and end it.

    Args:
        name: of the search.
        folder: its log_dir.
        moment: one of `MOMENTS`; nothing for a process that is left alone.
        at: which line of the journal it writes, or after how many seconds.
        by: the signal from outside.
    """
    result, heard = folder.parent / "result.json", folder.parent / "heard"
    for each in (result, heard):
        each.unlink(missing_ok=True)
    before, began = recorded(folder), time.monotonic()
    child = os.fork()
    if child == 0:
        _search(name, folder, moment, int(at), result, heard)
    if moment == "at any moment":
        threading.Event().wait(at)
        os.kill(child, by)
    _, status = os.waitpid(child, 0)
    return Life(
        os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        json.loads(result.read_text()) if result.exists() else {},
        before,
        recorded(folder),
        heard.stat().st_size if heard.exists() else 0,
        time.monotonic() - began,
    )


def recorded(folder: Path) -> int:
    """Intact events in a journal, without its header."""
    path = folder / "journal.jsonl"
    return max(0, len(lines.read(path.read_bytes()).payloads) - 1) if path.exists() else 0


def _search(name: str, folder: Path, moment: str, at: int, result: Path, heard: Path) -> None:
    """The life itself: never returns."""
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        _die_at(moment, at)
        file = os.open(heard, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        append = Journal.append

        def appended(journal: Journal, event: Any) -> None:
            append(journal, event)
            os.write(file, b".")

        Journal.append = appended
        program = SEARCHES[name](log_dir=folder)
        _write(result, told(program, folder))
    except KeyboardInterrupt as interrupt:
        _write(result, {"raised": str(interrupt)})
    except BaseException:
        _write(result, {"error": traceback.format_exc()})
    os._exit(0)


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


def _die_at(moment: str, at: int) -> None:
    """Let the process kill itself at the write of that line of its own."""
    if moment not in MOMENTS[:3]:
        return
    append, written = lines.LineFile.append, [0]

    def deadly(file: lines.LineFile, payload: bytes) -> None:
        written[0] += 1
        if written[0] != at:
            append(file, payload)
            return
        if moment == "within the write":
            line = lines.frame(payload, file._checksum)
            os.lseek(file._descriptor, file._end, os.SEEK_SET)
            os.write(file._descriptor, line[: random.Random(at).randrange(1, len(line))])
        elif moment == "after the write":
            append(file, payload)
        os.kill(os.getpid(), signal.SIGKILL)

    lines.LineFile.append = deadly


# --- many of them ---


@dataclass
class Tally:
    """What happened, and what should not have."""

    kills: Counter[str] = field(default_factory=Counter[str])
    ends: Counter[str] = field(default_factory=Counter[str])
    compared: int = 0
    most_lost: int = 0
    faults: list[str] = field(default_factory=list[str])

    def check(self, holds: object, what: str) -> None:
        if not holds:
            self.faults.append(what)


class Round:
    """Searches that were left alone, once each, and as many that were not as one likes."""

    def __init__(self, names: list[str], seed: int, root: Path) -> None:
        self.random, self.root, self.tally = random.Random(seed), root, Tally()
        self.whole: dict[str, Life] = {}
        for name in names:
            self.whole[name] = live(name, self._fresh())
            self.tally.check("decided" in self.whole[name].result, f"{name}: {self.whole[name].result}")

    def _any(self) -> str:
        """The quicker the search, the more often."""
        names = list(self.whole)
        return self.random.choices(names, [1 / self.whole[name].seconds for name in names])[0]

    def _fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root)) / "run"

    def kill(self) -> None:
        """One search, killed up to `MOST_IN_A_ROW` times, and then left to end."""
        name, folder = self._any(), self._fresh()
        whole, told = self.whole[name], Counter[str]()
        for _ in range(self.random.randint(1, MOST_IN_A_ROW)):
            moment = self.random.choice(MOMENTS)
            left = whole.after + 1 - recorded(folder)  # the header too, of a new one
            inside = moment != "at any moment"
            at = self.random.randint(1, max(1, left)) if inside else self.random.uniform(0, whole.seconds)
            life = live(name, folder, moment=moment, at=at)
            self.tally.check("error" not in life.result, f"{name}, {moment} {at}: {life.result}")
            self.tally.check(life.after >= life.before, f"{name}, {moment} {at}: events were lost")
            self.tally.check(life.after - life.before >= life.heard, f"{name}, {moment} {at}: not on disk")
            if life.signal != signal.SIGKILL:
                break
            told[moment] += 1
        self.tally.kills.update(told)
        self._finish(name, folder, f"{name} after {dict(told)}")

    def terminate(self) -> None:
        """One search that is sent SIGTERM, and goes on afterwards."""
        name, folder = self._any(), self._fresh()
        whole = self.whole[name]
        life = live(name, folder, moment="at any moment", at=self.random.uniform(0, whole.seconds), by=signal.SIGTERM)
        what = f"{name} after SIGTERM with {life.after} events: {life.result or life.signal}"
        self.tally.check("error" not in life.result, what)
        if life.signal:
            self.tally.ends["before or after the search, as without it"] += 1
            self.tally.check(life.after in (0, whole.after), what)
        elif "raised" in life.result:
            self.tally.ends["raised, with nothing found yet"] += 1
            self.tally.check(life.after <= 1 and life.result["raised"] == "SIGTERM", what)
        elif life.result.get("stopped by") is None:
            self.tally.ends["came too late"] += 1
        else:
            self.tally.ends["returned the best so far"] += 1
            self.tally.check(life.result["stopped by"] == "SIGTERM", what)
        told = "raised" not in life.result and life.signal == 0  # that the search has begun
        if (told and life.after > 0) or life.after > 1:
            self.tally.check(_is_saved(folder), f"{what}: no program on disk")
        self._finish(name, folder, what, ended=life.result.get("stopped by") is not None)

    def _finish(self, name: str, folder: Path, what: str, *, ended: bool = False) -> None:
        """Let it come to its end, and compare; one that was `ended` may have validated what it had."""
        whole, on_disk = self.whole[name], recorded(folder)
        last = live(name, folder)
        self.tally.compared += 1
        self.tally.check(last.result == whole.result, f"{what}: {last.result} is not {whole.result}")
        expected = (whole.after, whole.after + 1) if ended else (whole.after,)
        self.tally.check(last.after in expected, f"{what}: {last.after} events are not {whole.after}")
        self.tally.check(last.heard == last.after - on_disk, f"{what}: took {last.heard} steps after {on_disk}")


def _is_saved(folder: Path) -> bool:
    """Whether the program lies there, with the instructions that are called the best, and DSPy can load it."""
    best = json.loads((folder / NAME).read_text())["instructions"]
    saved = json.loads((folder / PROGRAM_NAME).read_text())
    return all(saved[name]["signature"]["instructions"] == text for name, text in best.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="by SIGKILL, at least so many")
    parser.add_argument("--terms", type=int, default=40, help="searches that are sent SIGTERM")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--searches", nargs="*", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        done = Round(arguments.searches, arguments.seed, Path(root))
        for name, life in done.whole.items():
            print(f"{name}: {life.after} events in {life.seconds:.1f} s", flush=True)
        tally = done.tally
        while tally.kills.total() < arguments.kills and not tally.faults:
            done.kill()
            if arguments.progress:
                print(tally.kills.total(), round(time.monotonic() - began), flush=True)
        print(f"{tally.kills.total()} kills by SIGKILL: {dict(tally.kills)}")
        print(f"{tally.compared} searches went on and were compared", flush=True)
        while tally.ends.total() < arguments.terms and not tally.faults:
            done.terminate()
    print(f"{tally.ends.total()} times SIGTERM: {dict(tally.ends)}")
    print(f"{tally.compared} searches went on and were compared, {len(tally.faults)} faults, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    for fault in tally.faults:
        print(fault)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
