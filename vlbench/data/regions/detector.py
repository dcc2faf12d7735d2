"""Region features by torchvision's Faster R-CNNs: what their box head says of the regions that they find.

The feature of a region is the output of ``box_head`` (1,024 numbers), from which class and box are predicted: pooled
from the box as finally placed, as bottom-up attention does, not from the proposal before it. N regions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.names import unknown
from vlbench.core.types import Source
from vlbench.data.images import decode
from vlbench.data.regions.features import RegionFeatures, checked_regions
from vlbench.data.regions.npz import npz_path, write_npz

RANDOM = "random"
_EPS_ZERO = frozenset({"fasterrcnn_resnet50_fpn"})
"""Networks whose published weights torchvision itself runs without an epsilon in the batch normalisation."""


class TorchvisionDetector:
    """Images to regions.

    Args:
        name: ``fasterrcnn_resnet50_fpn``, ``fasterrcnn_resnet50_fpn_v2``, ...
        weights: a local ``.pth`` or ``.safetensors`` file with torchvision's own names, or ``random``.
        max_regions: of an image, the most certain first. [M: max_features 100]
        min_score: regions below are left out. [VinVL's extraction: 0.2]
        device: where it runs.
        seed: of random weights.
        options: further arguments of the network (``min_size``).

    Raises:
        UserError: for an unknown name, or a file that is absent or of another network.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: Path | str,
        max_regions: int = 100,
        min_score: float = 0.2,
        device: str = "cpu",
        seed: int = 0,
        **options: Any,
    ) -> None:
        import torch
        import torchvision

        known = [n for n in torchvision.models.list_models(torchvision.models.detection) if n.startswith("fasterrcnn")]
        if name not in known:
            raise UserError(unknown("torchvision detector", name, known))
        state = None if weights == RANDOM else _read(Path(weights))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = torchvision.models.get_model(
                name,
                weights=None,
                weights_backbone=None,
                box_score_thresh=min_score,
                box_detections_per_img=max_regions,
                **options,
            )
        if state is not None:
            try:
                net.load_state_dict(state)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise UserError(f"{weights} does not fit {name}: {str(error).splitlines()[-1].strip()[:160]}") from None
            if name in _EPS_ZERO:
                for module in net.backbone.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.eps = 0.0
        self.classes = tuple(torchvision.models.get_model_weights(name).DEFAULT.meta["categories"])
        self._net: Any = net.eval().to(device)
        self._device = device

    def __call__(self, image: np.ndarray, *, where: str = "image") -> RegionFeatures:
        """The regions of one image: alone, since what is beside it in a batch would pad it and move its features.

        Args:
            image: RGB ``(H, W, 3)`` uint8.
            where: what to call it in an error.
        """
        import torch

        net = self._net
        height, width = image.shape[:2]
        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(self._device).float() / 255
            batch, _ = net.transform([pixels])
            maps = net.backbone(batch.tensors)
            proposals, _ = net.rpn(batch, maps)
            found, _ = net.roi_heads(maps, proposals, batch.image_sizes)
            pooled = net.roi_heads.box_roi_pool(maps, [found[0]["boxes"]], batch.image_sizes)
            features = net.roi_heads.box_head(pooled)
            placed = net.transform.postprocess(found, batch.image_sizes, [(height, width)])[0]
        return checked_regions(
            features.float().cpu().numpy(),
            placed["boxes"].float().cpu().numpy(),
            size=(width, height),
            tags=[self.classes[label] for label in placed["labels"].tolist()],
            scores=placed["scores"].float().cpu().numpy(),
            where=where,
        )


def extract(
    source: Source,
    detector: TorchvisionDetector,
    folder: Path | str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write ``<id>.npz`` for every image of ``source``; files that are there already are kept.

    Args:
        source: images.
        detector: what finds the regions.
        folder: made where it is absent.
        progress: called with the images done, and all of them.

    Returns:
        Counts: ``written``, ``kept``, ``regions`` of the written ones, and ``bad``: images that cannot be read.
    """
    counts = {"written": 0, "kept": 0, "regions": 0, "bad": 0}
    ids = source.ids()
    for index, image_id in enumerate(ids):
        path = npz_path(Path(folder), image_id)
        if path.exists():
            counts["kept"] += 1
        else:
            try:
                image = decode(source[index].image or b"", where=image_id)
            except BadExample:
                counts["bad"] += 1
            else:
                regions = detector(np.asarray(image), where=image_id)
                write_npz(path, regions)
                counts["written"] += 1
                counts["regions"] += len(regions)
        if progress is not None:
            progress(index + 1, len(ids))
    return counts


def _read(path: Path) -> Any:
    """A file of weights, without unpickling anything but tensors."""
    import torch

    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights; name one, or say {RANDOM}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises what it likes
        raise UserError(f"{path}: cannot be read as weights: {str(error).splitlines()[0][:160]}") from None
