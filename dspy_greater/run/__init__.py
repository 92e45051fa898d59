"""A run as it goes: what it says (`events`), what it keeps (`journal`) and what it shows (`progress`)."""

from dspy_greater.run.journal import Journal
from dspy_greater.run.progress import Listeners, ProgressBar
from dspy_greater.run.serialise import from_json, to_json

__all__ = ["Journal", "Listeners", "ProgressBar", "from_json", "to_json"]
