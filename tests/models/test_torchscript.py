from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.torchscript import is_torchscript, read_torchscript
from vlbench.models.weights import read_weights

pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(4, dtype=dtype)
        self.proj = nn.Parameter(torch.randn(3, 4, dtype=dtype))
        self.register_buffer("every_other", torch.arange(6, dtype=dtype)[::2])  # strides of its own
        self.attn_mask = torch.ones(2, 2)  # neither parameter nor buffer, as in OpenAI's archives
        self.sizes = [1, 2]
        self.scale = 0.5

    def forward(self, x):
        return self.ln(x) @ self.proj.t() * self.scale + self.every_other + self.attn_mask.sum()


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(dtype), nn.Linear(3, 4, dtype=dtype), Block(dtype))
        self.bn = nn.BatchNorm1d(3)
        self.tied = self.blocks[0].proj
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, x):
        return self.bn(self.blocks(x))


def script(model):
    return torch.jit.script(model)


def trace(model):
    return torch.jit.trace(model.eval(), torch.randn(2, 4))


@pytest.mark.parametrize("make", [script, trace])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_read_torchscript_gives_the_state_dict_without_running_anything(tmp_path, monkeypatch, make, dtype):
    path = tmp_path / "model.pt"
    torch.manual_seed(0)
    if dtype != torch.float32 and make is trace:
        pytest.skip("a trace computes with its weights, and these are not all of one type")
    make(Model(dtype)).save(path)
    expected = torch.jit.load(path).state_dict()

    def forbidden(*args, **options):
        raise AssertionError("the program was loaded")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    found = read_weights(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert not any("attn_mask" in name for name in found)


def test_read_torchscript_of_a_program_without_lists_of_buffers_takes_every_tensor(tmp_path):
    torch.jit.script(Model()).save(tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name.endswith(".py"):
                lines = content.decode().split("\n")
                content = "\n".join(line for line in lines if "__buffers__" not in line).encode()
            old.writestr(name, content)
    new, old = read_torchscript(tmp_path / "new.pt"), read_torchscript(tmp_path / "old.pt")
    assert old.keys() - new.keys() == {"blocks.0.attn_mask", "blocks.2.attn_mask"}
    assert new.keys() <= old.keys()


def test_is_torchscript_is_about_the_program(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("PK\x03\x04 no archive")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert [is_torchscript(tmp_path / f"{name}.pt") for name in ("plain", "text", "script")] == [False, False, True]


class Evil:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rewritten(source, target, **changed: bytes):
    """``source`` with members replaced, by the end of their name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            member = name.rpartition("/")[2].replace(".", "_")
            new.writestr(name, changed.get(member, old.read(name)))
    return target


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        read_weights(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_read_torchscript_refuses_a_pickle_that_calls(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "good.pt")
    for protocol in (0, 2, 4):
        evil = pickle.dumps(Evil(tmp_path / "made"), protocol=protocol)
        message = refused(rewritten(tmp_path / "good.pt", tmp_path / "evil.pt", data_pkl=evil))
        assert "refused" in message
        assert "mkdir" in message
        assert not (tmp_path / "made").exists()
    # A name inside PyTorch is no better than any other.
    for name in ("ctorch.serialization\nload\n.", "ctorch._utils\n_rebuild_device_tensor_from_numpy\n."):
        message = refused(rewritten(tmp_path / "good.pt", tmp_path / "evil.pt", data_pkl=b"\x80\x02" + name.encode()))
        assert "refused" in message


def test_read_torchscript_names_damage(tmp_path):
    torch.jit.script(nn.Linear(20, 20)).save(tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(tmp_path / "short.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        storage = next(archive.read(name) for name in archive.namelist() if name.endswith("data/0"))
    broken = {"0": storage[:40], "data_pkl": b"\x80\x02"}
    for member, content in broken.items():
        assert "damaged" in refused(rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", **{member: content}))
    # No module at the top: a list.
    message = refused(rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", data_pkl=pickle.dumps([1], protocol=2)))
    assert "refused" in message
    rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", data_pkl=b"\x80\x02c__torch__\nEmpty\n)\x81}b.")
    assert "holds no state dict" in refused(tmp_path / "bad.pt")
