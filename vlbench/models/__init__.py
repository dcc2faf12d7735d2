"""Models: visual and text towers, what is trained from them, and everything that loads a backbone to be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vlbench.core.cards import Preprocess
    from vlbench.models.backbone import TorchBackbone


def wrap(module: torch.nn.Module, *, preprocess: Preprocess | int, name: str, **options: Any) -> TorchBackbone:
    """Make a backbone of any image network: see ``vlbench.models.backbone.wrap``, which this forwards to."""
    from vlbench.models import backbone  # here, so that importing vlbench.models loads no torch

    return backbone.wrap(module, preprocess=preprocess, name=name, **options)
