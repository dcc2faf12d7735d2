from __future__ import annotations

from pathlib import Path

import pytest

from vlbench.core.errors import UserError
from vlbench.train.templates import SIMPLE, named_templates


def test_named_templates() -> None:
    assert named_templates("auto") == SIMPLE
    assert named_templates("auto", ("x {}",)) == ("x {}",)
    assert named_templates("simple", ("x {}",)) == SIMPLE
    many = named_templates("imagenet81")
    assert len(set(many)) == 81
    assert many[-1] == "{}."
    assert all(template.count("{}") == 1 for template in many)


def test_templates_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\na {} seen from above\nthe {c}\n")
    assert named_templates(str(path)) == ("a {} seen from above", "the {c}")
    path.write_text("no place\n")
    with pytest.raises(UserError, match=r"mine\.txt: template 'no place' has no \{\}"):
        named_templates(str(path))
    with pytest.raises(UserError, match="did you mean 'imagenet81'"):
        named_templates("imagenet80")
