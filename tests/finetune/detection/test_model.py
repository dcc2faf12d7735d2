"""Mask R-CNN over every family of towers: it builds, learns from what it should, and speaks of stored pixels."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import roi_heads
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from tests.finetune.detection.scenes import CLASSES, Scenes, small
from tests.models.test_tower_of import FAMILIES, tower
from vlbench.adapters.common.coco_rows import detection_rows
from vlbench.core.errors import UserError
from vlbench.core.types import Example, Features
from vlbench.data.masks import to_bitmap
from vlbench.finetune.detection import recipe
from vlbench.finetune.detection.batch import targets
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.finetune.detection.feed import DetectionFeed, picture
from vlbench.finetune.detection.model import TorchvisionDetector, at_corners
from vlbench.finetune.detection.neck import LEVELS, Pyramid, SimplePyramid
from vlbench.finetune.detection.predict import detections, pasted
from vlbench.finetune.detection.recipe import DetectionTuner, detect_all
from vlbench.models import wrap
from vlbench.models.load import load_backbone
from vlbench.models.tower_of import at_any_size, tower_of
from vlbench.train.distributed import Ranks

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def detector(visual: torch.nn.Module, **values: object) -> TorchvisionDetector:
    torch.manual_seed(0)
    return TorchvisionDetector(visual, small(**values), n_classes=2, mean=MEAN, std=STD)


def a_batch(**values: object) -> dict[str, torch.Tensor]:
    config = small(steps=1, **values)
    return next(DetectionFeed(Scenes(4), config).batches(None, config, start=0, here=Ranks(), pin=False))


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_gives_losses_gradients_and_detections(arch: str) -> None:
    torch.manual_seed(0)
    visual = tower(arch)
    model = detector(visual).train()
    own = {f"visual.{name}": value for name, value in at_any_size(visual).state_dict().items()}
    there = model.state_dict()
    assert own
    assert all(torch.equal(there[name], value) for name, value in own.items())
    losses = model(a_batch())
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():  # distributed training would wait for what gets none
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert sum(parameter.requires_grad for parameter in model.visual.parameters()) > 3
    model.eval()
    for height, width in ((60, 100), (112, 96)):
        (found,) = model.detect([torch.randint(0, 255, (3, height, width), dtype=torch.uint8)])
        assert len(found) <= 100
        assert (found.boxes_K4 >= 0).all()
        assert (found.boxes_K4 <= np.array([width, height, width, height]) + 1e-3).all()
        assert all(mask["size"] == [height, width] for mask in found.masks)
        assert set(found.classes_K.tolist()) <= {0, 1}
        assert (np.diff(found.scores_K) <= 0).all()


def test_detections_are_in_pixels_of_the_stored_image() -> None:
    """An image of 60 x 100 that was seen at 120 x 250: a box that is its right half, and a mask that fills it."""
    found = {
        "boxes": torch.tensor([[0.0, 0.0, 25.0, 12.0], [125.0, 0.0, 250.0, 120.0]]),
        "scores": torch.tensor([0.3, 0.9]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, 1, 28, 28),
    }
    said = detections(found, size=(120, 250), stored=(60, 100))
    assert said.boxes_K4.tolist() == [[50, 0, 100, 60], [0, 0, 10, 6]]
    assert said.classes_K.tolist() == [1, 0]
    assert said.scores_K.tolist() == pytest.approx([0.9, 0.3])
    mask = to_bitmap(said.masks[0])
    assert mask.shape == (60, 100)
    assert mask[2:58, 52:98].all()
    assert not mask[:, :48].any()


def said_back(source: Scenes) -> float:
    """Mask AP of what the mask head is asked for, in the true boxes: what no training gets beyond."""
    found = []
    for one in source.examples:
        shown = picture(one, CLASSES, short_side=96, long_side=192, flip=False)
        boxes_n4, count = torch.from_numpy(shown.boxes_n4), len(shown.boxes_n4)
        corners_nHW = at_corners(torch.from_numpy(shown.masks_nHW))
        asked_nMM = project_masks_on_boxes(corners_nHW, boxes_n4, torch.arange(count), 28)
        said = {
            "boxes": boxes_n4,
            "scores": torch.ones(count),
            "labels": torch.from_numpy(shown.classes_n) + 1,
            "masks": asked_nMM[:, None],
        }
        size = shown.image_CHW.shape[1], shown.image_CHW.shape[2]
        found.append(detections(said, size=size, stored=size))
    return detection_rows(source, found).meta["coco"]["mask_ap"]


def test_true_masks_are_said_to_the_pixel() -> None:
    """Of objects of thirty pixels. Read where torchvision reads them, 0.93; pasted as torchvision pastes, 0.89."""
    assert said_back(Scenes(8)) == 1


def test_the_mask_head_is_asked_at_the_corners_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    spied = lambda masks, *rest: asked.append(masks) or project_masks_on_boxes(masks, *rest)  # noqa: E731
    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", spied)
    batch = a_batch()
    detector(tower("timm:test_resnet")).train()(batch)
    for masks_nHW, one in zip(asked, targets(batch), strict=True):
        pixels_nHW = one["masks"].double()
        assert torch.equal(masks_nHW[:, 0, 0].double(), pixels_nHW[:, 0, 0] / 4)
        corners = sum(pixels_nHW[:, i : i + 95, j : j + 95] for i in (0, 1) for j in (0, 1)) / 4
        assert torch.equal(masks_nHW[:, 1:, 1:].double(), corners)


def test_pasting_is_bilinear_in_float64() -> None:
    masks_KMM = torch.rand(3, 5, 5, dtype=torch.float64)
    boxes_K4 = torch.tensor([[1.3, 2.2, 9.9, 7.4], [-2.5, -1.0, 4.0, 14.5], [3.0, 3.0, 3.4, 3.2]], dtype=torch.float64)

    def seen(mask_MM: torch.Tensor, row: int, column: int) -> float:
        return float(mask_MM[row, column]) if 0 <= row < 5 and 0 <= column < 5 else 0.0

    with torch.autocast("cpu", torch.bfloat16):
        found = pasted(masks_KMM, boxes_K4, (12, 10))
    for mask_MM, (left, top, right, bottom), pasted_HW in zip(masks_KMM, boxes_K4.tolist(), found):
        for row in range(12):
            for column in range(10):
                down = (row + 0.5 - top) / (bottom - top) * 5 - 0.5
                across = (column + 0.5 - left) / (right - left) * 5 - 0.5
                i, j = math.floor(down), math.floor(across)
                b, a = down - i, across - j
                wanted = (1 - b) * ((1 - a) * seen(mask_MM, i, j) + a * seen(mask_MM, i, j + 1))
                wanted += b * ((1 - a) * seen(mask_MM, i + 1, j) + a * seen(mask_MM, i + 1, j + 1))
                assert float(pasted_HW[row, column]) == pytest.approx(wanted, abs=1e-12)
    assert not (pasted(torch.ones(1, 5, 5), torch.tensor([[3.5, 3.5, 3.5, 3.5]]), (8, 8)) > 0.5).any()


def test_padding_is_zero_after_normalisation() -> None:
    model = detector(tower("timm:test_resnet"))
    small_image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    wide = torch.randint(0, 255, (3, 64, 128), dtype=torch.uint8)
    prepared = model._prepared(torch.stack([F.pad(small_image, (0, 64)), wide]), [(64, 64), (64, 128)])
    assert prepared.image_sizes == [(64, 64), (64, 128)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.allclose(prepared.tensors[0, :, :, :64], (small_image / 255 - mean) / std, atol=1e-5)
    assert not prepared.tensors[0, :, :, 64:].any()


def test_an_image_is_seen_the_same_alone_and_beside_others_of_other_sizes() -> None:
    config = small(score_threshold=0.0, detections=5, batch_size=4)
    model = TorchvisionDetector(tower("timm:test_resnet"), config, n_classes=2, mean=MEAN, std=STD).eval()
    source = Scenes(2, size=(96, 96))
    source.examples += Scenes(2, seed=1, size=(96, 180), split="wide").examples
    source.examples = [source.examples[place] for place in (0, 2, 1, 3)]
    beside = detect_all(model, source, config, device="cpu")
    together = model.detect([torch.from_numpy(_pixels(one)) for one in source.examples])
    assert len(beside) == 4
    moved = 0
    for place, one in enumerate(source.examples):
        alone = Scenes(0)
        alone.examples = [one]
        (found,) = detect_all(model, alone, config, device="cpu")
        assert len(found) == 5
        assert np.allclose(found.boxes_K4, beside[place].boxes_K4, atol=1e-3)
        assert np.allclose(found.scores_K, beside[place].scores_K, atol=1e-5)
        assert found.classes_K.tolist() == beside[place].classes_K.tolist()
        moved += not np.allclose(found.scores_K, together[place].scores_K, atol=1e-5)
    assert moved, "more padding would change what is found: else this test shows nothing"


def test_images_wait_for_their_like_and_no_more_than_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, tall = torch.zeros(3, 96, 180, dtype=torch.uint8), torch.zeros(3, 180, 96, dtype=torch.uint8)
    near = torch.zeros(3, 96, 179, dtype=torch.uint8)  # padded as ``wide`` is
    images = [wide, tall, near, wide, tall, wide]
    places = lambda: [batch for batch, _ in recipe._alike(images, small(batch_size=3))]  # noqa: E731
    assert places() == [[0, 2, 3], [1, 4], [5]]
    monkeypatch.setattr(recipe, "MOST_WAITING", 2)
    assert places() == [[0, 2], [1, 4], [3, 5]]


def test_the_pyramids_strides_are_known_and_not_guessed_from_the_first_image() -> None:
    visual = tower("timm:test_resnet")
    low, square = (torch.randint(0, 255, (3, high, wide), dtype=torch.uint8) for high, wide in ((13, 60), (96, 96)))
    fresh, used = (detector(visual, score_threshold=0.0, detections=5).eval() for _ in range(2))
    used.detect([low])  # 42 x 192 pixels padded to 64: its finest map has 16 rows, two fifths of 42
    (one,), (other,) = fresh.detect([square]), used.detect([square])
    assert np.array_equal(one.boxes_K4, other.boxes_K4)
    assert np.array_equal(one.scores_K, other.scores_K)


def test_known_strides_are_those_that_torchvision_finds_in_a_whole_image() -> None:
    torch.manual_seed(0)
    values = {"score_threshold": 0.0, "short_sides": (128,), "short_side": 128, "long_side": 256}
    known, guessed = (detector(tower("timm:test_resnet"), **values).train() for _ in range(2))
    for pool in (guessed.roi_heads.box_roi_pool, guessed.roi_heads.mask_roi_pool):
        pool.scales = pool.map_levels = None
    batch = a_batch(**values)
    losses = []
    for model in (known, guessed):
        torch.manual_seed(1)
        losses.append(model(batch))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    (one,), (other,) = known.eval().detect([image]), guessed.eval().detect([image])
    assert len(one)
    assert np.array_equal(one.boxes_K4, other.boxes_K4)
    assert np.array_equal(one.scores_K, other.scores_K)
    assert one.masks == other.masks


def _pixels(one: Example) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(one.image))).transpose(2, 0, 1)


def test_freezing_is_what_the_settings_say() -> None:
    visual = tower("timm:test_resnet")
    batch = a_batch()

    def moved(**values: object) -> tuple[set[str], set[str]]:
        """Stages of which a parameter, or a statistic, changed in one step."""
        model = detector(visual, **values).train()
        before = copy.deepcopy(model.visual.state_dict())
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=0.1)
        torch.stack(list(model(batch).values())).sum().backward()
        optimizer.step()
        after = model.visual.state_dict()
        names = {name for name in before if not torch.equal(before[name], after[name])}
        kinds = ({n for n in names if "running" not in n and "num_b" not in n}, {n for n in names if "running" in n})
        return tuple({n.split(".")[1][:6] for n in kind} for kind in kinds)

    stages = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert moved() == (stages, stages)  # its stem has norms too
    assert moved(freeze_at=2) == ({"layer2", "layer3", "layer4"},) * 2
    assert moved(backbone_norm="frozen")[1] == set()
    assert moved(backbone="frozen") == (set(), set())
    with pytest.raises(UserError, match="freeze_at 6: timm:test_resnet has 5 stages, the stem included"):
        detector(tower("timm:test_resnet"), freeze_at=6)


def test_a_frozen_backbone_computes_the_same_in_training() -> None:
    model = detector(tower("timm:test_resnet"), backbone="frozen").train()
    images = torch.randn(2, 3, 64, 64)
    assert model.training
    assert not model.visual.training
    assert torch.equal(model.visual(images)[32], model.eval().visual(images)[32])


def test_bf16_keeps_boxes_and_losses_in_float32() -> None:
    model = detector(tower("timm:test_resnet")).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(a_batch())
        seen = []
        model.rpn.head.register_forward_hook(lambda module, args, out: seen.extend([*out[0], *out[1]]))
        model(a_batch())
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert {level.dtype for level in seen} == {torch.float32}
    torch.stack(list(losses.values())).sum().backward()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = model.detect([torch.randint(0, 255, (3, 96, 96), dtype=torch.uint8)])
    assert found.boxes_K4.dtype == np.float32


def test_necks_have_the_strides_and_the_layers_that_they_should() -> None:
    conv, vit = at_any_size(tower("timm:test_resnet")), at_any_size(tower("timm:vit_tiny_patch16_224"))
    images = torch.randn(1, 3, 96, 128)
    for visual, kind, is_fpn in ((conv, "auto", True), (vit, "auto", False), (conv, "simple", False)):
        pyramid = Pyramid(visual, kind=kind, channels=8, norm="none")
        assert pyramid.is_fpn == is_fpn
        maps = pyramid(images, visual)
        assert list(maps) == list(LEVELS)
        sizes = [tuple(maps[level].shape[1:]) for level in LEVELS]
        assert sizes == [(8, 24, 32), (8, 12, 16), (8, 6, 8), (8, 3, 4), (8, 2, 2)]
    normed = Pyramid(conv, kind="fpn", channels=8, norm="batch")
    assert sum(isinstance(child, torch.nn.BatchNorm2d) for child in normed.modules()) == 8
    with pytest.raises(UserError, match="has maps of strides 16, and a feature pyramid"):
        Pyramid(vit, kind="fpn", channels=8, norm="none")


def test_the_simple_pyramid_is_vitdets_in_float64() -> None:
    torch.manual_seed(0)
    simple = SimplePyramid(12, 6, stride=16).double()
    for parameter in simple.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 12, 4, 6, dtype=torch.float64)

    def norm(values: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
        mean = values.mean(1, keepdim=True)
        var = values.var(1, keepdim=True, unbiased=False)
        gain, bias = layer.weight.view(1, -1, 1, 1), layer.bias.view(1, -1, 1, 1)
        return (values - mean) / torch.sqrt(var + layer.eps) * gain + bias

    def ends(values: torch.Tensor, layers: list) -> torch.Tensor:
        one, first, three, second = layers
        return norm(F.conv2d(norm(F.conv2d(values, one.weight), first), three.weight, padding=1), second)

    def doubled(values: torch.Tensor, layer: torch.nn.ConvTranspose2d) -> torch.Tensor:
        out = torch.einsum("bchw,cdij->bdhiwj", values, layer.weight)
        batch, width, height, _, across, _ = out.shape
        return out.reshape(batch, width, 2 * height, 2 * across) + layer.bias.view(1, -1, 1, 1)

    four, eight, same, half = (list(level) for level in simple.levels)
    found = simple(x)
    gelu = lambda v: v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))  # noqa: E731
    assert torch.allclose(found["4"], ends(doubled(gelu(norm(doubled(x, four[0]), four[1])), four[3]), four[4:]))
    assert torch.allclose(found["8"], ends(doubled(x, eight[0]), eight[1:]))
    assert torch.allclose(found["16"], ends(x, same))
    pooled = x.reshape(2, 12, 2, 2, 3, 2).amax((3, 5))
    assert torch.allclose(found["32"], ends(pooled, half[1:]))
    assert torch.equal(found["pool"], found["32"][:, :, ::2, ::2])


def test_patches_of_fourteen_pixels_give_strides_that_are_powers_of_two() -> None:
    visual = at_any_size(tower("timm:eva02_tiny_patch14_224"))
    seen = []
    visual.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    pyramid = Pyramid(visual, kind="auto", channels=8, norm="none")
    maps = pyramid(torch.randn(1, 3, 96, 128), visual)
    assert seen[-1] == (84, 112)
    assert maps["16"].shape[-2:] == (6, 8)


def test_presets_say_what_they_publish_and_come_back_from_json() -> None:
    for name in DetectionConfig.PRESETS:
        config = DetectionConfig(preset=name)
        assert DetectionConfig.model_validate(config.model_dump(mode="json")) == config
    virtex = DetectionConfig(preset="virtex")
    assert [round(mark * virtex.steps) for mark in virtex.schedule.milestones] == [120_000, 160_000]
    assert (virtex.batch_size, virtex.optim.lr, virtex.neck_norm, virtex.freeze_at) == (16, 0.02, "batch", 0)
    once = DetectionConfig(preset="1x")
    assert [round(mark * once.steps) for mark in once.schedule.milestones] == [60_000, 80_000]
    with pytest.raises(ValueError, match="long_side 700 is below a short side of 800"):
        DetectionConfig(long_side=700, short_side=800)


def test_images_without_objects_train_everything_a_little() -> None:
    """Distributed training waits for a gradient of every parameter, whatever a rank's images hold."""
    source = Scenes(3)
    source.examples = [replace(one, regions=(), extra=one.extra | {"categories": ()}) for one in source.examples]
    config = small(steps=1, empty_images="keep")
    feed = DetectionFeed(source, config)
    batch = next(feed.batches(None, config, start=0, here=Ranks(), pin=False))
    assert batch["boxes_K4"].shape == (0, 4)
    model = detector(tower("timm:test_resnet"), empty_images="keep").train()
    losses = model(batch)
    assert losses["loss_box_reg"] == losses["loss_mask"] == losses["loss_rpn_box_reg"] == 0
    assert losses["loss_objectness"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_blind_baseline_is_a_backbone_like_any_other() -> None:
    model = DetectionTuner(load_backbone("baseline:shuffled")).build(small(), ("square", "disc")).train()
    losses = model(a_batch())
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.visual.parameters() if parameter.requires_grad)
    (found,) = model.eval().detect([torch.randint(0, 255, (3, 96, 96), dtype=torch.uint8)])
    assert (found.boxes_K4 <= 96.001).all()


class _ReadsItsPixels(nn.Module):
    """What "meta" has no answer to; ``unread`` is in no map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, stride=16)
        self.unread = nn.Linear(6, 2)

    def forward(self, images_BCHW: torch.Tensor) -> Features:
        map_BCHW = self.conv(images_BCHW) * float(images_BCHW.abs().max() + 1)
        return Features(pooled_BD=map_BCHW.mean((2, 3)), maps={16: map_BCHW})


def test_a_users_module_that_reads_its_pixels_can_be_tuned() -> None:
    own = _ReadsItsPixels()
    parts = frozenset({"pooled", "maps"})
    model = detector(tower_of(wrap(own, preprocess=32, name="own", provides=parts)))
    learning = {name for name, parameter in model.visual.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2
    assert all("conv" in name for name in learning)
    assert own.unread.weight.requires_grad, "the user's own module is left alone"


def test_maps_of_weights_that_training_would_not_reach_are_refused() -> None:
    class Hides(_ReadsItsPixels):
        def __init__(self) -> None:
            super().__init__()
            self.others = [nn.Conv2d(3, 6, 16, stride=16)]

        def forward(self, images_BCHW: torch.Tensor) -> Features:
            map_BCHW = self.others[0](images_BCHW)
            return Features(pooled_BD=map_BCHW.mean((2, 3)), maps={16: map_BCHW})

    backbone = wrap(Hides(), preprocess=32, name="own", provides=frozenset({"pooled", "maps"}))
    with pytest.raises(UserError, match="its maps are made by weights that are no parameters of it; register"):
        detector(tower_of(backbone))
