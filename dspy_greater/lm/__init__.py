"""A `dspy.LM` over open weights in this process, or over several servers of one model."""
