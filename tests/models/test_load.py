from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from vlbench.core.cards import ModelCard, Preprocess, Published
from vlbench.core.errors import UserError
from vlbench.models import load as load_module
from vlbench.models.backbone import backbone_fingerprint
from vlbench.models.load import load_backbone


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module of the user's that can be imported."""

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def error_of(spec: str, **options) -> str:
    with pytest.raises(UserError) as error:
        load_backbone(spec, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:test_resnt", "did you mean 'test_resnet'"),
        ("timm:resnet50.a1_in1kk", "did you mean 'a1_in1k'"),
        ("timm:mixer_s32_224", "no pretrained weights"),
        ("torchvision:resnet_50", "did you mean 'resnet50'"),
        ("torchvision:resnet50.IMAGENET1K_V3", "did you mean 'IMAGENET1K_V"),
        ("open_clip:ViT-B-23", "did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32.opnai", "did you mean 'openai'"),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32.openai"),
        ("tim:resnet50", "did you mean timm:resnet50?"),
        ("torchvison:resnet50.IMAGENET1K_V2", "did you mean torchvision:resnet50.IMAGENET1K_V2?"),
        ("no_such_module_of_mine:build", "PYTHONPATH"),
        ("json:lodas", "did you mean 'loads'"),
        ("clip-rn50-openia", "did you mean 'clip-rn50-openai'"),
        ("something else", "timm:NAME"),
        ("", "timm:NAME"),
    ],
)
def test_load_backbone_answers_a_typing_error_with_the_nearest_name(spec, message):
    assert message in error_of(spec)


def test_load_backbone_answers_a_wrong_path_with_the_nearest_file(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "ckpt.pt")
    assert f"did you mean {tmp_path / 'ckpt.pt'}?" in error_of(str(tmp_path / "ckpt.tp"))
    assert f"did you mean {tmp_path / 'ckpt.pt'}?" in error_of("timm:test_resnet", weights=str(tmp_path / "ckp.pt"))
    assert f"did you mean {tmp_path}?" in error_of(f"{tmp_path}x")
    (tmp_path / "empty").mkdir()
    assert "it has no weights at all" in error_of(str(tmp_path / "empty"))
    assert "not a vlbench checkpoint" in error_of(str(tmp_path))


def test_load_backbone_without_network_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for spec in ("timm:test_resnet", "open_clip:RN50-quickgelu.openai"):
        message = error_of(spec)
        assert "cannot be downloaded" in message
        assert "huggingface.co/timm/" in message
        assert "--weights random" in message

    def no_network(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    message = error_of("torchvision:resnet18")
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert str(tmp_path / "hub" / "checkpoints") in message


@pytest.mark.parametrize("spec", ["timm:test_vit", "torchvision:resnet18", "open_clip:tiny-vit"])
def test_load_backbone_random_is_a_function_of_its_seed(spec, tiny_open_clip):
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    first = load_backbone(spec, weights="random")
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state moved"
    again, other = load_backbone(spec, weights="random:0"), load_backbone(spec, weights="random:1")
    assert first.weights_hash == again.weights_hash != other.weights_hash
    assert first.card.random
    assert (first.card.seed, other.card.seed) == (0, 1)
    assert first.card.id == f"{spec}-random-s0"
    assert other.card.id == f"{spec}-random-s1"
    assert first.card.published == ()
    assert load_backbone(spec, weights="random", name="baseline").card.id == "baseline"


@pytest.mark.parametrize("weights", ["random:x", "random:", "random:-1"])
def test_load_backbone_refuses_a_seed_that_is_no_number(weights):
    assert "random:SEED" in error_of("timm:test_vit", weights=weights)


def test_load_backbone_names_devices():
    assert "unknown device 'gpu'" in error_of("timm:test_vit", weights="random", device="gpu")
    if not torch.cuda.is_available():
        assert "no CUDA device" in error_of("timm:test_vit", weights="random", device="cuda")


def test_load_backbone_reads_reference_cards(monkeypatch, tmp_path):
    published = (Published(task="linear/x", metric="acc1", value=0.5, source="a table"),)
    preprocess = Preprocess(image_size=96)
    card = ModelCard(
        id="mine",
        loader="timm",
        arch="test_resnet",
        weights="r160_in1k",
        preprocess=preprocess,
        published=published,
        licence="MIT",
    )
    file = tmp_path / "w.pt"
    torch.save(load_backbone("timm:test_resnet", weights="random:5").module.net.state_dict(), file)
    known = card.model_copy(update={"id": "known", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    monkeypatch.setattr(load_module, "model_cards", lambda: {"mine": card, "known": known})

    loaded = load_backbone("mine", weights=str(file))
    assert loaded.card.id == "mine@w"
    assert loaded.card.preprocess == preprocess
    assert loaded.card.published == (), "published numbers are about other weights"
    assert loaded.card.weights == "w.pt"
    claims = ("pretrain_data", "images_seen", "seed", "licence", "recipe")
    assert [getattr(loaded.card, claim) for claim in claims] == [None] * 5, "said of other weights"
    assert loaded.card.provides == {"pooled", "tokens", "maps"}
    assert load_backbone("known", weights=str(file)).card.id == "known"
    assert load_backbone("known", weights=str(file)).card.published == published
    assert load_backbone("mine", weights="random").card.published == ()


def test_fingerprint_does_not_depend_on_the_file(tmp_path):
    from safetensors.torch import save_file

    state = load_backbone("timm:test_resnet", weights="random:5").module.net.state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pt")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "b.safetensors")
    one, two = (load_backbone("timm:test_resnet", weights=str(tmp_path / f)) for f in ("a.pt", "b.safetensors"))
    assert one.card.id != two.card.id
    assert backbone_fingerprint(one) == backbone_fingerprint(two)


BUILD = """
    import torch
    from torch import nn
    import vlbench.models

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8, 8)
            nn.init.ones_(self.conv.weight)
        def forward(self, images):
            return self.conv(images).mean((2, 3))

    def build():
        return vlbench.models.wrap(Net(), preprocess=32, name="mine")

    def build_weights(weights=None):
        return vlbench.models.wrap(Net(), preprocess=32, name=f"asked for {weights}")

    def build_plain():
        return Net()

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
        def forward(self, images):
            return images.mean((2, 3)) * self.weight

    def build_bare():
        return vlbench.models.wrap(Bare(), preprocess=32, name="bare")

    number = 3
"""


def test_build_function_gives_a_backbone(user_module, tmp_path):
    module = user_module("users_model", BUILD)
    backbone = load_backbone(f"{module}:build")
    assert backbone.card.id == "mine"
    assert backbone.encode_image(torch.ones(2, 3, 32, 32)).pooled_BD.shape == (2, 4)

    random = load_backbone(f"{module}:build", weights="random:4")
    assert random.card.random
    assert random.card.id == "mine-random-s4"
    assert random.weights_hash != backbone.weights_hash
    assert random.weights_hash == load_backbone(f"{module}:build", weights="random:4").weights_hash

    state = {"conv.weight": torch.zeros(4, 3, 8, 8), "conv.bias": torch.full((4,), 2.0)}
    torch.save(state, tmp_path / "w.pt")
    filled = load_backbone(f"{module}:build", weights=str(tmp_path / "w.pt"))
    assert torch.equal(filled.encode_image(torch.ones(1, 3, 32, 32)).pooled_BD, torch.full((1, 4), 2.0))
    assert filled.weights_hash not in (random.weights_hash, backbone.weights_hash), "the hash is of the loaded weights"

    assert load_backbone(f"{module}:build_weights", weights="random").card.id == "asked for random-random-s0"


def test_build_function_mistakes_are_named(user_module, tmp_path):
    module = user_module("users_other_model", BUILD)
    assert "vlbench.models.wrap" in error_of(f"{module}:build_plain")
    assert "int, not a function" in error_of(f"{module}:number")
    assert "did you mean 'build'" in error_of(f"{module}:buidl")
    assert "parameter 'weights'" in error_of(f"{module}:build_bare", weights="random")
    torch.save({"weight": torch.ones(4)}, tmp_path / "w.pt")
    assert "of another shape (weight (4,) for (3,))" in error_of(f"{module}:build_bare", weights=str(tmp_path / "w.pt"))


def test_build_function_own_import_error_is_not_hidden(user_module):
    module = user_module("users_broken_model", "import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_backbone(f"{module}:build")


def test_load_backbone_takes_a_path_object_text_with_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(Path(tmp_path, "ckpt.pt")) in error_of("~/ckpt.pt")


def test_importing_models_loads_no_torch():
    code = "import sys, vlbench.models; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_weights_file_that_is_renamed_or_moved_keeps_the_feature_key(tmp_path):
    for number, (spec, name) in enumerate({"timm:test_vit": "net", "torchvision:resnet18": "net"}.items()):
        state = getattr(load_backbone(spec, weights="random:2").module, name).state_dict()
        file, moved = tmp_path / f"{number}.pt", tmp_path / f"to-{number}" / "other.pt"
        torch.save(state, file)
        before = backbone_fingerprint(load_backbone(spec, weights=str(file)))
        moved.parent.mkdir()
        file.rename(moved)
        assert backbone_fingerprint(load_backbone(spec, weights=str(moved))) == before
