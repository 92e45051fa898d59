"""What can go wrong, and where it is tested that nothing worse comes of it; and the faults that have no other home.

`FAULTS` is the table. Whoever finds another fault adds a line, and a test; a line whose test is gone fails.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import dspy
import pytest
from any_event import bits
from chat_families import KINDS, TEMPLATES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_engine import RUN_FILES, instruction_of, optimizer, planted_engine, planted_rows, program_on
from test_journal import HAPPENED, IDENTITY, recorded, write
from test_layout import ADAPTERS, SIGNATURE, layout_for

from dspy_greater.errors import GreaterError, LayoutError, RunDirectoryError
from dspy_greater.run import lines
from dspy_greater.run.events import Warned
from dspy_greater.run.journal import Journal

HERE = Path(__file__).resolve().parent

# fault -> file: tests
FAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "out of memory: halved, remembered; at one row an error with advice": {
        "test_engine.py": (
            "test_out_of_memory_halves_the_batch_keeps_what_was_generated_and_remembers",
            "test_a_single_row_that_does_not_fit_says_what_to_do",
            "test_a_row_that_does_not_fit_spoils_neither_the_other_rows_nor_the_size_of_the_batches",
        ),
        "test_kept.py": ("test_what_a_failed_step_held_in_memory_is_given_back_before_the_validation",),
    },
    "NaN or Inf": {
        "test_algorithm.py": ("test_a_model_without_one_finite_loss_ends_the_search_and_says_what_to_do",),
        "test_select.py": ("test_an_evaluation_that_is_not_a_number_is_infinitely_bad",),
        "test_model_interface.py": ("test_a_sequence_without_a_finite_gradient_takes_no_part_in_the_sum",),
        "test_off_policy.py": ("test_a_reasoning_whose_numbers_are_not_finite_takes_no_part",),
        "test_proposals.py": ("test_a_context_whose_probabilities_are_not_numbers_takes_no_part",),
    },
    "killed": {
        "test_stop.py": ("test_searches_that_are_killed_at_random_moments_go_on_to_the_same_bits",),
        "test_promises.py": ("test_a_run_that_was_killed_goes_on_to_the_bit_identical_result",),
        "test_gradsum_faults.py": ("test_a_killed_run_goes_on_as_if_it_had_not_been",),
    },
    "told to end: Ctrl-C, SIGTERM, a STOP file": {
        "test_promises.py": ("test_the_signal_of_ctrl_c_returns_the_best_so_far", "test_a_second_interrupt_raises"),
        "test_stop.py": (
            "test_sigterm_returns_the_best_so_far_which_is_on_disk_and_the_run_goes_on_from_there",
            "test_a_second_sigterm_raises_at_once",
            "test_a_stop_file_ends_the_search_after_the_step_that_it_is_in_and_is_removed",
        ),
    },
    "torn and damaged journals": {
        "test_journal.py": (
            "test_a_kill_at_any_byte_leaves_a_beginning_that_goes_on",
            "test_every_flipped_bit_is_noticed",
            "test_damage_in_the_middle_names_the_line_and_keeps_a_copy",
        ),
        "test_faults.py": ("test_whatever_happens_to_a_journal_it_holds_its_beginning_or_says_that_it_is_damaged",),
    },
    "disk full, read-only": {
        "test_promises.py": (
            "test_a_full_disk_costs_the_journal_and_not_the_program",
            "test_a_log_dir_that_cannot_be_one_is_refused_before_anything_is_generated",
        ),
        "test_journal.py": ("test_a_disk_that_fills_up_warns_once_and_the_run_goes_on",),
        "test_public_face.py": ("test_a_folder_that_takes_no_file_costs_no_search",),
        "test_faults.py": ("test_a_folder_that_becomes_read_only_costs_no_search",),
    },
    "settings, data, weights changed on resume": {
        "test_promises.py": (
            "test_changed_settings_are_refused_with_the_difference",
            "test_changed_rows_are_refused",
            "test_changed_weights_are_refused",
        ),
    },
    "two runs in one log_dir": {
        "test_promises.py": ("test_a_second_run_in_the_same_directory_fails_at_once_and_names_the_first",),
    },
    "tokens that do not round-trip": {
        "test_token_edits.py": (
            "test_a_token_that_does_not_survive_retokenising_is_rejected",
            "test_every_legal_edit_is_deployed_as_it_was_scored",
        ),
        "test_proposals.py": ("test_widening_is_bounded_when_no_token_is_legal",),
        "test_faults.py": ("test_whatever_a_row_and_an_instruction_hold_what_is_scored_is_what_is_sent",),
    },
    "templates without a system role, or that trim": {
        "test_chat.py": (
            "test_a_template_without_a_system_role_gets_the_text_in_the_first_user_turn",
            "test_a_template_that_drops_what_was_said_is_refused",
        ),
        "test_sent.py": ("test_templates_without_a_system_role_or_texts_are_followed",),
        "test_layout.py": ("test_an_instruction_whose_tokens_depend_on_the_row_is_refused",),
    },
    "double BOS": {"test_chat.py": ("test_there_is_one_begin_token_whoever_writes_it",)},
    "special tokens in the data": {
        "test_layout.py": ("test_special_tokens_in_the_data_are_plain_text",),
        "test_promises.py": ("test_special_tokens_inside_the_rows_are_searched_as_plain_text",),
        "test_written.py": ("test_special_tokens_in_what_was_written_are_plain_text",),
    },
    "metrics that raise or return anything": {
        "test_metric.py": (
            "test_what_is_a_score_becomes_a_plain_float",
            "test_what_is_no_score_is_an_error_that_shows_it_and_says_what_to_return",
            "test_a_metric_that_raises_makes_a_failed_row_with_the_error",
        ),
        "test_kept.py": ("test_a_candidate_that_the_metric_cannot_score_is_only_a_bad_one",),
    },
    "endless generation": {
        "test_promises.py": ("test_reasoning_that_never_ends_is_bounded_and_still_scored",),
        "test_sent.py": ("test_thoughts_that_never_came_to_an_end_are_scored_as_far_as_they_came",),
    },
    "empty reasoning": {"test_objective.py": ("test_empty_reasoning_still_has_a_loss",)},
    "prompts longer than the context": {
        "test_problem.py": ("test_a_prompt_that_fills_the_context_is_refused_with_the_longest_row",),
        "test_seed_run.py": (
            "test_prompts_that_leave_no_room_for_the_gold_value_are_refused_before_the_first_token",
            "test_candidates_that_no_longer_fit_do_not_end_a_search",
        ),
        "test_objective.py": ("test_a_reasoning_that_fills_the_context_is_cut_and_still_scored",),
    },
    "empty sets, missing gold, train = val": {
        "test_problem.py": (
            "test_an_empty_trainset_is_refused",
            "test_rows_without_a_gold_value_are_named_with_the_field",
            "test_a_valset_without_gold_values_is_refused_by_its_own_name",
            "test_without_a_valset_train_and_validation_rows_are_disjoint_and_seeded",
            "test_rows_that_train_and_validate_are_counted_in_a_warning",
        ),
    },
    "an LM without weights": {
        "test_problem.py": ("test_an_lm_without_weights_is_refused_at_the_start_with_what_to_pass",),
    },
    "threads that share one model": {
        "test_problem.py": ("test_two_compiles_at_once_on_one_model_find_what_each_finds_alone",),
        "test_session.py": ("test_searches_at_once_in_threads_get_what_each_gets_alone",),
    },
    "a server that does not answer, or answers what is no language model's": {
        "test_outages.py": (
            "test_a_fault_in_the_middle_of_a_step_changes_nothing",
            "test_answers_that_are_no_language_models_are_no_mistakes_of_the_program",
            "test_a_server_that_dies_in_a_step_leaves_no_trace_in_the_journal_and_the_run_goes_on",
            "test_where_a_row_of_the_seeds_final_comparison_is_not_answered_nothing_is_returned_as_better",
            "test_a_judge_that_dies_is_no_mistake_of_the_program",
        ),
        "test_served_outages.py": ("test_a_restart_of_the_server_in_the_middle_of_a_step_changes_nothing",),
        "test_gradsum_outages.py": (
            "test_an_outage_ends_the_loop_before_the_iteration_is_recorded_and_the_run_goes_on",
            "test_a_verdict_on_the_students_output_is_never_made_up",
        ),
        "test_served_lm.py": ("test_a_server_that_fails_is_left_out_and_taken_back",),
    },
    "two servers with one name": {
        "test_outages.py": (
            "test_two_servers_with_one_name_never_share_answers",
            "test_other_weights_behind_the_same_name_never_replay_old_answers",
        ),
    },
    "callbacks that raise": {
        "test_callbacks.py": ("test_a_callback_that_raises_is_warned_of_once_and_ends_nothing",),
    },
    "hostile run directories": {
        "test_faults.py": (
            "test_a_pickle_in_a_run_directory_is_never_opened",
            "test_a_link_out_of_a_run_directory_is_never_written_through",
            "test_a_header_of_any_size_and_depth_is_refused_in_few_words",
            "test_markup_in_rows_is_text_wherever_it_is_written",
            "test_lines_that_say_what_they_like_make_events_or_an_error",
        ),
        "test_serialise.py": ("test_data_that_is_no_event_is_an_error_that_says_where",),
    },
}

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]


def compiled(**options: Any) -> Any:
    return optimizer(**options).compile(program_on(planted_engine()), TRAIN, valset=VALIDATION)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_the_table_has_its_tests(fault: str) -> None:
    for file, tests in FAULTS[fault].items():
        found = ast.walk(ast.parse((HERE / file).read_text(encoding="utf-8")))
        there = {node.name for node in found if isinstance(node, ast.FunctionDef)}
        assert set(tests) <= there, f"{file} has no {set(tests) - there}"


# --- disk ---


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_costs_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled(steps=3)

    def refuse(path: Any, text: str) -> None:
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr("dspy_greater.run.best.replace_text", refuse)
    text = r"best\.json could not be written: PermissionError: .*Read-only file system"
    with pytest.warns(RuntimeWarning, match=text) as caught:
        better = compiled(steps=3, log_dir=tmp_path)
    monkeypatch.undo()
    assert len(caught) == 1
    assert bits(better.detailed_results.steps) == bits(whole.detailed_results.steps)
    assert bits(compiled(steps=3, log_dir=tmp_path).detailed_results.steps) == bits(whole.detailed_results.steps)


# --- whatever happens to a journal ---

many = settings(deadline=None, derandomize=True, suppress_health_check=tuple(HealthCheck))
places = st.integers(0, 1 << 20)
changes = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(1, 255)),
    st.tuples(st.just("cut"), places, places),
    st.tuples(st.just("put"), places, st.binary(min_size=1, max_size=30)),
    st.tuples(st.just("repeat"), places, places),
    st.tuples(st.just("end"), places, st.just(0)),
)


def changed(data: bytes, change: tuple[str, int, Any]) -> bytes:
    kind, at, what = change
    at %= len(data) + 1
    if kind == "flip":
        return data[:at] + bytes(byte ^ what for byte in data[at : at + 1]) + data[at + 1 :]
    if kind == "put":
        return data[:at] + what + data[at:]
    if kind == "end":
        return data[:at]
    until = at + what % (len(data) - at + 1)
    return data[:at] + data[until:] if kind == "cut" else data[:until] + data[at:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("whole")).read_bytes()


@pytest.mark.slow
@settings(many, max_examples=1000)
@given(st.lists(changes, min_size=1, max_size=3))
def test_whatever_happens_to_a_journal_it_holds_its_beginning_or_says_that_it_is_damaged(
    written: bytes, made: list[tuple[str, int, Any]]
) -> None:
    data = written
    for change in made:
        data = changed(data, change)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(os, "fsync", lambda file: None)
        path = Path(folder) / "journal.jsonl"
        path.write_bytes(data)
        try:
            with Journal.open(folder, IDENTITY) as journal:
                kept = journal.recorded()
                journal.append(Warned("after"))
        except RunDirectoryError:
            assert path.read_bytes() == data  # nobody's file is changed by an error
            return
        assert bits(kept) == bits(HAPPENED[: len(kept)])
        assert bits(recorded(Path(folder))) == bits((*kept, Warned("after")))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "$float", "$list", "$pairs", "$class", "message", "seed"]), inner)
        | st.fixed_dictionaries(
            {"type": st.sampled_from(["Warned", "NotCalled", "Opaque", "StepTaken", "Popen"]), "message": inner}
        )
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(many, max_examples=600)
@given(st.lists(values, min_size=1, max_size=2))
def test_lines_that_say_what_they_like_make_events_or_an_error(said: list[Any]) -> None:
    header = {"format": "dspy_greater journal", "version": 2, "identity": IDENTITY}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(os, "fsync", lambda file: None)
        file = lines.LineFile(Path(folder) / "journal.jsonl")
        for each in (header, *said):
            file.append(json.dumps(each).encode("ascii"))
        file.close()
        try:
            with Journal.open(folder, IDENTITY) as journal:
                found, refused = journal.recorded(), ""
        except RunDirectoryError as error:
            found, refused = (), str(error)
        assert all(type(event).__module__ == "dspy_greater.run.events" for event in found)
        assert found or "is intact, but it is not an event of this version" in refused


# --- whatever rows and instructions hold ---

pieces = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    st.sampled_from(
        [
            "<|eot|>",
            "<|turn|>user",
            "<|end|>",
            "[[ ## answer ## ]]",
            "[[ ## completed ## ]]",
            "\n\n",
            "\t",
            " ",
            "\u2028",
        ]
    ),
    st.sampled_from(["{question}", "{{ x }}", "{% if %}", "<b>", "&amp;", "\u202e", "\x00", "é", "\ufeff", '"""']),
)
anything = st.lists(pieces, max_size=6).map("".join)


@pytest.mark.slow
@settings(many, max_examples=600)
@given(
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(list(TEMPLATES)),
    adapter=st.sampled_from(list(ADAPTERS)),
    instruction=anything,
    question=anything,
)
def test_whatever_a_row_and_an_instruction_hold_what_is_scored_is_what_is_sent(
    kind: str, template: str, adapter: str, instruction: str, question: str
) -> None:
    layout, row = layout_for(kind, template, adapter), {"question": question}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of special tokens
        try:
            prompt = layout.prompt(instruction, row)
        except LayoutError:
            return
        messages = ADAPTERS[adapter].format(SIGNATURE.with_instructions(instruction), [], row)
        assert prompt.token_ids == tuple(layout.encoder.chat_ids(messages))
    assert 0 < prompt.instruction.start < prompt.instruction.stop <= len(prompt.token_ids)


# --- hostile run directories ---


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_a_run_directory_is_never_opened(tmp_path: Path) -> None:
    mark, run = tmp_path / "mark", tmp_path / "run"
    run.mkdir()
    bomb = pickle.dumps(Bomb(mark))
    for name in ("best.json", "best_program.json", "best_program.pkl", "program.pkl", "journal.lock", "state.pt"):
        (run / name).write_bytes(bomb)
    better = compiled(log_dir=run)
    saved = json.loads((run / "best_program.json").read_text())
    assert saved["predict"]["signature"]["instructions"] == instruction_of(better)
    (run / "journal.jsonl").write_bytes(bomb)
    with pytest.raises(RunDirectoryError, match="Line 1 of .*journal.jsonl is damaged"):
        compiled(log_dir=run)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # it would have


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("there", ["empty", "full", "missing"])
@pytest.mark.parametrize(
    "name",
    [
        "journal.jsonl",
        "journal.lock",
        "journal.jsonl.damaged-1",
        "STOP",
        "best.json",
        "best_program.json",
        "report.html",
        ".best.json.partial",
        ".best_program.json.partial",
        ".report.html.partial",
    ],
)
def test_a_link_out_of_a_run_directory_is_never_written_through(tmp_path: Path, name: str, there: str) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    run.mkdir()
    before = {"empty": "", "full": "mine\n", "missing": None}[there]
    if before is not None:
        elsewhere.write_text(before)
    (run / name).symlink_to(Path("..") / "elsewhere")
    if name in ("journal.jsonl", "journal.lock"):
        with pytest.raises(RunDirectoryError, match=f"{name} is a symbolic link, and a run writes into its own direc"):
            compiled(log_dir=run, steps=1)
    elif name == "STOP":
        with pytest.warns(RuntimeWarning, match="STOP was there before the run began"):
            compiled(log_dir=run, steps=1)
        assert not (run / name).is_symlink()
    elif "damaged" in name:
        (run / "journal.jsonl").write_text("not a journal\n")
        with pytest.raises(RunDirectoryError, match="A copy is in .*journal.jsonl.damaged-2"):
            compiled(log_dir=run, steps=1)
    else:
        compiled(log_dir=run, steps=1)
        assert not (run / name).is_symlink()
    assert (elsewhere.read_text() if elsewhere.exists() else None) == before


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        ('{"settings":"' + "x" * 30_000_000 + '"}', "belongs to a run that began otherwise"),
        ("[" * 200_000 + "]" * 200_000, "is not a journal"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "is not a journal"),
        ("9" * 100_000, "is not a journal"),
        ("{" + ",".join(f'"k{i}":{i}' for i in range(50_000)) + "}", "and .* more"),
        ('{"settings":"\\u001b[2J\\u0007\\n</pre><script>"}', "belongs to a run that began otherwise"),
    ],
    ids=["long", "deep lists", "deep mappings", "long number", "wide", "control characters"],
)
def test_a_header_of_any_size_and_depth_is_refused_in_few_words(tmp_path: Path, identity: str, says: str) -> None:
    file = lines.LineFile(tmp_path / "journal.jsonl")
    file.append(f'{{"format":"dspy_greater journal","version":2,"identity":{identity}}}'.encode("ascii"))
    file.close()
    with pytest.raises(RunDirectoryError, match=says) as caught:
        Journal.open(tmp_path, IDENTITY)
    told = str(caught.value)
    assert len(told) < 10_000 and "\x1b" not in told and "\x07" not in told
    assert isinstance(caught.value, GreaterError)


def test_markup_in_rows_is_text_wherever_it_is_written(tmp_path: Path) -> None:
    marked = "<script>alert('x')</script> </td> &amp; ../../etc/passwd"
    rows = [
        dspy.Example(question=f"{row.question} {marked}", answer=row.answer).with_inputs("question") for row in TRAIN
    ]
    better = optimizer(log_dir=tmp_path).compile(program_on(planted_engine()), rows, valset=VALIDATION)
    again = optimizer(log_dir=tmp_path).compile(program_on(planted_engine()), rows, valset=VALIDATION)
    seed = better.detailed_results.predictors[0].seed
    assert all(str(row.inputs["question"]).endswith(marked) for row in seed.rows)
    assert bits(again.detailed_results.steps) == bits(better.detailed_results.steps)
    assert sorted(each.name for each in tmp_path.iterdir()) == RUN_FILES
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert" in page
