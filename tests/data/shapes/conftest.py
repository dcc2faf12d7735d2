"""A small world, written once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlbench.data.shapes.world import TINY
from vlbench.data.shapes.write import write_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a world of TINY sizes, seed 0."""
    return write_world(tmp_path_factory.mktemp("shapes") / "world", sizes=TINY, workers=1)
