"""The speed benchmark: honest rivals, a gate before the clock, a floor that nobody can undercut."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.speed import machine, timing
from benchmarks.speed.command import main, parse
from benchmarks.speed.floor import Nodes, floor_seconds, model_flops
from benchmarks.speed.gate import differences, run_gate
from benchmarks.speed.machine import measure
from benchmarks.speed.report import save
from benchmarks.speed.scale import doubling
from benchmarks.speed.shapes import SHAPES, build
from benchmarks.speed.sizes import Ceilings, ModelSize
from benchmarks.speed.step import PHASES, Clock, RowLosses, Step
from benchmarks.speed.timing import ARMS, Run, run_all, run_once
from benchmarks.speed.work import INSTRUCTION, Work, pocket_work, random_work
from dspy_greater.errors import LossError, SettingsError
from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.session import Session

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ROWS, REASONING, MU = 11, 5, 3  # more rows than one batch of nine
TINY = ["--shape", "tiny", "--rows", str(ROWS), "--reasoning-tokens", str(REASONING), "--prompt-tokens", "80"]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LEAST_SECONDS", 1e-3)
    monkeypatch.setattr(machine, "_COPY_BYTES", (1 << 16, 1 << 20))


@pytest.fixture(scope="module")
def engine() -> Engine:
    # One pass for all rows, so that the counts of passes below are the schedules' own.
    return build("tiny", device=CPU, dtype=torch.float32, max_batch_tokens=8192)


@pytest.fixture(scope="module")
def work(engine: Engine) -> Work:
    drawn = random_work(engine, rows=ROWS, reasoning_tokens=REASONING, selections=MU, prompt_tokens=80)
    return drawn.with_current_reasoning(engine)


@pytest.fixture(scope="module")
def spent(engine: Engine, work: Work) -> dict[str, dict[str, Counters]]:
    """Arm -> phase -> what it computed."""
    return {name: run_once(name, arm, engine, work, rows_done=ROWS).counters for name, arm in ARMS.items()}


def made_up_step() -> Step:
    losses = {7: RowLosses((0.5, 1.0), (2.0, 2.0))}
    return Step((7, 8), ((1.0, -2.0), (3.0, 4.0)), (7,), ((1, 2), (3, 4)), {7: ((5, 6), (7, 8))}, losses)


# --- the command ---


@pytest.mark.slow
def test_one_command_writes_a_complete_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "speed.json"
    assert main([*TINY, "--repeats", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["gate"] == "passed" and "in float64" in result["gate_on"]
    assert set(result["ratio"]) == {"released", "plain"} and all(value > 0 for value in result["ratio"].values())
    assert result["floor_seconds"] == pytest.approx(sum(result["floor"].values())) and result["floor_seconds"] > 0
    assert {"device", "cores", "torch", "matmul_flops_per_second", "copy_bytes_per_second"} <= set(result["machine"])
    assert result["settings"]["rows"] == ROWS and result["settings"]["reasoning_tokens"] == REASONING
    assert result["command"].startswith("python -m benchmarks speed --shape tiny")
    for arm in result["arms"].values():
        assert arm["repeats"] == 2 and arm["extrapolated"] is None and arm["peak_memory_bytes"] > 0
        assert set(arm["phases"]) == set(PHASES)
        assert arm["seconds"]["min"] <= arm["seconds"]["median"] <= arm["seconds"]["max"]
    said = capsys.readouterr().out
    assert "gate passed" in said and "| gradient | ours |" in said and "times the floor" in said


def test_a_broken_arm_fails_the_gate_and_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = ARMS["ours"]

    def broken(engine: Engine, work: Work, clock: Clock) -> Step:
        step = honest(engine, work, clock)
        return replace(
            step, losses={token: RowLosses(each.fluency_nll, each.fluency_nll) for token, each in step.losses.items()}
        )

    monkeypatch.setitem(ARMS, "ours", broken)
    out = tmp_path / "speed.json"
    assert main([*TINY, "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "do not agree" in said and "ours against plain: cross-entropy under candidate" in said
    assert "seconds" not in said
    result = json.loads(out.read_text())
    assert result["gate"] == "failed" and result["differences"] and "arms" not in result


@pytest.mark.slow
def test_an_extrapolated_arm_says_so_in_the_table_and_in_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    assert main([*TINY, "--repeats", "1", "--released-part", "1", "--out", str(out)]) == 0
    arms = json.loads(out.read_text())["arms"]
    assert arms["released"]["extrapolated"] == f"extrapolated from 9 of {ROWS} rows"
    assert arms["plain"]["extrapolated"] is None and arms["ours"]["extrapolated"] is None
    assert f"extrapolated from 9 of {ROWS} rows" in capsys.readouterr().out


@pytest.mark.slow
def test_another_dtype_passes_the_gate_on_a_small_float64_model_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--repeats", "1", "--dtype", "bfloat16", "--arms", "plain,ours"]) == 0
    assert "a small float64 version of tiny" in capsys.readouterr().out


@pytest.mark.slow
def test_the_growth_of_the_cost_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    command = [*TINY, "--scale", "mu", "--scale-from", "1", "--scale-to", "5", "--repeats", "1", "--out", str(out)]
    assert main(command) == 0
    scale = json.loads(out.read_text())["scale"]
    assert [point["value"] for point in scale["points"]] == [1, 2, 4] and scale["axis"] == "candidates"
    assert all(set(point["seconds"]) == {"ours"} for point in scale["points"])
    assert "#" in capsys.readouterr().out
    assert doubling(8, 8) == [8]


def test_options_that_cannot_work_are_refused_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", "tiny", "--prompt-tokens", "30"]) == 2
    assert "A prompt of 30 tokens has no room for an input; give at least 70" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--arms", "ours,theirs"])
    assert "there is no arm theirs" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="There is no shape 'gpt-5'. The shapes are pocket, llama-3-8b"):
        build("gpt-5", device=CPU, dtype=torch.float32)


def test_without_a_number_as_many_candidates_reason_as_in_the_search_that_is_measured() -> None:
    assert (parse([]).mu, parse(["--overhead"]).mu, parse(["--overhead", "--mu", "3"]).mu) == (3, 1, 3)


def test_an_unknown_benchmark_is_answered_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["sped"]) == 2
    said = capsys.readouterr().err
    assert "There is no benchmark 'sped'. Did you mean 'speed'?" in said and "python -m benchmarks NAME" in said
    assert benchmarks.main([]) == 2
    assert benchmarks.main(["--help"]) == 0


@pytest.mark.slow
def test_the_benchmark_runs_where_dspy_is_not_installed() -> None:
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"dspy", "litellm", "datasets"}}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Missing())
from benchmarks.__main__ import main
from benchmarks.speed import machine
machine._LEAST_SECONDS, machine._COPY_BYTES = 1e-3, (1 << 16, 1 << 20)
sys.exit(main({["speed", *TINY, "--repeats", "1", "--arms", "ours"]!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gate passed" in done.stdout


# --- the arms ---


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in ("pocket", "tiny")])
def test_the_arms_agree_on_every_architecture(shape: str) -> None:
    engine = build(shape, device=CPU, dtype=torch.float32, small=True)
    work = random_work(engine, rows=ROWS, reasoning_tokens=REASONING, selections=MU, prompt_tokens=80)
    assert run_gate(engine, work.with_current_reasoning(engine), ARMS) == []


@pytest.mark.slow
def test_the_arms_agree_on_the_pocket_model_whose_prompt_is_the_deployed_one() -> None:
    engine = build("pocket", device=CPU, dtype=torch.float32)
    work = pocket_work(engine, rows=4, reasoning_tokens=12, selections=MU).with_current_reasoning(engine)
    assert engine.tokenizer.decode(work.instruction).strip() == INSTRUCTION  # the first token may take a blank along
    for prompt in work.prompts(work.instruction):
        text = engine.tokenizer.decode(prompt)
        assert tuple(engine.tokenizer(text, add_special_tokens=False)["input_ids"]) == prompt
    assert run_gate(engine, work, ARMS) == []


def test_every_row_writes_exactly_as_long_as_it_is_told(engine: Engine, work: Work) -> None:
    for arm in ARMS.values():
        step = arm(engine, work, Clock(engine))
        assert {len(row) for part in step.reasoning.values() for row in part} == {REASONING}
        assert len(step.selected) == MU == len(step.losses)


@pytest.mark.slow
def test_the_released_schedule_does_the_work_that_is_described(spent: dict[str, dict[str, Counters]]) -> None:
    done = spent["released"]
    assert done["reasoning"].generated_tokens == (1 + MU) * ROWS * REASONING
    assert done["reasoning"].forwards == (1 + MU) * 2 * REASONING  # two batches of nine for eleven rows
    assert done["proposals"].forwards == done["gradient"].forwards == ROWS
    assert done["scoring"].forwards == MU * ROWS
    assert done["gradient"].lm_head_rows == done["gradient"].prefilled_tokens == done["gradient"].backward_tokens


@pytest.mark.slow
def test_the_plain_schedule_is_batched_and_reuses_nothing(spent: dict[str, dict[str, Counters]]) -> None:
    done = spent["plain"]
    assert done["reasoning"].generated_tokens == (1 + MU) * ROWS * REASONING
    assert done["reasoning"].forwards == 2 * REASONING  # the current instruction, then all candidates
    assert done["proposals"].forwards == done["gradient"].forwards == done["scoring"].forwards == 1


def test_ours_reuses_the_reasoning_and_makes_logits_where_they_are_needed(
    spent: dict[str, dict[str, Counters]], work: Work
) -> None:
    done = spent["ours"]
    assert done["reasoning"].generated_tokens == MU * ROWS * REASONING
    most = ROWS * (len(work.instruction) + len(work.rows[0].answer)) + 1
    assert done["gradient"].lm_head_rows <= most and done["scoring"].lm_head_rows <= MU * most
    for phase in PHASES:
        assert done[phase].prefilled_tokens <= spent["plain"][phase].prefilled_tokens


def test_the_rivals_leave_the_weights_frozen_and_without_gradients(engine: Engine, work: Work) -> None:
    for name in ("released", "plain"):
        ARMS[name](engine, work, Clock(engine))
        assert not any(parameter.requires_grad for parameter in engine.model.parameters())
        assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_too_few_candidates_for_the_whole_work_are_an_error(engine: Engine, work: Work) -> None:
    greedy = replace(work, forbidden=frozenset(range(510)))
    for arm in ARMS.values():
        with pytest.raises(LossError, match="candidates for 3 selections"):
            arm(engine, greedy, Clock(engine))


# --- the gate ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidates": (8, 7)}, "candidates (8, 7), not (7, 8)"),
        ({"selected": (8,)}, "selected (8,), not (7,)"),
        ({"gradient": ((1.0, -2.0), (3.0, 4.0001))}, "gradient: 2.5e-05 apart"),
        ({"gradient": ((1.0, -2.0), (3.0, float("nan")))}, "gradient: nan apart"),
        ({"gradient": ((1.5, -2.0), (2.5, 4.0))}, "per-example gradient: 1.2e-01 apart"),
        ({"current_reasoning": ((1, 2), (3, 5))}, "the current instruction differs in 1 rows; row 1 from token 1 on"),
        ({"reasoning": {7: ((5, 6), (9, 8))}}, "candidate 7 differs in 1 rows; row 1 from token 0 on"),
        ({"losses": {7: RowLosses((0.5, 1.1), (2.0, 2.0))}}, "cross-entropy under candidate 7: 5.0e-02 apart"),
        ({"losses": {7: RowLosses((0.5, 1.0), (2.0,))}}, "fluency under candidate 7: 1 rows, not 2"),
    ],
)
def test_the_gate_sees_every_kind_of_difference(change: dict[str, Any], said: str) -> None:
    step = made_up_step()
    assert differences(step, step, temperature=0.5) == []
    assert said in " | ".join(differences(replace(step, **change), step, temperature=0.5))


def test_the_gate_sees_rows_that_stopped_early(engine: Engine, work: Work) -> None:
    def lazy(engine: Engine, work: Work, clock: Clock) -> Step:
        return ARMS["plain"](engine, work.shortened(REASONING - 1), clock)

    assert "not 5" in run_gate(engine, work, {"plain": lazy})[-1]


# --- clock and repeats ---


@pytest.mark.slow
def test_the_arms_take_turns_and_every_round_is_reported(engine: Engine, work: Work) -> None:
    order: list[str] = []

    def noted(name: str) -> Callable[..., Step]:
        def arm(engine: Engine, work: Work, clock: Clock) -> Step:
            order.append(f"{name}{len(work.rows)}")
            return made_up_step()

        return arm

    reported: list[int] = []
    runs = run_all(
        {"released": noted("released"), "ours": noted("ours")},
        engine,
        work,
        repeats=2,
        parts={"released": 9},
        time_limit=None,
        after_repeat=lambda runs: reported.append(len(runs)),
    )
    assert order == ["released9", f"ours{ROWS}", f"ours{ROWS}", "released9"]
    assert reported == [2, 4]
    assert [run.scale for run in runs if run.arm == "released"] == [ROWS / 9, ROWS / 9]


@pytest.mark.slow
def test_the_time_limit_ends_the_repeats_but_never_the_first(engine: Engine, work: Work) -> None:
    arms = {"ours": lambda *_: made_up_step()}
    settings: dict[str, Any] = {"repeats": 5, "parts": {}, "after_repeat": lambda runs: None}
    assert len(run_all(arms, engine, work, time_limit=0.0, **settings)) == 1
    assert len(run_all(arms, engine, work, time_limit=None, **settings)) == 5


def test_ratios_are_taken_within_a_round() -> None:
    def run(arm: str, seconds: float) -> Run:
        return Run(arm, {"gradient": seconds}, {}, 0, 1, 1)

    runs = [run("plain", 2.0), run("ours", 1.0), run("ours", 10.0), run("plain", 40.0)]
    spread = timing.ratios(runs, "plain", "ours")
    assert (spread.least, spread.median, spread.most) == (2.0, 3.0, 4.0)


def test_a_result_replaces_the_earlier_one_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    for value in (1, 2):
        save(out, {"value": value})
    assert json.loads(out.read_text()) == {"value": 2} and list(tmp_path.iterdir()) == [out]


# --- the floor ---


def test_where_products_are_slow_the_smallest_is_measured_once(engine: Engine) -> None:
    size, at = ModelSize.of(engine.model), itertools.count(step=2.0)  # no call takes less than two seconds
    found = measure(size, tokens=16, device=CPU, dtype=torch.float32, now=at.__next__)
    assert found.matmul_flops == 2 * 16 * size.hidden * size.hidden / 2.0
    assert next(at) == 4 * 2.0  # begin and end of one product and of one copy


@pytest.mark.parametrize("after", [0, 2])
def test_what_has_to_be_computed_once_is_every_distinct_beginning(after: int) -> None:
    sequences = [(1, 2, 3, 4), (1, 2, 3), (1, 2, 5), (2, 2), (1, 2, 3, 4)]
    beginnings = {each[:end] for each in sequences for end in range(after + 1, len(each) + 1)}
    nodes = Nodes.of(sequences, after=after)
    assert nodes == Nodes(len(beginnings), sum(map(len, beginnings)))


def test_the_size_of_a_model_is_read_from_its_weights(engine: Engine) -> None:
    size, config = ModelSize.of(engine.model), engine.model.config
    attention = 64 * 64 * 2 + 2 * 64 * 32  # queries, output; keys, values of two heads
    assert size.body_parameters == config.num_hidden_layers * (attention + 3 * 64 * 128)
    assert size.head_parameters == 512 * 64
    assert size.token_bytes == 2 * 2 * 2 * 16 * 4


def test_no_arm_computes_less_than_the_floor_counts(
    engine: Engine, work: Work, spent: dict[str, dict[str, Counters]]
) -> None:
    size = ModelSize.of(engine.model)
    selected = [token for token in range(1, 5) if token != work.current][:MU]
    one = Ceilings(matmul_flops=1.0, copy_bytes=float("inf"))  # seconds are operations
    floor = floor_seconds(work, size, one, selected)
    for name, phases in spent.items():
        for phase in PHASES:
            done = model_flops(phases[phase], size, work, weight_gradients=name == "released")
            assert done > 0.95 * floor[phase], (name, phase)  # attention at the mean length is approximate


def test_the_floor_of_decoding_reads_the_weights_for_every_token(engine: Engine, work: Work) -> None:
    size = ModelSize.of(engine.model)
    endless = Ceilings(matmul_flops=float("inf"), copy_bytes=1.0)  # seconds are bytes
    floor = floor_seconds(work, size, endless, [1, 2, 3])
    assert floor["reasoning"] > REASONING * size.weight_bytes
    assert floor["proposals"] == size.weight_bytes


# --- overhead ---


@pytest.mark.slow
def test_a_real_search_is_split_into_token_level_work_and_overhead() -> None:
    from benchmarks.speed.overhead import CALLBACKS, MODEL, search

    before = Engine.exclusive, Session.generate
    (step,) = search(rows=3, steps=1, selections=1)
    assert 0 < step.token_level < step.seconds and 0 < step.overhead < 1
    assert MODEL not in step.profile and {"adapter: prompt", "metric", "journal"} <= set(step.profile)
    assert step.token_level + sum(step.profile.values()) == pytest.approx(step.seconds)
    assert 0 < step.profile[CALLBACKS] < step.seconds
    assert (Engine.exclusive, Session.generate) == before
