"""A run that is interrupted at any moment can go on, and nothing that was recorded comes back changed."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from any_event import bits, events
from hypothesis import given, settings
from hypothesis import strategies as st

import dspy_greater
from dspy_greater.errors import EventFormatError, GreaterError, RunDirectoryError
from dspy_greater.objective.types import Candidate, Evaluation, RowOutcome
from dspy_greater.run import lines
from dspy_greater.run.events import Event, SearchStarted, StepTaken, Validated, Warned
from dspy_greater.run.journal import Journal
from dspy_greater.run.serialise import to_json
from dspy_greater.run.software import installed

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = {"settings": {"steps": 3, "seed": 0}, "weights": "tiny@1:float32"}

# --- a journal that is whole ---


def evaluation(instruction: str = "Think.", score: float = 0.5) -> Evaluation:
    row = RowOutcome(0, score, {"question": "2+2?", "pair": (1, 2)}, {"reasoning": "four\nthen\u2028"}, math.nan)
    return Evaluation((5, 7), instruction, (row,), score, 0.25, 3.0, (1 - score, math.inf))


def step(number: int) -> StepTaken:
    tried = Candidate(9, " über", -0.5, None, evaluation("Denk.", 0.75))
    return StepTaken("predict", number, 0, 5, (tried,), evaluation(), "kept", {"forwards": 2})


HAPPENED: tuple[Event, ...] = (
    SearchStarted("predict", evaluation(), 3),
    step(0),
    Warned("café ☕"),
    Validated("predict", {"Think.": 0.5, "Denk.": math.nan}, "Think."),
)


def append_all(journal: Journal, happened: tuple[Event, ...]) -> None:
    for event in happened:
        journal.append(event)


def write(directory: Path, happened: tuple[Event, ...] = HAPPENED) -> Path:
    with Journal.open(directory, IDENTITY) as journal:
        append_all(journal, happened)
    return directory / "journal.jsonl"


def recorded(directory: Path) -> tuple[Event, ...]:
    with Journal.open(directory, IDENTITY) as journal:
        return journal.recorded()


@settings(max_examples=30, deadline=None)
@given(st.lists(events, max_size=3))
def test_every_event_comes_back_from_a_journal_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, happened: list[Event]
) -> None:
    directory = tmp_path_factory.mktemp("run")
    with Journal.open(directory, IDENTITY) as journal:
        for event in happened:
            journal.append(event)
    with Journal.open(directory, IDENTITY) as journal:
        assert bits(journal.recorded()) == bits(tuple(happened))


def test_a_journal_without_a_directory_lives_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Journal.open(None, IDENTITY) as journal:
        journal.append(HAPPENED[0])
        assert journal.recorded() == ()
        assert journal.events() == HAPPENED[:1]
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_after_what_was_recorded(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", HAPPENED[:2])
    with Journal.open(str(tmp_path / "a" / "b"), IDENTITY) as journal:
        assert bits(journal.recorded()) == bits(HAPPENED[:2])
        journal.append(HAPPENED[2])
        assert bits(journal.recorded()) == bits(HAPPENED[:2])
        assert bits(journal.events()) == bits(HAPPENED[:3])
    assert bits(recorded(tmp_path / "a" / "b")) == bits(HAPPENED[:3])


def test_an_event_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), sync(file)))
    with Journal.open(tmp_path, IDENTITY) as journal:
        journal.append(HAPPENED[0])
        assert synced[-1] == (tmp_path / "journal.jsonl").stat().st_size


def test_every_line_is_standard_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    text = write(tmp_path).read_text(encoding="ascii")
    parsed = [json.loads(line, parse_constant=refuse)["payload"] for line in text.splitlines()]
    versions = parsed[0].pop("versions")
    assert parsed[0] == {"format": "dspy_greater journal", "version": 2, "code": {}, "identity": IDENTITY}
    assert versions == installed() and versions["dspy_greater"] == dspy_greater.__version__
    assert [each["type"] for each in parsed[1:]] == [type(event).__name__ for event in HAPPENED]


def test_a_closed_journal_closes_again_and_takes_no_more(tmp_path: Path) -> None:
    for directory in (None, tmp_path):
        journal = Journal.open(directory, IDENTITY)
        journal.close()
        journal.close()
        with pytest.raises(RunDirectoryError, match="This journal is closed. Open it again to append to it."):
            journal.append(HAPPENED[0])


def test_an_event_of_the_wrong_type_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        journal.append(HAPPENED[0])
        with pytest.raises(EventFormatError, match="Warned.message"):
            journal.append(Warned(3))
        journal.append(HAPPENED[1])
    assert bits(recorded(tmp_path)) == bits(HAPPENED[:2])


# --- a journal that is torn or damaged ---


@pytest.mark.slow
def test_a_kill_at_any_byte_leaves_a_beginning_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of them
    path = write(tmp_path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    last = Warned("after")
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = max(0, sum(end <= size for end in ends) - 1)  # less the header
        with Journal.open(tmp_path, IDENTITY) as journal:
            assert bits(journal.recorded()) == bits(HAPPENED[:complete]), size
            journal.append(last)
        if size in ends or size - 1 in ends or size % 50 == 0:
            assert bits(recorded(tmp_path)) == bits((*HAPPENED[:complete], last)), size


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, HAPPENED[2:])
    whole = path.read_bytes()
    last_line = whole.rstrip(b"\n").rindex(b"\n") + 1
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        intact = lines.read(bytes(damaged))
        assert whole[: intact.end] == damaged[: intact.end] and intact.end <= place
        # In the last line, or the newline before it, it looks like a torn end and is cut off.
        assert intact.damaged_line is not None or place >= last_line - 1


def test_a_last_line_that_cannot_be_read_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    for tail in (b"\0" * 300, b'{"crc32":"00000000","payload":{}}\n', b"\xff\xfe\n", b"\n"):
        path.write_bytes(whole + tail)
        assert bits(recorded(tmp_path)) == bits(HAPPENED)
        assert path.read_bytes() == whole


def test_damage_in_the_middle_names_the_line_and_keeps_a_copy(tmp_path: Path) -> None:
    path = write(tmp_path)
    damaged = path.read_bytes().replace(b'"kept"', b'"kepp"')
    path.write_bytes(damaged)
    copy = tmp_path / "journal.jsonl.damaged-1"
    for _ in range(2):  # the same damage is copied once
        with pytest.raises(RunDirectoryError) as caught:
            Journal.open(tmp_path, IDENTITY)
        assert str(caught.value) == (
            f"Line 3 of {path} is damaged. A copy is in {copy}. Delete line 3 and all after it to go on "
            f"from the 1 events before it, delete {path} to begin again, or use another log_dir."
        )
        assert copy.read_bytes() == path.read_bytes() == damaged
    path.write_bytes(damaged.replace(b"kepp", b"keqq"))
    with pytest.raises(RunDirectoryError, match="damaged-2"):
        Journal.open(tmp_path, IDENTITY)
    assert copy.read_bytes() == damaged


def test_the_advice_after_damage_works(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"kept"', b'"kepp"'))
    with pytest.raises(RunDirectoryError, match="Delete line 3"):
        Journal.open(tmp_path, IDENTITY)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert bits(recorded(tmp_path)) == bits(HAPPENED[:1])


@pytest.mark.parametrize("order", [[0, 1, 3, 4], [0, 2, 1, 3, 4], [0, 1, 1, 2, 3, 4], [1, 2, 3, 4]])
def test_a_line_that_was_lost_moved_or_repeated_is_damage(tmp_path: Path, order: list[int]) -> None:
    path = write(tmp_path)
    original = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(original[i] for i in order))
    with pytest.raises(RunDirectoryError, match="is damaged"):
        Journal.open(tmp_path, IDENTITY)


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"a": 1}\n{"b": 2}\n'])
def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match="Line 1 of .* is damaged. .* to begin again, or use another"):
        Journal.open(tmp_path, IDENTITY)
    assert path.read_bytes() == content


def test_damage_is_reported_even_when_no_copy_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"kept"', b'"kepp"'))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(RunDirectoryError, match="Line 3 .* No copy could be made: No space left on device."):
        Journal.open(tmp_path, IDENTITY)


# --- another run, another format ---


def test_another_identity_is_refused_and_the_difference_shown(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = path.read_bytes() + b'{"torn'
    path.write_bytes(before)
    other = {"settings": {"steps": 5, "seed": 0, "extra": {"a": [1]}}, "weights": None}
    with pytest.raises(RunDirectoryError) as caught:
        Journal.open(tmp_path, other)
    assert str(caught.value) == (
        f"{path} belongs to a run that began otherwise (then -> now):\n"
        "  settings.steps: 3 -> 5\n"
        '  weights: "tiny@1:float32" -> null\n'
        "  settings.extra.a: absent -> [1]\n"
        f"Go on with what it began with, use another log_dir, or delete {path} to begin again."
    )
    assert path.read_bytes() == before, "a refused journal is left as it was"
    assert bits(recorded(tmp_path)) == bits(HAPPENED)


@pytest.mark.parametrize(
    ("then", "now", "shown"),
    [
        ({"a": 1}, {"a": 1.0}, "a: 1 -> 1.0"),
        ({"a": 1}, {"a": True}, "a: 1 -> true"),
        ({"a": {}}, {"a": {"b": 1}}, "a.b: absent -> 1"),
        ({"a": 1}, {}, "a: 1 -> absent"),
        ({"a": "x" * 500 + "y"}, {"a": "x" * 500 + "z"}, f'a: ...{"x" * 20}y" -> ...{"x" * 20}z"'),
        ({"a": "x" * 500}, {"a": 1}, f'a: "{"x" * 79}... -> 1'),
        ({str(i): 0 for i in range(30)}, {str(i): 1 for i in range(30)}, "19: 0 -> 1\n  and 10 more\n"),
    ],
)
def test_differences_are_shown_where_they_are(
    tmp_path: Path, then: dict[str, Any], now: dict[str, Any], shown: str
) -> None:
    Journal.open(tmp_path, then).close()
    with pytest.raises(RunDirectoryError) as caught:
        Journal.open(tmp_path, now)
    assert shown in str(caught.value)


def test_the_same_identity_may_come_as_other_containers(tmp_path: Path) -> None:
    Journal.open(tmp_path, {"rows": (1, 2), "x": {"a": 1, "b": math.nan}}).close()
    Journal.open(tmp_path, {"x": {"b": math.nan, "a": 1}, "rows": [1, 2]}).close()


def test_a_journal_of_before_versions_were_kept_goes_on_and_says_none(tmp_path: Path) -> None:
    path = write(tmp_path)
    header, *rest = [json.loads(payload) for payload in lines.read(path.read_bytes()).payloads]
    del header["versions"]
    rewrite(path, [header, *rest])
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert journal.versions == {} and bits(journal.recorded()) == bits(HAPPENED)


def test_a_run_keeps_the_versions_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr("dspy_greater.run.journal.installed", lambda: {"dspy_greater": "9"})
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert journal.versions["dspy_greater"] == dspy_greater.__version__


def rewrite(path: Path, payloads: list[Any]) -> None:
    content, checksum = b"", 0
    for payload in payloads:
        text = json.dumps(payload).encode()
        content += lines.frame(text, checksum)
        checksum = lines.read(content).checksum
    path.write_bytes(content)


# As format version 1 wrote it: a run of one event.
VERSION_1 = (
    b'{"crc32":"53444131","payload":{"format": "dspy_greater journal", "version": 1, "identity": {"seed": 0}}}\n'
    b'{"crc32":"9a8e4835","payload":{"type":"SearchStarted","predictor":"predict","seed":{"token_ids":[5,7],'
    b'"instruction":"Think.","rows":[{"row":0,"score":0.5,"inputs":{"question":"2+2?","pair":{"$tuple":[1,2]}},'
    b'"written":{"reasoning":"four"},"cross_entropy":{"$float":"nan"},"error":null,"preamble":"","calls":[],'
    b'"unparsed":false}],"score":0.5,"cross_entropy":0.25,"fluency_nll":3.0,"objective":[0.5,{"$float":"inf"}],'
    b'"complete":true},"steps":3,"spent":{},"samples":[]}}\n'
)


def test_a_journal_of_the_older_format_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(VERSION_1)
    assert lines.read(VERSION_1).damaged_line is None and len(lines.read(VERSION_1).payloads) == 2
    with pytest.raises(RunDirectoryError) as caught:
        Journal.open(tmp_path, {"seed": 0})
    assert str(caught.value) == (
        f"{path} has format version 1: an older dspy_greater wrote it, and this one has another form for events "
        "(version 2), so it cannot go on from there. Finish that run with the dspy_greater that began it, use another "
        f"log_dir, or delete {path} to begin again."
    )
    assert path.read_bytes() == VERSION_1


def test_a_line_of_the_older_format_is_refused_under_the_header_of_today_too(tmp_path: Path) -> None:
    old = json.loads(lines.read(VERSION_1).payloads[1])
    rewrite(
        tmp_path / "journal.jsonl",
        [{"format": "dspy_greater journal", "version": 2, "code": {}, "identity": IDENTITY}, old],
    )
    with pytest.raises(RunDirectoryError, match="Line 2 of .* is intact, but it is not an event of this version: It"):
        Journal.open(tmp_path, IDENTITY)


@pytest.mark.parametrize("version", [3, 0.5, "2", None, [2]])
def test_another_format_version_is_refused(tmp_path: Path, version: Any) -> None:
    path = tmp_path / "journal.jsonl"
    rewrite(path, [{"format": "dspy_greater journal", "version": version}, {"type": "Unheard"}])
    with pytest.raises(RunDirectoryError, match=r"has format version .*: another dspy_greater wrote it, and this one"):
        Journal.open(tmp_path, IDENTITY)


def test_a_file_of_our_lines_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for header in ({"format": "else"}, [1], None):
        rewrite(path, [header])
        with pytest.raises(RunDirectoryError, match="is not a journal. Move it away, or use another log_dir."):
            Journal.open(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    "payload",
    [
        {"type": "Unheard"},
        {"type": ["Warned"]},
        {"type": "Warned", "message": {"$pairs": [[[], 1]]}},
        {"type": "Warned", "message": {"$pairs": [[{"$list": []}, 1]]}},
        {"type": "Warned", "message": "", "extra": 1},
        {"type": "Evaluation"},
        [[[]]],
        None,
    ],
)
def test_an_intact_line_that_is_no_event_is_refused(tmp_path: Path, payload: Any) -> None:
    path = tmp_path / "journal.jsonl"
    header = {"format": "dspy_greater journal", "version": 2, "code": {}, "identity": IDENTITY}
    rewrite(path, [header, to_json(HAPPENED[0]), payload])
    with pytest.raises(RunDirectoryError, match="Line 3 of .* is intact, but it is not an event of this version"):
        Journal.open(tmp_path, IDENTITY)


# --- two runs in one directory ---


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that has a journal open in the directory, with one event in it."""
    code = """
        import sys
        from dspy_greater.run.events import Warned
        from dspy_greater.run.journal import Journal
        journal = Journal.open(sys.argv[1], {"seed": 0})
        journal.append(Warned("there"))
        sys.stdout.write("open\\n"); sys.stdout.flush()
        sys.stdin.read()
    """
    with python(code, tmp_path) as process:
        assert process.stdout and process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_a_second_run_fails_at_once_and_names_the_first(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    for _ in range(2):
        with pytest.raises(RunDirectoryError) as caught:
            Journal.open(tmp_path, {"seed": 0})
        assert str(caught.value) == (
            f"The run directory {tmp_path} is in use by another run: process {other_run.pid} on host "
            f"{os.uname().nodename}. Wait for it, end it, or give this run another log_dir."
        )


def test_a_killed_run_gives_its_directory_back(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    other_run.kill()
    other_run.wait()
    with Journal.open(tmp_path, {"seed": 0}) as journal:
        assert journal.recorded() == (Warned("there"),)


def test_a_run_in_the_same_process_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    first = Journal.open(tmp_path, IDENTITY)
    with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} on host"):
        Journal.open(tmp_path, IDENTITY)
    first.close()
    Journal.open(tmp_path, IDENTITY).close()


def test_a_refused_run_gives_its_directory_back(tmp_path: Path) -> None:
    write(tmp_path)
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match="began otherwise"):
            Journal.open(tmp_path, {"seed": 1})


@pytest.mark.parametrize("owner", [b"", b"{", b"[3]"])
def test_a_lock_without_a_name_is_still_a_lock(tmp_path: Path, owner: bytes) -> None:
    with Journal.open(tmp_path, IDENTITY):
        (tmp_path / "journal.lock").write_bytes(owner)
        with pytest.raises(RunDirectoryError, match="in use by another run: a process that has not written"):
            Journal.open(tmp_path, IDENTITY)


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("dspy_greater.run.lock._take", no_locks)
    with pytest.warns(RuntimeWarning, match=r"has no locks \(No locks available\): make sure that no second run"):
        write(tmp_path)
    assert len(lines.read((tmp_path / "journal.jsonl").read_bytes()).payloads) == len(HAPPENED) + 1


# --- a directory or a disk that cannot be written ---


def test_a_directory_that_cannot_be_made_is_an_error_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirectoryError) as caught:
            Journal.open(directory, IDENTITY)
        assert f"The run directory {directory} cannot be created or written: " in str(caught.value)
        assert "log_dir a directory that can be, or log_dir=None to run without" in str(caught.value)
        assert isinstance(caught.value, GreaterError)


def test_a_journal_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "journal.jsonl")
    with pytest.raises(RunDirectoryError, match="journal.jsonl is not a regular file. Move it away"):
        Journal.open(tmp_path, IDENTITY)
    (tmp_path / "journal.jsonl").unlink()
    Journal.open(tmp_path, IDENTITY).close()


class FullDisk:
    """`os.write` on a disk with this many bytes left; everything is cut short or refused after them."""

    def __init__(self, left: int, error: BaseException | None = None) -> None:
        self.left = left
        self.error = error or OSError(errno.ENOSPC, "No space left on device")
        self.really_write = os.write

    def __call__(self, file: int, data: bytes) -> int:
        if self.left <= 0:
            raise self.error
        written = self.really_write(file, bytes(data)[: self.left])
        self.left -= written
        return written


def test_a_full_disk_at_the_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(100))
        with pytest.raises(RunDirectoryError, match="cannot be created or written: No space left on device"):
            Journal.open(tmp_path, IDENTITY)
    assert recorded(tmp_path) == ()


def test_a_disk_that_fills_up_warns_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for left in (0, 1, 40, 400):  # the second event is longer than that
        directory = tmp_path / str(left)
        with monkeypatch.context() as patch, Journal.open(directory, IDENTITY) as journal:
            journal.append(HAPPENED[0])
            patch.setattr(os, "write", FullDisk(left))
            with pytest.warns(RuntimeWarning) as caught:
                append_all(journal, HAPPENED[1:])
            assert len(caught) == 1 and caught[0].category is RuntimeWarning
            assert str(caught[0].message) == (
                f"The journal {directory / 'journal.jsonl'} can no longer be written: No space left on device. "
                "The search goes on and will return its program, but if it is interrupted, it resumes from "
                "before this step. Free the disk, or use another log_dir, before the next run."
            )
            assert caught[0].filename == __file__
            assert bits(journal.events()) == bits(HAPPENED)
        assert bits(recorded(directory)) == bits(HAPPENED[:1])


def test_the_run_goes_on_even_when_its_warning_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal, monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(10))
        with pytest.raises(RuntimeWarning):
            journal.append(HAPPENED[0])
        journal.append(HAPPENED[1])
        assert bits(journal.events()) == bits(HAPPENED[:2])


def test_an_append_that_ctrl_c_cuts_short_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        for left in (0, 1, 30):
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", FullDisk(left, KeyboardInterrupt()))
                with pytest.raises(KeyboardInterrupt):
                    journal.append(HAPPENED[0])
        journal.append(HAPPENED[1])
        assert bits(journal.events()) == bits(HAPPENED[1:2])
    assert bits(recorded(tmp_path)) == bits(HAPPENED[1:2])


@pytest.mark.skipif(sys.platform == "win32", reason="needs the limit on the size of a file")
def test_a_real_limit_on_the_size_of_the_file_keeps_what_fits(tmp_path: Path) -> None:
    code = """
        import resource, sys, warnings
        from dspy_greater.run.events import Warned
        from dspy_greater.run.journal import Journal
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        warnings.simplefilter("always")
        with Journal.open(sys.argv[1], {"seed": 0}) as journal:
            for i in range(40):
                journal.append(Warned(f"event {i}"))
            sys.stdout.write(str(len(journal.events())))
    """
    with python(code, tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "40"), err
    assert err.count("can no longer be written: File too large") == 1
    with Journal.open(tmp_path, {"seed": 0}) as journal:
        kept = journal.recorded()
    assert 5 < len(kept) < 40
    assert kept == tuple(Warned(f"event {i}") for i in range(len(kept)))
