"""Experiment trackers: what they are handed, and that none of their faults ends a search.

Stand-ins are there in every environment; where the real packages are installed, they are used as well, offline.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_engine import instruction_of, optimizer, planted_engine, planted_rows, program_on
from scripted_gradsum import ROWS, program
from scripted_gradsum import optimizer as gradsum

from dspy_greater import GradSum, GReaTer
from dspy_greater.errors import GreaterError, MissingExtraError, SettingsError
from dspy_greater.run.trackers import Numbers, flattened, tracked

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]


class StandIn:
    """As much of MLflow and of wandb as is used; `broken` names the function that raises."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.active = broken, [] if broken != "active" else [SimpleNamespace(info=None)]
        self.nested: list[bool] = []
        self.ended: list[Any] = []
        self.parameters: dict[str, Any] = {}
        self.metrics: list[dict[str, float]] = []
        self.artifacts: dict[str, str] = {}
        self.run: Any = None
        self.config, self.id = SimpleNamespace(update=self.log_params), "abc"

    def _did(self, name: str) -> None:
        if name == self.broken:
            raise ConnectionError(f"{name}: no server")

    def active_run(self) -> Any:
        return self.active[-1] if self.active else None

    def start_run(self, run_name: str, nested: bool) -> Any:
        self._did("start_run")
        self.nested.append(nested)
        self.active.append(SimpleNamespace(info=SimpleNamespace(run_id="r1")))
        return self.active[-1]

    def log_params(self, parameters: dict[str, Any], allow_val_change: bool = False) -> None:
        self._did("log_params")
        self.parameters |= parameters

    def log_metrics(self, metrics: dict[str, float], step: int, run_id: str) -> None:
        self._did("log_metrics")
        self.metrics.append({"step": step, **metrics})

    def log_artifact(self, path: str, run_id: str = "", name: str = "", type: str = "") -> None:
        self._did("log_artifact")
        self.artifacts[Path(path).name] = Path(path).read_text(encoding="utf-8")

    def end_run(self, status: str) -> None:
        self._did("end_run")
        self.active.pop()
        self.ended.append(status)

    # --- wandb ---

    def init(self, project: str) -> Any:
        self._did("init")
        self.run = self
        return self

    def log(self, metrics: dict[str, float]) -> None:
        self._did("log")
        self.metrics.append(metrics)

    def finish(self, exit_code: int) -> None:
        self._did("finish")
        self.run = None
        self.ended.append(exit_code)


def compiled(**settings: Any) -> Any:
    return optimizer(steps=2, **settings).compile(program_on(planted_engine()), TRAIN, valset=VALIDATION)


@pytest.fixture(params=["mlflow", "wandb"])
def package(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, package: str) -> Callable[..., StandIn]:
    def put(broken: str = "") -> StandIn:
        found = StandIn(broken)
        monkeypatch.setitem(sys.modules, package, found)
        return found

    return put


@pytest.mark.slow
def test_a_run_has_parameters_a_metric_a_step_and_the_report(package: str, stand_in: Callable[..., StandIn]) -> None:
    found = stand_in()
    better = compiled(**{f"use_{package}": True})
    assert found.parameters["settings.steps"] == (2 if package == "wandb" else "2")
    assert "predictors.predict.weights" in found.parameters
    steps = better.detailed_results.predictors[0].steps
    assert [each["step"] for each in found.metrics] == [0, 1, 2, 2]
    assert [each["loss"] for each in found.metrics[1:3]] == [each.chosen.cross_entropy for each in steps]
    assert [each["tokens_written"] for each in found.metrics[1:3]] == [e.spent["generated_tokens"] for e in steps]
    assert found.metrics[-1]["validation_score"] == better.score
    assert "<!doctype html>" in found.artifacts["report.html"].lower()
    assert found.ended == ["FINISHED" if package == "mlflow" else 0]


@pytest.mark.slow
def test_a_run_directory_gives_the_best_program_as_well(
    package: str, stand_in: Callable[..., StandIn], tmp_path: Path
) -> None:
    found = stand_in()
    better = compiled(log_dir=tmp_path, **{f"use_{package}": True})
    assert found.artifacts["report.html"] == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert instruction_of(better) in json.dumps(json.loads(found.artifacts["best_program.json"]), ensure_ascii=False)


@pytest.mark.slow
def test_grad_sum_is_tracked_by_iterations(package: str, stand_in: Callable[..., StandIn]) -> None:
    found = stand_in()
    gradsum(iterations=2, **{f"use_{package}": True}).compile(program(), trainset=ROWS[:8], valset=ROWS[8:])
    assert [each["step"] for each in found.metrics] == [1, 2, 2]
    assert all(each["lm_calls"] > 0 and "best_score" in each for each in found.metrics[:2])
    assert "validation_score" in found.metrics[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "broken", "told"),
    [
        ("mlflow", "start_run", "The run in mlflow could not be opened: ConnectionError: start_run: no server"),
        ("mlflow", "log_params", "The run in mlflow could not be opened"),
        ("mlflow", "log_metrics", "The callback MLflow raised ConnectionError: log_metrics: no server .at Sea"),
        ("mlflow", "log_artifact", "The run in mlflow could not be given report.html: ConnectionError"),
        ("mlflow", "end_run", "The run in mlflow could not be closed: ConnectionError"),
        ("wandb", "init", "The run in wandb could not be opened: ConnectionError"),
        ("wandb", "log", "The callback WandB raised ConnectionError"),
        ("wandb", "log_artifact", "The run in wandb could not be given report.html: ConnectionError"),
        ("wandb", "finish", "The run in wandb could not be closed: ConnectionError"),
    ],
    indirect=["package"],
)  # fmt: skip
def test_a_tracker_that_fails_is_a_warning_and_the_search_finds_the_same(
    package: str, broken: str, told: str, stand_in: Callable[..., StandIn]
) -> None:
    expected = instruction_of(compiled())
    found = stand_in(broken)
    with pytest.warns(RuntimeWarning, match=told) as caught:
        assert instruction_of(compiled(**{f"use_{package}": True})) == expected
    assert len(caught) == 1
    assert len(found.ended) == (broken not in {"start_run", "end_run", "init", "finish"})  # what was opened is closed


@pytest.mark.parametrize(
    "make", [lambda **given: GReaTer(metric=len, **given), lambda **given: GradSum("t", "c", **given)]
)
def test_a_missing_package_is_refused_at_once_with_the_line_that_installs_it(
    make: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    with pytest.raises(MissingExtraError, match=rf"use_{package}=True needs {package}, .*pip install 'dspy-greater"):
        make(**{f"use_{package}": True})
    assert issubclass(MissingExtraError, GreaterError)
    with pytest.raises(SettingsError, match=f"use_{package}='yes': give True or False"):
        make(**{f"use_{package}": "yes"})
    make(**{f"use_{package}": None})


def test_a_run_of_the_callers_is_the_parent_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    found = StandIn("active")
    monkeypatch.setitem(sys.modules, "mlflow", found)
    compiled(use_mlflow=True)
    assert found.nested == [True] and len(found.active) == 1


def test_a_wandb_run_of_the_callers_is_used_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    found = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", found)
    found.init("theirs")
    compiled(use_wandb=True)
    assert found.metrics and found.run is found and not found.ended


def test_an_error_closes_the_run_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", found)
    from dspy_greater.run.trackers import MLflow

    with pytest.raises(LookupError), tracked((MLflow,), {"a": 1}, None):
        raise LookupError
    assert found.ended == ["FAILED"]


def test_numbers_that_are_none_are_left_out() -> None:
    from dspy_greater.run.events import Validated, Warned

    assert Numbers().of(Validated("predict", {"seed": math.nan}, "seed")) == {}
    assert Numbers().of(Warned("careful")) == {}


def test_names_of_predictors_become_names_of_parameters() -> None:
    assert flattened({"hops[0].generate": {"mode": "rewrite"}, "a:b": None}) == {
        "hops_0_.generate.mode": "rewrite",
        "a_b": None,
    }


# --- the real packages ---

# What MLflow warns of among its own modules: at the first use of a store, and where its DSPy flavour is imported.
STORE = "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning:mlflow.store.tracking.sqlalchemy_store"
HINTS = "ignore:.*Any type hint is inferred as AnyType:UserWarning:mlflow.types.type_hints"


@pytest.fixture
def real_mlflow(tmp_path: Path) -> Iterator[Any]:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'runs.db'}")
    mlflow.create_experiment("searches", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment("searches")
    yield mlflow
    safety = importlib.import_module("mlflow.utils.autologging_utils.safety")
    safety.revert_patches("dspy")  # switched off, they still take other tests' warnings


@pytest.mark.slow
@pytest.mark.filterwarnings(STORE)
def test_mlflow_keeps_a_run_in_a_local_store(real_mlflow: Any, tmp_path: Path) -> None:
    better = compiled(use_mlflow=True)
    [run] = real_mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED" and run.data.params["settings.steps"] == "2"
    client = real_mlflow.MlflowClient()
    steps = better.detailed_results.predictors[0].steps
    kept = client.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in kept[1:]] == [
        (number, pytest.approx(step.chosen.cross_entropy)) for number, step in enumerate(steps, 1)
    ]
    assert run.data.metrics["validation_score"] == better.score
    assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert real_mlflow.active_run() is None


@pytest.mark.slow
@pytest.mark.filterwarnings(STORE, HINTS)
@pytest.mark.parametrize("use_mlflow", [False, True])
def test_autolog_sees_the_compile_and_changes_nothing(real_mlflow: Any, use_mlflow: bool) -> None:
    expected = instruction_of(compiled())
    real_mlflow.dspy.autolog(log_compiles=True, log_evals=True, log_traces_from_compile=True)
    try:
        found = compiled(use_mlflow=use_mlflow)
    finally:
        real_mlflow.dspy.autolog(disable=True)
    assert instruction_of(found) == expected
    runs = real_mlflow.search_runs(output_format="list")
    names = [run.data.tags.get("mlflow.runName") for run in runs]
    assert len(runs) == 1 + use_mlflow and names.count("dspy_greater") == use_mlflow
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what the package warns of itself
def test_wandb_keeps_a_run_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    compiled(use_wandb=True)
    assert wandb.run is None
    [kept] = tmp_path.rglob("run-*.wandb")
    assert kept.stat().st_size > 0 and b"settings.steps" in kept.read_bytes()
