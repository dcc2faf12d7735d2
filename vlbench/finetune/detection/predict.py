"""From torchvision's detections of one resized image to ``Detections`` of the stored one.

Shapes: K detections, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

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
        pasted_K1HW = paste_masks_in_image(found["masks"].float()[order_K], boxes_K4, (height, width))
        masks = from_bitmaps((pasted_K1HW[:, 0] > _INSIDE).cpu().numpy())
    return Detections(
        boxes_K4=boxes_K4.cpu().numpy(),
        scores_K=scores_K.cpu().numpy(),
        classes_K=found["labels"][order_K].cpu().numpy() - 1,
        masks=masks,
    )
