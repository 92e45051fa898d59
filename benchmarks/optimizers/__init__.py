"""The optimizers that are compared, one file for each of them or for a family."""

from benchmarks.optimizers.optimizer import OPTIMIZERS, Context, DescribeTask, Optimizer, make, names

__all__ = ["OPTIMIZERS", "Context", "DescribeTask", "Optimizer", "make", "names"]
