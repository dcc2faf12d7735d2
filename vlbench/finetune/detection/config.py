"""Settings of a Mask R-CNN. This module loads without torch.

Source tags: [V:file] kdexd/virtex, configs/detectron2; [D2:file] facebookresearch/detectron2; [TV:file] torchvision's
models/detection; [ViTDet] Li et al., 2203.16527.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vlbench.finetune.config import FinetuneConfig

_SCALES = (640, 672, 704, 736, 768, 800)  # [V:coco_segm_default_init_2x.yaml], [D2:Base-RCNN-FPN.yaml]
_SGD: dict[str, Any] = {
    "name": "sgd",
    "lr": 0.02,  # [V:configs/detectron2], for a batch of 16
    "momentum": 0.9,  # [D2:config/defaults.py]
    "weight_decay": 1e-4,  # [D2:config/defaults.py]
    # Gains and biases of norms are not decayed [D2:config/defaults.py]; nor are, here, the biases of other layers,
    # which detectron2 decays: by name and shape alone the two cannot be told apart in every backbone.
    "decay_vectors": False,
    "clip_norm": None,
}


def _published(steps: int, milestones: tuple[int, ...], **values: Any) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": 16,
        "optim": _SGD,
        "schedule": {
            "kind": "milestones",
            "milestones": tuple(step / steps for step in milestones),
            "factor": 0.1,
            "warmup": 1000,  # [D2:config/defaults.py]
            "start": 0.001,  # [D2:config/defaults.py]
        },
        "short_sides": _SCALES,
        "backbone": "trained",
        "select": "last",
        "judge_every": 5000,
        "checkpoint_every": 5000,
        "workers": 4,
    } | values


_VIRTEX = _published(
    180_000,  # [V:coco_segm_default_init_2x.yaml]
    (120_000, 160_000),  # [V:coco_segm_default_init_2x.yaml]
    neck_norm="batch",  # SyncBN in the FPN [V:coco_segm_default_init_2x.yaml]
    backbone_norm="trained",  # SyncBN [V:coco_segm_default_init_2x.yaml]
    freeze_at=0,  # [V:coco_segm_default_init_2x.yaml]
    precise_norm=200,  # PreciseBN [V:coco_segm_default_init_2x.yaml], over 200 batches [D2:config/defaults.py]
)


class DetectionConfig(FinetuneConfig):
    """Settings of one Mask R-CNN, the same for every backbone."""

    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {
        # What one core learns from the embedded world in two minutes; values found on that world, none published.
        "tiny": {
            "steps": 400,
            "batch_size": 8,
            "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05, "clip_norm": 5.0, "betas": (0.9, 0.999)},
            "schedule": {"kind": "cosine", "warmup": 0.1, "final": 0.0},
            "backbone": "trained",
            "select": "best",
            "judge_every": 200,
            "checkpoint_every": 200,
            "short_sides": (128,),
            "short_side": 128,
            "long_side": 256,
            "anchor_sizes": (16, 32, 64, 128, 256),
            "channels": 64,
            "box_width": 256,
            "mask_convolutions": (64, 64),
            "proposals": 200,
            "sampled_boxes": 32,
            "workers": 0,
        },
        "virtex": _VIRTEX,
        "paper": _VIRTEX,
        # detectron2's baselines: statistics of batch norm and the first two stages as they were pretrained
        # [D2:config/defaults.py]; steps [D2:Base-RCNN-FPN.yaml], doubled.
        "1x": _published(90_000, (60_000, 80_000), backbone_norm="frozen", freeze_at=2),
        "2x": _published(180_000, (120_000, 160_000), backbone_norm="frozen", freeze_at=2),
    }

    engine: Literal["torchvision", "detectron2"] = Field(
        default="torchvision", description="whose Mask R-CNN it is; detectron2 must have been built from its source"
    )
    own_resnet: bool = Field(
        default=False, description="engine detectron2: its own ResNet with the weights of the backbone, a plain ResNet"
    )
    neck: Literal["auto", "fpn", "simple"] = Field(
        default="auto",
        description="fpn: over the maps of strides 4 to 32; simple: ViTDet's pyramid from the deepest map; auto: fpn "
        "where the network has such maps, else simple",
    )
    neck_norm: Literal["none", "batch"] = Field(
        default="none", description="in the FPN; the simple pyramid has LayerNorm, as its paper"
    )
    heads_norm: Literal["none", "batch"] = Field(
        default="none", description="batch: in mask and box head, and the box head has four convolutions before it ends"
    )
    backbone_norm: Literal["trained", "frozen"] = Field(
        default="trained",
        description="batch norm of the backbone: trained, over all GPUs together; or frozen, as an affine map",
    )
    freeze_at: int = Field(default=0, ge=0, description="stages of the backbone that stay as they are: 1 is the stem")
    channels: int = Field(default=256, ge=1, description="of the pyramid [TV:mask_rcnn.py]")
    box_width: int = Field(default=1024, ge=1, description="of the box head's hidden layers [TV:mask_rcnn.py]")
    mask_convolutions: tuple[int, ...] = Field(
        default=(256, 256, 256, 256), min_length=1, description="channels of the mask head [TV:mask_rcnn.py]"
    )
    anchor_sizes: tuple[int, ...] = Field(
        default=(32, 64, 128, 256, 512),
        min_length=5,
        max_length=5,
        description="sides of the anchors in pixels, at strides 4, 8, 16, 32, 64 [TV:mask_rcnn.py]",
    )
    short_sides: tuple[int, ...] = Field(
        default=(800,), min_length=1, description="short sides in pixels, one of them drawn for each training image"
    )
    short_side: int = Field(default=800, ge=32, description="short side in pixels when objects are looked for")
    long_side: int = Field(default=1333, ge=32, description="longest long side in pixels")
    flip: bool = Field(default=True, description="mirror half of the training images")
    empty_images: Literal["drop", "keep"] = Field(
        default="drop", description="training images without an object [TV:references/detection/coco_utils.py]: drop"
    )
    proposals: int = Field(default=1000, ge=1, description="proposals of an image after suppression [D2:defaults.py]")
    sampled_boxes: int = Field(default=512, ge=4, description="proposals of an image that are learnt from")
    sampled_anchors: int = Field(default=256, ge=2, description="anchors of an image that are learnt from")
    score_threshold: float = Field(default=0.05, ge=0, lt=1, description="detections below it are left out")
    nms_threshold: float = Field(default=0.5, gt=0, lt=1, description="IoU above which the less sure box goes")
    detections: int = Field(default=100, ge=1, description="of one image, at most: what COCO's AP counts")
    precise_norm: int = Field(
        default=0,
        ge=0,
        description="batches over which the statistics of batch norm are taken anew after training; 0: not at all",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        largest = max(*self.short_sides, self.short_side)
        if largest > self.long_side:
            raise ValueError(f"long_side {self.long_side} is below a short side of {largest}")
        if self.own_resnet and self.engine != "detectron2":
            raise ValueError("own_resnet is detectron2's; set engine to detectron2, or leave it out")
        return self
