"""A run as it goes: what it says (`events`), what it keeps (`journal`) and what it shows (`progress`)."""

from .journal import Journal
from .progress import Listeners, ProgressBar
from .serialise import from_json, to_json

__all__ = ["Journal", "Listeners", "ProgressBar", "from_json", "to_json"]
