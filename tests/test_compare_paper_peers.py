"""The optimizers written from their papers: each finds a planted instruction, through a scripted proposer."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted_gradsum import ROWS, SEED, exact_match, instruction_of, level, program, program_script
from scripted_text import Asked, ScriptedText, text_lm

from benchmarks.harness.budget import Budget, BudgetSpent
from benchmarks.harness.models import CountedEngine
from benchmarks.optimizers import Context, DescribeTask, ape, apo, evoprompt, make, opro, pe2
from benchmarks.optimizers.textual import InstructionSearch, PaperPeer, Scorer, TextualTeleprompter
from dspy_greater.errors import DataError, ProgramError

PEERS = ("apo", "ape", "pe2", "opro", "evoprompt")
METHODS = [
    apo.ProTeGi,
    ape.AutomaticPromptEngineer,
    pe2.PromptEngineer,
    opro.OptimizationByPrompting,
    evoprompt.DifferentialEvolution,
    evoprompt.GeneticAlgorithm,
]
BEST = "Level 16."
TRAIN, DEV = ROWS[:8], ROWS[8:]
CALL = 12  # tokens of one scripted call


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rounds than published, so that a run takes a second."""
    for module, settings in {
        apo: {"ROUNDS": 2, "BANDIT_ROUNDS": 5},
        ape: {"PROPOSALS": 12, "KEPT": 4, "RESAMPLINGS": 2},
        opro: {"STEPS": 4},
        evoprompt: {"POPULATION": 6, "GENERATIONS": 3, "POOL": 8},
        pe2: {"STEPS": 2},
    }.items():
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)


def in_format(asked: Asked, instruction: str) -> str:
    """A proposal as the request wants it."""
    if "<START>" in asked.text:
        return f"Here: <START>{instruction}<END>"
    if "</prompt>" in asked.text:
        return f"Crossed: <prompt>x</prompt>\n2. <prompt>{instruction}</prompt>"
    return f"[{instruction}]" if "square brackets" in asked.text else instruction


def proposer(levels: list[int], seed: int = 0) -> Any:
    """A language model whose proposals have these levels, at random."""
    rng = random.Random(seed)
    return text_lm(lambda asked: in_format(asked, f"Level {rng.choice(levels)}."), "scripted/proposer")


def rising() -> Any:
    """A language model that proposes a little more each time."""
    levels = itertools.count(3)
    return text_lm(lambda asked: in_format(asked, f"Level {next(levels)}."), "scripted/proposer")


def method(which: type[TextualTeleprompter], prompt_lm: Any, **settings: Any) -> TextualTeleprompter:
    return which(exact_match, prompt_lm, num_threads=1, **settings)


def metered(budget: Budget) -> Any:
    """The scripted task model as the harness meters a served one."""
    engine = CountedEngine(ScriptedText(program_script), budget.add_served, budget.check)
    return dspy.LM("scripted/task", engine=engine, cache=False, num_retries=0)


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_finds_the_planted_best_instruction(name: str, tmp_path: Path) -> None:
    budget, student = Budget(10**9), program()
    peer = make(name)
    found = peer.optimise(student, TRAIN, DEV, context(budget, tmp_path, proposer([0, 1, 2, 3, 5, 16], seed=1)))
    assert instruction_of(found) == BEST
    assert budget.notebook.best(1)[0].candidate.instructions[0][1] == BEST
    assert instruction_of(student) == SEED


def test_the_genetic_algorithm_finds_it_too(tmp_path: Path) -> None:
    found = evoprompt.EvoPromptGA().optimise(
        program(), TRAIN, DEV, context(Budget(10**9), tmp_path, proposer([0, 1, 2, 3, 5, 16], seed=1))
    )
    assert instruction_of(found) == BEST


def context(budget: Budget, log_dir: Path, prompt_lm: Any) -> Context:
    return Context(
        metric=exact_match,
        task_lm=text_lm(program_script),
        prompt_lm=prompt_lm,
        seed=0,
        log_dir=log_dir,
        budget=budget,
        requests=DescribeTask("levels", "answers with an a", SEED),
    )


@pytest.mark.parametrize("which", METHODS)
def test_a_peer_that_a_budget_ends_midway_returns_its_best_so_far(which: type[TextualTeleprompter]) -> None:
    budget, student = Budget(60 * CALL), program()
    student.set_lm(metered(budget))
    found = method(which, rising(), budget=budget).compile(student, trainset=ROWS[:8], valset=ROWS[:8])
    with pytest.raises(BudgetSpent):
        budget.check()
    tried = [candidate.candidate.instructions[0][1] for candidate in budget.notebook.best(100)]
    assert instruction_of(found) in tried
    assert level(instruction_of(found)) > level(SEED)


@pytest.mark.parametrize("which", METHODS)
def test_the_task_model_never_meets_the_same_row_with_the_same_instruction_twice(
    which: type[TextualTeleprompter],
) -> None:
    student = program()
    method(which, proposer([0, 3, 5])).compile(student, trainset=TRAIN, valset=DEV)
    asked = Counter((each.instruction, each["question"]) for each in student.predictors()[0].lm.engine.asked)
    assert asked.most_common(1)[0][1] == 1


@pytest.mark.parametrize("which", METHODS)
def test_a_seed_makes_every_choice_the_same_again(which: type[TextualTeleprompter]) -> None:
    runs = []
    for _ in range(2):
        prompt_lm = proposer([0, 3, 5, 9])
        method(which, prompt_lm, seed=3).compile(program(), trainset=TRAIN, valset=DEV)
        runs.append([each.text for each in prompt_lm.engine.asked])
    assert runs[0] == runs[1]


signature: Any = dspy.Signature  # a class whose metaclass reads "question -> answer"


class TwoSteps(dspy.Module):
    """A program whose first predictor is only as good as its instruction, like the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(signature("question -> hint", SEED))
        self.second = dspy.Predict(signature("question, hint -> answer", SEED))

    def forward(self, question: str) -> dspy.Prediction:
        return self.second(question=question, hint=self.first(question=question).hint)


def two_step_script(asked: Asked) -> dict[str, Any]:
    right = int(asked["question"]) < level(asked.instruction)
    if "hint" not in asked:
        return {"hint": "good" if right else "bad"}
    number = asked["question"]
    return {"answer": f"a{number}" if right and asked["hint"] == "good" else "wrong"}


@pytest.mark.parametrize("which", [apo.ProTeGi, opro.OptimizationByPrompting])
def test_the_predictors_of_a_program_are_improved_in_turn(which: type[TextualTeleprompter]) -> None:
    student: Any = TwoSteps()
    student.set_lm(text_lm(two_step_script))
    student.second.signature = student.second.signature.with_instructions("Level 6.")
    found: Any = method(which, proposer([1, 3, 16])).compile(student, trainset=ROWS, valset=ROWS)
    assert [each.signature.instructions for each in found.predictors()] == [BEST, BEST]
    assert student.first.signature.instructions == SEED


def test_errors_of_a_step_show_what_that_step_said() -> None:
    student: Any = TwoSteps()
    student.set_lm(text_lm(two_step_script))
    search = search_of(student, text_lm(lambda asked: ""), "first")
    shown = apo.show_errors(search, search.outcomes(SEED, ROWS[3:4]))
    assert shown == ('## Example 1\nText: "3"\nLabel: a3\nPrediction: (this step) bad (the whole program) wrong\n')


def search_of(student: Any, prompt_lm: Any, predictor: str = "predict", budget: Any = None) -> InstructionSearch:
    return InstructionSearch(
        student,
        predictor,
        scorer=Scorer(exact_match, budget, threads=1),
        prompt_lm=prompt_lm,
        train=TRAIN,
        dev=DEV,
        rng=random.Random(0),
    )


# ------------------------------------------------------------------------------- scoring


def test_a_program_that_fails_on_a_row_counts_as_wrong_there() -> None:
    def script(asked: Asked) -> Any:
        return "not the format" if asked["question"] == "1" else {"reasoning": "", "answer": f"a{asked['question']}"}

    scorer = Scorer(exact_match, threads=1)
    assert scorer.score(program(script), ROWS[:4]) == 0.75


def test_each_row_is_reported_to_the_budget_once() -> None:
    budget = Budget(10**6)
    scorer, student = Scorer(exact_match, budget, threads=2), program()
    scorer.score(student, ROWS[:4])
    scorer.score(student, ROWS[:8])
    assert [(best.score, best.rows) for best in budget.notebook.best(1)] == [(0.25, 8)]


def test_rows_that_were_done_before_the_budget_was_spent_are_reported() -> None:
    budget, student = Budget(3 * CALL), program()
    student.set_lm(metered(budget))
    with pytest.raises(BudgetSpent):
        Scorer(exact_match, budget, threads=1).score(student, ROWS)
    assert budget.notebook.best(1)[0].rows == 3


def test_a_score_on_more_rows_leads_and_a_tie_keeps_the_first() -> None:
    search = search_of(program(), text_lm(lambda asked: ""))
    search.scores(["Level 1.", "Level 4.", "Level 5."], ROWS[:4])
    assert search.best == "Level 4."
    search.scores(["Level 3."], ROWS[:8])
    assert search.best == "Level 3."
    search.scores(["Level 4."], ROWS[:4])
    assert search.best == "Level 3."


def test_no_rows_and_no_predictors_are_refused_with_a_reason() -> None:
    with pytest.raises(DataError, match="ProTeGi has no training rows; pass trainset="):
        method(apo.ProTeGi, None).compile(program(), trainset=[])
    with pytest.raises(ProgramError, match="no predictor, so there is no instruction to improve"):
        method(apo.ProTeGi, None).compile(dspy.Module(), trainset=TRAIN)
    with pytest.raises(DataError, match="cannot be scored on no rows"):
        Scorer(exact_match).score(program(), [])


# ------------------------------------------------------------------------- as published


def test_the_published_settings_are_the_ones_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert (apo.ROUNDS, apo.BEAM, apo.MINIBATCH, apo.ERRORS, apo.GRADIENTS) == (6, 4, 64, 4, 4)
    assert (apo.EDITS, apo.PARAPHRASES, apo.SUCCESSORS) == (1, 2, 8)
    assert (ape.PROPOSALS, ape.DEMONSTRATIONS) == (50, 5)
    assert (pe2.STEPS, pe2.BEAM, pe2.PROPOSALS, pe2.BATCH) == (3, 4, 4, 2)
    assert (opro.STEPS, opro.PER_STEP, opro.HISTORY, opro.EXEMPLARS) == (200, 8, 20, 3)
    assert (pe2.ENOUGH_FAILURES, pe2.SCANNED) == (4, 10)
    assert opro.LONGEST_TEXT == 500
    assert (evoprompt.POPULATION, evoprompt.GENERATIONS, evoprompt.TEMPERATURE) == (10, 10, 0.5)
    assert (evoprompt.POOL, evoprompt.SCORED) == (20, 50)


def test_protegi_asks_for_gradients_then_edits_then_paraphrases() -> None:
    lm = proposer([3])
    found = apo.expand(search_of(program(), lm), SEED, TRAIN)
    kinds = [
        "reasons" if "reasons why" in each.text else "edit" if "I wrote" in each.text else "paraphrase"
        for each in lm.engine.asked
    ]
    assert kinds == ["reasons", "edit"] * 4 + ["paraphrase"] * 2
    assert lm.engine.asked[0].text.count("## Example") == 4
    assert found == ["Level 3."]


def test_protegi_only_paraphrases_a_prompt_without_errors() -> None:
    lm = proposer([3])
    apo.expand(search_of(program(), lm), "Level 16.", TRAIN)
    assert ["semantic meaning" in each.text for each in lm.engine.asked] == [True, True]


def test_the_bandit_tries_every_prompt_before_it_repeats_one() -> None:
    tried, untried = apo.Arm("a", reward=30, rows=32), apo.Arm("b")
    assert untried.bound(5) > tried.bound(5) > tried.mean()
    assert tried.bound(50) > tried.bound(5)


def test_opro_shows_its_history_in_ascending_order_with_whole_scores() -> None:
    shown = opro.meta_prompt({"Good.": 0.876, "Bad.": 0.1}, ROWS[:1])
    assert shown.index("text:\nBad.\nscore:\n10\n") < shown.index("text:\nGood.\nscore:\n88\n")
    assert "input:\n<INS>\nQ: 0\nA:\noutput:\na0" in shown


def test_opro_shows_only_the_twenty_best() -> None:
    history = {f"Level {number}.": number / 100 for number in range(30)}
    shown = opro.meta_prompt(history, [])
    assert "Level 9." not in shown and "Level 10." in shown


def test_ape_infers_the_instruction_from_five_pairs() -> None:
    lm = proposer([3])
    ape.propose(search_of(program(), lm))
    (asked,) = lm.engine.asked
    assert asked.text.count("Input: ") == asked.text.count("Output: a") == 5
    assert asked.text.endswith(f"The instruction was{ape.ALONE}") and "alone" in ape.ALONE


def test_pe2_inspects_failures_and_then_refines() -> None:
    lm = text_lm(lambda asked: "Level 4." if "Reply with the prompt" in asked.text else "It is too low.")
    search = search_of(program(), lm)
    assert pe2.refine(search, SEED, pe2.hard_negatives(search, SEED)) == "Level 4."
    inspected, refined = lm.engine.asked
    assert inspected.text.count("Reasoning: I look.\nOutput: wrong\nLabel: a") == 2
    assert f"## Full Template\n{SEED}\n\nquestion: <question>\n\nreasoning:\nanswer:" in inspected.text
    assert "It is too low." in refined.text


def test_pe2_looks_for_no_more_failures_than_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pe2, "SCANNED", 4)
    student = program()
    search = search_of(student, text_lm(lambda asked: "Level 4."))
    failed = pe2.hard_negatives(search, "Level 0.")
    assert len(failed) == len(student.predictors()[0].lm.engine.asked) == 4
    right = pe2.hard_negatives(search, BEST)
    assert len(right) == len(search.train) and all(each.is_right for each in right)


def test_opro_shows_the_newest_of_equal_instructions_and_last() -> None:
    shown = opro.meta_prompt({f"Level {number}.": 0.5 for number in range(25)}, [])
    assert "Level 4." not in shown and shown.index("Level 5.") < shown.index("Level 24.")


def test_opro_does_not_score_what_is_too_long_or_holds_the_placeholder() -> None:
    answers = itertools.cycle(["[Level 9. " + "and " * 200 + "]", "[Level 12. <INS>]", "[Level 3.]"])
    budget, student = Budget(10**9), program()
    method(opro.OptimizationByPrompting, text_lm(lambda _: next(answers)), budget=budget).compile(
        student, trainset=TRAIN, valset=DEV
    )
    assert {each.candidate.instructions[0][1] for each in budget.notebook.best(9)} == {SEED, "Level 3."}


def test_evoprompt_starts_from_the_better_half_of_a_pool_and_a_variation_of_each() -> None:
    proposals = itertools.chain([12, 1, 14, 13, 3, 9, 0], [15, 10, 11])
    lm = text_lm(lambda asked: f"Level {next(proposals)}.")
    search = search_of(program(), lm)
    found = evoprompt.start(search)
    assert set(found) == {"Level 14.", "Level 13.", "Level 12.", "Level 15.", "Level 10.", "Level 11."}
    varied = [asked.text for asked in lm.engine.asked[7:]]
    assert ["Level 14." in varied[0], "Level 13." in varied[1], "Level 12." in varied[2]] == [True] * 3


def test_evoprompt_scores_a_prompt_on_no_more_rows_than_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evoprompt, "SCORED", 3)
    student = program()
    method(evoprompt.DifferentialEvolution, proposer([0, 3, 5])).compile(student, trainset=TRAIN, valset=DEV)
    asked = Counter(each.instruction for each in student.predictors()[0].lm.engine.asked)
    assert set(asked.values()) == {3}


def test_a_child_takes_its_parents_place_only_where_it_is_better() -> None:
    search = search_of(program(), text_lm(lambda asked: in_format(asked, "Level 1.")))
    assert evoprompt.offspring(search, "<prompt> and </prompt>", {"Level 1.": 0.0}) is None
    assert evoprompt.offspring(search, "<prompt> and </prompt>", {}) == ("Level 1.", 0.0)


def test_a_proposer_that_only_repeats_itself_leaves_the_seed() -> None:
    lm = text_lm(lambda asked: in_format(asked, SEED))
    for which in METHODS:
        assert instruction_of(method(which, lm).compile(program(), trainset=TRAIN, valset=DEV)) == SEED


def test_every_peer_says_what_it_follows() -> None:
    for name in PEERS:
        peer = make(name)
        assert isinstance(peer, PaperPeer) and peer.name == name
        assert "Departure" in (peer.teleprompter.__doc__ or "") and "several predictors" in (
            peer.teleprompter.__doc__ or ""
        )
