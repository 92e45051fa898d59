"""`evoprompt`: a population of prompts that a language model crosses and mutates (arXiv 2309.08532)."""

from __future__ import annotations

from benchmarks.optimizers.ape import ALONE, propose
from benchmarks.optimizers.apo import PARAPHRASE
from benchmarks.optimizers.textual import InstructionSearch, PaperPeer, TextualTeleprompter, between, distinct, ranked

POPULATION, GENERATIONS, TEMPERATURE = 10, 10, 0.5
POOL = 20  # prompts that the first population is chosen from
SCORED = 50  # validation rows, at most, that a prompt is scored on

_GENETIC = """Please follow the instruction step-by-step to generate a better prompt.
1. Crossover the following prompts and generate a new prompt:
Prompt 1: Rewrite the input text into simpler text.
Prompt 2: Rewrite my complex sentence in simpler terms, but keep the meaning.
2. Mutate the prompt generated in Step 1 and generate a final prompt bracketed with <prompt> and </prompt>.

1. Crossover Prompt: Rewrite the complex text into simpler text while keeping its meaning.
2. <prompt>Transform the provided text into simpler language, maintaining its essence.</prompt>

Please follow the instruction step-by-step to generate a better prompt.
1. Crossover the following prompts and generate a new prompt:
Prompt 1: {first}
Prompt 2: {second}
2. Mutate the prompt generated in Step 1 and generate a final prompt bracketed with <prompt> and </prompt>.

1. """

_DIFFERENTIAL = """Please follow the instruction step-by-step to generate a better prompt.
1. Identify the different parts between the Prompt 1 and Prompt 2:
Prompt 1: Rewrite the input text into simpler text.
Prompt 2: Rewrite my complex sentence in simpler terms, but keep the meaning.
2. Randomly mutate the different parts
3. Combine the different parts with Prompt 3, selectively replace it with the different parts in step 2 and generate a \
new prompt.
Prompt 3: Rewrite the given input text into simpler English sentences while preserving the same meaning.
4. Crossover the prompt in step 3 with the following basic prompt and generate a final prompt bracketed with <prompt> \
and </prompt>:
Basic Prompt: Make the sentence easier to understand and keep the semantic meaning.

1. Different parts: "input text" vs "my complex sentence"; "simpler text" vs "simpler terms, but keep the meaning"
2. "input text" -> "provided text"; "my complex sentence" -> "the difficult sentence"; "simpler text" -> "easier \
language"; "simpler terms, but keep the meaning" -> "simpler words while maintaining the meaning"
3. Rewrite the provided text into easier language while maintaining the meaning.
4. <prompt>Transform the difficult sentence into easier language while keeping the meaning.</prompt>

Please follow the instruction step-by-step to generate a better prompt.
1. Identify the different parts between the Prompt 1 and Prompt 2:
Prompt 1: {first}
Prompt 2: {second}
2. Randomly mutate the different parts
3. Combine the different parts with Prompt 3, selectively replace it with the different parts in step 2 and generate a \
new prompt.
Prompt 3: {best}
4. Crossover the prompt in step 3 with the following basic prompt and generate a final prompt bracketed with <prompt> \
and </prompt>:
Basic Prompt: {basic}

1. """


class DifferentialEvolution(TextualTeleprompter):
    """EvoPrompt (DE), which the paper found the better of its two algorithms on BIG-Bench Hard.

    Followed: a population of 10 over 10 generations; each prompt meets the mutated difference of two others,
    combined with the current best, and makes way for its child where that is better; parents are those of the
    generation before; scores on at most 50 validation rows. The first population are the better half of what is at
    hand and a variation of each.

    Departures: the paper has 20 prompts at hand that people or a model wrote; here these are the seed instruction and
    guesses from demonstrations. Programs with several predictors: one after the other, each shown the whole program's
    inputs and outputs.
    """

    def improve(self, search: InstructionSearch) -> str:
        """Differential evolution."""
        population = start(search)
        for _ in range(GENERATIONS):
            parents = list(population)
            for basic in parents:
                others = [text for text in parents if text != basic] or [basic]
                first, second = search.sample(others * 2 if len(others) == 1 else others, 2)
                request = _DIFFERENTIAL.format(first=first, second=second, best=ranked(population)[0], basic=basic)
                child = offspring(search, request, population)
                if child and child[1] > population[basic]:
                    population = {key: value for key, value in population.items() if key != basic} | dict([child])
        return search.best


class GeneticAlgorithm(TextualTeleprompter):
    """EvoPrompt (GA): parents drawn in proportion to their scores, children crossed and mutated, the best survive.

    Followed: a population of 10 over 10 generations, roulette-wheel selection, the paper's request, and survival of
    the 10 best of parents and children; scores on the validation rows. Departures: as in `DifferentialEvolution`.
    """

    def improve(self, search: InstructionSearch) -> str:
        """Selection, crossover and mutation, survival."""
        population = start(search)
        for _ in range(GENERATIONS):
            children: dict[str, float] = {}
            for _ in range(POPULATION):
                weights = [score or 1e-9 for score in population.values()]  # all at 0: any two
                first, second = search.rng.choices(list(population), weights=weights, k=2)
                request = _GENETIC.format(first=first, second=second)
                child = offspring(search, request, population | children)
                children |= dict([child] if child else [])
            together = population | children
            population = {text: together[text] for text in ranked(together)[:POPULATION]}
        return search.best


def start(search: InstructionSearch) -> dict[str, float]:
    """The first population with its scores: the best of the seed and of guesses, and a variation of each."""
    pool = search.scores(distinct([search.seed, *(propose(search) for _ in range(POOL - 1))]), search.dev[:SCORED])
    kept = {text: pool[text] for text in ranked(pool)[: POPULATION // 2]}
    varied = [search.ask(PARAPHRASE.format(prompt=text) + ALONE, temperature=TEMPERATURE) for text in kept]
    return kept | search.scores(distinct(varied, but=pool), search.dev[:SCORED])


def offspring(search: InstructionSearch, request: str, known: dict[str, float]) -> tuple[str, float] | None:
    """A new prompt with its score; None where the proposer wrote nothing or one that is there already."""
    answer = between(search.ask(request, temperature=TEMPERATURE), "<prompt>", "</prompt>")[-1]
    new = distinct([answer], but=known)
    return (new[0], search.scores(new, search.dev[:SCORED])[new[0]]) if new else None


class EvoPrompt(PaperPeer):
    """EvoPrompt in the comparison."""

    name = "evoprompt"
    about = "EvoPrompt (2309.08532), differential evolution: population 10, 10 generations; own first population"
    teleprompter = DifferentialEvolution


class EvoPromptGA(PaperPeer):
    """EvoPrompt's other algorithm in the comparison."""

    name = "evoprompt-ga"
    about = "EvoPrompt (2309.08532), genetic algorithm: population 10, 10 generations; own first population"
    teleprompter = GeneticAlgorithm
