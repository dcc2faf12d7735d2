from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.errors import UserError
from vlbench.data.transforms import eval_transform, normalise
from vlbench.models.backbone import backbone_fingerprint
from vlbench.models.hf_inputs import HfTokenizer
from vlbench.models.load import load_backbone

pytest.importorskip("transformers")

from tests.models.loaders import hf_models as tiny

KINDS = tuple(tiny.PROCESSORS)
SIZES = {"dinov2": 28, "dinov2_with_registers": 28, "align": 48, "convnext": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind → its folder and its model, written once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("hf") / kind
            made[kind] = folder, tiny.save(kind, folder)
        return made[kind]

    return get


@pytest.fixture
def copied(saved, tmp_path):
    """A folder of one kind that a test may spoil."""

    def get(kind: str):
        return shutil.copytree(saved(kind)[0], tmp_path / kind)

    return get


def images(kind: str, n: int = 3) -> torch.Tensor:
    torch.manual_seed(5)
    size = SIZES.get(kind, 32)
    return torch.randn(n, 3, size, size)


def error_of(spec: str, **options) -> str:
    with pytest.raises(UserError) as error:
        load_backbone(spec, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("kind", ["clip", "siglip", "align"])
def test_hf_image_and_text_features_are_the_models_own(saved, kind):
    from transformers import AutoTokenizer

    folder, model = saved(kind)
    backbone = load_backbone(f"hf:{folder}")
    images_BCHW = images(kind)
    length = {"clip": 20, "siglip": 20, "align": 64}[kind]
    tokens = AutoTokenizer.from_pretrained(folder)(
        tiny.TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    mask = {} if kind == "siglip" else {"attention_mask": tokens["attention_mask"]}
    with torch.inference_mode():
        image_BE = model.get_image_features(pixel_values=images_BCHW).pooler_output
        text_BE = model.get_text_features(input_ids=tokens["input_ids"], **mask).pooler_output
        pooled_BD = model.vision_model(pixel_values=images_BCHW).pooler_output
    features = backbone.encode_image(images_BCHW)
    close(features.embed_BE, image_BE)
    close(features.pooled_BD, pooled_BD)
    close(backbone.encode_text(tiny.TEXTS), text_BE)
    assert features.embed_BE.shape[1] == text_BE.shape[1]
    assert backbone.card.provides == {"pooled", "embed", "text", "tokens", "maps"}
    assert "projection" not in backbone.card.feature or kind == "clip"


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_hf_dinov2_gives_class_token_and_patches_without_registers(saved, kind):
    folder, model = saved(kind)
    backbone = load_backbone(f"hf:{folder}")
    images_BCHW = images(kind)  # 28 pixels, where its positions are for 42
    with torch.inference_mode():
        out = model(pixel_values=images_BCHW)
    features = backbone.encode_image(images_BCHW, dense=True)
    close(features.pooled_BD, out.last_hidden_state[:, 0])
    close(features.pooled_BD, out.pooler_output)
    close(features.tokens_BND, out.last_hidden_state[:, -4:])
    close(features.maps[14].flatten(2).transpose(1, 2), features.tokens_BND)
    assert features.maps[14].shape == (3, 32, 2, 2)
    assert features.embed_BE is None
    assert backbone.card.provides == {"pooled", "tokens", "maps"}
    assert backbone.card.feature == "class token after the last LayerNorm"


def test_hf_vit_is_read_at_its_class_token_from_a_classifiers_file(saved):
    folder, model = saved("vit")
    backbone = load_backbone(f"hf:{folder}")
    with torch.inference_mode():
        expected_BD = model.vit(pixel_values=images("vit")).last_hidden_state[:, 0]
        logits_BC = model(pixel_values=images("vit")).logits
        found_BD = backbone.encode_image(images("vit")).pooled_BD
        close(found_BD, expected_BD)
        close(model.classifier(found_BD), logits_BC)


def test_hf_convnext_and_align_give_a_map_at_stride(saved):
    folder, model = saved("convnext")
    features = load_backbone(f"hf:{folder}").encode_image(images("convnext"), dense=True)
    with torch.inference_mode():
        close(features.pooled_BD, model(pixel_values=images("convnext")).pooler_output)
    assert features.maps[32].shape == (3, 24, 2, 2)
    folder, model = saved("align")
    features = load_backbone(f"hf:{folder}").encode_image(images("align"), dense=True)
    (stride, map_BCHW), *_ = features.maps.items()
    assert map_BCHW.shape[-1] == 48 // stride
    close(map_BCHW.mean((2, 3)), features.pooled_BD)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_hf_dense_features_hold_the_pooled_ones(saved, kind):
    folder, model = saved(kind)
    backbone = load_backbone(f"hf:{folder}")
    features = backbone.encode_image(images(kind), dense=True)
    assert torch.equal(features.pooled_BD, backbone.encode_image(images(kind)).pooled_BD)
    assert features.tokens_BND.shape == (3, 16, 32)
    assert features.maps[8].shape == (3, 32, 4, 4)
    with torch.inference_mode():
        last = model.vision_model(pixel_values=images(kind)).last_hidden_state
        patches = model.vision_model.post_layernorm(last[:, 1:]) if kind == "clip" else last
    close(features.tokens_BND, patches)


@pytest.mark.parametrize("kind", KINDS)
def test_hf_features_do_not_depend_on_the_batch(saved, kind):
    backbone = load_backbone(f"hf:{saved(kind)[0]}")
    together = backbone.encode_image(images(kind)).pooled_BD
    alone = torch.cat([backbone.encode_image(image[None]).pooled_BD for image in images(kind)])
    close(alone, together)
    if "text" in backbone.card.provides:
        alone = torch.cat([backbone.encode_text([text]) for text in tiny.TEXTS])
        close(alone, backbone.encode_text(tiny.TEXTS))


@pytest.mark.parametrize("kind", ["clip", "siglip", "align"])
def test_hf_text_longer_than_the_context_is_cut_before_its_end_token(saved, kind):
    backbone = load_backbone(f"hf:{saved(kind)[0]}")
    length = backbone.card.text.context_length
    tokens_BL = backbone._tokenizer(["red " * 200, "a"])
    assert tokens_BL.shape == (2, length)
    assert tokens_BL[0, -1] == 38
    assert backbone._tokenizer(["a"]).shape[1] == (16 if kind == "clip" else length)
    assert torch.isfinite(backbone.encode_text(["", "red " * 200])).all()


def test_hf_clip_tokens_are_open_clips(tmp_path):
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own = SimpleTokenizer()
    vocabulary = {"<|startoftext|>": own.sot_token_id, "<|endoftext|>": own.eot_token_id}
    vocabulary = {token: number for token, number in own.encoder.items() if number < own.sot_token_id} | vocabulary
    CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks)).save_pretrained(tmp_path)
    tokenizer = HfTokenizer(tmp_path, context_length=77, trim=True, where="here")
    texts = ["a photo of a Siamese cat.", "Two DOGS,  running -- it's 12:30!", "naïve café", "", "word " * 100]
    ours_BL = tokenizer(texts)
    theirs_BL = own(texts)
    assert ours_BL.shape == (5, 77)
    for ours_L, theirs_L in zip(ours_BL, theirs_BL, strict=True):
        end = int(theirs_L.argmax()) + 1
        assert torch.equal(ours_L[:end], theirs_L[:end])
        assert (ours_L[end:] == own.eot_token_id).all(), "transformers pads CLIP's texts with their end token"


def test_hf_siglip_sentencepiece_tokenizer_pads_to_its_context(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join(f"a {x} {y} on white" for x in tiny.WORDS for y in tiny.WORDS))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    tokenizer = HfTokenizer(tmp_path, context_length=64, trim=False, where="here")
    tokens_BL = tokenizer(["a red circle", "A Red Circle!", "white"])
    assert tokens_BL.shape == (3, 64)
    assert torch.equal(tokens_BL[0], tokens_BL[1]), "SigLIP reads lower case without punctuation"
    assert (tokens_BL[:, -1] == tokenizer.pad_id).all()
    assert tokenizer.name.startswith("hf:SiglipTokenizer-")


def test_hf_siglip_2_reads_lower_case(copied):
    folder = copied("siglip")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens_BL = load_backbone(f"hf:{folder}")._tokenizer(["a Red circle", "a red circle"])
    assert not torch.equal(tokens_BL[0], tokens_BL[1])
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GemmaTokenizer"}))
    tokens_BL = load_backbone(f"hf:{folder}")._tokenizer(["a Red circle", "a red circle"])
    assert torch.equal(tokens_BL[0], tokens_BL[1])


def pictures():
    rng = np.random.default_rng(0)
    sizes = [(41, 97), (97, 41), (64, 64), (33, 32), (300, 211), (20, 26)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def theirs(folder, image, backend="pil") -> torch.Tensor:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend=backend)(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("kind", ["siglip", "vit", "align"])
def test_hf_pixels_are_the_processors_own(saved, kind):
    folder, _ = saved(kind)
    pre = load_backbone(f"hf:{folder}").card.preprocess
    for image in pictures():
        ours_CHW = normalise(eval_transform(pre)(image)[None], pre)[0]
        close(ours_CHW, theirs(folder, image), 2e-6)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "convnext"])
def test_hf_pixels_are_the_processors_own_but_for_an_odd_pixel_of_the_crop(saved, kind):
    folder, _ = saved(kind)
    pre = load_backbone(f"hf:{folder}").card.preprocess
    exact = 0
    for image in pictures():
        ours_CHW = normalise(eval_transform(pre)(image)[None], pre)[0]
        theirs_CHW = theirs(folder, image)
        same = torch.allclose(ours_CHW, theirs_CHW, rtol=1e-5, atol=2e-6)
        down = torch.allclose(ours_CHW[:, :-1], theirs_CHW[:, 1:], rtol=1e-5, atol=2e-6)
        across = torch.allclose(ours_CHW[:, :, :-1], theirs_CHW[:, :, 1:], rtol=1e-5, atol=2e-6)
        assert same or down or across, image.size
        exact += same
    assert exact >= 3


def test_hf_preprocess_of_each_family(saved):
    cards = {kind: load_backbone(f"hf:{saved(kind)[0]}").card.preprocess for kind in KINDS}
    assert (cards["clip"].resize, cards["clip"].interpolation, cards["clip"].resize_to) == ("shortest", "bicubic", None)
    assert (cards["siglip"].resize, cards["siglip"].image_size) == ("squash", (32, 32))
    assert (cards["dinov2"].resize_to, cards["dinov2"].image_size) == (40, (28, 28))
    assert (cards["vit"].resize, cards["vit"].interpolation) == ("squash", "bilinear")
    assert (cards["align"].resize, cards["align"].resize_to, cards["align"].image_size) == ("squash", 57, (48, 48))
    assert cards["align"].mean == pytest.approx((0.5, 0.5, 0.5))
    assert cards["align"].std == pytest.approx((0.5, 0.5, 0.5))
    assert (cards["convnext"].resize_to, cards["convnext"].image_size) == (73, (64, 64))


def test_hf_processor_that_cannot_be_followed_is_refused(copied):
    folder = copied("clip")

    def with_settings(**settings):
        (folder / "preprocessor_config.json").write_text(json.dumps(tiny.processor(**settings)))
        return error_of(f"hf:{folder}")

    assert "no fixed size" in with_settings(do_center_crop=False)
    assert "without a resize" in with_settings(do_resize=False)
    assert "interpolation 5" in with_settings(resample=5)
    assert "crops (64, 64) out of (32, 32)" in with_settings(crop_size={"height": 64, "width": 64})
    assert "config.json has a model for (32, 32)" in with_settings(crop_size={"height": 24, "width": 24})
    assert "LayoutLMv2ImageProcessor" in with_settings(image_processor_type="LayoutLMv2ImageProcessor")
    (folder / "preprocessor_config.json").write_text("{")
    assert "cannot be used" in error_of(f"hf:{folder}")
    (folder / "preprocessor_config.json").unlink()
    assert "no preprocessor_config.json" in error_of(f"hf:{folder}")


@pytest.mark.parametrize("kind", KINDS)
def test_hf_random_is_a_function_of_its_seed_and_needs_no_weights(copied, kind):
    folder = copied(kind)
    (folder / "model.safetensors").unlink()
    (folder / "preprocessor_config.json").unlink()
    state = torch.random.get_rng_state()
    first, again, other = (load_backbone(f"hf:{folder}", weights=f"random:{seed}") for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.weights_hash == again.weights_hash != other.weights_hash
    assert first.card.id == f"hf:{kind}-random-s0"
    assert first.card.random
    size = first.card.preprocess.image_size
    assert torch.isfinite(first.encode_image(torch.randn(1, 3, *size)).pooled_BD).all()
    assert "no weights in" in error_of(f"hf:{folder}")
    (folder / "config.json").unlink()
    assert "no config.json" in error_of(f"hf:{folder}", weights="random")


def test_hf_weights_file_replaces_the_folders_own(saved, tmp_path):
    folder, _ = saved("clip")
    state = load_file(folder / "model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in state.items()}
    torch.save({"state_dict": changed}, tmp_path / "w.pt")
    own, other = load_backbone(f"hf:{folder}"), load_backbone(f"hf:{folder}", weights=str(tmp_path / "w.pt"))
    assert other.card.id == "hf:clip@w"
    assert own.weights_hash != other.weights_hash
    loaded = other.module.state_dict()
    assert all(torch.equal(loaded[name], changed[name]) for name in changed)
    torch.save({name: tensor for name, tensor in state.items() if "visual_projection" not in name}, tmp_path / "x.pt")
    assert "1 missing (visual_projection.weight)" in error_of(f"hf:{folder}", weights=str(tmp_path / "x.pt"))
    torch.save(state | {"extra.weight": torch.ones(2)}, tmp_path / "x.pt")
    assert "1 unexpected (extra.weight)" in error_of(f"hf:{folder}", weights=str(tmp_path / "x.pt"))
    torch.save(state | {"visual_projection.weight": torch.ones(2, 2)}, tmp_path / "x.pt")
    assert "does not fit the architecture" in error_of(f"hf:{folder}", weights=str(tmp_path / "x.pt"))


def test_hf_reads_shards_half_precision_and_pickles_of_tensors_only(saved, copied):
    folder, _ = saved("clip")
    reference = load_backbone(f"hf:{folder}")

    spoilt = copied("clip")
    state = load_file(spoilt / "model.safetensors")
    (spoilt / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: state[name] for name in own}, spoilt / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (spoilt / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_backbone(f"hf:{spoilt}").weights_hash == reference.weights_hash

    for path in spoilt.glob("model*"):
        path.unlink()
    torch.save(state, spoilt / "pytorch_model.bin")
    assert load_backbone(f"hf:{spoilt}").weights_hash == reference.weights_hash
    torch.save({name: tensor.half() for name, tensor in state.items()}, spoilt / "pytorch_model.bin")
    half = load_backbone(f"hf:{spoilt}")
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.float32}
    torch.save({"x": pytest.raises}, spoilt / "pytorch_model.bin")
    assert "refused" in error_of(f"hf:{spoilt}")


def test_hf_identity_is_the_configuration_not_the_folder(saved, copied):
    folder, _ = saved("clip")
    reference = backbone_fingerprint(load_backbone(f"hf:{folder}"))
    other = copied("clip")
    assert backbone_fingerprint(load_backbone(f"hf:{other}")) == reference
    config = json.loads((other / "config.json").read_text())
    for key, value in {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 2}.items():
        changed = config | {"vision_config": config["vision_config"] | {key: value}}
        (other / "config.json").write_text(json.dumps(changed))
        backbone = load_backbone(f"hf:{other}")
        assert backbone.weights_hash == load_backbone(f"hf:{folder}").weights_hash
        assert backbone_fingerprint(backbone) != reference, key
    (other / "config.json").write_text(json.dumps(config | {"transformers_version": "4.0.0", "architectures": None}))
    assert backbone_fingerprint(load_backbone(f"hf:{other}")) == reference
    text = (other / "tokenizer.json").read_text().replace('"circle"', '"disc"')
    (other / "tokenizer.json").write_text(text)
    assert backbone_fingerprint(load_backbone(f"hf:{other}")) != reference


def test_hf_never_runs_code_that_comes_with_a_model(copied):
    folder = copied("dinov2")
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    auto = {"auto_map": {"AutoConfig": "evil.Config", "AutoImageProcessor": "evil.P", "AutoModel": "evil.M"}}
    for name in ("config.json", "preprocessor_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | auto))
    load_backbone(f"hf:{folder}")
    assert not (folder / "ran").exists()


def test_hf_says_what_is_wrong_with_a_folder(copied, tmp_path):
    folder = copied("clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "clap"}))
    assert "did you mean 'clip'" in error_of(f"hf:{folder}")
    (folder / "config.json").write_text("[1]")
    assert "not a JSON object" in error_of(f"hf:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "no tokenizer in" in error_of(f"hf:{folder}")
    assert "text" not in load_backbone(f"hf:{folder}", weights="random").card.provides
    (folder / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be made" in error_of(f"hf:{folder}")
    assert "no such folder" in error_of(f"hf:{tmp_path / 'nowhere'}")


def test_hf_without_network_says_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    (tmp_path / "w.pt").write_bytes(b"x")
    messages = {w: error_of("hf:facebook/dinov2-base", weights=w) for w in (None, "random", str(tmp_path / "w.pt"))}
    for message in messages.values():
        assert "huggingface.co/facebook/dinov2-base" in message
        assert "--model hf:FOLDER" in message
        assert len(message) < 500
    own, fresh, file = messages.values()
    assert "model.safetensors" in own
    assert own.endswith("--model hf:FOLDER")
    assert "model.safetensors" not in fresh + file
    assert fresh.endswith("--weights random")
    assert file.endswith(f"--weights {tmp_path / 'w.pt'}")


@pytest.fixture
def without_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["align-b7-coyo", "dinov2-vit-b-14-224"])
def test_hf_card_without_network_keeps_its_name_in_what_is_advised(without_hub, tmp_path, name):
    (tmp_path / "w.pt").write_bytes(b"x")
    for weights in (None, str(tmp_path / "w.pt")):
        message = error_of(name, weights=weights)
        assert f"into one folder and pass --model {name} --weights FOLDER" in message
        assert "hf:FOLDER" not in message
        assert ("tokenizer" in message) == (name == "align-b7-coyo")


@pytest.fixture
def tiny_card(saved, monkeypatch):
    """A reference card of a tiny ALIGN that only the hub has, and the configuration as it stands there."""
    folder, _ = saved("align")
    config = json.loads((folder / "config.json").read_text())
    card = ModelCard(
        id="tiny-align",
        loader="hf",
        arch="me/tiny-align",
        config={key: config[key] for key in ("model_type", "vision_config", "text_config", "projection_dim")},
        preprocess=Preprocess(image_size=48),
        provides=frozenset({"pooled", "embed", "tokens", "maps", "text"}),
    )
    monkeypatch.setattr("vlbench.models.load.model_cards", lambda: {card.id: card})
    return card, folder


def test_hf_card_with_its_configuration_is_initialised_without_the_hub(without_hub, tiny_card, tmp_path):
    card, folder = tiny_card
    backbone = load_backbone(card.id, weights="random:3")
    theirs = load_backbone(f"hf:{folder}", weights="random:3")
    assert backbone.card.id == "tiny-align-random-s3"
    assert backbone.card.arch == theirs.card.arch, "the configuration is the one in the repository"
    assert backbone.weights_hash == theirs.weights_hash
    assert backbone.card.provides == card.provides
    pixels_BCHW = images("align", 2)
    assert torch.equal(backbone.encode_image(pixels_BCHW).pooled_BD, theirs.encode_image(pixels_BCHW).pooled_BD)
    place = tmp_path / "cache" / "tokenizers" / "me" / "tiny-align"
    with pytest.raises(UserError, match=f"huggingface.co/me/tiny-align elsewhere and put them into {place}"):
        backbone.encode_text(["a red circle"])

    place.mkdir(parents=True)
    for file in folder.glob("*token*"):
        shutil.copy(file, place)
    reading = load_backbone(card.id, weights="random:3")
    assert torch.equal(reading.encode_text(tiny.TEXTS), theirs.encode_text(tiny.TEXTS))
    assert reading.card.text == theirs.card.text
    assert backbone_fingerprint(reading) != backbone_fingerprint(backbone)


def test_hf_cards_that_are_shipped_are_initialised_without_the_hub(without_hub):
    backbone = load_backbone("dinov2-vit-s-14-224", weights="random")
    assert backbone.card.preprocess.image_size == (224, 224)
    assert backbone.encode_image(torch.zeros(1, 3, 224, 224)).pooled_BD.shape == (1, 384)


def test_hf_folder_in_the_place_of_weights_needs_no_repository(saved, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    folder, _ = saved("dinov2")
    own = load_backbone(f"hf:{folder}")
    card = load_backbone("dinov2-vit-b-14-224", weights=str(folder))
    assert card.weights_hash == own.weights_hash
    assert (card.card.id, card.card.published, card.card.licence) == ("dinov2-vit-b-14-224@dinov2", (), None)
    assert load_backbone("hf:facebook/dinov2-base", weights=str(folder)).card.id == "hf:facebook/dinov2-base@dinov2"
    assert "no config.json in" in error_of("dinov2-vit-b-14-224", weights=str(tmp_path))
    assert "a folder; name the file in it" in error_of("timm:test_vit", weights=str(folder))


def test_hf_repository_in_the_cache_needs_no_network(saved, monkeypatch, tmp_path):
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    cache = tmp_path / "models--me--tiny-clip"
    shutil.copytree(saved("clip")[0], cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = load_backbone("hf:me/tiny-clip")
    assert backbone.card.id == "hf:me/tiny-clip"
    assert backbone_fingerprint(backbone) == backbone_fingerprint(load_backbone(f"hf:{saved('clip')[0]}"))


def test_hf_package_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers>=5' sentencepiece protobuf" in error_of("hf:facebook/dinov2-base")


def test_nothing_else_imports_transformers():
    code = "import sys, vlbench.models.load, vlbench.models.loaders.hf; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
