"""Which parts of a network repeat: transformer blocks, residual blocks.

They are what is recomputed (``recompute``) and what is sharded (``sharding``), since each is called as a whole, and
they hold nearly all activations and parameters. They are found by structure, so that a tower of any library does.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.towers import VisualTower


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of ``module`` in order, none of them inside another.

    A block is a member of a ``Sequential`` or ``ModuleList`` that has parts of its own. Lists within lists and stages
    (timm's Swin and ConvNeXt: a module with a list called ``blocks``) are gone into.

    Raises:
        UserError: for a visual tower without any, by name.
    """
    for tower in module.modules():
        if isinstance(tower, VisualTower) and not any(True for _ in _blocks(tower)):
            raise UserError(
                f"{tower.arch}: no blocks are known of this architecture, so its activations cannot be recomputed nor "
                "its weights sharded by block; leave checkpoint_activations and shard out, or take timm:resnet50 or "
                "open_clip:ViT-B-32"
            )
    return list(_blocks(module))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    is_list = isinstance(module, nn.Sequential | nn.ModuleList)
    for part in module.children():
        whole = is_list and not isinstance(part, nn.Sequential | nn.ModuleList) and not _is_stage(part)
        if not whole:
            yield from _blocks(part)
        elif any(True for _ in part.children()) and any(True for _ in part.parameters()):
            yield part


def _is_stage(module: nn.Module) -> bool:
    return isinstance(getattr(module, "blocks", None), nn.Sequential | nn.ModuleList)
