"""GRAD-SUM (arXiv 2407.12865): textual gradients, summarised, edit the prompts of a DSPy program.

`modules` holds the prompts, `loop` the beam search, `evaluate` generation and evaluation, `ask` the
bounded retries, `meter` what it costs, and `optimizer` the optimizer.
"""
