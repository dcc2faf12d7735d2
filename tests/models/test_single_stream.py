"""The stream against BERT itself, against float64 arithmetic written here, and against padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlbench.core.errors import UserError
from vlbench.models.roi import RegionTower, blank
from vlbench.models.single_stream import (
    Heads,
    Regions,
    SingleStream,
    StreamConfig,
    bert_weights,
)
from vlbench.models.vision import VisualConfig, build_visual
from vlbench.models.weights import read_weights

SMALL = StreamConfig(width=16, layers=2, heads=4, dropout=0.0, positions=12)


def stream(config: StreamConfig = SMALL, **kwargs: object) -> SingleStream:
    torch.manual_seed(0)
    made = SingleStream(config, words=30, feature_width=6, **kwargs)  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1:  # gains of 1 and biases of 0 would hide a norm or bias that is forgotten
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    return made.eval()


def regions(batch: int = 2, count: int = 3) -> Regions:
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(batch, count, 4, generator=generator) * 10
    valid = torch.ones(batch, count, dtype=torch.bool)
    valid[0, -1] = False
    return Regions(torch.randn(batch, count, 6, generator=generator), torch.cat([boxes, boxes[..., :1]], -1), valid)


@pytest.mark.parametrize("heads_too", [True, False])
def test_text_alone_on_berts_weights_is_bert(heads_too: bool, tmp_path: Path) -> None:
    """Loaded from a folder that Hugging Face's own BERT wrote, the stream gives its hidden states and scores."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=12,
    )
    bert = (transformers.BertForPreTraining if heads_too else transformers.BertModel)(config).eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    bert.save_pretrained(tmp_path)
    found = bert_weights(read_weights(tmp_path / "model.safetensors"), layers=2)
    ours = stream()
    assert not ours.load_state_dict(found["stream"], strict=False).unexpected_keys
    words = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    empty = torch.zeros(2, 1, 16), torch.zeros(2, 1, dtype=torch.bool)
    hidden, _ = ours(ours.embed_sentence(words), words != 0, *empty)
    mask = (words != 0).long()
    encoder = bert.bert if heads_too else bert
    theirs = encoder(input_ids=words, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[words != 0], theirs[words != 0], atol=2e-5, rtol=1e-4)
    if heads_too:
        heads = Heads(16, words=30, match=True)
        left = heads.load_state_dict(found["heads"], strict=False)
        assert set(left.missing_keys) == {"matches.weight", "matches.bias"}
        scores = bert(input_ids=words, attention_mask=mask).prediction_logits
        ours_scores = heads.words(hidden, ours.word.weight)
        torch.testing.assert_close(ours_scores[words != 0], scores[words != 0], atol=2e-5, rtol=1e-4)
    else:
        assert set(found["heads"]) == {"pooler.weight", "pooler.bias"}


def test_old_names_of_berts_weights_are_known_and_a_stranger_is_refused() -> None:
    names = bert_weights.__globals__["_stream_names"](1).values()
    old = {f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"): torch.zeros(1) for name in names}
    assert "sentence_norm.weight" in bert_weights(old, layers=1)["stream"]
    with pytest.raises(UserError, match="is this a BERT encoder"):
        bert_weights({"conv1.weight": torch.zeros(1)}, layers=1)


def norm64(x: torch.Tensor, module: torch.nn.LayerNorm) -> torch.Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
    return scaled * module.weight.double() + module.bias.double()


@pytest.mark.parametrize("modality", [True, False])
def test_embeddings_are_the_papers_sums(modality: bool) -> None:
    ours = stream(SMALL.model_copy(update={"modality_embedding": modality}))
    given = regions()
    zeroed = torch.tensor([[True, False, False], [False, False, False]])
    found, valid = ours.embed_regions(given, zeroed)
    features = given.features_BRF.double().clone()
    features[0, 0] = 0.0
    boxes = norm64(given.box_BR5.double() @ ours.box.weight.double().T + ours.box.bias.double(), ours.box_norm)
    visual = norm64(features @ ours.region.weight.double().T + ours.region.bias.double(), ours.region_norm)
    kind = ours.kind.weight.double() if modality else torch.zeros(2, 16, dtype=torch.float64)
    torch.testing.assert_close(found.double(), visual + boxes + kind[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(valid, given.valid_BR)

    words = torch.tensor([[4, 5, 6], [7, 8, 9]])
    tags = norm64(ours.word.weight[words], ours.tag_norm) + boxes + kind[0]
    torch.testing.assert_close(ours.embed_tags(words, given.box_BR5).double(), tags, atol=1e-5, rtol=1e-5)
    plain = ours.word.weight[words].double() + ours.position.weight[:3].double() + ours.kind.weight[0].double()
    expected = norm64(plain, ours.sentence_norm)
    torch.testing.assert_close(ours.embed_sentence(words).double(), expected, atol=1e-5, rtol=1e-5)
    released = stream(SMALL.model_copy(update={"modality_embedding": modality, "sentence_norm": False}))
    assert released.sentence_norm is None
    expected = (
        released.word.weight[words].double() + released.position.weight[:3].double() + released.kind.weight[0].double()
    )
    torch.testing.assert_close(released.embed_sentence(words).double(), expected, atol=1e-6, rtol=1e-6)


def test_padding_never_changes_an_output() -> None:
    ours, given = stream(), regions()
    words = torch.tensor([[4, 5, 6, 0, 0], [7, 8, 9, 10, 11]])
    text, places = ours(ours.embed_sentence(words), words != 0, *ours.embed_regions(given))
    alone = Regions(given.features_BRF[:1, :2], given.box_BR5[:1, :2], given.valid_BR[:1, :2])
    short_text, short_places = ours(ours.embed_sentence(words[:1, :3]), words[:1, :3] != 0, *ours.embed_regions(alone))
    torch.testing.assert_close(text[:1, :3], short_text, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(places[:1, :2], short_places, atol=1e-6, rtol=1e-5)
    # And what stands in the padding is nobody's business, down to the bit.
    noise = given.features_BRF.clone()
    noise[0, 2] = 1e3
    again, _ = ours(ours.embed_sentence(words), words != 0, *ours.embed_regions(given._replace(features_BRF=noise)))
    assert torch.equal(again, text)


def test_row_without_anything_is_finite() -> None:
    ours = stream()
    words = torch.zeros(1, 2, dtype=torch.long)
    given = Regions(torch.zeros(1, 1, 6), torch.zeros(1, 1, 5), torch.zeros(1, 1, dtype=torch.bool))
    text, places = ours(ours.embed_tags(words, torch.zeros(1, 2, 5)), words != 0, *ours.embed_regions(given))
    assert torch.isfinite(text).all()
    assert torch.isfinite(places).all()


def test_only_what_is_read_is_built() -> None:
    only_tags = stream(SMALL.model_copy(update={"modality_embedding": False}), sentences=False)
    assert (only_tags.position, only_tags.kind, only_tags.sentence_norm) == (None, None, None)
    assert stream(tags=False).tag_norm is None
    heads = Heads(16, words=30)
    assert (heads.tag, heads.feature, heads.matches) == (None, None, None)


def test_whole_image_is_a_token_of_its_own() -> None:
    ours = stream(image_width=4)
    given = regions()._replace(image_BP=torch.randn(2, 4))
    found, valid = ours.embed_regions(given)
    assert found.shape == (2, 4, 16)
    assert valid[:, -1].all()
    box = ours.box_norm(ours.box(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])))
    expected = ours.image_norm(ours.image(given.image_BP)) + box + ours.kind.weight[1]
    torch.testing.assert_close(found[:, -1], expected)


@pytest.fixture(scope="module")
def tower() -> RegionTower:
    torch.manual_seed(0)
    net = build_visual(VisualConfig(arch="timm:test_resnet", image_size=64))
    return RegionTower(net, strides=(8, 16), cells=2, image_size=64).eval()


def test_region_of_the_whole_image_is_the_mean_of_the_maps(tower: RegionTower) -> None:
    images = torch.randn(2, 3, 64, 64)
    boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]]).repeat(2, 1, 1)
    features, pooled = tower(images, boxes)
    maps = tower.tower.features(images, dense=True).maps
    assert features.shape == (2, 1, tower.width)
    # Two samples a bin and two bins: a grid of 4 x 4 interpolated points, which the map of 4 x 4 cells holds itself.
    torch.testing.assert_close(features[:, 0, -maps[16].shape[1] :], maps[16].mean((2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled, tower.tower(images))


def test_region_reads_its_own_box(tower: RegionTower) -> None:
    images = torch.randn(1, 3, 64, 64)
    boxes = torch.tensor([[[0.0, 0.0, 16.0, 16.0], [40.0, 40.0, 64.0, 64.0]]])
    before, _ = tower(images, boxes)
    changed = images.clone()
    changed[:, :, 60:, 60:] = 3.0
    after, _ = tower(changed, boxes)
    near, far = (before - after).abs().amax(-1)[0].flip(0)
    assert near > 3 * far


def test_region_tower_refuses_a_stride_that_is_not_there() -> None:
    net = build_visual(VisualConfig(arch="timm:test_resnet", image_size=64))
    with pytest.raises(UserError, match=r"no map of stride 5 \(there: 2, 4, 8, 16, 32\); set roi.strides"):
        RegionTower(net, strides=(8, 5), cells=1, image_size=64)


def test_blank_takes_the_pixels_of_masked_boxes_alone() -> None:
    images = torch.ones(2, 3, 8, 8)
    boxes = torch.tensor([[[0.0, 0.0, 2.5, 2.0], [4.0, 4.0, 8.0, 8.0]], [[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0]]])
    found = blank(images, boxes, torch.tensor([[True, False], [False, True]]))
    assert (found[0] == 0).nonzero()[:, 1:].unique(dim=0).tolist() == [[y, x] for y in range(2) for x in range(3)]
    assert (found[1] == 0).nonzero()[:, 1:].unique(dim=0).tolist() == [[0, 0]]
    assert images.min() == 1
