"""A DSPy program, in and out: its predictors, its runs, its rows, and copies with other instructions."""
