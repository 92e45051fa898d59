"""What every optimizer of the comparison runs in: one model, one budget, one way to be judged."""
