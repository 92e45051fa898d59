"""A search joins a Ray cluster that others started, from inside it and as a client; with its token, and not without."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden_runs import exact_match
from on_a_cluster import ALONE, HERE
from ray_marks import with_ray
from test_workers import lines_of

from dspy_greater import GReaTer
from dspy_greater.errors import MissingExtraError, WorkerError, WorkerLostError
from dspy_greater.workers import cluster as clusters
from dspy_greater.workers.jobs import Job

pytest.importorskip("ray", reason="Ray is not installed: pip install 'dspy-greater[ray]'")

from dspy_greater.workers.ray_actors import asked, end, meant

ROOT = Path(__file__).resolve().parent.parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-test-that-is-long-enough"}
STRANGER = {"RAY_AUTH_MODE": "disabled"}
PATIENCE = 120.0  # seconds that a cluster may take to start


def environment(more: dict[str, str]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [own.get("PYTHONPATH")])]
    return {**own, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def is_open(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """A cluster of two CPUs that asks for a token, and its two addresses."""
    pytest.importorskip("grpc", reason="Ray's client is not installed: pip install 'ray[client]'")
    port, client = free_ports()
    folder = tempfile.mkdtemp(prefix="ray")  # its sockets have to have short names
    options = ["--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder]
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
    ports = ["--port", f"{port}", "--ray-client-server-port", f"{client}"]
    head = subprocess.Popen(
        [*command, *ports, *options], env=environment(TOKEN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + PATIENCE
        while not (is_open(port) and is_open(client)):
            assert head.poll() is None and time.monotonic() < until, "The cluster did not start."
            time.sleep(0.5)
        yield {"inside": f"127.0.0.1:{port}", "client": f"ray://127.0.0.1:{client}"}
    finally:
        head.send_signal(signal.SIGTERM)  # it ends all that it started
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def search(where: str, folder: Path, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.on_a_cluster", where, str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment(more), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search with one worker in its own process."""
    folder = tmp_path_factory.mktemp("here")
    done = search(HERE, folder, {})
    assert done.returncode == 0, done.stderr
    return folder


@with_ray
@pytest.mark.parametrize("way", ["inside", "client"])
def test_a_search_on_a_cluster_writes_the_journal_of_one_without(
    way: str, addresses: dict[str, str], here: Path, tmp_path: Path
) -> None:
    done = search(addresses[way], tmp_path, TOKEN)
    assert done.returncode == 0, done.stderr
    assert len(lines_of(here)) >= 5
    assert lines_of(tmp_path) == lines_of(here)


@pytest.mark.slow
def test_a_search_without_workers_differs_from_one_with_them_in_last_digits_alone(here: Path, tmp_path: Path) -> None:
    done = search(ALONE, tmp_path, {})
    assert done.returncode == 0, done.stderr
    alone, others = lines_of(tmp_path), lines_of(here)
    assert alone != others  # batches are others, and so is rounding
    assert alike(alone, others)


def alike(one: Any, other: Any) -> bool:
    """Whether two journals say the same, to four digits; not what was spent, which follows from the batches."""
    if isinstance(one, dict):
        names = one.keys() - {"spent"}
        return names == other.keys() - {"spent"} and all(alike(one[name], other[name]) for name in names)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5) if isinstance(one, float) else one == other


@with_ray
def test_who_may_not_join_or_has_the_wrong_port_is_told_so(addresses: dict[str, str], tmp_path: Path) -> None:
    inside = addresses["inside"]
    other = {**TOKEN, "RAY_AUTH_TOKEN": "another-token-that-is-long-enough"}
    asks = f"No Ray cluster answers at '{inside}': it asks for a token, and this process has none or another one."
    expected = [
        (inside, STRANGER, f"{asks} To join, set RAY_AUTH_MODE=token before Python starts, with its token in ~/.ray/"),
        (inside, other, f"{asks} To join, check that ~/.ray/auth_token here is the one of its head."),
        (f"ray://{inside}", TOKEN, f"No Ray cluster answers at 'ray://{inside}' (ray client connection timeout), tho"),
    ]
    with ThreadPoolExecutor(3) as several:  # each waits half a minute for Ray to give up
        folders = [tmp_path / f"{number}" for number in range(3)]
        done = list(several.map(lambda each, folder: search(each[0], folder, each[1]), expected, folders))
    for each, (*_, said) in zip(done, expected, strict=True):
        assert each.returncode == 1
        assert each.stderr.strip().splitlines()[-1].startswith(said)
        assert "Traceback" not in each.stderr and "UserWarning" not in each.stderr


# --- without a cluster


def test_an_address_for_rays_client_needs_what_the_client_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "find_spec", lambda name: None if name == "grpc" else SimpleNamespace())
    with pytest.raises(MissingExtraError, match=r"'ray://head:10001' is .* pip install 'ray\[client\]', here and"):
        GReaTer(metric=exact_match, workers="ray://head:10001")
    assert GReaTer(metric=exact_match, workers="head:6379").workers == "head:6379"


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", "ray://[::1]:1"])
def test_where_nothing_listens_for_clients_the_error_says_what_a_head_needs(address: str) -> None:
    with pytest.raises(WorkerError, match=f"No Ray cluster answers at '{re.escape(address)}'.*where ray.client. is"):
        clusters._refuse_silence(address)


@pytest.mark.parametrize("late", [1, 2])
def test_a_head_that_is_late_once_is_asked_again_and_then_its_reason_is_said(
    late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    asked: list[str] = []

    def start(where: str, **_: Any) -> None:
        asked.append(where)
        if len(asked) <= late:
            raise ConnectionError("Initialization failure from server:\nTraceback\nRuntimeError: No server in 30 s.")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(clusters, "refuse_without_ray", lambda where: None)  # whether or not its client is here
    monkeypatch.setattr(clusters, "_refuse_silence", lambda where: None)
    if late == 1:
        clusters.joined("ray://head:10001", 2)
    else:
        with pytest.raises(
            WorkerError, match=r"\(Initialization failure from server: RuntimeError: No server in 30 s\)"
        ):
            clusters.joined("ray://head:10001", 2)
    assert asked == ["ray://head:10001"] * 2


def test_a_connection_to_a_cluster_that_broke_is_said_and_closing_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    broken = ConnectionError('terminated with:\n\tdetails = "Attempted to reconnect"\n\tdebug = "x"')

    def fail(*_: Any) -> Any:
        raise broken

    actor = SimpleNamespace(run=SimpleNamespace(remote=fail))
    found = meant(asked(actor, Job("next", ((1, 2),))).exception(timeout=0) or ValueError())
    assert isinstance(found, WorkerError) and not isinstance(found, WorkerLostError)
    assert str(found).startswith("The connection to the Ray cluster broke: Attempted to reconnect. What was found")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "kill", fail)
    end(actor)
