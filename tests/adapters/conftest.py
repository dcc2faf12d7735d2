"""The little world of the tasks on an image and a sentence, written once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters.fusion_worlds import make_world


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its root: ``shapes:vqa?root=...`` and so on."""
    return make_world(tmp_path_factory.mktemp("asked") / "world")
