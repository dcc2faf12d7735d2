"""``unicl:SWIN``: the files that UniCL and K-LITE publish, image tower and text tower.

Both are one model under two sets of names (microsoft/UniCL and microsoft/klite, model/model.py): a Swin Transformer
read as the mean of its last map, CLIP's causal text tower with the sigmoid approximation of GELU and LayerNorms of
epsilon 1e-12, and a projection of each without bias into a space of 512. Where only the image tower is wanted,
``timm:SWIN`` reads the same files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlbench.core.cards import Preprocess
from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.models.backbone import TorchBackbone
from vlbench.models.export import export_two_tower
from vlbench.models.layouts import converted_by_timm, published_image_tower
from vlbench.models.loaders.shared import RANDOM, seeded
from vlbench.models.text import TextConfig
from vlbench.models.two_tower import TwoTower
from vlbench.models.vision import VisualConfig
from vlbench.models.weights import load_strictly, read_weights

SWINS = ("swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
"""timm's names of the image towers that were published."""
EMBED_DIM = 512
TEXT = TextConfig(quick_gelu=True, layer_norm_eps=1e-12)
PREPROCESS = Preprocess(
    image_size=(224, 224),
    resize_to=256,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
"""``build_transform`` of microsoft/UniCL's data/build.py with the defaults of its config.py."""

_WHOSE = ("UniCL", "K-LITE")
_TEXT_PREFIXES = ("text_encoder.", "lang_encoder.", "text.")
_BESIDE = {
    "image_projection": "image_projection.weight",
    "vision_projection": "image_projection.weight",
    "text_projection": "text.net.text_projection",
    "logit_scale": "logit_scale",
}
"""The authors' names → ours, of what is neither tower."""


def load(ref: str, *, weights: str | None = None, seed: int = 0) -> TorchBackbone:
    """The model whose image tower is ``ref``.

    Raises:
        UserError: for another tower, where no file is named, or a file that is neither's or does not fit.
    """
    if ref not in SWINS:
        raise UserError(unknown("image tower of UniCL's files", ref, SWINS))
    if weights is None:
        raise UserError(
            f"unicl:{ref}: names no weights; pass a published file with --weights FILE (vlbench list models knows "
            "where they are), or --weights random for a fresh initialisation"
        )
    state = read_weights(weights) if weights != RANDOM else None
    with seeded(seed):
        model = TwoTower(
            VisualConfig(arch=f"timm:{ref}"),
            TEXT,
            embed_dim=EMBED_DIM,
            logit_scale_init=1.0,
            logit_scale_max=None,
            projection_std=0.02,
        )
    if state is not None:
        where = f"{weights} in unicl:{ref}"
        load_strictly(model, in_our_names(model, state, where=where), where=where)
    backbone = export_two_tower(model, model_id=f"unicl:{ref}", recipe="unicl", preprocess=PREPROCESS)
    backbone.card = backbone.card.model_copy(update={"loader": "unicl", "arch": ref})
    return backbone


def in_our_names(model: TwoTower, state: Mapping[str, torch.Tensor], *, where: str) -> dict[str, torch.Tensor]:
    """A published file's tensors under the names of ``model``; what is unknown keeps its name, and is refused later.

    Raises:
        UserError: where the file is neither UniCL's nor K-LITE's.
    """
    tower = published_image_tower(state, whose=_WHOSE)
    if tower is None:
        raise UserError(
            f"{where}: not a file of UniCL or K-LITE, which hold an image tower (image_encoder. or visual.), a text "
            f"tower and two projections; found {', '.join(list(state)[:3])}, …; for an image tower alone take timm:NAME"
        )
    converted = converted_by_timm(model.visual.net, tower)
    named = {f"visual.net.{name}": tensor for name, tensor in (tower if converted is None else converted).items()}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in _TEXT_PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            named[_text_name(name.removeprefix(prefix))] = tensor
        elif name in _BESIDE:
            # Theirs multiplies from the right; a linear layer's weight lies the other way round.
            turned = name in ("image_projection", "vision_projection")
            named[_BESIDE[name]] = tensor.T.contiguous() if turned else tensor
    return named


def _text_name(name: str) -> str:
    """``resblocks.0.attn.…`` and the rest of their transformer in open_clip's names, which are CLIP's."""
    return f"text.net.transformer.{name}" if name.startswith("resblocks.") else f"text.net.{name}"
