"""Images with objects as one dict of tensors, which any trainer can move, and back again as a detector wants them.

``forward(batch)`` of an engine reads:

- ``images_BCHW`` uint8 RGB, smaller images padded with zeros at the right and at the bottom;
- ``sizes_B2`` int64: height and width of each without its padding;
- ``owner_K`` int64: the image that each object is in, ascending; ``boxes_K4`` float32 and ``classes_K`` int64;
- ``masks_KHP`` uint8: masks of the padded height, eight columns a byte (``numpy.packbits``). A hundred masks of
  800 x 1333 pixels are 13 MB so, and 107 MB otherwise.

``detect(images)`` of an engine reads a list of uint8 ``(3, height, width)`` images in their stored size.

Shapes: B images, K objects in all of them, C channels, H padded height, W padded width, P packed width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Batch = dict[str, torch.Tensor]


@dataclass(slots=True)
class Pictured:
    """One image of a batch with its n objects, in pixels of that image."""

    image_CHW: torch.Tensor
    """uint8."""
    boxes_n4: np.ndarray
    classes_n: np.ndarray
    masks_nHW: np.ndarray
    """uint8, 1 inside."""


def collate(pictured: Sequence[Pictured], *, divisor: int) -> Batch:
    """A batch whose height and width are multiples of ``divisor``."""
    sizes = [tuple(one.image_CHW.shape[1:]) for one in pictured]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes))
    images_BCHW = torch.zeros(len(pictured), 3, height, width, dtype=torch.uint8)
    packed = []
    for image_CHW, one, (high, wide) in zip(images_BCHW, pictured, sizes):
        image_CHW[:, :high, :wide] = one.image_CHW
        masks_nHW = np.zeros((len(one.masks_nHW), height, width), dtype=np.uint8)
        masks_nHW[:, :high, :wide] = one.masks_nHW
        packed.append(np.packbits(masks_nHW, axis=2))
    counts = torch.tensor([len(one.classes_n) for one in pictured])
    return {
        "images_BCHW": images_BCHW,
        "sizes_B2": torch.tensor(sizes),
        "owner_K": torch.arange(len(pictured)).repeat_interleave(counts),
        "boxes_K4": torch.from_numpy(np.concatenate([one.boxes_n4 for one in pictured]).astype(np.float32)),
        "classes_K": torch.from_numpy(np.concatenate([one.classes_n for one in pictured]).astype(np.int64)),
        "masks_KHP": torch.from_numpy(np.concatenate(packed)),
    }


def unpacked(masks_KHP: torch.Tensor, width: int) -> torch.Tensor:
    """``masks_KHW`` uint8 of packed ones, on the device where they are."""
    bits_8 = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks_KHP.device)
    return (masks_KHP[..., None] >> bits_8 & 1).flatten(2)[..., :width]


def targets(batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What each image holds: ``boxes`` (n, 4), ``labels`` (n,) from 0 on, ``masks`` (n, H, W) uint8 of padded size."""
    counts = torch.bincount(batch["owner_K"], minlength=len(batch["sizes_B2"])).tolist()
    width = batch["images_BCHW"].shape[-1]
    return [
        {"boxes": boxes_n4, "labels": classes_n, "masks": unpacked(masks_nHP, width)}
        for boxes_n4, classes_n, masks_nHP in zip(
            batch["boxes_K4"].split(counts), batch["classes_K"].split(counts), batch["masks_KHP"].split(counts)
        )
    ]
