"""A visual tower with a linear classifier: the model of supervised pretraining.

Shapes: B batch, C classes (in logits) or channels, H height, W width, D pooled width.
"""

from __future__ import annotations

import torch
from torch import nn

from vlbench.models.vision import VisualConfig, build_visual


class Classifier(nn.Module):
    """Tower, then one linear layer. ``visual`` is what is measured afterwards; ``head`` is thrown away."""

    def __init__(self, visual: VisualConfig, n_classes: int) -> None:
        super().__init__()
        assert n_classes >= 1, "a classifier needs classes"
        self.visual = build_visual(visual)
        self.head = nn.Linear(self.visual.width, n_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """``logits_BC``."""
        return self.head(self.visual(images_BCHW))
