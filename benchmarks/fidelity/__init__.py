"""How well a ranking of candidate tokens predicts what they turn out to be worth."""
