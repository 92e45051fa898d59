"""The tasks that optimizers are compared on."""

from benchmarks.tasks.task import Task, about_all, load, names

__all__ = ["Task", "about_all", "load", "names"]
