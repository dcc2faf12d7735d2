"""Region features from a visual tower that is trained with them. OUR ADAPTATION: mu-VLA itself reads fixed features.

mu-VLA (2203.00242) trains no visual network: its regions are described once, offline, by VinVL's detector. Here the
boxes stay and their features come from a tower's maps by RoIAlign (He et al., 1703.06870), so that pretraining yields
a backbone which frozen tasks can score. The tower's pooled feature goes along as one token of the whole image.

What a masked region's neighbours see of it through their receptive fields, and the whole image's token, is not taken
away by zeroing its feature, as with a detector's overlapping boxes; ``blank`` takes its pixels away too.

Shapes: B batch, C channels, H height, W width, R regions, F width of a region's feature, P of the pooled one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlbench.core.errors import UserError
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
        widths = _map_widths(tower, image_size)
        missing = [stride for stride in self.strides if stride not in widths]
        if missing:
            has = ", ".join(map(str, sorted(widths))) or "none"
            raise UserError(f"{tower.arch}: has no map of stride {missing[0]} (there: {has}); set roi.strides")
        self.width = sum(widths[stride] for stride in self.strides)

    def forward(self, images_BCHW: torch.Tensor, boxes_BR4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``features_BRF`` at boxes in pixels of the images, and ``pooled_BP``. Padding may be any box."""
        from torchvision.ops import roi_align

        found = self.tower.features(images_BCHW, dense=True)
        assert found.maps is not None, "a tower with maps"
        batch, count = boxes_BR4.shape[:2]
        owner_K = torch.arange(batch, device=boxes_BR4.device).repeat_interleave(count)
        rois_K5 = torch.cat([owner_K[:, None].to(boxes_BR4.dtype), boxes_BR4.flatten(0, 1)], dim=1)
        # Autocast has no bfloat16 RoIAlign, and boxes need the precision anyway.
        with torch.autocast(images_BCHW.device.type, enabled=False):
            parts = [
                roi_align(
                    found.maps[stride].float(),
                    rois_K5.float(),
                    self.cells,
                    spatial_scale=found.maps[stride].shape[-1] / images_BCHW.shape[-1],
                    sampling_ratio=2,
                    aligned=True,
                ).mean((2, 3))
                for stride in self.strides
            ]
        return torch.cat(parts, dim=1).unflatten(0, (batch, count)), found.pooled_BD


def blank(images_BCHW: torch.Tensor, boxes_BR4: torch.Tensor, masked_BR: torch.Tensor) -> torch.Tensor:
    """A copy of normalised images whose masked boxes are 0, the colour that the normalisation calls mean."""
    blanked_BCHW = images_BCHW.clone()
    for (row, _), box in zip(masked_BR.nonzero().tolist(), boxes_BR4[masked_BR].tolist()):
        x1, y1, x2, y2 = int(box[0]), int(box[1]), -int(-box[2] // 1), -int(-box[3] // 1)
        blanked_BCHW[row, :, y1:y2, x1:x2] = 0.0
    return blanked_BCHW


def _map_widths(tower: VisualTower, image_size: int) -> dict[int, int]:
    """Channels of the tower's maps by stride."""
    if "maps" not in tower.parts:
        return {}
    training = tower.training
    device = next(tower.parameters()).device
    with torch.no_grad():
        maps = tower.eval().features(torch.zeros(1, 3, image_size, image_size, device=device), dense=True).maps
    tower.train(training)
    return {stride: found.shape[1] for stride, found in (maps or {}).items()}
