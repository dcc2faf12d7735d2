"""UniCL: Unified Contrastive Learning in Image-Text-Label Space (Yang et al., CVPR 2022, 2204.03610).

The released repository holds no working training loop (its authors: "only supports inference"), so the loss is
the paper's algorithm 1 and the settings are the repository's defaults. The paper's equation is the sum of both
directions; here it is their mean, as CLIP's, so that a batch of captions alone gives CLIP's loss (directions=sum is the
equation; whether the pseudo-code halves is unverified).

Source tag: [U:file] microsoft/UniCL, 9983bf8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from vlbench.core.types import Backbone, Part, Sample
from vlbench.data.transforms import Augment
from vlbench.models.two_tower import TwoTower
from vlbench.recipes.base import (
    ABOUT_TINY,
    IMAGENET_MEAN,
    IMAGENET_STD,
    TINY_RUN,
    TINY_TEXT,
    BaseRecipe,
    TwoTowerConfig,
    TwoTowerRecipe,
)
from vlbench.recipes.published import OURS, Preset, configs, published
from vlbench.recipes.unicl.variants import (
    CrossEntropy,
    ImageEmbedder,
    ImageToText,
    LabelEmbedding,
    MultiTask,
    SupCon,
    of_directions,
)
from vlbench.train.losses import unicl_loss


class UniclConfig(TwoTowerConfig):
    """UniCL's settings."""

    variant: Literal["unicl", "image_to_text", "cross_entropy", "supcon", "multi_task", "label_embedding"] = Field(
        default="unicl", description="UniCL itself, or what it is compared with"
    )
    head_weight: float = Field(
        default=1.0, gt=0, description="multi_task: weight of the cross-entropy beside the contrastive loss"
    )
    directions: Literal["mean", "sum"] = Field(
        default="mean",
        description="how image-to-text and text-to-image are joined, in unicl and label_embedding: mean, as CLIP does; "
        "sum, the paper's equation: twice the loss and its gradient, which counts where clip_norm cuts",
    )
    embed_dim: int = 512
    logit_scale_init: float = 1.0
    logit_scale_max: float | None = None


TINY = Preset(
    UniclConfig(
        **TINY_RUN,
        data=("shapes:labels@1", "shapes:pairs@4"),
        templates="simple",
        text=TINY_TEXT,
        embed_dim=128,
        logit_scale_init=math.log(1 / 0.07),
        logit_scale_max=100.0,
    ),
    ABOUT_TINY,
    {
        "data": "ours: where things are, and how large, is said in captions only",
        "templates": 'ours: the world\'s own say "large" or "on a dark background" of images that are not',
        "logit_scale_init": "ours: CLIP's; a few hundred steps are too short to climb from e",
    },
)

PAPER = published(
    UniclConfig,
    "Swin-T on IN-21K and YFCC-14M: 40.5% zero-shot on ImageNet [U:README].",
    {
        "data": ((), "image-label: IN-21K; image-text: YFCC-14M or GCC-15M [U:README]; weights 1 to 1 for balance"),
        "steps": (
            213_300,
            "32 epochs [U:config.py] of about 27.3M examples (sizes unverified) in batches of 4,096: computed",
        ),
        "batch_size": (4096, "from a review of the paper; the repository's own is 128 a GPU"),
        "optim.lr": (4e-3, "5e-4 * batch / 512 [U:main.py]; the paper's own figure is unverified"),
        "optim.weight_decay": (0.1, "[U:config.py]"),
        "optim.betas": ((0.9, 0.999), "[U:config.py]"),
        "optim.eps": (1e-8, "[U:config.py]"),
        "optim.clip_norm": (5.0, "[U:config.py]"),
        "optim.no_decay": (
            ("logit_scale$", "absolute_pos_embed$"),
            (
                "and all vectors and biases [U:optimizer.py, model/model.py]. Token, position and relative position "
                "tables decay, as they do there by two slips of names"
            ),
        ),
        "schedule.kind": ("cosine", "[U:config.py]"),
        "schedule.warmup": (5 / 32, "5 of 32 epochs [U:config.py]"),
        "schedule.start": (1e-3, "WARMUP_LR 5e-7 over BASE_LR 5e-4 [U:config.py]"),
        "schedule.final": (1e-2, "MIN_LR 5e-6 over BASE_LR 5e-4 [U:config.py]"),
        "visual.arch": (
            "timm:swin_tiny_patch4_window7_224",
            "96, [2, 2, 6, 2], heads 3/6/12/24, window 7 [U:configs/*.yaml]",
        ),
        "visual.image_size": (224, "[U:configs/*.yaml]"),
        "visual.kwargs.drop_path_rate": (0.2, "Swin-T; Swin-B has 0.5 [U:configs/*.yaml]"),
        "text.width": (512, "the yaml files; the code's default is 1024 [U:configs/*.yaml]"),
        "text.layers": (12, "[U:configs/*.yaml]"),
        "text.heads": (8, "[U:configs/*.yaml]"),
        "text.context_length": (77, "[U:model/text_encoder/build.py]"),
        "text.quick_gelu": (True, "[U:model/text_encoder/transformer.py]"),
        "text.layer_norm_eps": (1e-12, "[U:model/text_encoder/transformer.py]"),
        "embed_dim": (512, "[U:model/model.py]"),
        "logit_scale_init": (1.0, "used as exp(1.0) = 2.718, not CLIP's 14.3 [U:model/model.py]"),
        "logit_scale_max": (None, "no clamp anywhere [U:model/model.py]"),
        "projection_std": (0.02, "both, truncated normal [U:model/model.py]"),
        "augment": (
            Augment(crop_scale=(0.08, 1.0), flip=True, rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25),
            (
                "timm's create_transform [U:config.py], which leaves out the defaults' color jitter of 0.4 beside "
                "RandAugment. mixup and cutmix are in the defaults too; the models were trained without them "
                "[U:README]"
            ),
        ),
        "eval_images.resize_to": (256, "[U:data/build.py]"),
        "eval_images.mean": (IMAGENET_MEAN, "[U:data/build.py]"),
        "eval_images.std": (IMAGENET_STD, "[U:data/build.py]"),
        "templates": ("imagenet81", "[U:data/language/prompt_engineering.py]"),
        "precision": ("bf16", "apex O1 [U:main.py]"),
        "workers": (8, OURS),
        "checkpoint_every": (5000, OURS),
        "log_every": (100, OURS),
    },
)

PRESETS: Mapping[str, Preset] = {"tiny": TINY, "paper": PAPER}


class Bidirectional(TwoTowerRecipe):
    """UniCL itself: every image and text of one class belong together; each caption is a class of its own."""

    name = "unicl"

    def contrast(
        self,
        image_BE: torch.Tensor,
        text_BE: torch.Tensor,
        logit_scale: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        config: Any,
    ) -> torch.Tensor:
        """Bidirectional contrastive loss over the whole batch of all ranks; its floor is above 0."""
        loss = unicl_loss(image_BE, text_BE, batch["labels_B"], logit_scale, block=config.loss_block)
        return of_directions(loss, config)


VARIANTS: Mapping[str, TwoTowerRecipe | CrossEntropy | SupCon | LabelEmbedding] = {
    "unicl": Bidirectional(),
    "image_to_text": ImageToText(),
    "cross_entropy": CrossEntropy(),
    "supcon": SupCon(),
    "multi_task": MultiTask(),
    "label_embedding": LabelEmbedding(),
}


class Unicl(BaseRecipe):
    """UniCL and what it is compared with: a recipe a variant, which does the work."""

    name = "unicl"
    Config = UniclConfig
    presets: Mapping[str, Any] = configs(PRESETS)
    described = PRESETS
    needs: frozenset[Part] = frozenset({"image", "text"})
    variants: Mapping[str, str] = {
        "unicl": "images and texts attract each other by class, in both directions (2204.03610, algorithm 1)",
        "image_to_text": "the image-to-text direction of it alone (2204.03610)",
        "cross_entropy": "a linear head on labels; no captions (2204.03610's baseline)",
        "supcon": "images of a class attract each other, one view an image; no captions (SupCon, 2004.11362, which "
        "takes two views, and the sum over images where this is the mean)",
        "multi_task": "CLIP's loss on captions plus head_weight x cross-entropy on labels (2204.03610's baseline)",
        "label_embedding": "a vector a class in place of the text tower; no captions (2204.03610's ablation)",
    }

    def needs_of(self, config: Any) -> frozenset[Part]:
        """Labels for the variants that have no use for texts."""
        return VARIANTS[config.variant].needs

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        """Nothing; a variant may refuse the data."""
        return VARIANTS[config.variant].learn_assets(config, data)

    def build(self, config: Any, classes: Sequence[str]) -> torch.nn.Module:
        """Towers and heads, none that the variant does not use."""
        return VARIANTS[config.variant].build(config, classes)

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Images, labels (-1: a caption) and, where the variant reads them, tokens."""
        return VARIANTS[config.variant].collate(config, samples)

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """The variant's, over the whole batch of all ranks."""
        return VARIANTS[config.variant].loss(model, batch, config)

    def contrastive(self, config: Any) -> TwoTowerRecipe | None:
        """The variant, where it compares images with texts."""
        return VARIANTS[config.variant].contrastive(config)

    def takes_blocks(self, config: Any) -> bool:
        """Every variant does but the one without embeddings."""
        return VARIANTS[config.variant].takes_blocks(config)

    def after_step(self, model: torch.nn.Module) -> None:
        """Hold the logit scale at its maximum, where there is one."""
        if isinstance(model, TwoTower | ImageEmbedder):
            model.clamp_logit_scale()

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Backbone:
        """What the variant leaves to be measured: both towers, or the image tower."""
        return VARIANTS[config.variant].export(model, config, classes)


RECIPE = Unicl()
