"""How large an image is when a detector sees it: the short side as wanted, the long side within a limit.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def target_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width after resizing: the aspect stays, up to rounding."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resized(image_CHW: torch.Tensor, short_side: int, long_side: int) -> torch.Tensor:
    """A uint8 image at its target size, bilinearly, smoothed first where it gets smaller (as PIL resizes)."""
    height, width = image_CHW.shape[1:]
    size = target_size(height, width, short_side, long_side)
    if size == (height, width):
        return image_CHW
    larger_1CHW = F.interpolate(image_CHW[None].float(), size=size, mode="bilinear", antialias=True)
    return larger_1CHW[0].round_().clamp_(0, 255).to(torch.uint8)
