"""Supervised pretraining: softmax cross-entropy over class labels, the baseline that every recipe is compared with.

Source tags: [TV:file] pytorch/vision at 017e9b9, references/classification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from vlbench.core.types import Backbone, Part, Sample
from vlbench.models.classifier import Classifier
from vlbench.models.export import export_visual
from vlbench.recipes.base import ABOUT_TINY, IMAGENET_MEAN, IMAGENET_STD, TINY_RUN, BaseRecipe
from vlbench.recipes.published import OURS, Preset, configs, published
from vlbench.train.config import PretrainConfig
from vlbench.train.distributed import mean_over_ranks
from vlbench.train.losses import cross_entropy


class SupervisedConfig(PretrainConfig):
    """Settings of supervised pretraining."""

    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of each target that is spread evenly over the classes"
    )


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(SupervisedConfig(**TINY_RUN, data=("shapes:labels",)), ABOUT_TINY),
    "paper": published(
        SupervisedConfig,
        "torchvision's reference run of ResNet-50 on ImageNet-1k, whose weights (IMAGENET1K_V1) reach 76.13% top-1.",
        {
            "data": ((), "ImageNet-1k: imagefolder:DIR"),
            "steps": (450_410, "90 epochs [TV:train.py] of 1,281,167 images: computed"),
            "batch_size": (256, "32 a GPU on 8 GPUs [TV:train.py, README.md]"),
            "optim.name": ("sgd", "[TV:train.py]"),
            "optim.lr": (0.1, "[TV:train.py]"),
            "optim.momentum": (0.9, "[TV:train.py]"),
            "optim.weight_decay": (1e-4, "[TV:train.py]"),
            "optim.decay_vectors": (True, "--norm-weight-decay unset: everything decays [TV:train.py]"),
            "optim.clip_norm": (None, "[TV:train.py]"),
            "schedule.kind": ("step", "[TV:train.py]"),
            "schedule.warmup": (0, "[TV:train.py]"),
            "schedule.drops": (2, "every 30 of 90 epochs [TV:train.py]"),
            "schedule.factor": (0.1, "[TV:train.py]"),
            "visual.arch": ("torchvision:resnet50", "[TV:train.py]"),
            "visual.image_size": (224, "crop 224 [TV:train.py]"),
            "augment.crop_scale": ((0.08, 1.0), "RandomResizedCrop's own default"),
            "augment.flip": (True, "[TV:train.py]"),
            "augment.interpolation": ("bilinear", "[TV:train.py]"),
            "eval_images.resize_to": (256, "[TV:train.py]"),
            "eval_images.interpolation": ("bilinear", "[TV:train.py]"),
            "eval_images.mean": (IMAGENET_MEAN, "[TV:train.py]"),
            "eval_images.std": (IMAGENET_STD, "[TV:train.py]"),
            "workers": (8, OURS),
            "checkpoint_every": (5000, OURS),
            "log_every": (100, OURS),
        },
    ),
}


class Supervised(BaseRecipe):
    """A classifier over the union of all sources' classes; its head is thrown away afterwards."""

    name = "supervised"
    Config = SupervisedConfig
    presets: Mapping[str, Any] = configs(PRESETS)
    described = PRESETS
    needs: frozenset[Part] = frozenset({"image", "label"})

    def build(self, config: Any, classes: Sequence[str]) -> Classifier:
        """A fresh tower and head."""
        return Classifier(config.visual, len(classes))

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Images and labels."""
        return {
            "images_BCHW": torch.stack([sample.image_CHW for sample in samples]),
            "labels_B": torch.tensor([sample.label for sample in samples]),
        }

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """Cross-entropy and accuracy on the augmented batch."""
        logits_BC, labels_B = model(self.images(batch, config)), batch["labels_B"]
        return {
            "loss": cross_entropy(logits_BC, labels_B, smoothing=config.label_smoothing),
            "train_accuracy": mean_over_ranks((logits_BC.argmax(1) == labels_B).float().mean()),
        }

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Backbone:
        """The tower alone."""
        assert isinstance(model, Classifier), "supervised training trains a Classifier"
        return export_visual(
            model.visual,
            model_id=self.name,
            recipe=self.name,
            preprocess=config.preprocess(),
            pretrain_data=config.data,
        )


RECIPE = Supervised()
