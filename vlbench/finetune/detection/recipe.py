"""Mask R-CNN as a recipe of fine-tuning: which model, which loss, and how a tuned one is asked.

Shapes: none; see batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchvision.transforms.v2 import functional as tf

from vlbench.core.types import Source
from vlbench.data.images import image_at
from vlbench.data.loading import in_batches, loaded
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.finetune.detection.feed import DetectionFeed
from vlbench.finetune.detection.neck import DIVISOR
from vlbench.finetune.detection.sizes import target_size
from vlbench.finetune.detection.types import Detections
from vlbench.finetune.recipe import FineTuner
from vlbench.models.tower_of import tower_of
from vlbench.train.distributed import Ranks, gather_objects, mean_over_ranks, ranks

LARGEST_BATCH = 16
"""Images in which objects are looked for at once, at most."""
MOST_WAITING = 256
"""Images that are kept until there are enough of their size, at most."""


class DetectionTuner(FineTuner):
    """A detector over one backbone, whose weights are copied.

    Args:
        backbone: with an image tower that has maps.
    """

    name = "detection"

    def __init__(self, backbone: Any) -> None:
        self.tower = tower_of(backbone)
        self.card = backbone.card

    def build(self, config: DetectionConfig, classes: Sequence[str]) -> nn.Module:
        """The engine's model. Under distributed training on GPUs its batch norms count the images of all of them.

        Raises:
            UserError: where the tower does not suit it, or the engine is not there.
        """
        assert self.card is not None, "set when it was made"
        mean, std = self.card.preprocess.mean, self.card.preprocess.std
        model: nn.Module
        if config.engine == "detectron2":
            from vlbench.finetune.detection.detectron2_engine import build_detectron2

            model = build_detectron2(self.tower, config, n_classes=len(classes), mean=mean, std=std)
        else:
            from vlbench.finetune.detection.model import TorchvisionDetector

            model = TorchvisionDetector(self.tower, config, n_classes=len(classes), mean=mean, std=std)
        if ranks().world > 1 and "nccl" in str(dist.get_backend()):
            from timm.layers import convert_sync_batchnorm

            model = convert_sync_batchnorm(model)
        return model

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """The sum of the engine's losses, and each of them."""
        parts = {name: value.float() for name, value in model(batch).items()}
        total = torch.stack(list(parts.values())).sum()
        return {"loss": mean_over_ranks(total), **{name: mean_over_ranks(value) for name, value in parts.items()}}


@torch.no_grad()
def detect_all(
    model: nn.Module, source: Source, config: DetectionConfig, *, device: torch.device | str, together: bool = False
) -> list[Detections]:
    """What a tuned model finds in every image of a source, in its order.

    Only images that are padded to one size are looked at together: beside a larger one an image has more padding, and
    near its edge that shows. So what is found in an image is its own, whichever images stand beside it.

    Args:
        model: in evaluation mode, on ``device``.
        source: of images.
        config: ``precision``, ``workers``, ``batch_size``.
        device: where the model is.
        together: whether all ranks call it and divide the images; all get all detections.

    Raises:
        BadExample: where an image cannot be read: a test set with a hole would give another number.
    """
    here = ranks() if together else Ranks()
    mine = range(here.rank, len(source), here.world)
    by_place: dict[int, Detections] = {}
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16")
    for places, images in _alike(_stored_images(source, mine, config), config):
        with autocast:
            seen: list[Detections] = model.detect(images)  # type: ignore[operator]
        by_place.update(zip(places, seen, strict=True))
    found = [by_place[place] for place in range(len(mine))]
    if here.world == 1:
        return found
    shares = gather_objects(found)
    return [shares[index % here.world][index // here.world] for index in range(len(source))]


@torch.no_grad()
def renew_norms(model: nn.Module, feed: DetectionFeed, config: DetectionConfig) -> None:
    """Take the statistics of batch norm anew over ``config.precise_norm`` training batches (PreciseBN, 2105.07576).

    The running averages of training are of weights that have moved on; these are the plain means over batches of the
    weights that are kept. The batches are those that training would have read next.
    """
    norms = [child for child in model.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    if not norms or not config.precise_norm:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    device = next(model.parameters()).device
    on = config.model_copy(update={"steps": config.steps + config.precise_norm, "accumulate": 1})
    model.train()
    torch.manual_seed(config.seed)  # which boxes the heads see is drawn: alike on every rank, and after a resume
    for batch in feed.batches(None, on, start=config.steps, here=Ranks(), pin=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            model({name: tensor.to(device) for name, tensor in batch.items()})
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()


def _alike(images: Iterable[torch.Tensor], config: DetectionConfig) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Batches of images that are padded to one size, each with the places of its images among all of them."""
    waiting: dict[tuple[int, int], list[tuple[int, torch.Tensor]]] = {}
    for place, image_CHW in enumerate(images):
        size = target_size(image_CHW.shape[1], image_CHW.shape[2], config.short_side, config.long_side)
        padded = -(-size[0] // DIVISOR), -(-size[1] // DIVISOR)
        waiting.setdefault(padded, []).append((place, image_CHW))
        if len(waiting[padded]) == _at_once(config):
            yield _unzipped(waiting.pop(padded))
        elif sum(map(len, waiting.values())) > MOST_WAITING:
            yield _unzipped(waiting.pop(max(waiting, key=lambda key: len(waiting[key]))))
    for rest in waiting.values():
        yield _unzipped(rest)


def _unzipped(placed: Sequence[tuple[int, torch.Tensor]]) -> tuple[list[int], list[torch.Tensor]]:
    return [place for place, _ in placed], [image_CHW for _, image_CHW in placed]


def _at_once(config: DetectionConfig) -> int:
    return min(config.batch_size, LARGEST_BATCH)


def _stored_images(source: Source, indices: Sequence[int], config: DetectionConfig) -> Iterator[torch.Tensor]:
    """uint8 images of their stored size, in order."""
    batches = in_batches(indices, _at_once(config))
    for images in loaded(partial(_decoded, source), batches, workers=config.workers):
        yield from images


def _decoded(source: Source, indices: Sequence[int]) -> list[torch.Tensor]:
    return [tf.pil_to_tensor(image_at(source, index)[1]) for index in indices]
