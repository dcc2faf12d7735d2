from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlbench.core.later import absent, complete_at

SOURCE = """
try:
    import colorsys as library
    from fractions import Fraction as Base
except ImportError:
    library = None
    class Base: pass

class Tower:
    def __init__(self, value=1):
        "Its words."
        if library is None:
            raise RuntimeError("please install the library")
        self.value = value

class Small(Tower):
    def __init__(self):
        super().__init__(2)

BY_NAME = {"tower": Tower, "small": Small, "words": "its words"}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that was imported without a library that is here."""
    (tmp_path / "with_towers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with absent("colorsys"):
        module = importlib.import_module("with_towers")
    yield module
    del sys.modules["with_towers"]


def test_what_is_absent_is_there_afterwards(module) -> None:
    assert module.library is None
    assert "colorsys" not in sys.modules
    assert importlib.import_module("colorsys") is sys.modules["colorsys"]


def test_a_loaded_library_is_not_taken_away() -> None:
    with absent("json"):
        assert importlib.import_module("json").loads("1") == 1


def test_what_was_absent_is_free_after_an_error() -> None:
    with pytest.raises(KeyError), absent("colorsys_of_nobody"):
        raise KeyError
    assert "colorsys_of_nobody" not in sys.modules


def test_a_module_is_completed_when_its_class_is_first_needed(module) -> None:
    tower, small = module.Tower, module.Small
    complete_at(module, "Tower", "__init__")
    assert tower.__init__.__doc__ == "Its words."
    assert module.library is None
    assert small().value == 2
    assert module.library is sys.modules["colorsys"]
    assert (module.Tower, module.Small) == (tower, small), "a class there is once"
    assert module.Base.__module__ == "fractions", "and the library's own in place of the makeshift"
    assert module.Tower(3).value == 3
    by_name = module.BY_NAME
    assert by_name == {"tower": tower, "small": small, "words": "its words"}
    assert type(pickle.loads(pickle.dumps(by_name["small"]()))) is small


def test_threads_that_need_it_at_once_all_find_it_complete(module, tmp_path: Path) -> None:
    (tmp_path / "with_towers.py").write_text("import time\ntime.sleep(0.2)\n" + SOURCE)  # which is run again
    complete_at(module, "Tower", "__init__")
    with ThreadPoolExecutor(3) as pool:
        assert [tower.value for tower in pool.map(lambda number: module.Tower(number), range(3))] == [0, 1, 2]


def test_whoever_asks_the_compiler_for_more_gets_it() -> None:
    code = """
        import importlib, sys
        import torch
        from vlbench.core.later import compiler_later
        with compiler_later():
            stand_in = importlib.import_module("torch._dynamo.utils")
            assert "torch._dynamo" not in sys.modules
            stand_in.counters
            assert sys.modules["torch._dynamo.utils"].counters is stand_in.counters
            assert sys.modules["torch._dynamo.utils"] is not stand_in
        assert sys.modules["torch._dynamo.utils"] is not stand_in
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
