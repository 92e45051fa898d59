# %% [markdown]
# # Quickstart
#
# A small model answers questions badly under a plain instruction. `GReaTer` finds a better one, with gradients through
# the model's own reasoning. All of this takes about three minutes of one CPU core, without a network; the seconds that
# are printed below are of a busy machine.
#
# `make notebook` makes this notebook from `examples/quickstart_notebook.py`, which also runs as a plain script.

# %%
STEPS = 10  # of the search
TRAIN, VALIDATION, TEST = 24, 50, 100  # rows

# %% [markdown]
# ## A program, rows and a metric
#
# The model is the one that ships with the package: small, and made so that its reasoning depends on its instruction.
# With a model of your own this line is `local_lm("Qwen/Qwen3-4B")`, and nothing else changes.

# %%
import random

import dspy

from dspy_greater import GReaTer, local_lm
from dspy_greater.pocket.tasks import generate, work_out

dspy.configure(lm=local_lm("pocket"))
program = dspy.ChainOfThought(dspy.Signature("question -> answer", "Answer the question."))

rng = random.Random(0)
questions = list(dict.fromkeys(generate("navigate", rng) for _ in range(300)))[: TRAIN + VALIDATION + TEST]
rows = [
    dspy.Example(question=each, answer=work_out("navigate", each).answer).with_inputs("question") for each in questions
]
train, validation, test = rows[:TRAIN], rows[TRAIN : TRAIN + VALIDATION], rows[TRAIN + VALIDATION :]
print(f"{len(train)} training, {len(validation)} validation and {len(test)} test rows. The first:")
print(train[0].question)
print("->", train[0].answer)


# %% [markdown]
# The metric says which answers are right. It may be anything that returns a number.


# %%
def exact_match(example, prediction, trace=None):
    """Whether the answer is the gold one, case and blanks aside."""
    return prediction.answer.strip().lower() == example.answer.lower()


def accuracy(program):
    """In percent, on the test rows, which the search never sees."""
    evaluate = dspy.Evaluate(devset=test, metric=exact_match, num_threads=len(test), display_progress=False)
    return evaluate(program).score


before = accuracy(program)
print(f"{before:.0f} % of the test rows are right under {program.predict.signature.instructions!r}")

# %% [markdown]
# This is what the model writes under that instruction. It guesses.

# %%
print(program(question=train[0].question))

# %% [markdown]
# ## The search
#
# `log_dir` keeps a journal, so that a killed run goes on where it stopped, and a page that shows the run
# (`report.html`). Run this cell twice: the second time nothing is computed again.

# %%
optimizer = GReaTer(
    metric=exact_match,
    auto="light",
    steps=STEPS,
    train_rows=TRAIN,
    validation_rows=VALIDATION,
    log_dir="runs/notebook",
    progress=False,
)
better = optimizer.compile(program, trainset=train, valset=validation)
result = better.detailed_results
print(result)

# %% [markdown]
# The result is an ordinary DSPy program. It is never worse than the one that you came with on the validation rows. On
# the test rows:

# %%
after = accuracy(better)
print(f"{before:.0f} -> {after:.0f} %, under {better.predict.signature.instructions!r}")
print(better(question=train[0].question))

# %% [markdown]
# ## Pictures of the run
#
# Score and loss of the current instruction on the training rows. A ring is an edit that was accepted. The search goes
# on from an edit that looks good even where the score falls for a while; what is returned is the best on the
# validation rows.

# %%
result.plot_score()

# %% [markdown]
# Each dot is a candidate that was tried: across, what its forecast said; up, what it did to the mistake rate. Dots from
# bottom left to top right are forecasts that came true.

# %%
result.plot_forecasts()

# %% [markdown]
# What it cost, in tokens.

# %%
result.plot_cost()

# %% [markdown]
# ## Save it
#
# `save` writes DSPy's own format. The file loads in plain DSPy, without this package.

# %%
better.save("navigate.json")
loaded = dspy.ChainOfThought("question -> answer")
loaded.load("navigate.json")
print(f"loaded again: {accuracy(loaded):.0f} %")
