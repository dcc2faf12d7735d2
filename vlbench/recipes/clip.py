"""CLIP: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., ICML 2021, 2103.00020).

Source tags: [N-CLIP] detailed notes of the paper, its tables 19 and 20 among them; [C:file] openai/CLIP at d05afc4;
[O:file] mlfoundations/open_clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from vlbench.recipes.base import ABOUT_TINY, TINY_RUN, TINY_TEXT, TwoTowerConfig, TwoTowerRecipe
from vlbench.recipes.published import OURS, Preset, configs, published
from vlbench.train.losses import clip_loss


class ClipConfig(TwoTowerConfig):
    """CLIP's settings."""

    embed_dim: int = 512
    logit_scale_init: float = math.log(1 / 0.07)
    logit_scale_max: float | None = 100.0


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(ClipConfig(**TINY_RUN, data=("shapes:pairs",), text=TINY_TEXT, embed_dim=128), ABOUT_TINY),
    "paper": published(
        ClipConfig,
        "RN50 of the paper's tables 19 and 20: 59.6% zero-shot on ImageNet [N-CLIP].",
        {
            "data": ((), "400M pairs (WIT), never released"),
            "steps": (390_625, "32 epochs of 400M pairs [N-CLIP] in batches of 32,768: computed"),
            "batch_size": (32_768, "[N-CLIP]"),
            "optim.lr": (5e-4, "RN50's row of table 19 [N-CLIP]"),
            "optim.weight_decay": (0.2, "[N-CLIP]; not on gains and biases (the rule: [O:legacy_main.py])"),
            "optim.betas": ((0.9, 0.999), "ResNets; the ViTs have 0.98 [N-CLIP]"),
            "optim.eps": (1e-8, "ResNets; the ViTs have 1e-6 [N-CLIP]"),
            "optim.clip_norm": (None, "none is named"),
            "schedule.kind": ("cosine", "[N-CLIP]"),
            "schedule.warmup": (2000, "[N-CLIP]"),
            "schedule.final": (0.0, "[N-CLIP]"),
            "visual.arch": ("open_clip:RN50-quickgelu", "[N-CLIP]; ModifiedResNet [C:clip/model.py]"),
            "visual.image_size": (224, "[N-CLIP]"),
            "text.width": (512, "[N-CLIP]"),
            "text.layers": (12, "[N-CLIP]"),
            "text.heads": (8, "[N-CLIP]"),
            "text.context_length": (77, "[C:clip/clip.py]; the paper's text says 76"),
            "text.quick_gelu": (True, "[C:clip/model.py]"),
            "embed_dim": (1024, "RN50's row of table 19 [N-CLIP]"),
            "logit_scale_init": (math.log(1 / 0.07), "14.29 after the exponential [N-CLIP]"),
            "logit_scale_max": (100.0, "held after every step [O:src/open_clip_train/train.py]"),
            "augment.crop_scale": (
                (0.9, 1.0),
                "open_clip's default; the paper: a random square crop of the resized image [N-CLIP]",
            ),
            "augment.flip": (False, "nothing but the crop [N-CLIP]"),
            "precision": ("bf16", "the paper: fp16 with half-precision Adam statistics [N-CLIP]"),
            "workers": (8, OURS),
            "checkpoint_every": (5000, OURS),
            "log_every": (100, OURS),
        },
    ),
}


class Clip(TwoTowerRecipe):
    """Image i belongs to text i and to no other text of the batch."""

    name = "clip"
    Config = ClipConfig
    presets: Mapping[str, Any] = configs(PRESETS)
    described = PRESETS

    def contrast(
        self,
        image_BE: torch.Tensor,
        text_BE: torch.Tensor,
        logit_scale: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        config: Any,
    ) -> torch.Tensor:
        """Symmetric cross-entropy over the whole batch of all ranks."""
        return clip_loss(image_BE, text_BE, logit_scale, block=config.loss_block)


RECIPE = Clip()
