"""Our towers as backbones of detectron2. Import this module only where detectron2 is installed.

Importing it registers ``vlbench_pyramid`` with detectron2, so that whoever trains with detectron2's own tools has any
backbone that vlbench can name::

    cfg.MODEL.VLBENCH = CfgNode({"NAME": "timm:resnet50.a1_in1k", "WEIGHTS": "", "OWN_RESNET": False})
    cfg.MODEL.BACKBONE.NAME = "vlbench_pyramid"

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import nn

from vlbench.core.errors import UserError
from vlbench.finetune.detection.neck import DIVISOR, LEVELS, STRIDES, Pyramid
from vlbench.models.resnet_names import ResNetPlan, plan_of, to_detectron2
from vlbench.models.tower_of import MapTower, at_any_size, map_channels, tower_of

LEVEL_NAMES = ("p2", "p3", "p4", "p5", "p6")
"""detectron2's, of strides 4 to 64."""
_MAP_NAMES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
_VITDET_SCALES = (4.0, 2.0, 1.0, 0.5)  # from stride 16 to strides 4 to 32; detectron2 builds no other factors
_SEEN = 224  # a side that every patch size in use divides
_TOLERANCE = 1e-4  # of the largest value; float32 sums in another order differ by less


class TowerBackbone(Backbone):
    """A tower with detectron2's interface: maps by name, ``res2`` at stride 4 to ``res5`` at stride 32.

    Args:
        visual: a tower, or detectron2's own ResNet. Its weights are not this module's parameters: a pyramid insists on
            owning its backbone, and what two modules own has each of its weights twice in a checkpoint.
        strides: of the maps that are read, finest first.
    """

    def __init__(self, visual: nn.Module, strides: tuple[int, ...]) -> None:
        super().__init__()
        object.__setattr__(self, "_visual", visual)  # past nn.Module, which would register it
        self._strides = {_MAP_NAMES[stride]: stride for stride in strides}
        if isinstance(visual, ResNet):
            channels = {shape.stride: shape.channels for shape in visual.output_shape().values()}
        else:
            channels = map_channels(visual, _SEEN)
        self._shapes = {
            name: ShapeSpec(channels=channels[stride], stride=stride) for name, stride in self._strides.items()
        }

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps by name."""
        maps = self._visual(images_BCHW)
        # A tower speaks of strides, detectron2's own ResNet of names.
        return {name: maps[name] if name in maps else maps[stride] for name, stride in self._strides.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride by name."""
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        """Of every pyramid's images."""
        return DIVISOR


class NeckBackbone(Backbone):
    """Our own pyramid with detectron2's interface, for the towers on which detectron2's cannot stand.

    Patches of 14 pixels: their maps' strides are no powers of two, which detectron2 pools from. Patches of 8 and 32:
    its ``SimpleFeaturePyramid`` resizes by 4, 2, 1 and a half, and no other factors.
    """

    def __init__(self, visual: nn.Module, pyramid: Pyramid, channels: int) -> None:
        super().__init__()
        object.__setattr__(self, "_visual", visual)  # as above
        self.pyramid = pyramid
        self._shapes = {
            name: ShapeSpec(channels=channels, stride=stride) for name, stride in zip(LEVEL_NAMES, (*STRIDES, 64))
        }

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps by name, ``p2`` to ``p6``."""
        maps = self.pyramid(images_BCHW, self._visual)
        return {name: maps[level].float() for name, level in zip(LEVEL_NAMES, LEVELS)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride by name."""
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        """Of every pyramid's images."""
        return DIVISOR


class Float32Pyramid(FPN):
    """detectron2's pyramid, float32 maps out of it.

    Its RoIAlign casts boxes to the type of the maps (``rois.to(dtype=input.dtype)``): under autocast to bfloat16 a box
    at 1,000 pixels would lie up to 4 pixels off.
    """

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps by name, ``p2`` to ``p6``."""
        return {name: map_BCHW.float() for name, map_BCHW in super().forward(x).items()}


class Float32SimplePyramid(SimpleFeaturePyramid):
    """detectron2's pyramid on a single map (ViTDet), padded and in float32.

    It asks for padding under the key ``size_divisiblity``, which nothing reads, and has no ``size_divisibility``:
    images would be padded to no multiple of anything.
    """

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps by name, ``p2`` to ``p6``."""
        return {name: map_BCHW.float() for name, map_BCHW in super().forward(x).items()}

    @property
    def size_divisibility(self) -> int:
        """Of every pyramid's images."""
        return DIVISOR

    @property
    def padding_constraints(self) -> dict[str, int]:
        """None beside it."""
        return {}


def pyramid_on(
    visual: MapTower | ResNet, *, kind: Literal["auto", "fpn", "simple"], channels: int, norm: Literal["none", "batch"]
) -> Backbone:
    """The pyramid that the other engine would take (``neck.Pyramid``), of detectron2's parts where it has them.

    Args:
        visual: a tower, or detectron2's own ResNet, which keeps its weights; what of it no map depends on is frozen.
        kind: see ``DetectionConfig.neck``.
        channels: of every level.
        norm: of an FPN's convolutions; the simple pyramid has LayerNorm.

    Raises:
        UserError: for an FPN over a tower without the maps for it.
    """
    ours = None if isinstance(visual, ResNet) else Pyramid(visual, kind=kind, channels=channels, norm=norm)
    if ours is None and kind == "simple":
        raise UserError("own_resnet: detectron2's own ResNet stands under an FPN; take neck=auto")
    if ours is None or ours.reads == list(STRIDES):
        bottom_up = TowerBackbone(visual, STRIDES)
        names = list(bottom_up.output_shape())
        norm_layer = "BN" if norm == "batch" else ""
        return Float32Pyramid(bottom_up, names, channels, norm=norm_layer, top_block=LastLevelMaxPool())
    if ours.scale == 1 and ours.reads == [16]:
        bottom_up = TowerBackbone(visual, (16,))
        return Float32SimplePyramid(
            bottom_up, _MAP_NAMES[16], channels, _VITDET_SCALES, top_block=LastLevelMaxPool(), norm="LN"
        )
    return NeckBackbone(visual, ours, channels)


def own_resnet(tower: MapTower) -> ResNet:
    """detectron2's ResNet with a tower's weights, in evaluation mode the same function to rounding.

    Any number of blocks and any width: detectron2's own builder knows five depths.

    Raises:
        UserError: where the tower is no plain ResNet, by its weights or by what comes out of it.
    """
    where = f"{tower.arch} as detectron2's own ResNet"
    net = _build_resnet(plan_of(_weights(tower), where=where))
    _check_same_function(tower, net, where)
    net.load_state_dict(to_detectron2(_weights(tower)))
    return net


def _weights(tower: MapTower) -> dict[str, torch.Tensor]:
    return {name.removeprefix("net."): tensor for name, tensor in tower.state_dict().items()}


def _build_resnet(plan: ResNetPlan) -> ResNet:
    stages, width = [], plan.stem
    for stage, (blocks, inner, outer) in enumerate(zip(plan.blocks, plan.inner, plan.outer, strict=True)):
        # Strides are torchvision's: in the 3x3 convolution, where detectron2's default is the 1x1.
        settings: dict[str, Any] = {"stride_per_block": [1 if stage == 0 else 2, *[1] * (blocks - 1)], "norm": "BN"}
        if plan.bottleneck:
            settings |= {"bottleneck_channels": inner, "num_groups": plan.groups, "stride_in_1x1": False}
        kind = BottleneckBlock if plan.bottleneck else BasicBlock
        stages.append(ResNet.make_stage(kind, blocks, in_channels=width, out_channels=outer, **settings))
        width = outer
    stem = BasicStem(in_channels=3, out_channels=plan.stem, norm="BN")
    return ResNet(stem, stages, out_features=["res2", "res3", "res4", "res5"])


def _check_same_function(tower: MapTower, net: ResNet, where: str) -> None:
    """Weights do not tell strides, dilations, activations: look at what comes out. Leaves other weights in ``net``."""
    shadow = copy.deepcopy(tower).eval()
    for norm in (module for module in shadow.modules() if isinstance(module, nn.BatchNorm2d)):
        # A fresh ResNet ends each block with gains of 0: what is within would not be heard.
        norm.weight.data[norm.weight == 0] = 1.0
    net.load_state_dict(to_detectron2(_weights(shadow), where=where))
    device = next(shadow.parameters()).device
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        wanted, found = shadow(noise), net.to(device).eval()(noise)
    net.train(tower.training)
    for name, map_BCHW in found.items():
        other = wanted[2 ** int(name.removeprefix("res"))]
        if map_BCHW.shape != other.shape or (map_BCHW - other).abs().max() > _TOLERANCE * other.abs().max():
            raise UserError(f"{where}: {name} differs, so the network is no plain ResNet; leave own_resnet out")


@BACKBONE_REGISTRY.register()
def vlbench_pyramid(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """For detectron2's own tools: a pyramid on the backbone that ``cfg.MODEL.VLBENCH`` names, with its weights.

    ``NAME`` and ``WEIGHTS`` are what ``--model`` and ``--weights`` take; ``OWN_RESNET`` is for plain ResNets.
    Set ``PIXEL_MEAN`` and ``PIXEL_STD`` to the backbone's, times 255, ``INPUT.FORMAT`` to RGB, the ``IN_FEATURES`` of
    the proposal network to p2 to p6 and those of the heads to p2 to p5, as with detectron2's own FPN.
    """
    from vlbench.models.load import load_backbone

    assert input_shape.channels == 3, f"images of three channels, not {input_shape.channels}"
    settings = cfg.MODEL.VLBENCH
    tower = at_any_size(tower_of(load_backbone(settings.NAME, weights=settings.WEIGHTS or None)))
    visual: MapTower | ResNet = own_resnet(tower) if settings.OWN_RESNET else tower
    norm: Literal["none", "batch"] = "batch" if cfg.MODEL.FPN.NORM else "none"
    backbone = pyramid_on(visual, kind="auto", channels=cfg.MODEL.FPN.OUT_CHANNELS, norm=norm)
    backbone.visual = visual  # here nobody else owns it
    return backbone
