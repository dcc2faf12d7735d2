"""The model: what its output depends on, and what it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.finetune.fusion.quadrants import SIDE, backbone, settings
from vlbench.data.wordpiece import train_wordpiece
from vlbench.finetune.fusion.heads import NO_REGION, AnswerHead, ClassHead, RegionHead
from vlbench.finetune.fusion.model import FusionModel, Scale, Sight
from vlbench.finetune.fusion.words import Words
from vlbench.models.roi import DeepestMaps
from vlbench.models.tower_of import tower_of

WORDS = Words(train_wordpiece(["the red one", "what colour is top left?", "green blue"] * 3, 120), 16)


def model(head: Any, *, views: int = 1, pooled: int | None = 5, **values: Any) -> FusionModel:
    torch.manual_seed(0)
    return FusionModel(settings(**values), head, Sight((4, 3), pooled, views), words=WORDS).eval()


def batch(
    texts: list[str], *, views: int = 1, regions: int = 3, pooled: int | None = 5, seed: int = 0
) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    rows, _ = WORDS(texts)
    words_BL = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, pieces in zip(words_BL, rows):
        row[: len(pieces)] = torch.tensor(pieces)
    shape = (len(texts), views, regions)
    found = {
        "words_BL": words_BL,
        "features_BVRF": torch.randn(*shape, 7, generator=rng),
        "box_BVR5": torch.rand(*shape, 5, generator=rng),
        "valid_BVR": torch.ones(*shape, dtype=torch.bool),
    }
    return found | ({"pooled_BVP": torch.randn(*shape[:2], pooled, generator=rng)} if pooled else {})


TEXTS = ["the red one", "what colour is top left?", "blue"]


@pytest.mark.parametrize("pooler", ["cls", "last_word"])
@pytest.mark.parametrize(
    ("head", "views", "width"), [(ClassHead(3), 1, 3), (AnswerHead(50), 1, 50), (ClassHead(2), 2, 2)]
)
def test_pooled_heads_have_a_logit_a_class(head: Any, views: int, width: int, pooler: str) -> None:
    found = model(head, views=views, pooler=pooler)(batch(TEXTS, views=views))
    assert found.shape == (3, width)
    assert torch.isfinite(found).all()


def test_permuting_regions_permutes_their_logits() -> None:
    net, given = model(RegionHead()), batch(TEXTS, regions=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = given | {name: given[name][:, :, order] for name in ("features_BVRF", "box_BVR5", "valid_BVR")}
    with torch.no_grad():
        before, after = net(given), net(permuted)
    assert before.shape == (3, 5)  # the whole image is a token and no candidate
    torch.testing.assert_close(after, before[:, order], atol=2e-6, rtol=0)
    assert not torch.allclose(after, before, atol=1e-3)


def test_padding_regions_are_never_chosen_and_change_nothing() -> None:
    net, given = model(RegionHead()), batch(TEXTS, regions=4)
    given["valid_BVR"][1, 0, 2:] = False
    with torch.no_grad():
        whole = net(given)
        given["features_BVRF"][1, 0, 2:] = 1e3
        given["box_BVR5"][1, 0, 2:] = -7.0
        other = net(given)
        alone = net(
            {name: part[1:2] for name, part in given.items()}
            | {name: given[name][1:2, :, :2] for name in ("features_BVRF", "box_BVR5", "valid_BVR")}
        )
    assert (whole[1, 2:] == NO_REGION).all()
    torch.testing.assert_close(whole, other)
    torch.testing.assert_close(whole[1:2, :2], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("pooler", ["cls", "last_word"])
def test_padding_words_change_nothing(pooler: str) -> None:
    net, given = model(ClassHead(3), pooler=pooler), batch(TEXTS)
    padded = given | {"words_BL": torch.nn.functional.pad(given["words_BL"], (0, 5))}
    with torch.no_grad():
        torch.testing.assert_close(net(given), net(padded), atol=2e-6, rtol=0)


def test_two_views_are_not_confused() -> None:
    """Swapping the images is what swapping the halves of the head's input is, and it changes the answer."""
    net, given = model(ClassHead(2), views=2), batch(TEXTS, views=2)
    flipped = {name: part.flip(1) if name != "words_BL" else part for name, part in given.items()}
    with torch.no_grad():
        before, after = net(given), net(flipped)
        dense = net.head[0].dense
        dense.weight.copy_(torch.cat(dense.weight.chunk(2, dim=1)[::-1], dim=1))
        again = net(flipped)
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(again, before, atol=2e-6, rtol=0)


def test_each_view_is_read_with_the_same_sentence() -> None:
    net, given = model(ClassHead(2), views=2), batch(TEXTS, views=2)
    with torch.no_grad():
        before = net(given)
        for name in ("features_BVRF", "box_BVR5", "pooled_BVP"):
            given[name][:, 1] = given[name][:, 0]
        hidden: list[torch.Tensor] = []
        handle = net.head.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0]))
        after = net(given)
        handle.remove()
    left, right = hidden[0].chunk(2, dim=1)
    torch.testing.assert_close(left, right)
    assert (before - after).abs().max() > 1e-3


def test_last_word_is_the_token_before_the_closing_one() -> None:
    net, given = model(ClassHead(3), pooler="last_word"), batch(TEXTS)
    hidden: list[torch.Tensor] = []
    handle = net.stream.register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    pooled: list[torch.Tensor] = []
    other = net.head.register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    with torch.no_grad():
        net(given)
    handle.remove()
    other.remove()
    rows, _ = WORDS(TEXTS)
    expected = torch.stack([hidden[0][i, len(row) - 2] for i, row in enumerate(rows)])
    torch.testing.assert_close(pooled[0], expected)
    assert net.pooler is None


def test_without_a_word_the_last_word_is_cls() -> None:
    net = model(ClassHead(3), pooler="last_word")
    assert torch.isfinite(net(batch(["", "red"]))).all()


def test_features_are_scaled_by_part_and_then_by_channel() -> None:
    rng = np.random.default_rng(0)
    batches = [
        np.concatenate([rng.normal(size=(6, 3, 40)) * 1e-3 + 5, rng.normal(size=(6, 3, 30)) * 100 + 7], axis=2)
        for _ in range(4)
    ]
    valid = rng.random((6, 3)) < 0.7

    def by_part(batch: np.ndarray) -> np.ndarray:
        parts = [batch[valid][:, :40], batch[valid][:, 40:]]
        return np.concatenate(
            [(p - p.mean(1, keepdims=True)) / np.sqrt(p.var(1, keepdims=True) + 1e-5) for p in parts], 1
        )

    scale = Scale((40, 30), None).train()
    for batch in batches:
        rows = by_part(batch)
        expected = np.zeros_like(batch)
        expected[valid] = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-3)
        # In float32, the first part's spread of a thousandth around 5 is known to four digits.
        assert scale(torch.tensor(batch).float(), torch.tensor(valid)).numpy() == pytest.approx(expected, abs=5e-3)
    scale.eval()
    # Afterwards, the mean of all batches' statistics.
    whole = [by_part(batch) for batch in batches]
    mean, n = np.mean([rows.mean(0) for rows in whole], axis=0), valid.sum()
    variance = np.mean([rows.var(0) * n / (n - 1) for rows in whole], axis=0)
    expected = np.zeros_like(batches[0])
    expected[valid] = (whole[0] - mean) / np.sqrt(variance + 1e-3)
    assert scale(torch.tensor(batches[0]).float(), torch.tensor(valid)).numpy() == pytest.approx(expected, abs=5e-3)


def test_a_scale_of_the_backbone_has_no_part_in_the_answer() -> None:
    net, given = model(ClassHead(3)), batch(TEXTS)
    scale = torch.tensor([50.0] * 4 + [0.5] * 3)  # another for each map
    larger = given | {"features_BVRF": given["features_BVRF"] * scale, "pooled_BVP": given["pooled_BVP"] * 50}
    with torch.no_grad():
        torch.testing.assert_close(net(given), net(larger), atol=2e-3, rtol=0)
        raw = model(ClassHead(3), scale_features=False)
        assert (raw(given) - raw(larger)).abs().max() > 1e-2


def trained(*, image_token: bool = True) -> tuple[FusionModel, dict[str, torch.Tensor]]:
    eyes = backbone()
    visual = DeepestMaps(tower_of(eyes), levels=2, cells=2, image_size=(SIDE, SIDE))
    sight = Sight(visual.parts, visual.pooled_width if image_token else None, 1)
    torch.manual_seed(0)
    net = FusionModel(settings(), ClassHead(3), sight, words=WORDS, visual=visual, preprocess=eyes.card.preprocess)
    given = batch(TEXTS, regions=2, pooled=None)
    del given["features_BVRF"]
    given["images_BVCHW"] = torch.randint(0, 255, (3, 1, 3, SIDE, SIDE), dtype=torch.uint8)
    given["boxes_BVR4"] = torch.tensor([0.0, 0.0, 16.0, 16.0]).repeat(3, 1, 2, 1)
    return net, given


def test_gradients_reach_the_tower_and_every_parameter_that_is_trained() -> None:
    net, given = trained()
    assert net.visual is not None
    net.train()
    before = net.visual.tower.net[1].running_mean.clone()
    ClassHead(3).loss(net(given), torch.tensor([0, 1, 2])).backward()
    without = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert net.visual.tower.net[0].weight.grad.abs().max() > 0
    assert any(name.startswith("visual.") for name, _ in net.named_parameters())
    # BatchNorm learns along: batch statistics, and running ones for later.
    assert not torch.equal(before, net.visual.tower.net[1].running_mean)


def test_what_the_output_does_not_depend_on_is_not_trained() -> None:
    net, _ = trained()
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"visual.tower.joint.weight", "visual.tower.joint.bias"}


@pytest.mark.parametrize("head", [ClassHead(3), RegionHead()])
def test_logits_are_float32_under_autocast(head: Any) -> None:
    """In bfloat16 answers tie, and the first of them would win."""
    asked = batch(TEXTS, regions=4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(head).eval()(asked)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
