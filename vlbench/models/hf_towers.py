"""The models of transformers behind vlbench's interfaces: which class, which feature is probed, how text is read.

The feature follows the papers: CLIP's class token before the projection, SigLIP's attention-pooled output, DINOv2's
and ViT's class token after the last LayerNorm, the average of the last map for the convolutional networks.

Shapes: B batch, C channels, H height, W width, N tokens, L text tokens, D width of the pooled feature, E joint space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.towers import VisualTower, grid_tokens


class HfTokenTower(VisualTower):
    """A vision transformer of transformers.

    Args:
        net: its vision model.
        arch: the name that goes into the card.
        feature: the pooled feature in words.
        prefix: how many tokens come before the patches: class token and registers.
        token_norm: CLIP's last LayerNorm, which transformers applies to the class token only.
        projection: into the joint space; ``nn.Identity()`` where the pooled feature is the embedding.
    """

    def __init__(
        self,
        net: Any,
        arch: str,
        *,
        feature: str,
        prefix: int,
        token_norm: nn.Module | None = None,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__(net, arch)
        self.feature = feature
        self.width = net.config.hidden_size
        self.projection = projection
        if projection is not None:
            self.embed_dim = getattr(projection, "out_features", self.width)
        self._token_norm = [token_norm] if token_norm is not None else []  # a list: it is in ``net`` already
        self._prefix = prefix
        self._patch = int(net.config.patch_size)
        self.parts = frozenset({"pooled", "tokens", "maps"} | ({"embed"} if projection is not None else set()))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The pooled token."""
        return self._pooled(self.net(pixel_values=images_BCHW))

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """The model's own projection."""
        assert self.projection is not None, "built without a projection"
        return self.projection(pooled_BD)

    def _dense(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor]]:
        out = self.net(pixel_values=images_BCHW)
        patches_BND = out.last_hidden_state[:, self._prefix :]
        height, width = (side // self._patch for side in images_BCHW.shape[-2:])
        map_BCHW = patches_BND.transpose(1, 2).unflatten(2, (height, width))
        tokens_BND = self._token_norm[0](patches_BND) if self._token_norm else patches_BND
        return self._pooled(out), tokens_BND, {self._patch: map_BCHW}

    @staticmethod
    def _pooled(out: Any) -> torch.Tensor:
        return out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output


class HfMapTower(VisualTower):
    """A convolutional vision model of transformers: its pooled output, and its last map as tokens and map."""

    def __init__(self, net: Any, arch: str, *, feature: str, width: int, stride: int, joint: bool) -> None:
        super().__init__(net, arch)
        self.feature = feature
        self.width = width
        self.embed_dim = width if joint else None
        self._stride = stride
        self.parts = frozenset({"pooled", "tokens", "maps"} | ({"embed"} if joint else set()))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The model's own pooled output."""
        return self.net(pixel_values=images_BCHW).pooler_output

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """The same tensor: ALIGN compares texts with the pooled output."""
        return pooled_BD

    def _dense(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor]]:
        out = self.net(pixel_values=images_BCHW)
        map_BCHW = out.last_hidden_state
        return out.pooler_output, grid_tokens(map_BCHW), {self._stride: map_BCHW}


@dataclass(frozen=True)
class HfText:
    """How a family reads texts.

    Attributes:
        context: the number of tokens, of the model's configuration.
        trim: pad to the longest text of the batch only: right for a causal tower read at the end of text.
        masked: padding is masked out (BERT); SigLIP's tower reads its padding, and was trained to.
    """

    context: Callable[[Any], int]
    trim: bool = False
    masked: bool = False

    def encode(self, model: Any, tokens_BL: torch.Tensor, *, pad_id: int) -> torch.Tensor:
        """``text_BE`` by the model's own text function."""
        mask = {"attention_mask": (tokens_BL != pad_id).long()} if self.masked else {}
        return model.get_text_features(input_ids=tokens_BL, **mask).pooler_output


@dataclass(frozen=True)
class HfFamily:
    """One ``model_type`` of transformers.

    Attributes:
        model: the class of transformers.
        tower: from that model and an architecture's name to the visual tower.
        text: how it reads texts; None without a text tower.
        options: for the class's constructor.
        ignore: what files hold besides the model: classifiers, and poolers that no paper probes.
        any_size: whether it takes images of another size than its configuration's.
    """

    model: str
    tower: Callable[[Any, str], VisualTower]
    text: HfText | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ("classifier.",)
    any_size: bool = False


def _clip(model: Any, arch: str) -> VisualTower:
    return HfTokenTower(
        model.vision_model,
        arch,
        feature="class token before the projection",
        prefix=1,
        token_norm=model.vision_model.post_layernorm,
        projection=model.visual_projection,
    )


def _siglip(model: Any, arch: str) -> VisualTower:
    if not model.vision_model.use_head:
        raise UserError("this SigLIP has no pooling head (vision_use_head: false), so no feature to be probed")
    feature = "attention-pooled output"
    return HfTokenTower(model.vision_model, arch, feature=feature, prefix=0, projection=nn.Identity())


def _class_token(model: Any, arch: str) -> VisualTower:
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    return HfTokenTower(model, arch, feature="class token after the last LayerNorm", prefix=prefix)


def _align(model: Any, arch: str) -> VisualTower:
    vision = model.vision_model
    return HfMapTower(
        vision,
        arch,
        feature="global average pool" if vision.config.pooling_type == "mean" else "global max pool",
        width=model.config.projection_dim,  # texts are projected to what the image tower's last stage happens to have
        stride=2 * math.prod(vision.config.strides),  # the stem halves, then each stage by its own stride
        joint=True,
    )


def _convnext(model: Any, arch: str) -> VisualTower:
    config = model.config
    return HfMapTower(
        model,
        arch,
        feature="global average pool after LayerNorm",
        width=config.hidden_sizes[-1],
        stride=config.patch_size * 2 ** (len(config.depths) - 1),
        joint=False,
    )


def _text_positions(config: Any) -> int:
    return int(config.text_config.max_position_embeddings)


_ALIGN_CONTEXT = 64  # what transformers' AlignProcessor pads to; BERT's positions go further
_MASK_TOKEN = ("classifier.", "embeddings.mask_token")

FAMILIES: dict[str, HfFamily] = {
    "clip": HfFamily("CLIPModel", _clip, HfText(_text_positions, trim=True)),
    "siglip": HfFamily("SiglipModel", _siglip, HfText(_text_positions)),
    "align": HfFamily("AlignModel", _align, HfText(lambda config: _ALIGN_CONTEXT, masked=True), any_size=True),
    "dinov2": HfFamily("Dinov2Model", _class_token, ignore=_MASK_TOKEN, any_size=True),
    "dinov2_with_registers": HfFamily("Dinov2WithRegistersModel", _class_token, ignore=_MASK_TOKEN, any_size=True),
    "vit": HfFamily(
        "ViTModel", _class_token, options={"add_pooling_layer": False}, ignore=(*_MASK_TOKEN, "pooler.", "vit.pooler.")
    ),
    "convnext": HfFamily("ConvNextModel", _convnext, any_size=True),
    "convnextv2": HfFamily("ConvNextV2Model", _convnext, any_size=True),
}
