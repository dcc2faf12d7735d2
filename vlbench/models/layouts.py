"""Published files whose image tower lies under other names than the architecture's own.

VirTex and UniCL publish whole models: the image tower is one part, named as in torchvision or as in the authors' Swin
Transformer. What a file is recognised as is said in a warning, for it leaves weights out. Nothing is guessed: a file
with one name that a layout does not know is passed on as it is, and refused for its names.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.resnet_names import from_detectron2


@dataclass(frozen=True)
class Layout:
    """One way in which a publication names its weights.

    Attributes:
        what: whose.
        prefix: of the image tower's names.
        beside: how the names of everything else begin; at least one such name must be there.
    """

    what: str
    prefix: str
    beside: tuple[str, ...]

    def image_tower(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """The image tower of ``state`` under its own names, or None where the file is not of this layout."""
        tower = [name for name in state if name.startswith(self.prefix) and not name.startswith(self.beside)]
        others = [name for name in state if name.startswith(self.beside)]
        if not tower or not others or len(tower) + len(others) != len(state):
            return None
        return {name.removeprefix(self.prefix): state[name] for name in tower}


LAYOUTS = (
    # kdexd/virtex, models/captioning.py and classification.py
    Layout("VirTex", "visual.cnn.", ("textual.", "backward_textual.")),
    # microsoft/UniCL, model/model.py
    Layout(
        "UniCL",
        "image_encoder.",
        ("text_encoder.", "lang_encoder.", "image_projection", "text_projection", "logit_scale"),
    ),
    # microsoft/klite, model/model.py, and UniCL's own older files
    Layout("K-LITE", "visual.", ("text.", "lang_encoder.", "vision_projection", "text_projection", "logit_scale")),
    # facebookresearch/dino and dinov2: a teacher with its projection heads
    Layout("DINO", "backbone.", ("head.", "dino_head.", "ibot_head.")),
    # facebookresearch/mae: the files for visualisation
    Layout("MAE", "", ("decoder_", "mask_token")),
    # facebookresearch/detectron2: a detector with a feature pyramid
    Layout("detectron2", "backbone.bottom_up.", ("backbone.fpn_", "proposal_generator.", "roi_heads.", "pixel_")),
)


def in_names_of(
    net: nn.Module, state: dict[str, torch.Tensor], *, where: str, ignore: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """``state`` in the names of ``net`` where it is a published layout that is known here or to timm; else as it is.

    Args:
        net: the image network to be filled.
        state: a file's content.
        where: what to call the file in the warning.
        ignore: prefixes of names that the network has deliberately given up (a classifier).
    """
    wanted, ignored = set(net.state_dict()), tuple(ignore) or ("\0",)
    if _fits(state, wanted, ignored):
        return state
    towers = {layout.what: layout.image_tower(state) for layout in LAYOUTS}
    for what, candidate in {"": state, **towers}.items():
        if candidate is None:
            continue
        left_out = len(state) - len(candidate)
        said = f": read as {what}'s, the image tower without {left_out} other tensors" if what else ""
        if _fits(candidate, wanted, ignored):
            warnings.warn(f"{where}{said}", stacklevel=4)
            return candidate
        converted = converted_by_timm(net, candidate)
        if converted is not None and _fits(converted, wanted, ignored):
            warnings.warn(f"{where}{said}; its authors' names converted by timm", stacklevel=4)
            return converted
        converted = _by_detectron2(candidate)
        if converted is not None and _fits(converted, wanted, ignored):
            # Neither leaves a trace in the weights.
            told = "right where detectron2 had STRIDE_IN_1X1: False and FORMAT: RGB"
            warnings.warn(f"{where}{said}; the names of its ResNet converted, {told}", stacklevel=4)
            return converted
    return state


def published_image_tower(state: Mapping[str, torch.Tensor], *, whose: Iterable[str]) -> dict[str, torch.Tensor] | None:
    """The image tower under its own names where ``state`` is a whole model in one of these layouts; else None."""
    towers = (layout.image_tower(state) for layout in LAYOUTS if layout.what in tuple(whose))
    return next((tower for tower in towers if tower is not None), None)


def _fits(state: Iterable[str], wanted: set[str], ignored: tuple[str, ...]) -> bool:
    return all(name in wanted or name.startswith(ignored) for name in state)


def _by_detectron2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """A ResNet in detectron2's names in torchvision's."""
    if "stem.conv1.weight" not in state:
        return None
    try:
        return from_detectron2(state)
    except UserError:
        return None


def converted_by_timm(net: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """What timm itself makes of the authors' names (Swin's, DINOv2's, ConvNeXt's, ...); None where it knows none."""
    module = type(net).__module__
    convert = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if convert is None or not module.startswith("timm."):
        return None
    try:
        converted = convert(dict(state), net)
    except Exception:  # each is written for a few layouts, and raises what it likes on any other
        return None
    return dict(converted) if isinstance(converted, Mapping) else None
