"""Processes that divide the weights among themselves find what one with all of them finds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Linear, ModuleDict, ModuleList

from dspy_greater.workers.fsdp import repeated_blocks

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("llama", "gemma2")

# --- without Ray: two processes, each with a part of the weights


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, see `members_of_a_group.py`."""
    folder = tmp_path_factory.mktemp("members")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.members_of_a_group"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [each.communicate(timeout=300)[1] for each in started]
    finally:
        for each in started:
            each.kill()
    assert [each.returncode for each in started] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_weights_come_to_the_bits_of_the_whole_in_any_order_of_jobs(members: Any, kind: str) -> None:
    for each in members:
        assert each[kind]["divided"] == each[kind]["whole"] == each[kind]["backwards"]
        assert len(each[kind]["whole"]) == 6
        assert len(each[kind]["identities"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_process_holds_half_of_the_layers_and_all_of_the_embeddings(members: Any, kind: str) -> None:
    for name, count in members[0][kind]["counts"].items():
        here = [each[kind]["here"][name] for each in members]
        if ".layers." in name:
            assert sum(here) == count and max(here) <= count / 2 + 32  # a row more where rows do not halve
        else:
            assert here == [count, count]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_do_not_fit_are_halved_by_all_processes_alike(members: Any, kind: str) -> None:
    for each in members:
        assert each[kind]["starved"] == each[kind]["halved"] != each[kind]["whole"]


@pytest.mark.slow
def test_processes_that_are_about_to_read_unlike_tokens_stop(members: Any) -> None:
    assert {each["apart"] for each in members} == {"The processes of a group were about to read unlike tokens."}


@pytest.mark.slow
def test_a_process_that_waits_for_the_others_in_vain_is_lost(members: Any) -> None:
    assert members[0]["alone"].startswith("A process of a group could not go on: Timed out waiting 1000ms")


def test_the_blocks_to_divide_are_found_by_what_they_hold() -> None:
    layers = ModuleList([ModuleDict({"experts": ModuleList([Linear(8, 8), Linear(8, 8)])}) for _ in range(3)])
    small, alone = ModuleList([Linear(1, 1), Linear(1, 1)]), ModuleList([Linear(8, 8)])
    model = ModuleDict({"embed": Linear(8, 4), "decoder": ModuleDict({"layers": layers}), "small": small, "one": alone})
    assert repeated_blocks(model) == [expert for layer in layers for expert in layer["experts"]]
    called = ModuleList([Linear(8, 8) for _ in range(3)])
    assert repeated_blocks(ModuleDict({"embed": Linear(8, 4), "tower": called, "layers": layers})) == [
        *called,
        *(expert for layer in layers for expert in layer["experts"]),
    ]
    assert repeated_blocks(Linear(8, 8)) == []
