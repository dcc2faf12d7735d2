"""The second engine, run for real where detectron2 has been built from its source."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.adapters.test_coco_rows import detections_of, some_scenes, written
from tests.finetune.detection.scenes import CLASSES, Scenes, backbone, small
from tests.stats.coco_scenes import nothing_found
from vlbench.adapters.common.coco_rows import detection_outcomes, detection_rows
from vlbench.adapters.detection import ADAPTER
from vlbench.core.cards import task_cards
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.data.masks import to_bitmaps
from vlbench.data.sources import open_source
from vlbench.finetune.detection.batch import Pictured, collate
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.finetune.detection.detectron2_engine import build_detectron2, detectron2_problem
from vlbench.finetune.detection.feed import picture
from vlbench.models.resnet_names import from_detectron2
from vlbench.models.tower_of import at_any_size, tower_of
from vlbench.models.towers import TimmTower, TorchvisionTower, VisualTower
from vlbench.stats.coco_ap import METRICS
from vlbench.stats.intervals import mean_of
from vlbench.verbs.evaluate import Unsuitable, prepare
from vlbench.verbs.selection import Choice

WHY = "detectron2 is on no package index; docs/protocols.md says how to build it from its source"
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


@pytest.fixture(scope="module")
def detectron2() -> Any:
    """The package. The tests that ask for it skip without it."""
    return pytest.importorskip("detectron2", reason=WHY)


@pytest.fixture
def without_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has not built it, whatever this one has."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "detectron2":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)


def resnet(name: str = "resnet18") -> VisualTower:
    """A torchvision ResNet whose batch norms have statistics that matter."""
    torch.manual_seed(1)
    net = torchvision.models.get_model(name, weights=None)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.2, 0.8)
        nn.init.normal_(norm.bias, std=0.1)
    return TorchvisionTower(net, name)


def engine(tower: VisualTower | None = None, **values: Any) -> Any:
    """A small model of the engine under test, for two classes."""
    torch.manual_seed(0)
    config = small(engine="detectron2", **values)
    return build_detectron2(tower or tower_of(backbone()), config, n_classes=len(CLASSES), mean=MEAN, std=STD)


def batch() -> dict[str, torch.Tensor]:
    """Four pictures of two sizes, one of them without an object."""
    wide = [
        picture(one, CLASSES, short_side=64, long_side=192, flip=False) for one in Scenes(2, size=(64, 90)).examples
    ]
    tall = [picture(one, CLASSES, short_side=96, long_side=192, flip=True) for one in Scenes(1, seed=3).examples]
    empty = Pictured(
        torch.zeros(3, 40, 40, dtype=torch.uint8),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        np.zeros((0, 40, 40), np.uint8),
    )
    return collate([*wide, empty, *tall], divisor=32)


# ----------------------------------------------------------------------------------------------- without detectron2


def test_absent_detectron2_is_one_line_that_says_how_to_build_it(without_detectron2: None) -> None:
    with pytest.raises(
        UserError, match=r"^engine detectron2 is not installed: git clone .* or take engine: torchvision$"
    ):
        engine()


def test_kind_skips_what_a_name_demands(without_detectron2: None) -> None:
    assert ADAPTER.lack(DetectionConfig()) is None
    choice = Choice(task_cards()["detection/shapes_detectron2"], "shapes:coco", said="shapes:coco", named=False)
    model = SimpleNamespace(card=SimpleNamespace(provides=frozenset({"pooled"})))
    session: Any = SimpleNamespace(encoder=SimpleNamespace(backbone=model))
    with pytest.raises(Unsuitable, match="not installed"):  # before its data are made
        prepare(choice, session)


def test_own_resnet_belongs_to_detectron2() -> None:
    with pytest.raises(ValueError, match="set engine to detectron2"):
        DetectionConfig(own_resnet=True)


# ------------------------------------------------------------------------------------------------------- backbones


def test_nothing_is_lacking_where_it_is_built(detectron2: Any) -> None:
    assert detectron2_problem() is None


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_same_weights_give_the_same_maps_in_both_libraries(detectron2: Any, name: str) -> None:
    from vlbench.finetune.detection.detectron2_backbone import own_resnet

    tower = at_any_size(resnet(name)).eval()
    net = own_resnet(tower).eval()
    images_BCHW = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = tower(images_BCHW), net(images_BCHW)
    for stride, level in ((4, "res2"), (8, "res3"), (16, "res4"), (32, "res5")):
        assert theirs[level].shape == ours[stride].shape
        assert (theirs[level] - ours[stride]).abs().max() <= 1e-5 * ours[stride].abs().max()
    back = from_detectron2(net.state_dict())
    assert all(torch.equal(back[key], value) for key, value in tower.net.state_dict().items())


def test_strides_in_the_1x1_are_another_network(detectron2: Any) -> None:
    # What detectron2 builds by default: the names fit, the function does not.
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    from vlbench.models.resnet_names import to_detectron2

    tower = at_any_size(resnet("resnet50")).eval()
    maps = {}
    for in_1x1 in (True, False):
        cfg = get_cfg()
        cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = ["res5"], in_1x1
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
        net = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
        net.load_state_dict(to_detectron2(tower.net.state_dict()))
        with torch.no_grad():
            maps[in_1x1] = net(torch.ones(1, 3, 64, 64))["res5"]
    with torch.no_grad():
        wanted = tower(torch.ones(1, 3, 64, 64))[32]
    assert torch.allclose(maps[False], wanted, atol=1e-5)
    assert not torch.allclose(maps[True], wanted, atol=1e-2)


@pytest.mark.parametrize("name", ["timm:resnet18d", "timm:resnet18"])
def test_own_resnet_of_another_network_is_refused(detectron2: Any, name: str) -> None:
    tower = tower_of(backbone(name))
    if name == "timm:resnet18":
        tower.net.layer1[0].act1 = nn.SiLU()  # no weight tells an activation
    with pytest.raises(UserError, match=r"as detectron2's own ResNet: .*plain ResNet"):
        engine(tower, own_resnet=True)


@pytest.mark.parametrize(
    ("name", "values", "neck", "kind"),
    [
        ("test_resnet", {}, "auto", "Float32Pyramid"),
        ("test_resnet", {}, "simple", "NeckBackbone"),
        ("test_vit", {}, "auto", "Float32SimplePyramid"),
        ("test_vit", {"patch_size": 32}, "auto", "NeckBackbone"),
        ("test_vit", {"patch_size": 14, "img_size": 224}, "auto", "NeckBackbone"),
    ],
)
def test_pyramids_have_five_levels_of_strides_4_to_64(
    detectron2: Any, name: str, values: dict[str, int], neck: str, kind: str
) -> None:
    tower = TimmTower(timm.create_model(name, num_classes=0, **values), name)
    model = engine(tower, neck=neck).eval()
    pyramid = model.rcnn.backbone
    assert type(pyramid).__name__ == kind
    with torch.no_grad():
        maps = pyramid(torch.randn(1, 3, 64, 96))
    shapes = pyramid.output_shape()
    assert [shapes[level].stride for level in maps] == [4, 8, 16, 32, 64]
    assert [tuple(map_BCHW.shape[1:]) for map_BCHW in maps.values()] == [
        (shapes[level].channels, -(-64 // shapes[level].stride), -(-96 // shapes[level].stride)) for level in maps
    ]


def test_detectron2s_own_tools_find_the_backbone_by_name(detectron2: Any) -> None:
    from detectron2.config import CfgNode, get_cfg
    from detectron2.modeling import build_model

    import vlbench.finetune.detection.detectron2_backbone  # noqa: F401  registers it

    cfg = get_cfg()
    cfg.MODEL.VLBENCH = CfgNode({"NAME": "timm:test_resnet", "WEIGHTS": "random", "OWN_RESNET": False})
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE, cfg.MODEL.FPN.OUT_CHANNELS = "vlbench_pyramid", "cpu", 16
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.IN_FEATURES = "StandardROIHeads", ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model = build_model(cfg).eval()
    with torch.no_grad():
        found = model([{"image": torch.zeros(3, 70, 64)}])
    assert found[0]["instances"].image_size == (70, 64)


# ----------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("values", [{}, {"neck_norm": "batch", "heads_norm": "batch"}, {"own_resnet": True}])
def test_losses_reach_every_parameter_and_each_weight_is_there_once(detectron2: Any, values: dict[str, Any]) -> None:
    model = engine(resnet() if values.get("own_resnet") else None, **values).train()
    losses = model(batch())
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []
    places = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    assert len(set(places)) == len(places)
    assert any(name.startswith("visual.") for name, _ in model.named_parameters())


def test_own_resnet_learns_as_the_tower_does(detectron2: Any) -> None:
    tower, gradients, losses = resnet(), [], []
    models = [engine(tower).train(), engine(tower, own_resnet=True).train()]
    models[1].rcnn.load_state_dict(models[0].rcnn.state_dict())  # everything but the backbone, which `visual` owns
    for model in models:
        torch.manual_seed(3)  # which proposals are learnt from is drawn
        losses.append(model(batch()))
        sum(losses[-1].values()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.visual.named_parameters()})
    for name in LOSSES:
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=1e-4)
    theirs = from_detectron2(models[1].visual.state_dict() | gradients[1])
    for name, gradient in gradients[0].items():
        assert torch.allclose(theirs[name.removeprefix("net.")], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max())


def test_order_of_images_changes_nothing(detectron2: Any) -> None:
    model = engine().eval()
    one, other = (
        torch.from_numpy(np.random.default_rng(side).integers(0, 256, (3, side, 90), dtype=np.uint8))
        for side in (70, 96)
    )
    there, back = model.detect([one, other]), model.detect([other, one])[::-1]
    for before, after, height in zip(there, back, (70, 96)):
        assert len(before) > 0
        assert {tuple(mask["size"]) for mask in before.masks} == {(height, 90)}
        assert after.boxes_K4 == pytest.approx(before.boxes_K4, abs=1e-3)
        assert after.masks == before.masks


def test_detections_are_in_pixels_of_the_stored_image(detectron2: Any) -> None:
    model = engine().eval()
    height, width = 150, 50  # seen as 192 x 64
    found = model.detect([torch.randint(0, 256, (3, height, width), dtype=torch.uint8)])[0]
    assert len(found) > 0
    assert found.boxes_K4.dtype == found.scores_K.dtype == np.float32
    assert found.classes_K.dtype == np.int64
    assert (found.boxes_K4[:, [0, 1]] >= 0).all()
    assert (found.boxes_K4[:, 2] <= width).all()
    assert (found.boxes_K4[:, 3] <= height).all()
    assert (np.diff(found.scores_K) <= 0).all()
    assert set(found.classes_K.tolist()) <= {0, 1}
    masks_KHW = to_bitmaps(found.masks)
    assert masks_KHW.shape == (len(found), height, width)
    for mask_HW, (left, top, right, bottom) in zip(masks_KHW, found.boxes_K4):
        rows, columns = np.nonzero(mask_HW)
        if len(rows):  # a mask lies in its box, to the pixel that its edge cuts
            assert rows.min() >= top - 1
            assert rows.max() <= bottom
            assert columns.min() >= left - 1
            assert columns.max() <= right


def test_pixels_are_normalised_as_the_card_says(detectron2: Any) -> None:
    model = engine()
    pixel = torch.tensor([10, 100, 250], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    seen = model.rcnn.preprocess_image([{"image": pixel}]).tensor[0, :, 0, 0]
    wanted = [(value / 255 - mean) / std for value, mean, std in zip((10, 100, 250), MEAN, STD)]
    assert seen.tolist() == pytest.approx(wanted, abs=1e-5)


def test_frozen_backbone_stays_as_it_is(detectron2: Any) -> None:
    for own in (False, True):
        model = engine(resnet(), backbone="frozen", own_resnet=own).train()
        before = {name: tensor.clone() for name, tensor in model.visual.state_dict().items()}
        sum(model(batch()).values()).backward()
        assert all(parameter.grad is None for parameter in model.visual.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.visual.state_dict().items())


def test_freeze_at_counts_the_stem(detectron2: Any) -> None:
    for own in (False, True):
        model = engine(resnet(), freeze_at=2, own_resnet=own)
        learning = {name for name, parameter in model.visual.named_parameters() if parameter.requires_grad}
        first, second = ("res2", "res3") if own else ("layer1", "layer2")
        assert not any(first in name or "conv1" in name.partition("layer")[0].partition("res")[0] for name in learning)
        assert any(second in name for name in learning)
    with pytest.raises(UserError, match="freeze_at 6"):
        engine(resnet(), freeze_at=6, own_resnet=True)


def test_maps_leave_the_pyramid_in_float32_under_autocast(detectron2: Any) -> None:
    # detectron2 would round boxes to the type of the maps: eight bits for a coordinate.
    model = engine().train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.rcnn.backbone(torch.randn(1, 3, 64, 64))
        losses = model(batch())
    assert {map_BCHW.dtype for map_BCHW in maps.values()} == {torch.float32}
    assert all(torch.isfinite(value) for value in losses.values())


def test_diverged_training_is_one_line(detectron2: Any) -> None:
    model = engine().train()
    with torch.no_grad():
        next(model.visual.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"diverged\. Lower optim\.lr"):
        model(batch())


def test_mask_heads_of_several_widths_are_refused(detectron2: Any) -> None:
    with pytest.raises(UserError, match="has one width"):
        engine(mask_convolutions=(16, 32))


def test_three_pictures_are_learnt_by_heart(detectron2: Any) -> None:
    source, steps = Scenes(3, seed=5, size=(64, 64)), 240
    pictures = [picture(one, CLASSES, short_side=64, long_side=192, flip=False) for one in source.examples]
    model = engine(channels=32, box_width=64, mask_convolutions=(32, 32), short_side=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(collate(pictures, divisor=32)).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        rate.step()
    images = [one.image_CHW for one in pictures]
    rows = detection_rows(source, model.eval().detect(images))
    numbers = same_in_both(rows)
    assert min(numbers["box_ap"], numbers["mask_ap"]) >= 0.95


# ------------------------------------------------------------------------------------------------------ evaluation


def same_in_both(rows: Rows) -> dict[str, float]:
    """detectron2's numbers, which must be ours: all that both give."""
    from vlbench.finetune.detection.detectron2_evaluation import coco_evaluator

    theirs = coco_evaluator(rows)
    ours = {name: mean_of(found) for name, found in detection_outcomes(rows).items()}
    for name, value in theirs.items():
        assert rows.meta["coco"][name] == pytest.approx(value, abs=1e-6)
        if name in ours:  # absent where one image has all objects of a size: no interval
            assert ours[name] == pytest.approx(value, abs=1e-6)
    return theirs


@pytest.mark.parametrize("seed", range(3))
def test_evaluation_agrees_on_crowds_empty_images_and_missing_classes(
    detectron2: Any, seed: int, tmp_path: Path
) -> None:
    scenes = some_scenes(seed)  # of four classes, one without an object; an image without objects, one without finds
    for masks in (True, False):
        source = open_source(written(tmp_path / str(masks), scenes, masks=masks), "val")
        rows = detection_rows(source, detections_of(scenes, masks=masks))
        theirs = same_in_both(rows)
        assert sorted(theirs) == sorted(
            f"{kind}_{name}" for kind in (("box", "mask") if masks else ("box",)) for name in METRICS if "ap" in name
        )
        assert 0.05 < theirs["box_ap"] < 0.95


def test_evaluation_reads_no_stale_annotations(detectron2: Any, tmp_path: Path) -> None:
    # The same names twice: its own conversion would be found in the output folder and read again.
    for seed in (0, 1):
        source = open_source(written(tmp_path / str(seed), some_scenes(seed)), "val")
        same_in_both(detection_rows(source, detections_of(some_scenes(seed))))


def test_evaluation_of_nothing_found_has_no_numbers(detectron2: Any, tmp_path: Path) -> None:
    from vlbench.finetune.detection.detectron2_evaluation import coco_evaluator, second_opinion

    scenes = [nothing_found(one) for one in some_scenes()]
    rows = detection_rows(open_source(written(tmp_path, scenes), "val"), detections_of(scenes))
    assert coco_evaluator(rows) == {}
    assert "no number where nothing was found" in second_opinion(rows).meta["notes"][-1]


def test_second_opinion_says_whether_it_is_ours(detectron2: Any, tmp_path: Path) -> None:
    from vlbench.finetune.detection.detectron2_evaluation import second_opinion

    scenes = some_scenes()
    rows = detection_rows(open_source(written(tmp_path, scenes), "val"), detections_of(scenes))
    told = second_opinion(rows)
    assert told.meta["notes"][-1] == "detectron2's COCOEvaluator agrees in 12 numbers to 1e-06"
    assert told.meta["detectron2"]["mask_ap"] == pytest.approx(rows.meta["coco"]["mask_ap"], abs=1e-6)
    moved = Rows(rows.columns, {**rows.meta, "coco": {**rows.meta["coco"], "box_ap": 0.5}})
    assert "COCOEvaluator says box_ap" in second_opinion(moved).meta["notes"][-1]
