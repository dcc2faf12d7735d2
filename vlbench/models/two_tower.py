"""An image tower and a text tower with a joint space: the model of CLIP, ALIGN and UniCL.

Shapes: B batch, C channels, H height, W width, L tokens, D pooled width, E joint space.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from vlbench.core.types import Features
from vlbench.models.bert import BertConfig, BertTower, build_bert
from vlbench.models.text import TextConfig, TextTower, build_text
from vlbench.models.vision import VisualConfig, build_visual


class TwoTower(nn.Module):
    """Two towers, each with a linear projection, and a learned logit scale.

    Args:
        visual: the image tower. open_clip's bring their own projection; the others get a linear layer.
        text: the text tower.
        embed_dim: E.
        vocabulary_size: of a BERT, whose vocabulary is learnt; CLIP's text tower has its own.
        project_equal: give an image tower as wide as the joint space a projection too. ALIGN's has none then.
        logit_scale_init: the stored parameter, a logarithm: ln(1/0.07) in CLIP, 1.0 in UniCL's code.
        logit_scale_max: the largest scale after the exponential, held by ``clamp_logit_scale``: 100 in CLIP, None
            in UniCL, which has no clamp.
        projection_std: standard deviation of both projections at the start; None is CLIP's width^-0.5, UniCL has
            0.02 (``trunc_normal_`` with its default bounds, microsoft/UniCL model/model.py).
    """

    def __init__(
        self,
        visual: VisualConfig,
        text: TextConfig | BertConfig,
        *,
        embed_dim: int,
        vocabulary_size: int | None = None,
        project_equal: bool = True,
        logit_scale_init: float = math.log(1 / 0.07),
        logit_scale_max: float | None = 100.0,
        projection_std: float | None = None,
    ) -> None:
        super().__init__()
        assert logit_scale_max is None or math.exp(logit_scale_init) <= logit_scale_max, (
            f"the initial scale {math.exp(logit_scale_init):.2f} is above its maximum {logit_scale_max}"
            " (logit_scale_init is a logarithm, logit_scale_max is not)"
        )
        self.visual = build_visual(visual, embed_dim=embed_dim)
        if isinstance(text, BertConfig):
            assert vocabulary_size is not None, "a BERT needs the size of its vocabulary"
            self.text: TextTower | BertTower = build_bert(text, embed_dim, vocabulary_size=vocabulary_size)
        else:
            self.text = build_text(text, embed_dim)
        self.image_projection: nn.Linear | None = None
        self._pooled_is_embedding = (
            self.visual.embed_dim is None and self.visual.width == embed_dim and not project_equal
        )
        if self.visual.embed_dim is None and not self._pooled_is_embedding:
            self.image_projection = nn.Linear(self.visual.width, embed_dim, bias=False)
            nn.init.normal_(self.image_projection.weight, std=self.visual.width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale_init)))
        self.logit_scale_max = logit_scale_max
        self.embed_dim = embed_dim
        self.text_config = text
        if projection_std is not None:
            for weight in self.projections():
                nn.init.trunc_normal_(weight, std=projection_std)

    def forward(self, images_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``(image_BE, text_BE, logit_scale)``: unit-norm float32 embeddings and the scale after the exponential."""
        image_BE = F.normalize(self.encode_image(images_BCHW).float(), dim=-1)
        text_BE = F.normalize(self.encode_text(tokens_BL).float(), dim=-1)
        return image_BE, text_BE, self.logit_scale.exp()

    def encode_image(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """``image_BE``, not normalised."""
        return self._project(self.visual(images_BCHW))

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """``text_BE``, not normalised."""
        return self.text(tokens_BL)

    def image_features(self, images_BCHW: torch.Tensor, *, dense: bool = False) -> Features:
        """Pooled feature before the projection and embedding after it; with ``dense`` also tokens and maps."""
        features = self.visual.features(images_BCHW, dense=dense)
        if self.visual.embed_dim is not None:
            return features
        return replace(features, embed_BE=self._project(features.pooled_BD))

    def projections(self) -> list[torch.Tensor]:
        """The weights of the two linear projections, where there are any (ModifiedResNet's is its attention pool)."""
        own = getattr(self.visual, "proj", None)
        image = self.image_projection.weight if self.image_projection is not None else own
        return [weight for weight in (image, self.text.projection) if weight is not None]

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Hold the scale at its maximum; to be called after every optimizer step."""
        if self.logit_scale_max is not None:
            self.logit_scale.clamp_(max=math.log(self.logit_scale_max))

    def _project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        if self._pooled_is_embedding:
            return pooled_BD
        return self.visual.project(pooled_BD) if self.image_projection is None else self.image_projection(pooled_BD)
