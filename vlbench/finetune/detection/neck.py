"""From a backbone's maps to a pyramid of strides 4 to 64, whatever the backbone.

Two necks. A feature pyramid network (Lin et al., 1612.03144) where the network has maps of several strides. A simple
feature pyramid (ViTDet: Li et al., 2203.16527, section 3) where it has one: strides below it by transposed
convolutions, above it by pooling, then a 1x1 and a 3x3 convolution, each with a LayerNorm over channels.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from vlbench.core.errors import UserError
from vlbench.models.tower_of import MapTower

STRIDES = (4, 8, 16, 32)
LEVELS = ("4", "8", "16", "32", "pool")
"""Names of the pyramid's maps; ``pool`` is of stride 64 and read by the proposal network alone."""
DIVISOR = 32
"""Of a padded image's height and width."""
_SEEN = 224  # a side that every patch size in use divides


class Pyramid(nn.Module):
    """A tower's maps, of images whose sides are multiples of ``DIVISOR``, as ``LEVELS``.

    Args:
        visual: gives the maps; what none of them passes through is frozen, since nothing would train it.
        kind: auto, fpn or simple: see ``DetectionConfig.neck``.
        channels: of every level.
        norm: of the FPN.

    Raises:
        UserError: for an FPN over a tower without the maps for it.
    """

    def __init__(
        self, visual: MapTower, *, kind: Literal["auto", "fpn", "simple"], channels: int, norm: Literal["none", "batch"]
    ) -> None:
        super().__init__()
        widths = _looked_at(visual)
        self.scale = _scale(max(widths))
        own = {round(stride * self.scale): (stride, width) for stride, width in widths.items()}
        whole = own.keys() >= set(STRIDES)
        if kind == "fpn" and not whole:
            raise UserError(
                f"{visual.arch} has maps of strides {', '.join(map(str, sorted(widths)))}, and a feature pyramid "
                "network reads those of 4, 8, 16 and 32; take neck=simple"
            )
        self.is_fpn = whole and kind != "simple"
        strides = list(STRIDES) if self.is_fpn else [max(own)]
        self.reads = [own[stride][0] for stride in strides]
        self.neck: nn.Module
        if self.is_fpn:
            norm_layer = nn.BatchNorm2d if norm == "batch" else None
            self.neck = FeaturePyramidNetwork(
                [own[stride][1] for stride in strides], channels, LastLevelMaxPool(), norm_layer
            )
        else:
            self.neck = SimplePyramid(own[strides[0]][1], channels, stride=strides[0])
        freeze_unread(visual, self.reads)

    def forward(self, images_BCHW: torch.Tensor, visual: nn.Module) -> dict[str, torch.Tensor]:
        """Level name → ``(B, channels, H / stride, W / stride)``. ``visual`` is the tower that it was made for."""
        if self.scale != 1:  # a patch of 14 pixels sees what one of 16 would: strides remain powers of two
            images_BCHW = F.interpolate(images_BCHW, scale_factor=1 / self.scale, mode="bilinear", antialias=True)
        maps = visual(images_BCHW)
        if self.is_fpn:
            return self.neck(OrderedDict(zip(LEVELS, (maps[stride] for stride in self.reads))))
        return self.neck(maps[self.reads[0]])


class SimplePyramid(nn.Module):
    """ViTDet's pyramid from one map of ``stride``, a power of two."""

    def __init__(self, width: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(self._level(width, channels, stride / wanted) for wanted in STRIDES)
        self.last = LastLevelMaxPool()

    def forward(self, map_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Level name → map."""
        maps = [level(map_BCHW) for level in self.levels]
        maps, names = self.last(maps, [map_BCHW], list(LEVELS[:-1]))
        return OrderedDict(zip(names, maps))

    @staticmethod
    def _level(width: int, channels: int, factor: float) -> nn.Sequential:
        """Resize by ``factor``, each doubling halving the channels, then the two convolutions."""
        layers: list[nn.Module] = []
        for number in range(max(0, round(math.log2(factor)))):
            if number:
                layers += [ChannelNorm(width), nn.GELU()]
            layers.append(nn.ConvTranspose2d(width, max(width // 2, 1), 2, stride=2))
            width = max(width // 2, 1)
        if factor < 1:
            side = round(1 / factor)
            layers.append(nn.MaxPool2d(side, stride=side))
        layers += [nn.Conv2d(width, channels, 1, bias=False), ChannelNorm(channels)]
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels)]
        return nn.Sequential(*layers)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return super().forward(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def freeze_unread(visual: MapTower, strides: list[int]) -> None:
    """Freeze the parameters that none of the maps of these strides depends on.

    They would be decayed without ever learning, and distributed training would wait for their gradients.

    Raises:
        UserError: where the maps are made by weights that are no parameters of the tower: nothing would train them.
    """
    shadow, maps = _shadow(visual)
    learning = [name for name, parameter in shadow.named_parameters() if parameter.requires_grad]
    total = torch.stack([maps[stride].sum() for stride in strides]).sum()
    unread = learning
    if learning and total.requires_grad:
        used = torch.autograd.grad(total, [shadow.get_parameter(name) for name in learning], allow_unused=True)
        unread = [name for name, gradient in zip(learning, used) if gradient is None]
        if len(unread) == len(learning):
            raise UserError(
                f"{visual.arch}: its maps are made by weights that are no parameters of it; register the network that "
                "makes them as a submodule of what is given to vlbench.models.wrap"
            )
    for name in unread:
        visual.get_parameter(name).requires_grad_(False)


def _looked_at(visual: MapTower) -> dict[int, int]:
    """Stride → channels, without computing anything where that can be."""
    with torch.no_grad():
        _, maps = _shadow(visual)
    return {stride: map_BCHW.shape[1] for stride, map_BCHW in maps.items()}


def _shadow(visual: MapTower) -> tuple[MapTower, dict[int, torch.Tensor]]:
    """A copy of the tower and its maps, without values; with them where a user's module cannot do without."""
    shadow = copy.deepcopy(visual).to("meta")
    # Two images: batch norm of a map of one cell wants more than one value.
    try:
        return shadow, shadow(torch.zeros(2, 3, _SEEN, _SEEN, device="meta"))
    except (RuntimeError, TypeError):  # NotImplementedError is one; TypeError comes from numpy
        shadow = copy.deepcopy(visual).cpu().eval()  # dropout would draw from the numbers of what is built next
        return shadow, shadow(torch.zeros(2, 3, _SEEN, _SEEN))


def _scale(stride: int) -> float:
    """From the tower's largest stride to the power of two that stands for it: 16/14, else 1."""
    return 2.0 ** round(math.log2(stride)) / stride
