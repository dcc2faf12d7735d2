"""Cells of a grid in place of regions: what the adaptation reads where nothing has found a box. OURS.

A tower's last map, averaged over ``N x N`` equal cells, is the sequence of regions, each with the box vector of its
cell, row by row. PixelBERT and its like read a map so; mu-VLA does not.

Shapes: B batch, C channels, H height, W width, R = N x N cells, F width of a cell's feature, P of the pooled one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.tower_of import map_channels
from vlbench.models.towers import VisualTower


class GridTower(nn.Module):
    """A tower read at the cells of its last map.

    Args:
        tower: a visual tower with maps.
        grid: cells each way.
        image_size: height and width of the images.

    Raises:
        UserError: where the tower has no maps, or its last one fewer places than there are cells.
    """

    def __init__(self, tower: VisualTower, *, grid: int, image_size: int) -> None:
        super().__init__()
        self.tower = tower
        self.grid = grid
        widths = map_channels(tower, image_size)
        if not widths:
            raise UserError(f"{tower.arch}: has no maps, which roi.grid reads; leave it out, or take another tower")
        self.stride = max(widths)
        places = image_size // self.stride
        if grid > places:
            raise UserError(
                f"{tower.arch}: its last map has {places} x {places} places at {image_size} pixels, fewer than "
                f"roi.grid={grid}; set roi.grid to {places} at most, or a larger visual.image_size"
            )
        self.width = widths[self.stride]

    def forward(self, images_BCHW: torch.Tensor, boxes_BR4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``features_BRF`` of the cells, row by row, and ``pooled_BP``. The boxes are the cells', and not looked at."""
        found = self.tower.features(images_BCHW, dense=True)
        assert found.maps is not None, "a tower with maps"
        cells_BFNN = F.adaptive_avg_pool2d(found.maps[self.stride].float(), self.grid)
        return cells_BFNN.flatten(2).transpose(1, 2), found.pooled_BD


def cell_boxes(grid: int) -> np.ndarray:
    """``boxes_R4`` float32 of ``grid x grid`` cells, row by row, as shares of the image's width and height."""
    edges = np.arange(grid + 1, dtype=np.float64) / grid
    rows = [(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(grid) for x in range(grid)]
    return np.array(rows, dtype=np.float32)
