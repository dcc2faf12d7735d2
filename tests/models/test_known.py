"""A model that was loaded before is not built again for what its card says, and never taken for another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlbench.core.errors import UserError
from vlbench.core.paths import cache_dir
from vlbench.models import load as load_module
from vlbench.models.known import KnownBackbone, open_backbone
from vlbench.models.load import load_backbone


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The specs that were really loaded."""
    made: list[str] = []

    def note(spec: str, **options: Any) -> Any:
        made.append(spec)
        return load_backbone(spec, **options)

    monkeypatch.setattr(load_module, "load_backbone", note)
    return made


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights.pt"
    torch.save(load_backbone("timm:test_resnet", weights="random:1").module.net.state_dict(), file)
    return file


def records() -> list[Path]:
    return sorted((cache_dir() / "models").glob("*.json"))


def test_a_known_model_is_loaded_when_it_is_asked_to_compute(weights: Path, loads: list[str]) -> None:
    first = open_backbone("timm:test_resnet", weights=str(weights))
    again = open_backbone("timm:test_resnet", weights=str(weights))
    assert isinstance(again, KnownBackbone)
    assert (again.card, again.weights_hash) == (first.card, first.weights_hash)
    assert loads == ["timm:test_resnet"]
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again.encode_image(images).pooled_BD, first.encode_image(images).pooled_BD)
    assert len(loads) == 2


def test_other_weights_another_name_and_another_architecture_are_other_models(weights: Path, loads: list[str]) -> None:
    hashes = {open_backbone("timm:test_resnet", weights=str(weights)).weights_hash}
    state = torch.load(weights, weights_only=True)
    next(value for value in state.values() if value.is_floating_point()).view(-1)[0] += 1.0
    torch.save(state, weights)
    hashes.add(open_backbone("timm:test_resnet", weights=str(weights)).weights_hash)
    assert len(hashes) == 2, "one weight in the same file"
    assert open_backbone("timm:test_resnet", weights=str(weights), name="mine").card.id == "mine"
    with pytest.raises(UserError):
        open_backbone("timm:test_vit", weights=str(weights))
    assert len(loads) == 4
    assert len(records()) == 3


@pytest.mark.parametrize("options", [{"weights": "random"}, {"weights": "random:3"}])
def test_what_no_file_says_is_not_kept(options: dict[str, str], loads: list[str]) -> None:
    for _ in range(2):
        assert not isinstance(open_backbone("timm:test_resnet", **options), KnownBackbone)
    assert len(loads) == 2
    assert records() == []


def test_a_users_own_code_is_not_kept(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model.py").write_text(
        "from vlbench.models import wrap\n"
        "def build(weights=None):\n"
        "    import timm\n"
        "    return wrap(timm.create_model('test_resnet', num_classes=0), preprocess=64, name='mine')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for options in ({}, {"weights": str(weights)}):
        open_backbone("my_model:build", **options)
    assert records() == []


def test_a_model_that_is_not_what_was_kept_of_it_is_refused_and_forgotten(weights: Path) -> None:
    open_backbone("timm:test_resnet", weights=str(weights))
    (record,) = records()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"weights_hash": "0" * 16}))
    known = open_backbone("timm:test_resnet", weights=str(weights))
    with pytest.raises(UserError, match="give the same command again"):
        known.encode_image(torch.rand(1, 3, 64, 64))
    assert records() == []


def test_a_damaged_record_is_made_again(weights: Path) -> None:
    open_backbone("timm:test_resnet", weights=str(weights))
    (record,) = records()
    whole = record.read_text()
    for damaged in ("", "{", json.dumps({"card": {}}), json.dumps([1])):
        record.write_text(damaged)
        assert not isinstance(open_backbone("timm:test_resnet", weights=str(weights)), KnownBackbone)
        assert json.loads(record.read_text()) == json.loads(whole)


def test_a_known_model_needs_no_library(weights: Path) -> None:
    open_backbone("timm:test_resnet", weights=str(weights))
    code = (
        "import sys\n"
        "from vlbench.models.known import open_backbone\n"
        f"backbone = open_backbone('timm:test_resnet', weights={str(weights)!r})\n"
        "assert backbone.card.arch, backbone\n"
        "print([name for name in ('torch', 'torchvision', 'timm', 'open_clip') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
