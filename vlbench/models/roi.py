"""Region features from a visual tower that is trained with them. OUR ADAPTATION: mu-VLA itself reads fixed features.

mu-VLA (2203.00242) trains no visual network: its regions are described once, offline, by VinVL's detector. Here the
boxes stay and their features come from a tower's maps by RoIAlign (He et al., 1703.06870), so that pretraining yields
a backbone which frozen tasks can score. The tower's pooled feature goes along as one token of the whole image.

What a masked region's neighbours see of it through their receptive fields, and the whole image's token, is not taken
away by zeroing its feature, as with a detector's overlapping boxes; ``blank`` takes its pixels away too.

``DeepestMaps`` reads any tower in the same way for fine-tuning (``finetune/fusion``), by depth instead of by stride.

Shapes: B batch, C channels, H height, W width, R regions, F width of a region's feature, P of the pooled one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.tower_of import at_any_size, map_channels
from vlbench.models.towers import VisualTower


class RegionTower(nn.Module):
    """A tower read at boxes.

    Args:
        tower: a visual tower with maps.
        strides: the maps that are read; a region's feature is all of them, one after the other.
        cells: RoIAlign's grid of ``cells x cells`` bins, whose mean is taken.

    Raises:
        UserError: where the tower has no map of such a stride.
    """

    def __init__(self, tower: VisualTower, *, strides: Sequence[int], cells: int, image_size: int) -> None:
        super().__init__()
        self.tower = tower
        self.strides = tuple(strides)
        self.cells = cells
        widths = map_channels(tower, image_size)
        missing = [stride for stride in self.strides if stride not in widths]
        if missing:
            has = ", ".join(map(str, sorted(widths))) or "none"
            raise UserError(f"{tower.arch}: has no map of stride {missing[0]} (there: {has}); set roi.strides")
        self.width = sum(widths[stride] for stride in self.strides)

    def forward(self, images_BCHW: torch.Tensor, boxes_BR4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``features_BRF`` at boxes in pixels of the images, and ``pooled_BP``. Padding may be any box."""
        found = self.tower.features(images_BCHW, dense=True)
        assert found.maps is not None, "a tower with maps"
        maps = [found.maps[stride] for stride in self.strides]
        return read_boxes(maps, boxes_BR4, cells=self.cells, pixels=images_BCHW.shape[-1]), found.pooled_BD


class DeepestMaps(nn.Module):
    """A tower read at boxes of its deepest maps, whatever strides they have, so that all towers are read alike.

    Args:
        tower: a visual tower. One that pools in a way of its own and shows no maps beside it (torchvision's, but for
            ResNets) is cut before it pools; its deepest map's mean is then the pooled feature.
        levels: how many maps are read; a tower that has fewer strides gives all that it has.
        cells: RoIAlign's grid of ``cells x cells`` bins, whose mean is taken.
        image_size: height and width of the images.

    Raises:
        UserError: where the tower has no maps.
    """

    def __init__(self, tower: VisualTower, *, levels: int, cells: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        widths = map_channels(tower, image_size)
        self.pools = bool(widths)
        """Whether the pooled feature is the tower's own."""
        self.tower = tower if widths else at_any_size(tower)
        widths = widths or map_channels(self.tower, image_size)
        self.cells = cells
        self.strides = tuple(sorted(widths)[-levels:])
        self.parts = tuple(widths[stride] for stride in self.strides)
        """Width that each map has in a box's feature."""
        self.pooled_width = tower.width if self.pools else self.parts[-1]

    def forward(self, images_BCHW: torch.Tensor, boxes_BR4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``features_BRF`` at boxes in pixels of the images, and ``pooled_BP``; float32. Padding may be any box."""
        if isinstance(self.tower, VisualTower):
            found = self.tower.features(images_BCHW, dense=True)
            assert found.maps is not None, "a tower with maps"
            maps, pooled_BP = found.maps, found.pooled_BD
        else:
            maps = self.tower(images_BCHW)
            pooled_BP = maps[self.strides[-1]].mean((2, 3))
        chosen = [maps[stride] for stride in self.strides]
        features_BRF = read_boxes(chosen, boxes_BR4, cells=self.cells, pixels=images_BCHW.shape[-1])
        return features_BRF, pooled_BP.float()


def read_boxes(maps: Sequence[torch.Tensor], boxes_BR4: torch.Tensor, *, cells: int, pixels: int) -> torch.Tensor:
    """``features_BRF``: RoIAlign's mean over each box, of one map after the other, float32.

    Args:
        maps: ``(B, C, H, W)`` each.
        boxes_BR4: in pixels of the images.
        cells: bins each way.
        pixels: width of the images.
    """
    from torchvision.ops import roi_align

    batch, count = boxes_BR4.shape[:2]
    owner_K = torch.arange(batch, device=boxes_BR4.device).repeat_interleave(count)
    rois_K5 = torch.cat([owner_K[:, None].to(boxes_BR4.dtype), boxes_BR4.flatten(0, 1)], dim=1)
    # Autocast has no bfloat16 RoIAlign, and boxes need the precision anyway.
    with torch.autocast(boxes_BR4.device.type, enabled=False):
        parts = [
            roi_align(
                map_BCHW.float(),
                rois_K5.float(),
                cells,
                spatial_scale=map_BCHW.shape[-1] / pixels,
                sampling_ratio=2,
                aligned=True,
            ).mean((2, 3))
            for map_BCHW in maps
        ]
    return torch.cat(parts, dim=1).unflatten(0, (batch, count))


def blank(images_BCHW: torch.Tensor, boxes_BR4: torch.Tensor, masked_BR: torch.Tensor) -> torch.Tensor:
    """A copy of normalised images whose masked boxes are 0, the colour that the normalisation calls mean."""
    blanked_BCHW = images_BCHW.clone()
    for (row, _), box in zip(masked_BR.nonzero().tolist(), boxes_BR4[masked_BR].tolist()):
        x1, y1, x2, y2 = int(box[0]), int(box[1]), -int(-box[2] // 1), -int(-box[3] // 1)
        blanked_BCHW[row, :, y1:y2, x1:x2] = 0.0
    return blanked_BCHW
