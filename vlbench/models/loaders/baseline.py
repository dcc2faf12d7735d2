"""``baseline:shuffled`` and ``baseline:constant``: models that know nothing of an image, as rows of every table.

``shuffled`` gives each image numbers of its own, drawn from its pixels: a head can tell images apart, and learn them by
heart, but what it learns says nothing of another image. That is what features shuffled over images are; of a task on
an image and a question it leaves the question. ``constant`` gives every image the same numbers; in the tasks that ask
a question it is not tuned, and answers with what leads the training data (``adapters/common/questions.py``).

Both have one weight, by which the numbers are multiplied, so that they can be trained as any tower can, to no avail.

Shapes: B batch, C channels, H height, W width, D width of the pooled feature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.models.backbone import TorchBackbone
from vlbench.models.loaders.shared import RANDOM
from vlbench.models.towers import VisualTower, grid_tokens

SHUFFLED, CONSTANT = "shuffled", "constant"
_FEATURES = {
    SHUFFLED: "Gaussian numbers drawn from the image's pixels",
    CONSTANT: "ones",
}
_STRIDES = (4, 8, 16, 32)
_WIDTH = 64
"""Of the pooled feature and of every map: as many numbers as the smallest networks give."""
# With this mean and deviation, a pixel's value comes back from the normalised image exactly, on any device.
_PREPROCESS = Preprocess(
    image_size=(64, 64), resize="squash", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def load(ref: str, *, weights: str | None = None, seed: int = 0) -> TorchBackbone:
    """The baseline ``ref``; ``--weights random:SEED`` draws other numbers.

    Raises:
        UserError: for an unknown baseline, or a file of weights.
    """
    if ref not in _FEATURES:
        raise UserError(f"--model baseline:{ref}: {unknown('baseline', ref, _FEATURES)}")
    if weights not in (None, RANDOM):
        raise UserError(f"--model baseline:{ref}: it has no weights to load; leave --weights out, or random:SEED")
    tower = ShuffledTower(seed) if ref == SHUFFLED else ConstantTower()
    card = ModelCard(
        id=f"baseline:{ref}",
        loader="baseline",
        arch=ref,
        preprocess=_PREPROCESS,
        provides=tower.parts,
        feature=tower.feature,
        pretrain_data=("nothing: a baseline",),
        images_seen=0,
        params=0,
    )
    return TorchBackbone(card, tower)


class _BlindTower(VisualTower):
    """Maps of the usual strides and a pooled feature, all made of numbers that a subclass gives."""

    width = _WIDTH
    parts = frozenset({"pooled", "tokens", "maps"})

    def __init__(self, arch: str) -> None:
        super().__init__(nn.Module(), arch)
        self.feature = _FEATURES[arch]
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """``pooled_BD``."""
        return self._numbers(images_BCHW, [(_WIDTH,)])[0] * self.scale

    def _numbers(self, images_BCHW: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        """One tensor ``(B, *shape)`` of each shape; the first is the same whatever is asked for after it."""
        raise NotImplementedError

    def _dense(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor]]:
        height, width = images_BCHW.shape[2:]
        sizes = [(_WIDTH, -(-height // stride), -(-width // stride)) for stride in _STRIDES]
        pooled_BD, *maps = (part * self.scale for part in self._numbers(images_BCHW, [(_WIDTH,), *sizes]))
        return pooled_BD, grid_tokens(maps[-1]), dict(zip(_STRIDES, maps, strict=True))


class ShuffledTower(_BlindTower):
    """Numbers of each image's own.

    Args:
        seed: of the numbers.
    """

    seed: torch.Tensor

    def __init__(self, seed: int) -> None:
        super().__init__(SHUFFLED)
        self.register_buffer("seed", torch.tensor(seed))

    def _numbers(self, images_BCHW: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        if images_BCHW.is_meta:  # asked for shapes alone: there are no pixels to draw from
            return [images_BCHW.new_empty(len(images_BCHW), *shape, dtype=torch.float32) for shape in shapes]
        pixels_BCHW = ((images_BCHW.float() + 1) * 127.5).round().to("cpu", torch.int16).contiguous().numpy()
        salt = int(self.seed).to_bytes(8, "little", signed=True)
        rows = []
        for pixels_CHW in pixels_BCHW:
            digest = hashlib.blake2b(pixels_CHW.tobytes(), digest_size=8, key=salt).digest()
            draw = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            rows.append([torch.randn(shape, generator=draw) for shape in shapes])
        return [torch.stack(parts).to(images_BCHW.device) for parts in zip(*rows, strict=True)]


class ConstantTower(_BlindTower):
    """The number one."""

    def __init__(self) -> None:
        super().__init__(CONSTANT)

    def _numbers(self, images_BCHW: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        return [torch.ones(len(images_BCHW), *shape, device=images_BCHW.device) for shape in shapes]
