from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.weights import load_strictly, read_checkpoint, read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
CHECKPOINT = {
    "format": "vlbench.checkpoint",
    "version": 1,
    "recipe": "clip",
    "config": {},
    "classes": [],
    "card": {},
    "model": STATE,
    "step": 1,
    "samples_seen": 2,
}


class Evil:
    """What reading it would do is visible afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(path: Path, reader=read_weights) -> str:
    with pytest.raises(UserError) as error:
        reader(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path.parent) in message
    assert len(message) < 400
    return message


def test_read_weights_unwraps_what_training_scripts_write(tmp_path):
    forms = {
        "bare.pt": STATE,
        "state_dict.pt": {"epoch": 3, "state_dict": STATE},
        "model.pth": {"model": STATE, "optimizer": {"lr": 0.1}},
        "module.pt": {"state_dict": {f"module.{key}": value for key, value in STATE.items()}},
        "compiled.pt": {"model": {f"_orig_mod.{key}": value for key, value in STATE.items()}},
        "native.pt": CHECKPOINT,
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "safe.safetensors")
    save_file(STATE, tmp_path / "safe-under-another-name.pt")
    for path in sorted(tmp_path.iterdir()):
        found = read_weights(path)
        assert found.keys() == STATE.keys(), path.name
        assert all(torch.equal(found[key], STATE[key]) for key in STATE), path.name


def test_read_weights_keeps_a_prefix_that_only_some_names_have(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt").keys() == {"module.a", "b"}


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle4"])
@pytest.mark.parametrize("reader", [read_weights, read_checkpoint])
def test_read_weights_refuses_a_pickle_that_runs_code(tmp_path, form, reader):
    trap, path = tmp_path / "pwned", tmp_path / "evil.pt"
    content = CHECKPOINT | {"model": {"w": Evil(trap)}}
    if form == "zip":
        torch.save(content, path)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Evil(trap), protocol=int(form[-1])))
    message = refused(path, reader)
    assert "refused" in message
    if form in ("zip", "legacy"):
        assert f"{os.mkdir.__module__}.mkdir" in message
    assert not trap.exists(), "the code in the file ran"


def test_read_weights_names_an_object_that_is_no_tensor(tmp_path):
    torch.save({"model": STATE, "args": argparse.ArgumentParser}, tmp_path / "x.pt")
    assert "argparse.ArgumentParser" in refused(tmp_path / "x.pt")


def test_read_weights_reads_past_the_settings_beside_them_without_their_classes(tmp_path, monkeypatch):
    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.frozen = True

        def __setstate__(self, state):
            raise AssertionError("run while it was read")

    yacs = types.ModuleType("yacs.config")
    CfgNode.__module__, CfgNode.__qualname__, yacs.CfgNode = "yacs.config", "CfgNode", CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    before = torch.serialization.get_safe_globals()
    settings = {"args": argparse.Namespace(lr=1, path=["a"]), "config": CfgNode({"MODEL": CfgNode({"DROP": 0.1})})}
    for zipped in (True, False):
        torch.save({"model": STATE, **settings}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "yacs.config")
            assert read_weights(tmp_path / "x.pt").keys() == STATE.keys()
    assert torch.serialization.get_safe_globals() == before, "nobody else's reading has changed"


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_read_weights_says_that_a_file_is_truncated(tmp_path, kept, zipped):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.randn(20_000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "truncated" in refused(path)


def test_read_weights_explains_other_broken_files(tmp_path):
    cases = {
        "zero.pt": (b"", "empty file"),
        "text.pt": (b"learning rate 0.1\n" * 20, "not a PyTorch or safetensors file"),
        "image.pt": (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a PyTorch or safetensors file"),
        "header.safetensors": ((10**12).to_bytes(8, "little") + b"{}", "not a valid safetensors file"),
        "garbage.safetensors": (b"\x10\0\0\0\0\0\0\0{not json at all", "not a valid safetensors file"),
        "zip.pt": (b"PK\x03\x04" + bytes(100), "truncated"),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert expected in refused(tmp_path / name), name
    save_file(STATE, tmp_path / "short.safetensors")
    short = (tmp_path / "short.safetensors").read_bytes()[:-4]
    (tmp_path / "short.safetensors").write_bytes(short)
    assert "not a valid safetensors file" in refused(tmp_path / "short.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in refused(tmp_path / "list.pt")
    torch.save({"lr": 0.1, "steps": 3}, tmp_path / "settings.pt")
    assert "found 'lr', 'steps'" in refused(tmp_path / "settings.pt")


def test_read_weights_finds_the_nearest_file(tmp_path):
    torch.save(STATE, tmp_path / "resnet50.pt")
    assert f"did you mean {tmp_path / 'resnet50.pt'}?" in refused(tmp_path / "resnet5.pt")
    assert "weights beside it: resnet50.pt" in refused(tmp_path / "zzzzzzzzz")
    assert "does not exist either" in refused(tmp_path / "nowhere" / "x.pt")
    (tmp_path / "sub").mkdir()
    assert "a folder" in refused(tmp_path / "sub")


def test_read_checkpoint_checks_format_version_and_parts(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(CHECKPOINT, path)
    assert read_checkpoint(path)["recipe"] == "clip"
    torch.save(STATE, path)
    assert "--weights ckpt.pt" in refused(path, read_checkpoint)
    torch.save(CHECKPOINT | {"version": 2}, path)
    assert "version 2" in refused(path, read_checkpoint)
    assert "update vlbench" in refused(path, read_checkpoint)
    torch.save(CHECKPOINT | {"version": 0}, path)
    assert "version 0" in refused(path, read_checkpoint)
    torch.save({key: value for key, value in CHECKPOINT.items() if key != "classes"}, path)
    assert "classes" in refused(path, read_checkpoint)


def test_load_strictly_copies_everything_or_nothing():
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    with pytest.raises(UserError) as error:
        load_strictly(module, {"weight": torch.ones(2, 4), "extra": torch.ones(1)}, where="f.pt")
    message = str(error.value)
    assert message.startswith("f.pt: does not fit")
    assert "1 missing (bias)" in message
    assert "1 unexpected (extra)" in message
    assert "weight (2, 4) for (2, 3)" in message
    assert torch.equal(module.weight, before)
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "head.weight": torch.ones(5)}
    load_strictly(module, state, where="f.pt", ignore=["head."])
    assert torch.equal(module.weight, torch.ones(2, 3))


def test_load_strictly_shows_only_the_first_few_keys():
    with pytest.raises(UserError, match=r"9 unexpected \(k0, k1, k2, …\)"):
        load_strictly(nn.Identity(), {f"k{i}": torch.ones(1) for i in range(9)}, where="f.pt")


def test_load_strictly_does_without_batch_counters():
    state = {key: value for key, value in nn.BatchNorm2d(3).state_dict().items() if key != "num_batches_tracked"}
    load_strictly(nn.BatchNorm2d(3), state, where="f.pt")
