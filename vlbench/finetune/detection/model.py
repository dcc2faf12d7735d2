"""Mask R-CNN (He et al., 1703.06870) of torchvision's parts over any backbone's pyramid.

torchvision's ``MaskRCNN`` brings the anchors, the proposal network, the heads and their losses. Its input transform is
left out: it resizes images and whole masks one by one on the device, which ``feed.py`` has done before in its loader
processes, as a function of seed and position.

Shapes: B images, C channels, H height, W width, K objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from vlbench.core.errors import UserError
from vlbench.finetune.detection.batch import targets
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.finetune.detection.neck import DIVISOR, LEVELS, STRIDES, Pyramid
from vlbench.finetune.detection.predict import detections
from vlbench.finetune.detection.sizes import resized
from vlbench.finetune.detection.types import Detections
from vlbench.models.tower_of import MapTower, at_any_size
from vlbench.models.towers import VisualTower

_RATIOS = (0.5, 1.0, 2.0)  # [TV:faster_rcnn.py]
_BOX_CELLS, _MASK_CELLS = 7, 14  # [TV:faster_rcnn.py, mask_rcnn.py]


class TorchvisionDetector(nn.Module):
    """The engine ``torchvision``: ``forward`` gives losses, ``detect`` objects. See ``batch.py`` for their input.

    Args:
        tower: the backbone's; it is copied.
        config: the settings.
        n_classes: without background.
        mean: of the images' channels, as the backbone was trained, for pixels in [0, 1].
        std: likewise.

    Raises:
        UserError: for a tower without maps, or without stages where ``freeze_at`` asks for them.
    """

    def __init__(
        self,
        tower: VisualTower,
        config: DetectionConfig,
        *,
        n_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.visual = at_any_size(tower)
        prepare_visual(self.visual, config)
        self.pyramid = Pyramid(self.visual, kind=config.neck, channels=config.channels, norm=config.neck_norm)
        whole = _mask_rcnn(config, n_classes)
        self.rpn, self.roi_heads = whole.rpn, whole.roi_heads
        for head in (self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            # Under autocast, boxes would be moved by numbers of 8 bits: four pixels of a thousand are one step then.
            head.register_forward_hook(_as_float32)
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1) * 255, persistent=False)
        self._frozen = config.backbone == "frozen"
        self._short, self._long = config.short_side, config.long_side

    def train(self, mode: bool = True) -> TorchvisionDetector:
        """A frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._frozen:
            self.visual.eval()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The five losses of a batch by name, in training mode."""
        images = self._prepared(batch["images_BCHW"], batch["sizes_B2"].tolist())
        wanted = targets(batch)
        for one in wanted:
            one["labels"] = one["labels"] + 1  # 0 is the background
            one["masks"] = at_corners(one["masks"])
        features = self._features(images.tensors)
        proposals, losses = self.rpn(images, features, wanted)
        _, more = self.roi_heads(features, proposals, images.image_sizes, wanted)
        return {**losses, **more}

    @torch.no_grad()
    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """The objects in each image, uint8 ``(3, height, width)`` of stored size, in evaluation mode."""
        device = self.mean.device
        smaller = [resized(image.to(device), self._short, self._long) for image in images]
        height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*(one.shape[1:] for one in smaller)))
        padded_BCHW = torch.stack([F.pad(one, (0, width - one.shape[2], 0, height - one.shape[1])) for one in smaller])
        batch = self._prepared(padded_BCHW, [list(one.shape[1:]) for one in smaller])
        features = self._features(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        found, _ = self.roi_heads(features, proposals, batch.image_sizes)
        return [
            detections(one, size=size, stored=(image.shape[1], image.shape[2]))
            for one, size, image in zip(found, batch.image_sizes, images)
        ]

    def _prepared(self, images_BCHW: torch.Tensor, sizes: Sequence[Sequence[int]]) -> ImageList:
        """Normalised images, 0 where they are padded."""
        pixels_BCHW = (images_BCHW.float() - self.mean) / self.std
        for pixels_CHW, (height, width) in zip(pixels_BCHW, sizes):
            pixels_CHW[:, height:] = 0
            pixels_CHW[:, :, width:] = 0
        pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
        return ImageList(pixels_BCHW, [(int(height), int(width)) for height, width in sizes])

    def _features(self, pixels_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid(pixels_BCHW, self.visual)


def at_corners(masks_nHW: torch.Tensor) -> torch.Tensor:
    """Masks as torchvision reads them when it cuts out what the mask head shall say: at the corners of the pixels.

    Its RoIAlign (of masks, without ``aligned``) takes the value of a pixel to be that of its top left corner, so that
    masks would be learnt half a pixel beside their objects. At a corner, four pixels meet.

    Returns:
        float16, of the same shape: quarters are exact, and a batch of large images has many masks.
    """
    padded_n1HW = F.pad(masks_nHW[:, None].float(), (1, 0, 1, 0))
    return F.avg_pool2d(padded_n1HW, 2, stride=1)[:, 0].half()


def prepare_visual(visual: MapTower, config: DetectionConfig) -> None:
    """Freeze what the settings want frozen of a tower: all of it, its first stages, its batch norm.

    Raises:
        UserError: where ``freeze_at`` counts more stages than there are.
    """
    stages = visual.stages()
    if config.freeze_at > len(stages):
        raise UserError(
            f"freeze_at {config.freeze_at}: {visual.arch} has "
            + (f"{len(stages)} stages, the stem included" if stages else "no stages that are known here; leave it 0")
        )
    names = {name for stage in stages[: config.freeze_at] for name in stage}
    if config.backbone == "frozen":
        names = {name for name, _ in visual.named_parameters()}
    for name in names:
        visual.get_parameter(name).requires_grad_(False)
    _freeze_norms(visual, None if config.backbone_norm == "frozen" else names)


def _freeze_norms(visual: nn.Module, names: Iterable[str] | None) -> None:
    """Turn batch norms into affine maps with the statistics that they have: all, or those with parameters in names."""
    from timm.layers import freeze_batch_norm_2d

    chosen = None if names is None else set(names)
    norms = [
        (name, child) for name, child in visual.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    for name, child in norms:
        if chosen is None or f"{name}.weight" in chosen:
            visual.set_submodule(name, freeze_batch_norm_2d(child))


def _mask_rcnn(config: DetectionConfig, n_classes: int) -> MaskRCNN:
    """Mask R-CNN as torchvision builds it, without a backbone of its own."""
    norm = nn.BatchNorm2d if config.heads_norm == "batch" else None
    channels, masks = config.channels, config.mask_convolutions
    box_head: nn.Module
    if norm is None:
        box_head = TwoMLPHead(channels * _BOX_CELLS**2, config.box_width)
    else:
        box_head = FastRCNNConvFCHead(
            (channels, _BOX_CELLS, _BOX_CELLS), [channels] * 4, [config.box_width], norm_layer=norm
        )
    return MaskRCNN(
        _NoBackbone(channels),
        rpn_anchor_generator=AnchorGenerator(
            tuple((side,) for side in config.anchor_sizes), (_RATIOS,) * len(config.anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=2 * config.proposals,
        rpn_pre_nms_top_n_test=config.proposals,
        rpn_post_nms_top_n_train=config.proposals,
        rpn_post_nms_top_n_test=config.proposals,
        rpn_batch_size_per_image=config.sampled_anchors,
        box_roi_pool=_roi_align(_BOX_CELLS),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(config.box_width, n_classes + 1),
        box_score_thresh=config.score_threshold,
        box_nms_thresh=config.nms_threshold,
        box_detections_per_img=config.detections,
        box_batch_size_per_image=config.sampled_boxes,
        mask_roi_pool=_roi_align(_MASK_CELLS),
        mask_head=MaskRCNNHeads(channels, masks, 1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(masks[-1], masks[-1], n_classes + 1),
    )


def _roi_align(cells: int) -> MultiScaleRoIAlign:
    """Over the strides of the pyramid, which torchvision would guess from the first images, and keep.

    It divides their unpadded height by that of a map: an image of 42 x 192 pixels would make a stride of 2 of 4.
    """
    align = MultiScaleRoIAlign([level for level in LEVELS if level != "pool"], cells, sampling_ratio=2)
    align.scales = [1 / stride for stride in STRIDES]
    align.map_levels = initLevelMapper(
        round(math.log2(STRIDES[0])),
        round(math.log2(STRIDES[-1])),
        canonical_scale=align.canonical_scale,
        canonical_level=align.canonical_level,
    )
    return align


class _NoBackbone(nn.Module):
    """What ``MaskRCNN`` wants to know of a backbone when it is made."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


def _as_float32(module: nn.Module, args: Any, out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return out.float()
    return type(out)(_as_float32(module, args, part) for part in out)
