from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch

import open_clip
import pytest
import torch

from vlbench.core.errors import UserError
from vlbench.models.backbone import backbone_fingerprint
from vlbench.models.load import load_backbone
from vlbench.models.loaders import open_clip as loader

TEXTS = ["a red circle", "two blue squares on a white ground"]


@pytest.fixture
def saved(tiny_open_clip, tmp_path):
    """A tiny open_clip model and a file of its weights, by name."""

    def save(name: str, **options):
        torch.manual_seed(7)
        model = open_clip.create_model(name, **options).eval()
        path = tmp_path / f"{name}.pt"
        # As open_clip's own trainer writes it.
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": state}, path)
        return model, str(path)

    return save


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn", "tiny-timm", "tiny-coca"])
def test_open_clip_weights_file_is_really_loaded(saved, name):
    model, path = saved(name)
    backbone = loader.load(name, weights=path)
    images_BCHW = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        image_BE = model.encode_image(images_BCHW, normalize=False)
        text_BE = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=False)
    features = backbone.encode_image(images_BCHW)
    torch.testing.assert_close(features.embed_BE, image_BE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backbone.encode_text(TEXTS), text_BE, rtol=1e-5, atol=1e-6)
    assert backbone.weights_hash != loader.load(name, weights="random").weights_hash
    assert backbone.card.provides >= {"pooled", "embed", "text"}


def test_open_clip_feature_that_probes_read(saved):
    model, path = saved("tiny-vit")
    images_BCHW = torch.randn(2, 3, 32, 32)
    features = loader.load("tiny-vit", weights=path).encode_image(images_BCHW)
    assert features.pooled_BD.shape == (2, 32)  # before the projection to 24
    with torch.inference_mode():
        torch.testing.assert_close(features.pooled_BD @ model.visual.proj, features.embed_BE)
    _, path = saved("tiny-rn")
    features = loader.load("tiny-rn", weights=path).encode_image(images_BCHW)
    assert torch.equal(features.pooled_BD, features.embed_BE)  # the attention pool's output


def test_open_clip_weights_of_another_model_are_refused(saved):
    _, path = saved("tiny-rn")
    with pytest.raises(UserError, match="in open_clip:tiny-vit: does not fit the architecture"):
        loader.load("tiny-vit", weights=path)


TAGS = {
    "openai": {"url": "https://example.org/ViT-tiny.pt", "hf_hub": "x/y/", "quick_gelu": True},
    "laion": {"url": "https://example.org/vit-laion.pt", "hf_hub": "x/z/"},
}


@pytest.fixture
def tagged(monkeypatch, tiny_open_clip):
    from open_clip import pretrained

    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", TAGS)


def test_open_clip_activation_follows_the_tag(saved, tagged):
    model, path = saved("tiny-vit", force_quick_gelu=True)
    images_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected_BE = model.encode_image(images_BCHW)
    quick = loader.load("tiny-vit.openai", weights=path)
    plain = loader.load("tiny-vit.laion", weights=path)
    torch.testing.assert_close(quick.encode_image(images_BCHW).embed_BE, expected_BE, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain.encode_image(images_BCHW).embed_BE, expected_BE, atol=1e-4)
    assert quick.weights_hash == plain.weights_hash
    assert quick.card.arch == "tiny-vit-quickgelu" != plain.card.arch, "so that their fingerprints differ"


def test_open_clip_names_weights_that_need_another_activation(saved, tagged, tmp_path):
    model, _ = saved("tiny-vit")
    for file in ("ViT-tiny.pt", "vit-laion.pt"):
        torch.save(model.state_dict(), tmp_path / file)
    with pytest.raises(UserError, match=r"trained with QuickGELU, .* ask for open_clip:tiny-vit\.openai"):
        loader.load("tiny-vit", weights=str(tmp_path / "ViT-tiny.pt"))
    with pytest.raises(UserError, match=r"trained with GELU, .* ask for open_clip:tiny-vit\.laion"):
        loader.load("tiny-vit.openai", weights=str(tmp_path / "vit-laion.pt"))
    marks = {key: torch.tensor(32) for key in ("input_resolution", "context_length", "vocab_size")}
    torch.save(model.state_dict() | marks, tmp_path / "renamed.pt")
    with pytest.raises(UserError, match="QuickGELU"):
        loader.load("tiny-vit", weights=str(tmp_path / "renamed.pt"))
    assert loader.load("tiny-vit.openai", weights=str(tmp_path / "renamed.pt")).card.weights == "openai"
    torch.save(model.state_dict(), tmp_path / "from-openai.pt")
    with pytest.warns(UserWarning, match="sounds like weights trained with QuickGELU"):
        loader.load("tiny-vit", weights=str(tmp_path / "from-openai.pt"))


def test_open_clip_preprocessing_must_be_known(saved, monkeypatch, tiny_open_clip):
    from open_clip import pretrained

    _, path = saved("tiny-vit")
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "squash"}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", {"a": half, "b": half | {"mean": (0.0, 0.0, 0.0)}})
    with pytest.raises(UserError, match=r"differ in how images are prepared.*open_clip:tiny-vit\.a"):
        loader.load("tiny-vit", weights=path)
    preprocess = loader.load("tiny-vit.a", weights=path).card.preprocess
    assert preprocess.mean == (0.5, 0.5, 0.5)
    assert preprocess.resize == "squash"
    assert preprocess.image_size == (32, 32)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", {"a": half})
    assert loader.load("tiny-vit", weights=path).card.preprocess == preprocess


def test_open_clip_leaves_the_root_logger_alone(tiny_open_clip, capsys):
    import logging

    before = list(logging.getLogger().handlers), logging.root.manager.disable
    loader.load("tiny-vit", weights="random")
    assert (list(logging.getLogger().handlers), logging.root.manager.disable) == before
    assert capsys.readouterr().err == ""


class Holder(torch.nn.Module):
    """A module with the tensors of a state dict under their names."""

    def __init__(self, state, **buffers):
        super().__init__()
        for name in sorted({key.partition(".")[0] for key in state}):
            if name in state:
                self.register_parameter(name, torch.nn.Parameter(state[name], requires_grad=False))
            else:
                below = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
                self.add_module(name, Holder(below))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_open_clip_reads_openais_own_archives(tiny_open_clip, monkeypatch, tmp_path, name):
    from open_clip import pretrained

    monkeypatch.setitem(pretrained._PRETRAINED, name, TAGS)
    torch.manual_seed(7)
    model = open_clip.create_model(name, force_quick_gelu=True).eval()
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    archive = Holder(half, **{key: torch.tensor(value) for key, value in sizes.items()})
    torch.jit.script(archive).save(tmp_path / "ViT-tiny.pt")

    with pytest.raises(UserError, match=rf"trained with QuickGELU, .* ask for open_clip:{name}\.openai"):
        loader.load(name, weights=str(tmp_path / "ViT-tiny.pt"))
    backbone = loader.load(f"{name}.openai", weights=str(tmp_path / "ViT-tiny.pt"))
    assert {parameter.dtype for parameter in backbone.module.parameters()} == {torch.float32}
    model.load_state_dict(half)
    images_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected_BE = model.encode_image(images_BCHW)
        text_BE = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    torch.testing.assert_close(backbone.encode_image(images_BCHW).embed_BE, expected_BE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backbone.encode_text(TEXTS), text_BE, rtol=1e-5, atol=1e-6)


def test_open_clip_recognised_file_says_how_images_are_prepared(saved, monkeypatch, tiny_open_clip, tmp_path):
    from open_clip import pretrained

    model, _ = saved("tiny-vit")
    torch.save(model.state_dict(), tmp_path / "b.pt")
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    tags = {"a": {"url": "https://example.org/a.pt"}, "b": {"url": "https://example.org/b.pt", **half}}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", tags)
    assert loader.load("tiny-vit", weights=str(tmp_path / "b.pt")).card.preprocess.mean == (0.5, 0.5, 0.5)
    (tmp_path / "b.pt").rename(tmp_path / "other.pt")
    with pytest.raises(UserError, match="differ in how images are prepared"):
        loader.load("tiny-vit", weights=str(tmp_path / "other.pt"))


CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def folder(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = open_clip.CLIP(**CONFIG)
    folder = tmp_path / "mine"
    folder.mkdir()
    settings = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model.eval()


def test_local_folder_gives_open_clips_own_features_and_its_preprocessing(folder):
    place, model = folder
    backbone = load_backbone(f"open_clip:local-dir:{place}")
    images_BCHW = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(backbone.encode_image(images_BCHW).embed_BE, model.encode_image(images_BCHW))
    assert backbone.card.preprocess.mean == (0.5, 0.5, 0.5)
    assert backbone.card.preprocess.resize == "squash"
    assert backbone.card.id.startswith("open_clip:mine-")
    assert "mine" not in backbone.card.arch


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_folder_that_is_renamed_or_moved_keeps_the_feature_key(folder, tmp_path, own_tokenizer):
    place, _ = folder
    if own_tokenizer:
        pytest.importorskip("transformers")
        from tests.models.loaders import hf_models

        config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_tokenizer_name": "me/words"}}
        (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        hf_models.tokenizer("siglip").save_pretrained(place)
    before = load_backbone(f"open_clip:local-dir:{place}")
    texts_BE = before.encode_text(TEXTS)
    # open_clip takes a model of its own for SigLIP's by its name; a folder's name decides nothing.
    moved = tmp_path / "elsewhere" / "siglip-renamed"
    moved.parent.mkdir()
    place.rename(moved)
    after = load_backbone(f"open_clip:local-dir:{moved}")
    assert backbone_fingerprint(after) == backbone_fingerprint(before)
    assert after.card.id != before.card.id, "the name that is shown is the folder's"
    assert str(tmp_path) not in after.card.model_dump_json()
    if own_tokenizer:
        assert torch.equal(after.encode_text(TEXTS), texts_BE)
        changed = json.loads((moved / "tokenizer.json").read_text())
        words = changed["model"]["vocab"]
        words["red"], words["blue"] = words["blue"], words["red"]
        (moved / "tokenizer.json").write_text(json.dumps(changed))
        other = load_backbone(f"open_clip:local-dir:{moved}")
        assert backbone_fingerprint(other) != backbone_fingerprint(before), "another tokenizer reads other texts"


def test_local_folder_reads_the_weights_that_are_named_not_its_own(folder):
    place, _ = folder
    own = load_backbone(f"open_clip:local-dir:{place}")
    assert load_backbone(f"open_clip:local-dir:{place}", weights="random:1").weights_hash != own.weights_hash


def test_local_folder_without_weights_or_configuration_says_so(folder, tmp_path):
    place, _ = folder
    (place / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="has none of"):
        load_backbone(f"open_clip:local-dir:{place}")
    with pytest.raises(UserError, match="cannot read its open_clip_config"):
        load_backbone(f"open_clip:local-dir:{tmp_path}")


def test_hub_repository_names_the_model_wherever_its_files_lie(folder, monkeypatch, tmp_path):
    place, _ = folder
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    place.rename(snapshot)
    monkeypatch.setattr(loader, "_hub_folder", lambda repository, weights: snapshot)
    hub, local = load_backbone("open_clip:hf-hub:me/tiny"), load_backbone(f"open_clip:local-dir:{snapshot}")
    assert hub.card.id == "open_clip:hf-hub:me/tiny"
    assert "0123abc" not in hub.card.model_dump_json()
    assert backbone_fingerprint(hub) == backbone_fingerprint(local), "the same files are the same model"


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    """A repository on a hub made up here, and what it was asked for: the patterns of each call."""
    repository, model = folder
    snapshot, asked = tmp_path / "cache" / "snapshot", []

    def download(name, *, allow_patterns):
        asked.append(list(allow_patterns))
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: True)
    return repository, model, asked


def test_hub_repository_is_asked_for_one_file_of_weights(hub):
    repository, _, asked = hub
    (repository / "open_clip_pytorch_model.bin").write_bytes(b"the same weights once more")
    load_backbone("open_clip:hf-hub:me/tiny")
    assert [patterns[3:] for patterns in asked] == [["open_clip_model.safetensors"]]


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"])
def test_hub_repository_s_older_weight_files_are_found(hub, name):
    repository, model, _ = hub
    safetensors = repository / "open_clip_model.safetensors"
    if name.endswith(".bin"):
        torch.save(model.state_dict(), repository / name)
        safetensors.unlink()
    else:
        safetensors.rename(repository / name)
    backbone = load_backbone("open_clip:hf-hub:me/tiny")
    images_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(backbone.encode_image(images_BCHW).embed_BE, model.encode_image(images_BCHW))


def test_hub_repository_without_any_weights_says_which_names_it_was_searched_for(hub):
    repository, _, asked = hub
    (repository / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"its copy .*snapshot has none of .*open_clip_pytorch_model\.bin; pass --w"):
        load_backbone("open_clip:hf-hub:me/tiny")
    assert len(asked) == 3


def test_hub_repository_s_weights_are_left_there_where_others_are_named(hub):
    _, _, asked = hub
    load_backbone("open_clip:hf-hub:me/tiny", weights="random")
    assert asked == [["*.json", "*.txt", "*.model"]]


def test_hub_that_cannot_be_reached_names_both_files(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    with pytest.raises(UserError, match=r"open_clip_model\.safetensors \(or open_clip_pytorch_model\.bin\) from"):
        load_backbone("open_clip:hf-hub:me/tiny")


def test_hub_repository_s_own_tokenizer_is_read_from_its_folder(folder, monkeypatch):
    place, _ = folder
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_tokenizer_name": "me/words"}}
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    monkeypatch.setattr(loader, "_hub_folder", lambda repository, weights: place)
    asked = []

    def ask(name):
        asked.append(name)
        return lambda texts, context_length: torch.ones(len(texts), context_length, dtype=torch.long)

    monkeypatch.setattr(open_clip, "get_tokenizer", ask)
    backbone = load_backbone("open_clip:hf-hub:me/tiny")
    assert backbone.card.text.tokenizer.startswith("open_clip:tokenizer-")
    assert asked == [], "linear and knn need none"
    assert backbone.encode_text(["a", "b"]).shape == (2, 24)
    assert backbone.encode_text(["c"]).shape == (1, 24)
    assert asked == [f"local-dir:{place}"]


def test_model_with_a_tokenizer_on_the_hub_is_probed_without_network(folder, monkeypatch):
    pytest.importorskip("transformers")
    place, _ = folder
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_tokenizer_name": "me/words"}}
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    backbone = load_backbone(f"open_clip:local-dir:{place}", weights="random")
    assert torch.isfinite(backbone.encode_image(torch.randn(1, 3, 32, 32)).pooled_BD).all()
    with pytest.raises(UserError, match=r"tokenizer\.json, tokenizer_config\.json .*linear and knn need no tokenizer"):
        backbone.encode_text(["a"])


def test_local_folder_with_its_own_tokenizer_reads_texts_without_network(folder, monkeypatch):
    pytest.importorskip("transformers")
    from tests.models.loaders import hf_models

    place, model = folder
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_tokenizer_name": "me/words"}}
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    hf_models.tokenizer("siglip").save_pretrained(place)
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    backbone = load_backbone(f"open_clip:local-dir:{place}")
    tokens_BL = open_clip.get_tokenizer(f"local-dir:{place}")(TEXTS)
    assert tokens_BL.shape == (2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(backbone.encode_text(TEXTS), model.encode_text(tokens_BL))


@pytest.fixture
def without_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny_siglip(without_hub, tmp_path):
    """A configuration of open_clip's whose tokenizer the hub has."""
    pytest.importorskip("transformers")
    text = {**CONFIG["text_cfg"], "hf_tokenizer_name": "me/words", "tokenizer_kwargs": {"clean": "canonicalize"}}
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny-own-words.json").write_text(json.dumps({**CONFIG, "text_cfg": text}))
    open_clip.add_model_config(folder)
    yield "tiny-own-words"
    open_clip.factory._MODEL_CONFIGS.pop("tiny-own-words")


def test_tokenizer_of_the_hub_is_put_in_its_place_by_hand(tiny_siglip, tmp_path):
    from tests.models.loaders import hf_models

    spec = f"open_clip:{tiny_siglip}"
    named = load_backbone(spec, weights="random")
    assert named.card.text.tokenizer == spec, "the hub's, whatever is in it"
    with pytest.raises(UserError) as caught:
        named.encode_text(["a"])
    place = tmp_path / "cache" / "tokenizers" / "me" / "words"
    line = str(caught.value)
    assert "\n" not in line
    assert f"from huggingface.co/me/words elsewhere and put them into {place}" in line
    assert "--model" not in line, "another --model would lose a card's name, preprocessing and published numbers"

    hf_models.tokenizer("siglip").save_pretrained(place)
    backbone = load_backbone(spec, weights="random")
    assert backbone.card.id == named.card.id
    assert backbone.card.text.tokenizer.startswith("open_clip:tokenizer-"), "known by its files"
    theirs = open_clip.tokenizer.HFTokenizer(str(place), context_length=20, clean="canonicalize")
    texts = ["A red, circle!", "two blue square on a white ground"]
    with torch.inference_mode():
        expected_BE = backbone.module.encode_text(theirs(texts))
    torch.testing.assert_close(backbone.encode_text(texts), expected_BE)
    assert not torch.equal(theirs(["a red circle"]), theirs(["two blue square"])), "the tokenizer tells texts apart"


def test_tokenizer_put_in_its_place_later_is_another_model_than_was_kept(tiny_siglip, tmp_path):
    from tests.models.loaders import hf_models
    from vlbench.models.known import open_backbone

    spec, file = f"open_clip:{tiny_siglip}", tmp_path / "w.pt"
    torch.save(open_clip.create_model(tiny_siglip).state_dict(), file)
    for _ in range(2):
        assert open_backbone(spec, weights=str(file)).card.text.tokenizer == spec
    hf_models.tokenizer("siglip").save_pretrained(tmp_path / "cache" / "tokenizers" / "me" / "words")
    for _ in range(2):
        assert open_backbone(spec, weights=str(file)).encode_text(["a red circle"]).shape == (1, 24)
