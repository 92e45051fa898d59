"""The search over instructions: problem, loop, steps, selection."""
