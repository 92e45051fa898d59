"""A search on the packaged model behind `transformers serve`, with faults in between, finds what it finds without."""

from __future__ import annotations

import pytest
from serving import needs_serving, pocket_server

__all__ = ["pocket_server"]
pytestmark = [pytest.mark.slow, needs_serving]
