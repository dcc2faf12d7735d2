"""ResNet weights under torchvision's names and under detectron2's, both ways.

The two libraries hold the same network (He et al., 1512.03385) under different names: ``layer1`` to ``layer4`` are
``res2`` to ``res5``, a batch norm lies inside its convolution as ``norm``, the projection of a block is ``shortcut``,
what comes before the blocks is the ``stem``. timm's plain ResNets have torchvision's names. Only names change, so a
round trip gives the same tensors. The same maps come out where the strides lie at the same place, which no name tells:
torchvision and timm stride in the 3x3 convolution (detectron2: ``STRIDE_IN_1X1 = False``), the networks of MSRA that
detectron2's own configurations start from stride in the 1x1 before it.

Nothing passes half converted: a name that a plain ResNet does not have (squeeze-and-excitation, a deep stem) and a
tensor that is not there are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from vlbench.core.errors import UserError

STAGES = (1, 2, 3, 4)
"""torchvision's numbers; detectron2's are one higher, for its first stage is the stem."""
_NORM = ("weight", "bias", "running_mean", "running_var")
_WHOLE_MODEL = "backbone.bottom_up."  # where a detectron2 model with a feature pyramid keeps its ResNet
_LEAF = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_TO_DETECTRON2 = (
    (re.compile(r"conv1\.weight"), r"stem.conv1.weight"),
    (re.compile(rf"bn1\.{_LEAF}"), r"stem.conv1.norm.\1"),
    (re.compile(r"(layer[1-4]\.\d+)\.(conv[123])\.weight"), r"\1.\2.weight"),
    (re.compile(rf"(layer[1-4]\.\d+)\.bn([123])\.{_LEAF}"), r"\1.conv\2.norm.\3"),
    (re.compile(r"(layer[1-4]\.\d+)\.downsample\.0\.weight"), r"\1.shortcut.weight"),
    (re.compile(rf"(layer[1-4]\.\d+)\.downsample\.1\.{_LEAF}"), r"\1.shortcut.norm.\2"),
    (re.compile(r"fc\.(weight|bias)"), r"linear.\1"),
)
_FROM_DETECTRON2 = (
    (re.compile(r"stem\.conv1\.weight"), r"conv1.weight"),
    (re.compile(rf"stem\.conv1\.norm\.{_LEAF}"), r"bn1.\1"),
    (re.compile(r"(res[2-5]\.\d+)\.(conv[123])\.weight"), r"\1.\2.weight"),
    (re.compile(rf"(res[2-5]\.\d+)\.conv([123])\.norm\.{_LEAF}"), r"\1.bn\2.\3"),
    (re.compile(r"(res[2-5]\.\d+)\.shortcut\.weight"), r"\1.downsample.0.weight"),
    (re.compile(rf"(res[2-5]\.\d+)\.shortcut\.norm\.{_LEAF}"), r"\1.downsample.1.\2"),
    (re.compile(r"linear\.(weight|bias)"), r"fc.\1"),
)


@dataclass(frozen=True)
class ResNetPlan:
    """What a plain ResNet's weights say of its structure. One entry a stage, from stride 4 to stride 32.

    Attributes:
        stem: channels after the first convolution.
        blocks: residual blocks.
        inner: channels inside a block (of its 3x3 convolution).
        outer: channels after a block.
        groups: of the 3x3 convolutions (1; ResNeXt: 32).
        bottleneck: blocks of three convolutions, not two.
    """

    stem: int
    blocks: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    groups: int
    bottleneck: bool


def to_detectron2(state: Mapping[str, torch.Tensor], *, where: str = "these weights") -> dict[str, torch.Tensor]:
    """A ResNet's weights in detectron2's names, the same tensors.

    Args:
        state: torchvision's names, or timm's for its plain ResNets. A classifier (``fc``) may be there: ``linear``.
        where: what to call the weights in an error.

    Raises:
        UserError: for a name that a plain ResNet does not have, and for a tensor that is missing.
    """
    plan_of(state, where=where)
    renamed = _renamed(state, _TO_DETECTRON2, where)
    return {re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name): renamed[name] for name in renamed}


def from_detectron2(state: Mapping[str, torch.Tensor], *, where: str = "these weights") -> dict[str, torch.Tensor]:
    """A ResNet's weights in torchvision's names, the same tensors: the other way of ``to_detectron2``.

    ``state`` may be a whole model with a feature pyramid (``backbone.bottom_up.``): its ResNet is taken, for that is
    what can be named in torchvision's words.

    Raises:
        UserError: as ``to_detectron2``. Backbones that were trained with a frozen norm of weight and bias only
            (Caffe2's) have no running statistics and are refused for that.
    """
    if any(name.startswith(_WHOLE_MODEL) for name in state):
        state = {name.removeprefix(_WHOLE_MODEL): state[name] for name in state if name.startswith(_WHOLE_MODEL)}
    renamed = _renamed(state, _FROM_DETECTRON2, where)
    out = {re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", name): renamed[name] for name in renamed}
    plan_of(out, where=where)
    return out


def plan_of(state: Mapping[str, torch.Tensor], *, where: str = "these weights") -> ResNetPlan:
    """The structure of a plain ResNet from its weights in torchvision's names.

    Raises:
        UserError: for a name that a plain ResNet does not have, and for a tensor that is missing.
    """
    _renamed(state, _TO_DETECTRON2, where)  # for its complaint about a name
    blocks = tuple(_count(state, stage) for stage in STAGES)
    bottleneck = any(".conv3." in name for name in state)
    missing = [name for name in _expected(state, blocks, bottleneck) if name not in state]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: not the weights of a whole ResNet: {missing[0]}{others} missing")
    last = "conv3" if bottleneck else "conv2"
    middle = [state[f"layer{stage}.0.conv2.weight"] for stage in STAGES]
    return ResNetPlan(
        stem=state["conv1.weight"].shape[0],
        blocks=blocks,
        inner=tuple(weight.shape[0] for weight in middle),
        outer=tuple(state[f"layer{stage}.0.{last}.weight"].shape[0] for stage in STAGES),
        groups=middle[0].shape[0] // middle[0].shape[1],
        bottleneck=bottleneck,
    )


def _renamed(
    state: Mapping[str, torch.Tensor], rules: Iterable[tuple[re.Pattern[str], str]], where: str
) -> dict[str, torch.Tensor]:
    """Every tensor under its new name, the stages' own names left as they are."""
    renamed = {}
    for name, tensor in state.items():
        rule = next(((pattern, new) for pattern, new in rules if pattern.fullmatch(name)), None)
        if rule is None:
            raise UserError(
                f"{where}: {name} is no part of a plain ResNet; only ResNet, ResNeXt and wide ResNet convert"
            )
        renamed[rule[0].sub(rule[1], name)] = tensor
    return renamed


def _count(state: Iterable[str], stage: int) -> int:
    found = [re.match(rf"layer{stage}\.(\d+)\.", name) for name in state]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _expected(state: Mapping[str, torch.Tensor], blocks: tuple[int, ...], bottleneck: bool) -> Iterable[str]:
    """The names that a ResNet of these blocks must have. ``num_batches_tracked`` says nothing about the network."""
    yield "conv1.weight"
    yield from (f"bn1.{leaf}" for leaf in _NORM)
    for stage, count in zip(STAGES, blocks, strict=True):
        for block in (f"layer{stage}.{index}" for index in range(count)):
            for conv in (1, 2, 3) if bottleneck else (1, 2):
                yield f"{block}.conv{conv}.weight"
                yield from (f"{block}.bn{conv}.{leaf}" for leaf in _NORM)
            if block.endswith(".0") and (stage > 1 or _changes_width(state, block)):
                yield f"{block}.downsample.0.weight"
                yield from (f"{block}.downsample.1.{leaf}" for leaf in _NORM)


def _changes_width(state: Mapping[str, torch.Tensor], block: str) -> bool:
    """Whether a block's input and output differ in channels, so that its shortcut must be a projection."""
    first = state.get(f"{block}.conv1.weight")
    last = state.get(f"{block}.conv3.weight", state.get(f"{block}.conv2.weight"))
    return first is not None and last is not None and first.shape[1] != last.shape[0]
