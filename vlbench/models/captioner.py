"""An image tower whose grid a textual head reads to write captions: VirTex's model.

Shapes: B batch, C channels, H height, W width, N grid cells, D width of a cell, L tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.beam import beam_search
from vlbench.models.textual_head import HeadSize, TextualHead
from vlbench.models.towers import VisualTower
from vlbench.models.vision import VisualConfig, build_visual

DESCRIBED_AT_ONCE = 16
"""Images in one search, always: the last few are filled up with black ones. The shapes of all products are then the
same whatever batch a caption was asked for in, and so is the caption."""


class Captioner(nn.Module):
    """``visual``, the tower that is measured afterwards, and ``textual``, the head that trains it.

    Args:
        visual: the tower; any with a grid of tokens.
        head: size of the textual head.
        vocabulary: V.
        max_length: longest caption in tokens, start and end included.
        dropout: of the head.
        causal: false for masked language modelling.
        backward: whether there is a second decoder, for the reversed caption.
        std: of the head's initial weights.
        grid_stride: pixels between the grid's cells, where it must be of one stride; None: whatever the tower has.

    Raises:
        UserError: for a tower without a grid, of another stride, or whose pooled feature the grid would leave
            untrained.
    """

    def __init__(
        self,
        visual: VisualConfig,
        head: HeadSize,
        *,
        vocabulary: int,
        max_length: int = 30,
        dropout: float = 0.1,
        causal: bool = True,
        backward: bool = True,
        std: float = 0.02,
        grid_stride: int | None = None,
    ) -> None:
        super().__init__()
        self.visual = build_visual(visual)
        cells_BND = settle_grid(self.visual, visual.image_size, stride=grid_stride)
        self.textual = TextualHead(
            head,
            visual_width=cells_BND.shape[2],
            vocabulary=vocabulary,
            max_length=max_length,
            dropout=dropout,
            causal=causal,
            backward=backward,
            std=std,
        )

    def forward(
        self, images_BCHW: torch.Tensor, tokens_BL: torch.Tensor, backward_BL: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """``(logits_BLV,)``, one of each direction: see ``TextualHead``."""
        return self.textual(self.cells(images_BCHW), tokens_BL, backward_BL)

    def cells(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """``cells_BND``: what the tower says of each place of its last map."""
        cells_BND = self.visual.features(images_BCHW, dense=True).tokens_BND
        assert cells_BND is not None, "settle_grid has seen to it"
        return cells_BND

    def describe(
        self,
        images_BCHW: torch.Tensor,
        *,
        start: int,
        end: int,
        beams: int = 5,
        per_beam: int | None = None,
        never: Sequence[int] = (),
    ) -> list[list[int]]:
        """The most likely caption of each image that beam search finds, as tokens between start and end.

        A caption does not depend on the images beside it. Arguments are those of ``models.beam.beam_search``.
        """
        captions: list[list[int]] = []
        for part in images_BCHW.split(DESCRIBED_AT_ONCE):
            filled = part.new_zeros(DESCRIBED_AT_ONCE, *part.shape[1:])
            filled[: len(part)] = part
            cells_BND = self.cells(filled.contiguous(memory_format=torch.channels_last)).repeat_interleave(beams, 0)

            def next_token(tokens_BL: torch.Tensor, cells_BND: torch.Tensor = cells_BND) -> torch.Tensor:
                return self.textual.next_token(cells_BND, tokens_BL)

            tokens_BL, _ = beam_search(
                next_token,
                start_B=torch.full((DESCRIBED_AT_ONCE,), start, device=part.device),
                end=end,
                max_length=self.textual.max_length,
                beams=beams,
                per_beam=per_beam,
                never=never,
            )
            captions += [_until(row, end) for row in tokens_BL[: len(part), 1:].tolist()]
        return captions


def settle_grid(tower: VisualTower, image_size: int, *, stride: int | None = None) -> torch.Tensor:
    """Make sure that a head on the grid trains the tower, and return a grid of one image without content (``meta``).

    What the grid does not pass through would stay as it began: gains of a norm behind the pooling are frozen (they
    would else be decayed, and DistributedDataParallel would wait for their gradients), an attention pool is refused.

    Raises:
        UserError: see Captioner.
    """
    if "tokens" not in tower.parts:
        raise UserError(f"{tower.arch} has no grid of image tokens to write captions from; take torchvision:resnet50")
    shadow = copy.deepcopy(tower).to("meta")
    # One image alone has no variance: batch norm of a map of one cell wants two.
    cells_BND = shadow.features(torch.zeros(2, 3, image_size, image_size, device="meta"), dense=True).tokens_BND
    assert cells_BND is not None, f"{tower.arch} says that it has tokens"
    side = round(cells_BND.shape[1] ** 0.5)
    if stride is not None and side != -(-image_size // stride):
        raise UserError(
            f"{tower.arch} at {image_size} px: its grid is {side} x {side}, a stride of {image_size / side:g}, not "
            f"grid_stride={stride}"
        )
    names = [name for name, parameter in shadow.named_parameters() if parameter.requires_grad]
    used = torch.autograd.grad(cells_BND.sum(), [shadow.get_parameter(name) for name in names], allow_unused=True)
    unused = [name for name, gradient in zip(names, used) if gradient is None]
    pools = [name for name in unused if tower.get_parameter(name).ndim > 1]
    if pools:
        raise UserError(
            f"{tower.arch}: its pooled feature has weights that captions never train ({pools[0]}), since they are "
            "written from the grid; take a tower with average pooling, for instance torchvision:resnet50"
        )
    for name in unused:
        tower.get_parameter(name).requires_grad_(False)
    return cells_BND.detach()[:1]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
