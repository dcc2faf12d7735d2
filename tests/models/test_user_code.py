from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vlbench.adapters.encoder import Encoder
from vlbench.models import wrap
from vlbench.models.backbone import backbone_fingerprint
from vlbench.models.load import load_backbone
from vlbench.models.user_code import code_fingerprint, has_known_code
from vlbench.store.features import FeatureStore

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return images.mean((2, 3)) * self.scale
"""
BUILD = """
from vlbench.models import wrap
from {net} import Net

def build():
    return wrap(Net(), preprocess=32, name="mine")
"""


def _load(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> str:
    """The fingerprint of ``mine:build`` in fresh modules, as another process would import them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return backbone_fingerprint(load_backbone("vlb_build:build"))


def test_a_changed_forward_body_or_build_file_is_another_model(tmp_path, monkeypatch):
    build = BUILD.format(net="vlb_net")
    base = _load(tmp_path / "a", monkeypatch, vlb_net=NET, vlb_build=build)
    assert _load(tmp_path / "moved", monkeypatch, vlb_net=NET, vlb_build=build) == base, "the place is not content"
    squared = NET.replace("* self.scale", "** 2 * self.scale")
    changed = _load(tmp_path / "b", monkeypatch, vlb_net=squared, vlb_build=build)
    rebuilt = _load(tmp_path / "c", monkeypatch, vlb_net=NET, vlb_build=build.replace("Net()", "Net().eval()"))
    assert len({base, changed, rebuilt}) == 3


def test_other_layers_without_weights_are_another_model():
    def of(layer: nn.Module) -> str:
        torch.manual_seed(0)
        return backbone_fingerprint(wrap(nn.Sequential(nn.Flatten(), nn.Linear(3, 3), layer), preprocess=1, name="m"))

    assert of(nn.ReLU()) == of(nn.ReLU())
    assert of(nn.ReLU()) != of(nn.Tanh())


def test_a_changed_text_function_is_another_model(tmp_path):
    def of(body: str) -> str | None:
        path = tmp_path / "vlb_text.py"
        path.write_text(f"import torch\ndef embed(texts):\n    return {body}\n")
        spec = importlib.util.spec_from_file_location("vlb_text", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["vlb_text"] = module
        try:
            spec.loader.exec_module(module)
            return code_fingerprint(wrap(nn.Flatten(), preprocess=1, name="m", text=module.embed))
        finally:
            del sys.modules["vlb_text"]

    assert None not in {of("torch.ones(len(texts), 3)")}
    assert of("torch.ones(len(texts), 3)") == of("torch.ones(len(texts), 3)")
    assert of("torch.ones(len(texts), 3)") != of("torch.zeros(len(texts), 3)")


def test_features_of_code_without_a_file_are_not_kept(tmp_path):
    names: dict = {"__name__": "no_such_module"}
    exec("from torch import nn\nclass Net(nn.Flatten):\n    pass", names)
    unknown = wrap(names["Net"](), preprocess=1, name="m")
    assert code_fingerprint(unknown) is None
    assert not has_known_code(unknown)
    encoder = Encoder(unknown, FeatureStore(tmp_path))
    assert not encoder.code_is_known
    assert type(encoder._images).__name__ == "_MemoryTable"
    known = Encoder(wrap(nn.Flatten(), preprocess=1, name="m"), FeatureStore(tmp_path))
    assert known.code_is_known
    assert type(known._images).__name__ == "FeatureTable"
