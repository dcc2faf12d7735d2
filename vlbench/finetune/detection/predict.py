"""From torchvision's detections of one resized image to ``Detections`` of the stored one.

Shapes: K detections, M cells along a side of a mask as it is predicted, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlbench.data.masks import from_bitmaps
from vlbench.finetune.detection.types import Detections

_INSIDE = 0.5  # of a mask's probability [TV:mask_rcnn.py]


def detections(found: Mapping[str, torch.Tensor], *, size: tuple[int, int], stored: tuple[int, int]) -> Detections:
    """Boxes and masks of an image that was resized from ``stored`` (height, width) to ``size``."""
    height, width = stored
    across, down = width / size[1], height / size[0]
    boxes_K4 = found["boxes"].float() * torch.tensor([across, down, across, down], device=found["boxes"].device)
    scores_K, order_K = found["scores"].float().sort(descending=True, stable=True)
    boxes_K4 = boxes_K4[order_K]
    masks = None
    if "masks" in found:
        pasted_KHW = pasted(found["masks"].float()[order_K, 0], boxes_K4, (height, width))
        masks = from_bitmaps((pasted_KHW > _INSIDE).cpu().numpy())
    return Detections(
        boxes_K4=boxes_K4.cpu().numpy(),
        scores_K=scores_K.cpu().numpy(),
        classes_K=found["labels"][order_K].cpu().numpy() - 1,
        masks=masks,
    )


def pasted(masks_KMM: torch.Tensor, boxes_K4: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``masks_KHW``: what each mask, stretched over its box, says at the middle of each pixel; outside, less than 1/2.

    Bilinear between the middles of the cells, as detectron2 pastes. torchvision rounds boxes to whole pixels first:
    the true masks of objects of 30 pixels, pasted so, lie up to a pixel beside themselves.

    Args:
        masks_KMM: probabilities.
        boxes_K4: left, top, right, bottom in pixels of the image, whose first pixel reaches from 0 to 1.
        size: height and width of the image.
    """
    cells = masks_KMM.shape[-1]
    left_K, top_K, right_K, bottom_K = boxes_K4.unbind(1)
    with torch.autocast(masks_KMM.device.type, enabled=False):  # bfloat16 is too coarse beside 0.5
        rows_KHM = _weights(top_K, bottom_K, size[0], cells)
        columns_KWM = _weights(left_K, right_K, size[1], cells)
        return rows_KHM @ masks_KMM @ columns_KWM.transpose(1, 2)


def _weights(low_K: torch.Tensor, high_K: torch.Tensor, pixels: int, cells: int) -> torch.Tensor:
    """``(K, pixels, cells)``: how much of each cell from ``low`` to ``high`` the middle of each pixel sees."""
    middles_P, cells_M = (torch.arange(n, device=low_K.device, dtype=low_K.dtype) for n in (pixels, cells))
    at_KP = (middles_P + 0.5 - low_K[:, None]) / (high_K - low_K)[:, None] * cells - 0.5
    return (1 - (at_KP[..., None] - cells_M).abs()).clamp(min=0)
