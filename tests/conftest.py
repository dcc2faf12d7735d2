"""Shared fixtures: one thread, a private cache, the real data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: on shared cores a spinning OpenMP pool is many times slower than a passive one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory):
    """Point VLBENCH_CACHE at a folder of this run, shared by its workers, so that tests never read a user's cache."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    before = os.environ.get("VLBENCH_CACHE")
    os.environ["VLBENCH_CACHE"] = str(root / "vlbench-cache")
    yield
    if before is None:
        del os.environ["VLBENCH_CACHE"]
    else:
        os.environ["VLBENCH_CACHE"] = before


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real data: $VLBENCH_REAL_DATA, else ../shared/data beside the checkout. Skips where it is absent."""
    named = os.environ.get("VLBENCH_REAL_DATA")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set VLBENCH_REAL_DATA")
    return path
