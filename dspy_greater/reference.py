"""GReaTer (arXiv 2412.09722) from end to end: one example at a time, one pass through the model for each question.

Read this file first. It is Algorithm 1 (`variant="paper"`) and the default variant, in the order of the paper's lines:

    search (3 to 5); propose (7; equations 3, 4); evaluate (10; equation 5), losses (equation 6), paper_slopes (8, 12;
    equation 7), paper_step (14, 15); default_step (in the place of 7 to 15); move_on (16 to 18); next_position (19)

The search computes the same, faster; a test holds it to this file, candidate for candidate and number for number. Text
becomes tokens in `Layout` and `Examples`, and the program runs as it will be deployed; every probability, gradient and
decision is made here. Left out: phrases, written instructions, prices and other budgets, what follows steps without a
finite loss, journal, validation. Shapes: T tokens, V vocabulary, d embedding, C candidates, M reasonings.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dspy_greater.objective.replay import Reasoning
from dspy_greater.objective.sequences import Examples
from dspy_greater.objective.types import Evaluation, RowOutcome
from dspy_greater.program.rollout import run_pairs, searching_copy
from dspy_greater.prompt.layout import Span, Supervised
from dspy_greater.search.problem import Problem, Target

Prediction = tuple[float, tuple[float, float]]  # predicted change; realised change of mistakes and of cross-entropy
Weighed = Sequence[tuple[float, Reasoning]]  # r_m, and how much worse it turned out than others would: ℓ_m - b


class Task:
    """What is searched: the instruction of one predictor, on the rows and with the metric of a problem."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem, self.settings, self.predictor = problem, problem.settings, target.predictor
        self.field, self.paper = target.field, problem.step.name == "paper"
        self.mu = self.settings.selections or (3 if self.paper else 1)
        self.model: Any = target.engine.model
        predictor, extractor, length = target.predictor, problem.extractor, target.engine.context_length
        self.layout = target.layout(extractor)
        header = not self.paper and extractor is None  # where no answer is found, its header is asked for as well
        self.examples = Examples(self.layout, predictor, target.field, problem.train, length, header_counts=header)

    def run(self, text: str) -> list[RowOutcome]:
        """Under this instruction, row by row: what the predictor generated, r ~ f(. | x ⊙ p), and the score."""
        program, metric = searching_copy(self.problem.program, {self.predictor.name: text}), self.problem.metric
        runs = [run_pairs([(program, row)], metric, threads=1)[0] for row in self.problem.train]
        return [self.examples.outcome(index, rollout) for index, rollout in enumerate(runs)]

    def random(self, step: int) -> random.Random:  # each step has a source of randomness of its own
        return random.Random(f"{self.problem.seed}/{self.predictor.name}/{step}")


@dataclass(frozen=True)
class Candidate:
    """An instruction that differs from p at one position."""

    edit: str  # "replace", "insert" or "delete"
    token_ids: tuple[int, ...]
    text: str
    log_probability: float  # of the token that was proposed, nats, mean over the contexts; nan for a deletion


@dataclass(frozen=True)
class Step:
    """What the stages of a step said of its candidates, by their text, and where p went."""

    position: int
    candidates: Sequence[Candidate]
    slopes: Mapping[str, float]
    forecasts: Mapping[str, tuple[float, float]]  # change of the expected loss, effective sample size
    outcomes: Mapping[str, Evaluation]  # of those that were tried
    chosen: Evaluation

    def promise(self, text: str) -> float:  # the forecast of a candidate; infinite without one
        return self.forecasts.get(text, (math.inf, 0.0))[0]


@dataclass(frozen=True)
class State:
    """Where the search stands between two steps."""

    seed: Evaluation  # p_init
    current: Evaluation  # p
    best: Sequence[Evaluation]  # p*, and the other finalists
    position: int  # i; the length of p where the next step appends a token
    step: int = 0  # t
    tried: frozenset[str] = frozenset()
    predictions: Sequence[Prediction] = ()  # of the last candidates that were tried
    unchanged: int = 0  # steps since p* changed


def search(task: Task) -> Iterator[tuple[Step, State]]:
    """Every step, and the state after it; `best[0]` of the last is p*.

    ```python
    problem = prepare(program, trainset, metric, valset, Options(Settings(), PaperStep()))
    steps = list(search(Task(problem, problem.targets[0])))
    ```
    """
    seed = evaluate(task, task.layout.edits.instruction_ids(task.predictor.instruction), task.predictor.instruction)
    state = State(seed, seed, [seed], next_position(task, seed, -1), tried=frozenset([seed.instruction]))
    while state.step < task.settings.steps:
        step = paper_step(task, state) if task.paper else default_step(task, state)
        state = move_on(task, state, step)
        yield step, state


def logits_of(model: Any, ids: Sequence[int], i: int = 0, at_i: Sequence[int] = (), ε: Tensor | None = None) -> Tensor:
    """What the model expects after each token, [T, V]. Line 8: with ε [C] over tokens, the embedding at i is ε · E."""
    embed = model.get_input_embeddings()
    tokens = torch.tensor([ids], device=embed.weight.device)  # [1, T]
    with torch.set_grad_enabled(ε is not None):
        if ε is None:
            logits = model(input_ids=tokens).logits  # [1, T, V]
        else:
            x, E = embed(tokens).detach(), embed(tokens.new_tensor(at_i)).detach()  # [1, T, d], [C, d]
            x = torch.cat([x[:, :i], (ε.to(E) @ E)[None, None], x[:, i + 1 :]], dim=1)
            logits = model(inputs_embeds=x).logits
    return logits[0].to(torch.promote_types(logits.dtype, torch.float32))  # [T, V]


def nll(logits: Tensor, token_ids: Sequence[int], span: Span, temperature: float = 1.0) -> Tensor:
    """-log f of each token of a span, given all before it (teacher forcing): nats, [span]."""
    targets = torch.tensor(token_ids[span.start : span.stop], dtype=torch.long, device=logits.device)
    return cross_entropy(logits[span.start - 1 : span.stop - 1] / temperature, targets, reduction="none")


def propose(task: Task, state: State, i: int) -> list[Candidate]:
    """Line 7: edits at position i with tokens that the model finds likely after every one of a few inputs."""
    settings, p, chance = task.settings, state.current.token_ids, task.random(state.step)
    inputs = [row.inputs for row in state.current.rows if row.inputs]
    contexts = [(*task.layout.proposal_prefix(given), *p[:i]) for given in inputs]  # x_j ⊙ p_<i
    size = min(settings.proposal_rows, len(contexts))
    draws = [chance.sample(contexts, size) for _ in range(settings.proposal_draws)]  # D_q, several times over
    read = {prefix: logits_of(task.model, prefix)[-1].log_softmax(-1) for draw in draws for prefix in draw}  # [V] each
    f = {context: log_f for context, log_f in read.items() if not log_f.isnan().any()}
    ranked = {context: log_f.sort(descending=True, stable=True).indices.tolist() for context, log_f in f.items()}
    k, widest = settings.top_k, 16 * settings.top_k
    while True:
        tops = [[set(ranked[context][:k]) for context in draw if context in ranked] for draw in draws]  # equation 3
        tokens = {token for top_k in tops if top_k for token in set.intersection(*top_k)}  # equation 4, united
        legal = {token: made for token in tokens if (made := edits_with(task, state, i, token))}
        if len(legal) >= settings.minimum_candidates or k >= widest:
            break
        k = min(2 * k, widest)
    likely = {token: mean([float(log_f[token]) for log_f in f.values()]) for token in legal}
    order = sorted(legal, key=lambda token: (-likely[token], token))
    found = [Candidate(edit, *made, likely[token]) for token in order for edit, made in legal[token].items()]
    shorter = None if task.paper or not contexts else task.layout.edits.delete(p, i)
    if shorter is not None and shorter[1] not in state.tried:
        found.append(Candidate("delete", *shorter, math.nan))
    texts = [edit.text for edit in found]
    return [edit for at, edit in enumerate(found) if edit.text not in texts[:at]]


def edits_with(task: Task, state: State, i: int, token: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What a token can make of p that can be deployed, and by default was not tried: token ids and text."""
    p, editing = state.current.token_ids, task.layout.edits
    room = task.settings.max_instruction_tokens - len(editing.positions(p) if editing.fixed else p)
    edits = {"replace": editing.replace(p, i, token)} if i < len(p) else {}
    if i == len(p) or (room > 0 and not task.paper):  # behind the end, or by default in front of p_i
        edits["insert"] = editing.insert(p, i, token)
    return {edit: made for edit, made in edits.items() if made and (task.paper or made[1] not in state.tried)}


def evaluate(task: Task, token_ids: tuple[int, ...], text: str) -> Evaluation:
    """Line 10: an instruction with reasoning of its own on every row, r ~ f(. | x ⊙ p), and the exact losses."""
    rows, log_perplexities = list[RowOutcome](), list[float]()
    for row in task.run(text):
        L_CE, answer, log_perplexity = math.nan, 0, math.nan
        for at, sequence in enumerate(task.examples.alternatives(text, row)):  # x ⊙ p ⊙ r ⊙ p_extract ⊙ y, for each y
            if sequence is not None:
                logits = logits_of(task.model, sequence.token_ids)
                loss, nats = (float(value) for value in losses(task, logits, sequence))
                if not loss >= L_CE:  # of acceptable answers the likeliest counts
                    L_CE, answer, log_perplexity = loss, at, nats
        L_CE = L_CE if task.field else 1.0 - row.score  # without y, the metric is all
        rows.append(replace(row, cross_entropy=L_CE, answer=answer))
        log_perplexities.append(log_perplexity)
    score, L_CE = mean(row.score for row in rows), mean(row.cross_entropy for row in rows)
    fluency = mean(log_perplexities)
    return Evaluation(token_ids, text, tuple(rows), score, L_CE, fluency, objective(task, rows, score, L_CE, fluency))


def losses(task: Task, logits: Tensor, sequence: Supervised) -> tuple[Tensor, Tensor]:
    """Equations 5 and 6: L_CE of the gold answer, at its temperature, and the logarithm of L_perpl."""
    answer = nll(logits, sequence.token_ids, sequence.answer, task.settings.answer_temperature)
    return answer.mean(), nll(logits, sequence.token_ids, sequence.instruction).mean()


def objective(task: Task, rows: Sequence[RowOutcome], score: float, L_CE: float, nats: float) -> tuple[float, float]:
    """What instructions are compared by, left to right; lower is better. A row without a finite loss does not count."""
    known = [row for row in rows if math.isfinite(row.cross_entropy)]
    unsure = mean(row.unparsed + answer_uncertainty(max(0.0, row.cross_entropy)) for row in known)
    mistakes = 1.0 - score + task.settings.score_fluency_weight * nats
    first = mistakes if task.paper else mistakes + task.settings.uncertainty_weight * unsure
    return (first, L_CE) if math.isfinite(first + L_CE) else (math.inf, math.inf)


def answer_uncertainty(L_CE: float) -> float:
    """D: how likely an answer, drawn by the mean likelihood of its tokens, is not the gold one."""
    return 1.0 - math.exp(-L_CE)


def paper_slopes(task: Task, p: Evaluation, i: int, tokens: Sequence[int]) -> list[float]:
    """Line 12: ∂L/∂ε of each token and, last, of p_i, [C + 1], summed over rows; r is as it was generated."""
    at_i, found = [*tokens, p.token_ids[i]], list[Tensor]()
    for sequence in (task.examples.supervised(p.instruction, row) for row in p.rows):  # x ⊙ p ⊙ r ⊙ p_extract ⊙ y
        if sequence is not None:
            ε = torch.tensor([0.0] * len(tokens) + [1.0], dtype=torch.double, requires_grad=True)  # p_i stands there
            logits = logits_of(task.model, sequence.token_ids, sequence.instruction.start + i, at_i, ε)
            L_CE, log_perplexity = losses(task, logits, sequence)
            L = L_CE + task.settings.fluency_weight * log_perplexity.exp()  # equation 6
            found += torch.autograd.grad(L, ε)  # equation 7
    return total([slope for slope in found if slope[-1].isfinite()], len(at_i))


def paper_step(task: Task, state: State) -> Step:
    """Lines 7 to 15 of Algorithm 1."""
    p, i, candidates = state.current, state.position, propose(task, state, state.position)  # line 7
    outcomes: dict[str, Evaluation] = {}
    if i == len(p.token_ids) and candidates:  # the sentence is open: p grows by the likeliest token, to be improved on
        p = evaluate(task, candidates[0].token_ids, candidates[0].text)
        outcomes[p.instruction] = p
    others = [edit for edit in candidates if edit.text != p.instruction]
    if not others:
        return Step(i, candidates, {}, {}, outcomes, p)
    *slopes, own = paper_slopes(task, p, i, [edit.token_ids[i] for edit in others])  # lines 8 to 12
    ahead = {edit.text: slope - own for edit, slope in zip(others, slopes, strict=True)}
    ε = {text: slope for text, slope in {p.instruction: 0.0, **ahead}.items() if math.isfinite(slope)}
    selections = sorted(ε, key=ε.__getitem__)[: task.mu]  # line 14; p_i may be among them
    outcomes |= {edit.text: evaluate(task, edit.token_ids, edit.text) for edit in others if edit.text in selections}
    moves = [move for text, move in {p.instruction: p, **outcomes}.items() if text in selections]
    return Step(i, candidates, ahead, {}, outcomes, best_of(moves, p))


def baseline_scale(task: Task, state: State) -> float:
    """b over the mean mistake: the setting, rising to 1 as p makes a tenth fewer mistakes than the seed."""
    before, now = 1.0 - state.seed.score, 1.0 - state.current.score
    hope = min(1.0, max(0.0, (now / before - 0.9) / (1.0 - 0.9))) if before > 0 else 0.0  # 1.0 at the seed's score
    return 1.0 - (1.0 - task.settings.baseline_scale) * hope


def score_slopes(task: Task, weighed: Weighed, i: int, tokens: Sequence[int]) -> list[float]:
    """∂S/∂ε of each token, [C], where ε weighs all alike; S = 1/M Σ_m (ℓ_m - b) log f(r_m | x, p)."""
    mistakes = [advantage for advantage, _ in weighed]  # less b
    sequences = [(advantage, sequence) for advantage, reasoning in weighed for sequence in reasoning.sequences]
    alike = max(mistakes) - min(mistakes) <= 1e-9 or not any(len(sequence.generated) for _, sequence in sequences)
    α, found = task.settings.answer_weight if alike else 0.0, list[Tensor]()  # alike: S tells nothing of the answer
    for advantage, sequence in sequences:
        ids, r, y = sequence.token_ids, sequence.generated, sequence.answer
        ε = torch.full([len(tokens)], 1 / len(tokens), dtype=torch.double, requires_grad=True)
        logits = logits_of(task.model, ids, sequence.instruction.start + i, tokens, ε)
        S = [-advantage * nll(logits, ids, r).sum()] if advantage and len(r) else []
        if α and y is not None:
            S.append(α * nll(logits, ids, y, task.settings.answer_temperature).mean())
        found += torch.autograd.grad(torch.stack(S).sum() / len(weighed), ε) if S else []
    return total([slope for slope in found if slope.isfinite().all()], len(tokens))


def likelihood(task: Task, reasoning: Reasoning) -> tuple[float, float]:
    """log f(r | x, p), and L_CE of the gold answer after it, 0 where there is none."""
    log_f = L_CE = 0.0
    for sequence in reasoning.sequences:
        logits, heat = logits_of(task.model, sequence.token_ids), task.settings.answer_temperature
        log_f -= float(nll(logits, sequence.token_ids, sequence.generated).sum())
        L_CE += 0.0 if sequence.answer is None else float(nll(logits, sequence.token_ids, sequence.answer, heat).mean())
    return log_f, L_CE


def off_policy(task: Task, state: State, weighed: Weighed, c: Sequence[int]) -> tuple[float, float]:
    """The forecast of c: 1/M Σ_m [(ℓ_m - b) κ tanh(Δ log f(r_m) / κ) + α ΔD]; and its effective sample size."""
    rows = [row for row in state.seed.rows if not row.unparsed]
    reasons = any(row.written for row in rows) or 2 * sum(bool(row.preamble.strip()) for row in rows) > len(rows)
    lack = answer_uncertainty if reasons else float  # D; L_CE where nothing is reasoned before the answer
    κ, changes, weights = 3.0, list[float](), list[float]()
    for advantage, reasoning in weighed:
        before, y_before = likelihood(task, reasoning)
        after, y_after = likelihood(task, reasoning.under(c))
        if all(map(math.isfinite, (before, y_before, after, y_after))):
            ratio = κ * math.tanh((after - before) / κ)
            changes.append(advantage * ratio + task.settings.answer_weight * (lack(y_after) - lack(y_before)))
            weights.append(math.exp(ratio))
    return (mean(changes), sum(weights) ** 2 / sum(weight**2 for weight in weights)) if weights else (math.inf, 0.0)


def look_at(task: Task, state: State, weighed: Weighed, i: int, alone: bool) -> tuple[Step, list[Candidate]]:
    """What could be tried at position i, and a shortlist by slope: kinds in turn, since they cannot be compared."""
    p, candidates, slopes = state.current, propose(task, state, i), dict[str, float]()
    kinds = [[edit for edit in candidates if edit.edit == kind] for kind in ("replace", "insert", "delete")]
    for alike, behind in zip(kinds, (i + 1, i), strict=False):  # in the place of p_i, or in a gap before it
        if weighed and len(alike) > 1:
            tokens = [edit.token_ids[i] for edit in alike]
            ids = (*p.token_ids[:i], tokens[0], *p.token_ids[behind:])
            under = [(advantage, reasoning.under(ids)) for advantage, reasoning in weighed]
            slopes |= dict(zip([edit.text for edit in alike], score_slopes(task, under, i, tokens), strict=True))
    best_first = [sorted(alike, key=lambda edit: slopes.get(edit.text, math.inf)) for alike in kinds]
    in_turn = [edit for turn in zip_longest(*best_first) for edit in turn if edit is not None]
    shortlist = in_turn[: max(task.settings.forecasts, task.mu)]
    asked = shortlist if weighed and task.settings.forecasts and len(shortlist) > alone else []
    forecasts = {edit.text: off_policy(task, state, weighed, edit.token_ids) for edit in asked}
    return Step(i, candidates, slopes, forecasts, {}, p), shortlist


def default_step(task: Task, state: State) -> Step:
    """Instead of lines 7 to 15: slopes at a few positions, forecasts for the best, and runs of what promises most."""
    settings, p, chance = task.settings, state.current, task.random(state.step)
    known = [pair for pair in state.predictions if all(map(math.isfinite, (pair[0], *pair[1])))]
    doubted = len(known) >= 6 and not rank_correlation(known[-12:]) >= 0.3  # nor is it where nothing varied
    blind = settings.explore_every > 0 and doubted and chance.random() * settings.explore_every < 1
    rows = [row for row in p.rows if row.inputs]
    drawn = chance.sample(rows, min(settings.replayed, len(rows)))
    laid_out = [(row, task.examples.sequences(p.instruction, row)) for row in drawn]
    reasonings = [Reasoning(row.row, 1.0 - row.score, 1.0, calls) for row, calls in laid_out if calls]
    b = baseline_scale(task, state) * mean(reasoning.mistake for reasoning in reasonings)
    weighed = [] if blind else [(reasoning.mistake - b, reasoning) for reasoning in reasonings]

    positions, following = [state.position], next_position(task, p, state.position)
    while settings.forecasts and weighed and len(positions) < settings.positions_ahead and following not in positions:
        positions.append(following)
        following = next_position(task, p, following)
    looks = [look_at(task, state, weighed, i, alone=len(positions) == 1) for i in positions]
    leads = [min([step.promise(edit.text) for edit in short], default=math.inf) for step, short in looks]
    step, shortlist = looks[leads.index(min(leads))]
    tried = sorted(shortlist, key=lambda edit: step.promise(edit.text))[: task.mu]
    if blind:
        tried = chance.sample(step.candidates, min(task.mu, len(step.candidates)))
    elif len(known) >= 9 and rank_correlation(known) >= 0.3:
        tried = [edit for edit in tried if step.promise(edit.text) < 0] or tried[:1]
    outcomes = {edit.text: evaluate(task, edit.token_ids, edit.text) for edit in step.candidates if edit in tried}
    return replace(step, outcomes=outcomes, chosen=best_of([outcomes[edit.text] for edit in tried], p))


def best_of(tried: Iterable[Evaluation], p: Evaluation) -> Evaluation:
    """Line 15: the lowest objective, though it be worse than p's; p where none is finite."""
    return min((move for move in tried if move.objective[0] < math.inf), key=lambda move: move.objective, default=p)


def move_on(task: Task, state: State, step: Step) -> State:
    """Lines 16 to 19: p*, the finalists, and where to go on; by default a walk that finds no new p* returns to p*."""
    ranked = sorted([*state.best, step.chosen, *step.outcomes.values()], key=lambda evaluation: evaluation.objective)
    best = list({evaluation.instruction: evaluation for evaluation in ranked}.values())[: task.settings.finalists]
    p, i, unchanged = step.chosen, step.position, state.unchanged + 1
    if best[0].instruction != state.best[0].instruction:
        unchanged = 0
    elif not task.paper and unchanged > max(1, min(len(task.layout.edits.positions(p.token_ids)), 20)):
        p, i, unchanged = best[0], -1, 0
    predictions = (*state.predictions, *predictions_of(step, state.current))[-60:]
    tried, position = state.tried | set(step.outcomes), next_position(task, p, i)
    return State(state.seed, p, best, position, state.step + 1, tried, predictions, unchanged)


def next_position(task: Task, p: Evaluation, i: int) -> int:
    """Line 19: the next position that may be edited; after the last the end, while the sentence is open; the first."""
    editing, length = task.layout.edits, len(p.token_ids)
    editable, fixed = sorted(editing.positions(p.token_ids)), editing.fixed
    words = p.instruction[len(fixed) :]
    ends = words.rstrip().rstrip("\"')]").endswith((".", "!", "?", "。", "！", "？")) and any(map(str.isalnum, words))
    grows = not ends and len(editable if fixed else p.token_ids) < task.settings.max_instruction_tokens
    later = [place for place in editable if place > i] or ([length] if grows and i < length else editable)
    return min(later, default=length if fixed else 0)


def predictions_of(step: Step, p: Evaluation) -> list[Prediction]:
    """For each candidate that was tried: its forecast, or else its slope, and what came of it on the same rows."""
    predicted = {**step.slopes, **{text: change for text, (change, _) in step.forecasts.items()}}
    found = list[Prediction]()
    for text in (edit.text for edit in step.candidates if edit.text in predicted and edit.text in step.outcomes):
        pairs = list(zip(p.rows, step.outcomes[text].rows, strict=True))
        mistakes = mean(before.score - after.score for before, after in pairs)
        L_CE = mean(after.cross_entropy - before.cross_entropy for before, after in pairs)
        found.append((predicted[text], (mistakes, L_CE)))
    return found


def rank_correlation(pairs: Sequence[Prediction]) -> float:
    """Spearman's ρ of what was predicted and what was realised; nan where one of them does not vary."""
    sides: list[list[Any]] = [[predicted for predicted, _ in pairs], [realised for _, realised in pairs]]
    ranks = [[sorted(side).index(item) + side.count(item) / 2 for item in side] for side in sides]  # ties share theirs
    return float(torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1])


def total(slopes: Sequence[Tensor], count: int) -> list[float]:
    """The sum over examples; infinite where there is no finite one."""
    summed = torch.stack(list(slopes)).double().sum(0).tolist() if slopes else [math.inf] * count
    return [slope if math.isfinite(slope) else math.inf for slope in summed]


def mean(values: Iterable[float]) -> float:
    """Of those that are finite; nan of none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
