"""Visual towers: one interface over timm, open_clip and torchvision networks.

A tower gives the pooled feature that a head or a projection is trained on (``forward``), and on request everything
else that the network can say of an image (``features``): the libraries differ in layout, in what "pooled" means and
in whether they carry a projection, and nothing above this module needs to know.

Shapes: B batch, C channels, H height, W width, N tokens, D width of the pooled feature, E joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vlbench.core.errors import UserError
from vlbench.core.types import Features, Provides


class VisualTower(nn.Module):
    """The interface. Subclasses hold their network in ``net`` and set the attributes below.

    ``forward`` gives ``pooled_BD``. ``project`` maps it to the joint space where the network has its own projection.
    """

    arch: str
    """What was asked for, settings included; part of a backbone's identity."""
    width: int
    """D, of the pooled feature."""
    embed_dim: int | None = None
    """E, where the network carries its own projection."""
    parts: frozenset[Provides] = frozenset({"pooled"})
    """What ``features(..., dense=True)`` gives."""
    feature: str = "pooled"
    """The pooled feature in words, for the model card."""

    def __init__(self, net: nn.Module, arch: str) -> None:
        super().__init__()
        self.net = net
        self.arch = arch

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """``pooled_BD`` of preprocessed images."""
        raise NotImplementedError

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """``embed_BE``: the pooled feature through the network's own projection."""
        raise NotImplementedError(f"{self.arch} has no projection of its own")

    def features(self, images_BCHW: torch.Tensor, *, dense: bool = False) -> Features:
        """Pooled feature and embedding; with ``dense`` also tokens and maps, whose memory probes do not need."""
        pooled_BD, tokens_BND, maps = self._dense(images_BCHW) if dense else (self(images_BCHW), None, None)
        embed_BE = self.project(pooled_BD) if self.embed_dim is not None else None
        return Features(pooled_BD=pooled_BD, embed_BE=embed_BE, tokens_BND=tokens_BND, maps=maps)

    def _dense(
        self, images_BCHW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, Mapping[int, torch.Tensor] | None]:
        return self(images_BCHW), None, None


def grid_tokens(map_BCHW: torch.Tensor) -> torch.Tensor:
    """The cells of a feature map as ``tokens_BND``, row by row."""
    return map_BCHW.flatten(2).transpose(1, 2)


class TimmTower(VisualTower):
    """A timm network without its classifier. ``pooled`` is what the classifier would read."""

    def __init__(self, net: Any, arch: str) -> None:
        super().__init__(net, arch)
        self.width = getattr(net, "head_hidden_size", None) or net.num_features
        # Swin and its kin return NHWC from forward_features while the rest of timm returns NCHW or tokens.
        self._channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        self._prefix_tokens = getattr(net, "num_prefix_tokens", 0)
        self._level_of_stride: dict[int, int] = {}
        if hasattr(net, "forward_intermediates") and getattr(net, "feature_info", None):
            # A ViT has one stride at every depth: the deepest map of each stride is the one that is wanted.
            self._level_of_stride = {int(level["reduction"]): index for index, level in enumerate(net.feature_info)}
        self.parts = frozenset({"pooled", "tokens"} | ({"maps"} if self._level_of_stride else set()))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The network's pooled feature, its own final normalisation included."""
        return self.net.forward_head(self.net.forward_features(images_BCHW), pre_logits=True)

    def _dense(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor] | None]:
        maps = None
        if self._level_of_stride:
            levels = sorted(self._level_of_stride.values())
            final, maps_BCHW = self.net.forward_intermediates(images_BCHW, indices=levels, output_fmt="NCHW")
            by_level = dict(zip(levels, maps_BCHW, strict=True))
            maps = {stride: by_level[level] for stride, level in sorted(self._level_of_stride.items())}
        else:
            final = self.net.forward_features(images_BCHW)
        if final.ndim == 3:
            tokens_BND = final[:, self._prefix_tokens :]
        else:
            tokens_BND = final.flatten(1, 2) if self._channels_last else grid_tokens(final)
        return self.net.forward_head(final, pre_logits=True), tokens_BND, maps


class ClipResNetTower(VisualTower):
    """CLIP's ModifiedResNet. Pooled feature and embedding are one: attention pooling ends in the joint space."""

    feature = "attention-pooled output"
    parts = frozenset({"pooled", "embed", "tokens", "maps"})

    def __init__(self, net: Any, arch: str) -> None:
        super().__init__(net, arch)
        self.width = self.embed_dim = net.output_dim

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The attention-pooled output."""
        return self.net(images_BCHW)

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """The same tensor."""
        return pooled_BD

    def _dense(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor]]:
        out = self.net.forward_intermediates(images_BCHW)
        stem_and_layer1, *deeper = out["image_intermediates"][1:]  # the stem's own map has layer 1's stride
        maps = dict(zip((4, 8, 16, 32), (stem_and_layer1, *deeper), strict=True))
        return out["image_features"], grid_tokens(maps[32]), maps


class ClipViTTower(VisualTower):
    """CLIP's ViT. Pooled is the class token after the last LayerNorm and before the projection, as CLIP is probed."""

    feature = "class token before the projection"

    def __init__(self, net: Any, arch: str, *, projected: bool = True) -> None:
        super().__init__(net, arch)
        assert net.attn_pool is None, "a ViT with attentional pooling is not this tower"
        self.width = net.proj.shape[0]
        if net.pool_type == "avg":
            self.feature = "mean of the patch tokens before the projection"
        # The projection moves out of the network: a probe wants its input, and a model trained without the joint
        # space must not carry a parameter that never gets a gradient (distributed training refuses such ones).
        self.proj = net.proj if projected else None
        net.proj = None
        self.embed_dim = self.proj.shape[1] if self.proj is not None else None
        self.parts = frozenset({"pooled", "tokens", "maps"} | ({"embed"} if projected else set()))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The pooled token before the projection."""
        out = self.net(images_BCHW)
        return out[0] if isinstance(out, tuple) else out

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Linear, no bias."""
        assert self.proj is not None, "built without a projection"
        return pooled_BD @ self.proj

    def _dense(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor]]:
        out = self.net.forward_intermediates(images_BCHW, indices=1)
        map_BCHW = out["image_intermediates"][0]
        tokens_BND = grid_tokens(self.net.ln_post(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return out["image_features"], tokens_BND, {self.net.patch_size[0]: map_BCHW}


class ClipTimmTower(VisualTower):
    """open_clip's wrapper of a timm trunk. Pooled is the trunk's output, before open_clip's projection head."""

    parts = frozenset({"pooled", "embed"})

    def __init__(self, net: Any, arch: str, *, embed_dim: int) -> None:
        super().__init__(net, arch)
        self.embed_dim = embed_dim
        # Attention-pooled variants pool inside the head: their first vector per image is the embedding itself.
        self._pools_in_head = hasattr(net.head, "pool")
        self.width = embed_dim if self._pools_in_head else net.trunk.num_features
        self.feature = "embedding (pooling is part of the projection head)" if self._pools_in_head else "trunk output"

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The trunk's pooled output."""
        return self.net(images_BCHW) if self._pools_in_head else self.net.trunk(images_BCHW)

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """open_clip's projection head."""
        return pooled_BD if self._pools_in_head else self.net.head(pooled_BD)


class ClipOtherTower(VisualTower):
    """Any other image tower of open_clip: its pooling and its projection cannot be told apart from outside."""

    feature = "embedding"
    parts = frozenset({"pooled", "embed"})

    def __init__(self, net: Any, arch: str, *, embed_dim: int) -> None:
        super().__init__(net, arch)
        self.width = self.embed_dim = embed_dim

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The embedding."""
        out = self.net(images_BCHW)
        return out[0] if isinstance(out, tuple) else out

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """The same tensor."""
        return pooled_BD


class TorchvisionTower(VisualTower):
    """A torchvision classifier whose last linear layer is taken out: pooled is what that layer would read."""

    feature = "input of the last linear layer"

    def __init__(self, net: Any, arch: str) -> None:
        super().__init__(net, arch)
        from torchvision.models import ResNet

        name, head = last_linear(net, arch)
        self.width = head.in_features
        net.set_submodule(name, nn.Identity())
        self.removed = (f"{name}.weight", f"{name}.bias")
        self._is_resnet = isinstance(net, ResNet)
        if self._is_resnet:
            self.feature = "global average pool"
            self.parts = frozenset({"pooled", "tokens", "maps"})

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The input of the layer that was taken out."""
        out = self.net(images_BCHW)
        # In training mode GoogLeNet and Inception also return what their auxiliary classifiers say.
        return out if isinstance(out, torch.Tensor) else out[0]

    def _dense(
        self, images_BCHW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, Mapping[int, torch.Tensor] | None]:
        if not self._is_resnet:
            return super()._dense(images_BCHW)
        net = self.net
        x = net.maxpool(net.relu(net.bn1(net.conv1(images_BCHW))))
        maps = {}
        for stride, layer in ((4, net.layer1), (8, net.layer2), (16, net.layer3), (32, net.layer4)):
            maps[stride] = x = layer(x)
        return net.avgpool(x).flatten(1), grid_tokens(x), maps


def last_linear(net: nn.Module, arch: str) -> tuple[str, nn.Linear]:
    """The classifier of a torchvision network: its last linear layer, by name."""
    linear = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear or not linear[-1][0].startswith(("fc", "classifier", "head")):
        raise UserError(f"{arch}: it does not end in a linear layer, so there is no pooled feature to probe")
    return linear[-1]
