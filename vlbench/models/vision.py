"""Visual towers to be trained, by name: ``timm:NAME``, ``open_clip:CONFIG``, ``torchvision:NAME``.

Weights are always fresh: nothing is downloaded here. Pretrained weights come through ``vlbench.models.load``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic import Field

from vlbench.core.config import Config
from vlbench.core.errors import UserError
from vlbench.core.names import nearest, unknown
from vlbench.models.open_clip_import import import_open_clip
from vlbench.models.towers import ClipResNetTower, ClipViTTower, TimmTower, TorchvisionTower, VisualTower

LIBRARIES = ("timm", "open_clip", "torchvision")


class VisualConfig(Config):
    """Which visual tower."""

    arch: str = Field(description="timm:NAME, open_clip:CONFIG (CLIP's ModifiedResNet and ViT) or torchvision:NAME")
    image_size: int = Field(default=224, ge=8, description="side of the square input in pixels")
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="the library's own constructor settings; for open_clip: layers, width, heads, patch_size, ...; for "
        "timm's EfficientNets also headless: true leaves out the last 1x1 convolution, so that the pooled feature is "
        "that of the last block (B7: 640, L2: 1376)",
    )

    def identity(self) -> str:
        """The architecture with its settings, for a model card: ``open_clip:ViT-B-32(heads=4, layers=2)``.

        Settings that leave no trace in the weights (the number of heads) change what the weights compute.
        """
        settings = ", ".join(f"{key}={self.kwargs[key]!r}" for key in sorted(self.kwargs))
        return f"{self.arch}({settings})" if settings else self.arch


def build_visual(config: VisualConfig, *, embed_dim: int | None = None) -> VisualTower:
    """A freshly initialised tower.

    Args:
        config: which one.
        embed_dim: E of the joint space for towers that carry their own projection (open_clip's); None builds CLIP's
            ViT without one. Towers of the other libraries have none and ignore it.

    Raises:
        UserError: for an unknown architecture or setting, with the nearest valid one.
    """
    library, name = split_arch(config.arch)
    if library == "timm":
        return TimmTower(_timm_net(name, config), config.identity())
    if library == "torchvision":
        return TorchvisionTower(_torchvision_net(name, config), config.identity())
    return _open_clip_tower(name, config, embed_dim)


def split_arch(arch: str) -> tuple[str, str]:
    """``"timm:resnet50"`` as library and name."""
    library, separator, name = arch.partition(":")
    if not separator:
        raise UserError(f"architecture {arch!r}: name its library, for instance timm:{arch}")
    if library not in LIBRARIES:
        raise UserError(unknown("library", library, LIBRARIES) + f" (in the architecture {arch!r})")
    return library, name


def check_timm_name(name: str) -> None:
    """Raises UserError where timm has no such architecture; a pretrained tag after the dot is not looked at."""
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        guess = nearest(architecture, timm.list_models())
        hint = f"did you mean {guess!r}?" if guess else "timm.list_models() lists them"
        raise UserError(f"unknown timm architecture {architecture!r}; {hint}")


def timm_size_kwargs(name: str, image_size: int) -> dict[str, Any]:
    """``img_size`` for the networks whose input size is built in (position embeddings, windows); others take any."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return {"img_size": image_size} if config is not None and config.fixed_input_size else {}


def _timm_net(name: str, config: VisualConfig) -> Any:
    import timm

    check_timm_name(name)
    kwargs = timm_size_kwargs(name, config.image_size) | config.kwargs
    headless = kwargs.pop("headless", False)
    net = _construct(config, lambda: timm.create_model(name, pretrained=False, num_classes=0, **kwargs))
    if headless:
        _drop_head_convolution(net, config)
    return net


def _drop_head_convolution(net: Any, config: VisualConfig) -> None:
    """Let ``forward_features`` end after the last block of an EfficientNet, as ALIGN's image tower does."""
    from timm.models.efficientnet import EfficientNet
    from torch import nn

    if not isinstance(net, EfficientNet):
        raise UserError(f"{config.identity()}: only EfficientNets can be headless; leave headless out")
    net.conv_head, net.bn2 = nn.Identity(), nn.Identity()
    net.num_features = net.head_hidden_size = net.feature_info[-1]["num_chs"]


def _torchvision_net(name: str, config: VisualConfig) -> Any:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(unknown("torchvision architecture", name, known))
    return _construct(config, lambda: torchvision.models.get_model(name, weights=None, **config.kwargs))


def _construct(config: VisualConfig, make: Any) -> Any:
    """Turn a constructor's complaint about the user's kwargs into one line; without kwargs it is our mistake."""
    try:
        return make()
    except (TypeError, AssertionError, ValueError) as error:
        if not config.kwargs and not isinstance(error, AssertionError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{config.identity()} at {config.image_size} px cannot be built: {text}") from None


def open_clip_config(name: str) -> dict[str, Any]:
    """open_clip's own configuration of that name. Raises UserError with the nearest name."""
    open_clip = import_open_clip()
    config = open_clip.get_model_config(name) if ":" not in name else None
    if config is None:
        raise UserError(unknown("open_clip architecture", name, open_clip.list_models()))
    return config


def _open_clip_tower(name: str, config: VisualConfig, embed_dim: int | None) -> VisualTower:
    open_clip = import_open_clip()
    whole = open_clip_config(name)
    vision = whole["vision_cfg"] | {"image_size": config.image_size} | config.kwargs
    if vision.get("timm_model_name"):
        raise UserError(f"{config.arch} is a timm network inside open_clip; train timm:{vision['timm_model_name']}")
    heads = vision.pop("heads", None)
    known = {field.name for field in fields(open_clip.CLIPVisionCfg)}
    for key in sorted(vision.keys() - known):
        raise UserError(f"{config.arch}: {unknown('setting', key, known | {'heads'})}")
    cfg = open_clip.CLIPVisionCfg(**vision)
    is_resnet = isinstance(cfg.layers, list | tuple)
    attention_width = cfg.width * 32 if is_resnet else cfg.width
    heads = heads or max(1, attention_width // cfg.head_width)
    if attention_width % heads:
        raise UserError(f"{config.identity()}: a width of {attention_width} cannot be shared by {heads} heads")
    if is_resnet:
        if config.image_size % 32:
            raise UserError(f"{config.identity()}: its input is a multiple of 32 pixels, not {config.image_size}")
        net = open_clip.modified_resnet.ModifiedResNet(
            list(cfg.layers), embed_dim or whole["embed_dim"], heads, image_size=config.image_size, width=cfg.width
        )
        return ClipResNetTower(net, config.identity())
    if cfg.attentional_pool:
        raise UserError(f"{config.arch}: attentional pooling is not supported for training; take open_clip:ViT-B-32")
    net = _open_clip_vit(cfg, heads, embed_dim or whole["embed_dim"], quick_gelu=whole.get("quick_gelu", False))
    return ClipViTTower(net, config.identity(), projected=embed_dim is not None)


def _open_clip_vit(cfg: Any, heads: int, output_dim: int, *, quick_gelu: bool) -> Any:
    from open_clip.transformer import QuickGELU, VisionTransformer
    from torch import nn

    return VisionTransformer(
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        width=cfg.width,
        layers=cfg.layers,
        heads=heads,
        mlp_ratio=cfg.mlp_ratio,
        ls_init_value=cfg.ls_init_value,
        patch_dropout=cfg.patch_dropout,
        no_ln_pre=cfg.no_ln_pre,
        pos_embed_type=cfg.pos_embed_type,
        pool_type=cfg.pool_type,
        final_ln_after_pool=cfg.final_ln_after_pool,
        output_dim=output_dim,
        act_layer=QuickGELU if quick_gelu else nn.GELU,
    )
