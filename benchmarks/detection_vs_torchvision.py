"""Training a Mask R-CNN: images per second beside torchvision's own loop, on the same images, network and optimizer.

    python benchmarks/detection_vs_torchvision.py                                      small, on a CPU: a minute or two
    python benchmarks/detection_vs_torchvision.py --backbone torchvision:resnet50 --size 800 --batch 8 \
        --channels 256 --data coco:DIR --workers 8 --device cuda --bf16                what is published, on a GPU

The peer is put together as torchvision's reference script (references/detection) has it: a data set that gives float
images with boxes and masks, a shuffling DataLoader, and ``MaskRCNN`` whose own transform normalises, resizes and pads.
Both have the same FPN over the same backbone, the same heads, flips and step of the optimizer, and take turns within
one process. Steps are timed whole, waiting for data included.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="timm:resnet18", help="timm: or torchvision: with a name; random weights")
    parser.add_argument("--data", default="shapes:coco", help="images with boxes and masks, a data spec")
    parser.add_argument("--size", type=int, default=128, help="short side in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=64, help="of the pyramid")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of either")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of either")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    runs = {"torchvision": peer_steps(args), "vlbench": our_steps(args)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.steps + 3):
        for name in list(runs) if turn % 2 else reversed(list(runs)):
            began = time.perf_counter()
            next(runs[name])
            if args.device != "cpu":
                torch.cuda.synchronize()
            if turn >= 3:  # the first steps choose algorithms and fill queues
                times[name].append(time.perf_counter() - began)
    for name, seconds in times.items():
        print(f"{name:12s} {args.batch / statistics.median(seconds):8.2f} images/s, median of {len(seconds)} steps")
    pairs = [peer / ours for peer, ours in zip(times["torchvision"], times["vlbench"])]
    print(f"vlbench over torchvision: {statistics.median(pairs):.2f} (pairs {min(pairs):.2f} to {max(pairs):.2f})")


def our_steps(args: argparse.Namespace) -> Iterator[None]:
    """One step of vlbench's each time."""
    from vlbench.finetune.detection.feed import DetectionFeed
    from vlbench.finetune.detection.model import TorchvisionDetector
    from vlbench.models.tower_of import tower_of
    from vlbench.train.distributed import Ranks

    backbone, config, source = _parts(args)
    card = backbone.card.preprocess
    feed = DetectionFeed(source, config)
    torch.manual_seed(0)
    model: nn.Module = TorchvisionDetector(
        tower_of(backbone), config, n_classes=len(feed.classes), mean=card.mean, std=card.std
    )
    model = model.to(args.device, memory_format=torch.channels_last).train()
    batches = feed.batches(None, config, start=0, here=Ranks(), pin=args.device != "cpu")

    def losses() -> dict[str, torch.Tensor]:
        return model({name: part.to(args.device, non_blocking=True) for name, part in next(batches).items()})

    return _steps(model, losses, config, args)


def peer_steps(args: argparse.Namespace) -> Iterator[None]:
    """One step of torchvision's each time."""
    from torch.utils.data import DataLoader
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    backbone, config, source = _parts(args)
    card, labels = backbone.card.preprocess, len(source.classes) + 1
    torch.manual_seed(0)
    model: nn.Module = MaskRCNN(
        _Pyramid(backbone, config.channels),
        box_predictor=FastRCNNPredictor(config.box_width, labels),
        mask_predictor=MaskRCNNPredictor(config.channels, config.channels, labels),
        min_size=args.size,
        max_size=config.long_side,
        image_mean=list(card.mean),
        image_std=list(card.std),
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), ((0.5, 1.0, 2.0),) * len(config.anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=2 * config.proposals,
        rpn_post_nms_top_n_train=config.proposals,
        rpn_batch_size_per_image=config.sampled_anchors,
        box_batch_size_per_image=config.sampled_boxes,
        mask_head=MaskRCNNHeads(config.channels, config.mask_convolutions, 1),
    )
    model = model.to(args.device, memory_format=torch.channels_last).train()
    loader: Any = DataLoader(
        _Images(source), args.batch, shuffle=True, drop_last=True, num_workers=args.workers, collate_fn=_zipped
    )

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()

    def losses() -> dict[str, torch.Tensor]:
        images, wanted = next(batches)
        return model(
            [image.to(args.device) for image in images],
            [{name: part.to(args.device) for name, part in one.items()} for one in wanted],
        )

    return _steps(model, losses, config, args)


def _parts(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from vlbench.data.sources import open_source
    from vlbench.finetune.detection.config import DetectionConfig
    from vlbench.models.load import load_backbone

    config = DetectionConfig(
        preset="paper",
        steps=100_000,
        batch_size=args.batch,
        short_sides=(args.size,),
        short_side=args.size,
        long_side=2 * args.size,
        channels=args.channels,
        mask_convolutions=(args.channels,) * 4,
        neck_norm="none",
        optim={"name": "sgd", "lr": 0.001, "clip_norm": 5.0},
        workers=args.workers,
        precision="bf16" if args.bf16 else "fp32",
    )
    return load_backbone(args.backbone, weights="random"), config, open_source(args.data, "train")


def _steps(
    model: nn.Module, losses: Callable[[], dict[str, torch.Tensor]], config: Any, args: argparse.Namespace
) -> Iterator[None]:
    from vlbench.train.optim import build_optimizer

    optimizer = build_optimizer(model, config.optim)
    while True:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            loss = torch.stack([part.float() for part in losses().values()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        yield


class _Pyramid(nn.Module):
    """torchvision's FPN over the same backbone."""

    def __init__(self, backbone: Any, channels: int) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        from vlbench.models.tower_of import at_any_size, tower_of

        self.body, self.out_channels = at_any_size(tower_of(backbone)), channels
        with torch.no_grad():
            maps = self.body(torch.zeros(1, 3, 64, 64))
        self.strides = [stride for stride in sorted(maps) if stride >= 4]
        widths = [maps[stride].shape[1] for stride in self.strides]
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps by level."""
        maps = self.body(images_BCHW)
        return self.fpn(OrderedDict((str(level), maps[stride]) for level, stride in enumerate(self.strides)))


class _Images(torch.utils.data.Dataset[Any]):
    """Float images with boxes, labels and masks, half of them mirrored, as the reference script gives them."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        from faster_coco_eval.core import mask as api
        from PIL import Image
        from torchvision.transforms.functional import to_tensor

        example = self.source[index]
        image = to_tensor(Image.open(io.BytesIO(example.image)).convert("RGB"))
        height, width = image.shape[1:]
        runs = []
        for region in example.regions:
            made = api.frPyObjects(region.segmentation, height, width)
            runs.append(api.merge(made) if isinstance(made, list) else made)
        masks = torch.from_numpy(api.decode(runs)).permute(2, 0, 1).contiguous()
        boxes = torch.tensor([region.box_xyxy for region in example.regions])
        if torch.rand(()) < 0.5:
            image, masks = image.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": torch.tensor(example.extra["categories"]) + 1, "masks": masks}


def _zipped(items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(zip(*items))


if __name__ == "__main__":
    main()
