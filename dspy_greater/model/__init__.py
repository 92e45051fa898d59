"""Token ids in, tokens and log-probabilities out. Nothing here imports DSPy."""
