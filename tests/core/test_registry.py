from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlbench.core.errors import BadExample, UserError
from vlbench.core.names import nearest, slug, unknown
from vlbench.core.registry import Registry, load_attribute


def test_registry_resolves_on_first_use() -> None:
    registry = Registry("thing", {"join": "os.path:join"}, group="vlbench.none")
    assert registry.get("join")("a", "b") == "a/b"


def test_registry_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown thing 'jion'; did you mean 'join'\?"):
        Registry("thing", {"join": "os.path:join"}, group="vlbench.none").get("jion")


@pytest.mark.parametrize("target", ["os.path", "nowhere:x", "os.path:jion", ":x", "x:"])
def test_load_attribute_says_what_is_wrong(target: str) -> None:
    with pytest.raises(UserError):
        load_attribute(target, what="build function")


def test_load_attribute_lets_an_inner_import_error_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_inside.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_attribute("breaks_inside:x", what="build function")
    sys.modules.pop("breaks_inside", None)


def test_unknown_lists_what_is_known_where_nothing_is_near() -> None:
    assert unknown("task", "zzz", ["linear", "knn"]) == "unknown task 'zzz'; known: knn, linear"
    assert nearest("LINAER", ["linear"]) == "linear"


@pytest.mark.parametrize("name", ["../../etc/passwd", "timm:resnet50.a1", ".hidden", "a/b\\c", "", "héllo wörld"])
def test_slug_is_one_safe_component(name: str) -> None:
    made = slug(name)
    assert made
    assert "/" not in made
    assert not made.startswith(".")


def test_bad_example_survives_the_way_home_from_a_loader_process() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadExample("truncated image", "a.jpg", "ends early")))
    assert (error.kind, error.where, error.reason) == ("truncated image", "a.jpg", "ends early")
