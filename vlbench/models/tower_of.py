"""The image tower inside a backbone, to be trained further: which module it is, which maps it has, at which sizes.

A backbone is measured through a function from images to features (``models/backbone.py``). Whoever fine-tunes it wants
the module behind that function: a text tower, a captioner's head or a classifier beside it must not come along.

Shapes: B batch, C channels, H height, W width, N tokens, D width of a token.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlbench.core.errors import UserError
from vlbench.core.types import Features
from vlbench.models.towers import ClipResNetTower, ClipTimmTower, ClipViTTower, TimmTower, TorchvisionTower, VisualTower

_SEEN = 224  # a side that all of torchvision's networks take
_STAGE = re.compile(r"\b(?:layer|stages|resblocks|blocks|features|layers)\.?(\d+)\.")


def tower_of(backbone: Any) -> VisualTower:
    """The image tower of ``backbone``, sharing its weights: copy it before training it, or the backbone changes too.

    Args:
        backbone: what a loader or a recipe's ``export`` gave: a ``TorchBackbone``.

    Raises:
        UserError: where it has none: a model that reads fixed region features, or a backbone that is no torch module.
    """
    module, image_fn = getattr(backbone, "module", None), getattr(backbone, "_image_fn", None)
    name = backbone.card.id
    if not isinstance(module, nn.Module) or image_fn is None:
        raise UserError(
            f"{name}: a {type(backbone).__name__} cannot be trained; return vlbench.models.wrap(module, ...) from your "
            "function"
        )
    if not backbone.card.provides & {"pooled", "tokens", "maps"}:
        raise UserError(f"{name} has no image tower to train; take a model that reads images")
    owner = getattr(image_fn, "__self__", None)
    towers = [child for child in module.modules() if isinstance(child, VisualTower)]
    if isinstance(owner, VisualTower):
        tower = owner
    else:
        tower = towers[0] if towers else _FunctionTower(module, image_fn, backbone.card)
    return _TrunkTower(tower) if isinstance(tower, ClipTimmTower) else tower


def map_channels(tower: nn.Module, image_size: int | tuple[int, int]) -> dict[int, int]:
    """Channels of the tower's maps by stride; none where it has no maps.

    Args:
        tower: a visual tower, or one ``at_any_size``.
        image_size: a size in pixels that it takes; it sees one black image of it.
    """
    if isinstance(tower, VisualTower) and "maps" not in tower.parts:
        return {}
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    device = next(tower.parameters()).device
    with _evaluation(tower), torch.no_grad():
        black = torch.zeros(1, 3, height, width, device=device)
        maps = tower.features(black, dense=True).maps if isinstance(tower, VisualTower) else tower(black)
    return {stride: found.shape[1] for stride, found in (maps or {}).items()}


def at_any_size(tower: VisualTower) -> MapTower:
    """A copy of the tower that gives maps only, of images of any height and width that its largest stride divides.

    Position embeddings are resampled to the grid at hand, windows masked where they reach over its edge.

    Raises:
        UserError: where the tower has no maps, or a size that cannot be changed.
    """
    if "maps" not in tower.parts and not isinstance(tower, TorchvisionTower):
        raise UserError(f"{tower.arch} has no feature maps; take a convolutional network, a Swin or a ViT")
    tower = copy.deepcopy(tower)
    if isinstance(tower, TimmTower):
        return _TimmMaps(tower)
    if isinstance(tower, _TrunkTower):
        return _TimmMaps(tower.trunk())
    if isinstance(tower, ClipResNetTower):
        return _ClipResNetMaps(tower)
    if isinstance(tower, ClipViTTower):
        return _ClipViTMaps(tower)
    if isinstance(tower, TorchvisionTower):
        return _TorchvisionMaps(tower)
    return _DenseMaps(tower)


class MapTower(nn.Module):
    """Images to maps ``(B, C, H, W)`` by stride, and nothing else: what pools them is left out."""

    kind: str = "convolutional"
    """``transformer``: maps of one stride; ``windows``: a hierarchy made by attention; else ``convolutional``."""

    def __init__(self, net: nn.Module, arch: str) -> None:
        super().__init__()
        self.net = net
        self.arch = arch

    def forward(self, images_BCHW: torch.Tensor) -> dict[int, torch.Tensor]:
        """The deepest map of every stride."""
        raise NotImplementedError

    def stages(self) -> list[list[str]]:
        """Names of parameters from the image on, as detectors freeze them: first the stem, then stage by stage."""
        stem: list[str] = []
        later: dict[int, list[str]] = {}
        for name, _ in self.named_parameters():
            found = _STAGE.search(name)
            (stem if found is None else later.setdefault(int(found[1]), [])).append(name)
        return [names for names in (stem, *(later[number] for number in sorted(later))) if names] if later else []


class _FunctionTower(VisualTower):
    """A user's own module: whatever its function says of images."""

    def __init__(self, module: nn.Module, image_fn: Callable[..., Any], card: Any) -> None:
        super().__init__(module, card.arch)
        self._function = None if image_fn is module else image_fn
        self._takes_dense = "dense" in inspect.signature(image_fn).parameters
        self.parts = card.provides & {"pooled", "embed", "tokens", "maps"}
        self.feature = card.feature
        height, width = card.preprocess.image_size
        device = next(module.parameters()).device
        with _evaluation(self), torch.no_grad():
            self.width = self(torch.zeros(1, 3, height, width, device=device)).shape[1]

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """``pooled_BD``, whatever the function says."""
        return self.features(images_BCHW).pooled_BD

    def features(self, images_BCHW: torch.Tensor, *, dense: bool = False) -> Features:
        """What the function gives, with gradients."""
        ask = {"dense": True} if dense and self._takes_dense else {}
        out = (self._function or self.net)(images_BCHW, **ask)
        return out if isinstance(out, Features) else Features(pooled_BD=out)


class _TrunkTower(VisualTower):
    """open_clip's wrapper of a timm trunk, with the trunk's maps, which frozen probes have no use for."""

    def __init__(self, clip: ClipTimmTower) -> None:
        super().__init__(clip, clip.arch)
        self.width, self.feature, self.embed_dim = clip.width, clip.feature, clip.embed_dim
        self.parts = clip.parts | (self.trunk().parts & {"maps"})

    def trunk(self) -> TimmTower:
        """The trunk as a tower; not a submodule, since its weights are the wrapper's."""
        clip: Any = self.net
        return TimmTower(clip.net.trunk, self.arch)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The trunk's pooled output."""
        return self.net(images_BCHW)

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """open_clip's projection head."""
        clip: Any = self.net
        return clip.project(pooled_BD)

    def _dense(
        self, images_BCHW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, Mapping[int, torch.Tensor] | None]:
        clip: Any = self.net
        levels = _deepest_levels(clip.net.trunk)
        final, maps = clip.net.trunk.forward_intermediates(
            images_BCHW, indices=sorted(levels.values()), output_fmt="NCHW"
        )
        pooled_BD = clip.net.trunk.forward_head(final)
        if clip.width == clip.embed_dim and hasattr(clip.net.head, "pool"):
            pooled_BD = clip.net.head(pooled_BD)
        return pooled_BD, None, _by_stride(levels, maps)


class _TimmMaps(MapTower):
    def __init__(self, tower: TimmTower) -> None:
        super().__init__(tower.net, tower.arch)
        net: Any = tower.net
        _free_size(net, tower.arch)
        self._levels = _deepest_levels(net)
        if len(self._levels) == 1:
            self.kind = "transformer"
        elif getattr(net, "output_fmt", "NCHW") == "NHWC":
            self.kind = "windows"

    def forward(self, images_BCHW: torch.Tensor) -> dict[int, torch.Tensor]:
        net: Any = self.net
        rope = getattr(net, "rope", None)
        if hasattr(rope, "update_feat_shape"):  # rotary embeddings of the grid at hand
            rope.update_feat_shape(net.patch_embed.dynamic_feat_size(images_BCHW.shape[-2:]))
        maps = net.forward_intermediates(
            images_BCHW,
            indices=sorted(self._levels.values()),
            output_fmt="NCHW",
            stop_early=True,
            intermediates_only=True,
        )
        return _by_stride(self._levels, maps)

    def stages(self) -> list[list[str]]:
        """The coarse groups of timm itself, where the network names them."""
        from timm.models import group_parameters

        net: Any = self.net
        if not hasattr(net, "group_matcher"):
            return super().stages()
        groups = group_parameters(net, net.group_matcher(coarse=True))
        return [[f"net.{name}" for name in groups[number]] for number in sorted(groups)]


class _ClipResNetMaps(MapTower):
    def __init__(self, tower: ClipResNetTower) -> None:
        super().__init__(tower.net, tower.arch)
        net: Any = tower.net
        net.attnpool = nn.Identity()  # of one size only, and nothing here pools

    def forward(self, images_BCHW: torch.Tensor) -> dict[int, torch.Tensor]:
        net: Any = self.net
        x, maps = net.stem(images_BCHW), {}
        for stride, layer in ((4, net.layer1), (8, net.layer2), (16, net.layer3), (32, net.layer4)):
            maps[stride] = x = layer(x)
        return maps


class _ClipViTMaps(MapTower):
    kind = "transformer"

    def __init__(self, tower: ClipViTTower) -> None:
        super().__init__(tower.net, tower.arch)
        net: Any = tower.net
        self._patch = int(net.patch_size[0])
        self._grid = (int(net.grid_size[0]), int(net.grid_size[1]))

    def forward(self, images_BCHW: torch.Tensor) -> dict[int, torch.Tensor]:
        net: Any = self.net
        cells_BDHW = net.conv1(images_BCHW)
        grid = (cells_BDHW.shape[2], cells_BDHW.shape[3])
        prefix_1D, places_ND = net.positional_embedding[:1], net.positional_embedding[1:]
        class_BND = (net.class_embedding + prefix_1D).expand(len(images_BCHW), 1, -1)
        patches_BND = cells_BDHW.flatten(2).transpose(1, 2) + _resampled(places_ND, self._grid, grid)
        tokens_BND = net.ln_pre(net.patch_dropout(torch.cat([class_BND.to(patches_BND.dtype), patches_BND], dim=1)))
        return {self._patch: net.transformer(tokens_BND)[:, 1:].transpose(1, 2).unflatten(2, grid)}


class _TorchvisionMaps(MapTower):
    """torchvision's networks: a ResNet's layers, or the parts of ``features`` of those that have it."""

    def __init__(self, tower: TorchvisionTower) -> None:
        super().__init__(tower.net, tower.arch)
        net: Any = tower.net
        self._is_resnet = hasattr(net, "layer4")
        if not self._is_resnet and not isinstance(getattr(net, "features", None), nn.Sequential):
            raise UserError(f"{tower.arch} has no feature maps; take torchvision:resnet50 or a timm network")
        self._channels_last = type(net).__name__ == "SwinTransformer"
        if self._channels_last:
            self.kind = "windows"
        for unused in ("avgpool", "fc", "classifier", "head", "norm"):
            if hasattr(net, unused):
                setattr(net, unused, nn.Identity())

    def forward(self, images_BCHW: torch.Tensor) -> dict[int, torch.Tensor]:
        net: Any = self.net
        x, maps = images_BCHW, {}
        if self._is_resnet:
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            for stride, layer in ((4, net.layer1), (8, net.layer2), (16, net.layer3), (32, net.layer4)):
                maps[stride] = x = layer(x)
            return maps
        for part in net.features:
            x = part(x)
            map_BCHW = x.permute(0, 3, 1, 2) if self._channels_last else x
            maps[round(images_BCHW.shape[-1] / map_BCHW.shape[-1])] = map_BCHW
        return maps

    def stages(self) -> list[list[str]]:
        """As of a ResNet: first the stem, then the blocks of its stride, then those of each stride after it.

        The stem is the first part of ``features``. Where that is a single layer (VGG, DenseNet), it is the layers of
        that layer's stride: two frozen stages of VGG are its conv1 and conv2.
        """
        if self._is_resnet:
            return super().stages()
        net: Any = self.net
        shadow = copy.deepcopy(net.features).to("meta").eval()
        x, keys, stages = torch.zeros(1, 3, _SEEN, _SEEN, device="meta"), [], []
        for place, (name, part) in enumerate(shadow.named_children()):
            with torch.no_grad():
                x = part(x)
            is_stem = place == 0 and any(True for _ in part.children())
            key = (is_stem, x.shape[1 if self._channels_last else 2])
            own = [f"net.features.{name}.{inner}" for inner, _ in part.named_parameters()]
            if own and keys[-1:] != [key]:
                keys.append(key)
                stages.append([])
            if own:
                stages[-1] += own
        return stages


class _DenseMaps(MapTower):
    """Any other tower, through its ``features``."""

    def __init__(self, tower: VisualTower) -> None:
        super().__init__(tower, tower.arch)
        net: Any = tower.net
        if "interpolate_pos_encoding" in inspect.signature(net.forward).parameters:
            net.forward = partial(net.forward, interpolate_pos_encoding=True)

    def forward(self, images_BCHW: torch.Tensor) -> dict[int, torch.Tensor]:
        tower: Any = self.net
        maps = tower.features(images_BCHW, dense=True).maps
        assert maps is not None, f"{self.arch} says that it has maps"
        return dict(maps)


def _deepest_levels(net: Any) -> dict[int, int]:
    """Stride → index into a timm network's ``feature_info``. A ViT has one stride at every depth."""
    return {int(level["reduction"]): index for index, level in enumerate(net.feature_info)}


def _by_stride(levels: Mapping[int, int], maps: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    by_level = dict(zip(sorted(levels.values()), maps, strict=True))
    return {stride: by_level[level] for stride, level in sorted(levels.items())}


def _free_size(net: Any, arch: str) -> None:
    """Let a timm network take images of any size, where one of its settings does that."""
    from timm.layers.format import Format

    if not hasattr(net, "dynamic_img_size"):
        if net.pretrained_cfg.get("fixed_input_size"):
            raise UserError(f"{arch} takes images of one size only; a detector needs a network that takes any")
        return
    net.dynamic_img_size = True
    net.patch_embed.strict_img_size = False
    windowed = [child for child in net.modules() if hasattr(child, "dynamic_mask")]
    for block in windowed:
        block.dynamic_mask = True
        block.attn_mask = None
    if not windowed:  # a ViT reads the grid's height and width off its patches
        net.patch_embed.flatten = False
        net.patch_embed.output_fmt = Format.NHWC


def _resampled(places_ND: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Position embeddings of another grid, bicubically, as open_clip resizes them."""
    if old == new:
        return places_ND
    places_1DHW = places_ND.T.unflatten(1, old)[None].float()
    resized_1DHW = F.interpolate(places_1DHW, size=new, mode="bicubic", antialias=True, align_corners=False)
    return resized_1DHW[0].flatten(1).T.to(places_ND.dtype)


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; what was in training mode before is in training mode again afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
