"""detectron2's Mask R-CNN behind the same interface as torchvision's. Import it only where detectron2 is installed.

Its configuration is made here, in code: no file, and nothing of its model zoo (which needs ``pkg_resources``, gone from
new setuptools). Input, schedule, optimizer, sizes and the choice of weights are ours and the same for both engines;
what the engines do not share, and what is detectron2's own here:

- anchors: not rounded to whole pixels;
- box losses: L1, where torchvision's are quadratic below a ninth; both losses of the proposal network are divided by
  the anchors that may be drawn, not by those that were;
- RoIAlign: moved by half a pixel (``aligned``), with as many samples a cell as the box is large;
- masks: 0.5 is inside.

Shapes: B images, C channels, H height, W width, K objects.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone, build_proposal_generator, build_roi_heads
from detectron2.modeling.backbone.resnet import ResNet
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from vlbench.core.errors import UserError
from vlbench.data.masks import from_bitmaps
from vlbench.finetune.detection.batch import targets
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.finetune.detection.detectron2_backbone import LEVEL_NAMES, own_resnet, pyramid_on
from vlbench.finetune.detection.model import prepare_visual
from vlbench.finetune.detection.sizes import resized
from vlbench.finetune.detection.types import Detections
from vlbench.models.tower_of import MapTower, at_any_size
from vlbench.models.towers import VisualTower
from vlbench.train.loop import Diverged

_LOSSES = {  # detectron2's name → torchvision's, so that the logs of both engines read alike
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
}
_STAGES = 5  # of a ResNet, the stem included

# What detectron2 calls has new names in torch by now: nothing that a user could mend.
warnings.filterwarnings("ignore", message=r"torch\.meshgrid")
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in record.getMessage())


class Detectron2Detector(nn.Module):
    """The engine ``detectron2``: ``forward`` gives losses, ``detect`` objects. See ``batch.py`` for their input.

    Args:
        tower: the backbone's; it is copied.
        config: the settings.
        n_classes: without background.
        mean: of the images' channels, as the backbone was trained, for pixels in [0, 1].
        std: likewise.

    Raises:
        UserError: for a tower without maps, settings that detectron2's heads do not have, and ``own_resnet`` of a tower
            that is no plain ResNet.
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
        self.visual = _visual(tower, config)
        backbone = pyramid_on(self.visual, kind=config.neck, channels=config.channels, norm=config.neck_norm)
        cfg = detectron2_config(config, n_classes=n_classes, mean=mean, std=std)
        self.rcnn = _rcnn(cfg, backbone)
        self._frozen = config.backbone == "frozen"
        self._short, self._long = config.short_side, config.long_side

    def train(self, mode: bool = True) -> Detectron2Detector:
        """A frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._frozen:
            self.visual.eval()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The five losses of a batch by torchvision's names, in training mode.

        Raises:
            Diverged: where a proposal is not finite.
        """
        pictures = []
        for image_CHW, size, wanted in zip(batch["images_BCHW"], batch["sizes_B2"].tolist(), targets(batch)):
            height, width = (int(side) for side in size)
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(wanted["boxes"])
            instances.gt_classes = wanted["labels"]
            instances.gt_masks = BitMasks(wanted["masks"][:, :height, :width])
            # Cut to its size: detectron2 pads by itself, after it has subtracted the mean.
            pictures.append({"image": image_CHW[:, :height, :width], "instances": instances})
        # Its heads write statistics to the storage of the moment and refuse to run without one.
        with EventStorage():
            try:
                losses = self.rcnn(pictures)
            except FloatingPointError as error:
                raise Diverged(f"detectron2: {error} Lower optim.lr or lengthen the warm-up") from None
        return {_LOSSES[name]: value for name, value in losses.items()}

    @torch.no_grad()
    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """The objects in each image, uint8 ``(3, height, width)`` of stored size, in evaluation mode."""
        pictures = [
            {
                "image": resized(image_CHW.to(self.rcnn.device), self._short, self._long),
                "height": image_CHW.shape[1],
                "width": image_CHW.shape[2],
            }
            for image_CHW in images
        ]
        return [_detections(found["instances"]) for found in self.rcnn(pictures)]


def detectron2_config(
    config: DetectionConfig, *, n_classes: int, mean: Sequence[float], std: Sequence[float]
) -> CfgNode:
    """Our settings in detectron2's words.

    Raises:
        UserError: for a mask head whose convolutions differ in width, which detectron2 has no words for.
    """
    if len(set(config.mask_convolutions)) > 1:
        raise UserError(
            f"mask_convolutions {list(config.mask_convolutions)}: detectron2's mask head has one width; "
            "make them equal, or take engine: torchvision"
        )
    cfg = get_cfg()
    cfg.INPUT.FORMAT = "RGB"  # its default is BGR
    model, norm = cfg.MODEL, "BN" if config.heads_norm == "batch" else ""
    model.MASK_ON = True
    model.PIXEL_MEAN, model.PIXEL_STD = [value * 255 for value in mean], [value * 255 for value in std]
    model.ANCHOR_GENERATOR.SIZES = [[side] for side in config.anchor_sizes]
    rpn, heads, box, mask = model.RPN, model.ROI_HEADS, model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    rpn.IN_FEATURES = list(LEVEL_NAMES)
    rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST = 2 * config.proposals, config.proposals  # of each level
    rpn.POST_NMS_TOPK_TRAIN = rpn.POST_NMS_TOPK_TEST = config.proposals
    rpn.BATCH_SIZE_PER_IMAGE = config.sampled_anchors
    heads.NAME, heads.IN_FEATURES = "StandardROIHeads", list(LEVEL_NAMES[:-1])
    heads.NUM_CLASSES, heads.BATCH_SIZE_PER_IMAGE = n_classes, config.sampled_boxes
    heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST = config.score_threshold, config.nms_threshold
    cfg.TEST.DETECTIONS_PER_IMAGE = config.detections
    box.NAME, box.POOLER_RESOLUTION, box.NORM = "FastRCNNConvFCHead", 7, norm
    box.NUM_CONV, box.NUM_FC = (4, 1) if norm else (0, 2)
    box.CONV_DIM, box.FC_DIM = config.channels, config.box_width
    mask.NUM_CONV, mask.CONV_DIM, mask.NORM = len(config.mask_convolutions), config.mask_convolutions[0], norm
    cfg.freeze()
    return cfg


def _visual(tower: VisualTower, config: DetectionConfig) -> MapTower | ResNet:
    """What gives the maps, frozen as the settings say."""
    visual = at_any_size(tower)
    if not config.own_resnet:
        prepare_visual(visual, config)
        return visual
    net = own_resnet(visual)
    if config.freeze_at > _STAGES:
        raise UserError(f"freeze_at {config.freeze_at}: {visual.arch} has {_STAGES} stages, the stem included")
    # Freezing takes the batch norms of a stage along: they become affine maps.
    net.freeze(_STAGES if config.backbone == "frozen" else config.freeze_at)
    return FrozenBatchNorm2d.convert_frozen_batchnorm(net) if config.backbone_norm == "frozen" else net


def _rcnn(cfg: CfgNode, backbone: Backbone) -> GeneralizedRCNN:
    """From its parts: ``build_model`` would build a backbone of its own, and move it to ``MODEL.DEVICE``."""
    shapes = backbone.output_shape()
    return GeneralizedRCNN(
        backbone=backbone,
        proposal_generator=build_proposal_generator(cfg, shapes),
        roi_heads=build_roi_heads(cfg, shapes),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format=cfg.INPUT.FORMAT,
    )


def _detections(found: Instances) -> Detections:
    """detectron2 has scaled the boxes to the stored image, pasted the masks into it, and sorted by score."""
    return Detections(
        boxes_K4=found.pred_boxes.tensor.float().cpu().numpy(),
        scores_K=found.scores.float().cpu().numpy(),
        classes_K=found.pred_classes.cpu().numpy(),
        masks=tuple(from_bitmaps(found.pred_masks.cpu().numpy())),
    )
