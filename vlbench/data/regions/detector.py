"""Region features by torchvision's Faster R-CNNs: what their box head says of the regions that they find.

The feature of a region is the output of ``box_head`` (1,024 numbers), from which class and box are predicted: pooled
from the box as finally placed, as bottom-up attention does, not from the proposal before it. N regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.files import sha256
from vlbench.core.names import unknown
from vlbench.data.regions.features import RegionFeatures, checked_regions

RANDOM = "random"
_EPS_ZERO = frozenset({"fasterrcnn_resnet50_fpn"})
"""Networks whose published weights torchvision itself runs without an epsilon in the batch normalisation."""


class TorchvisionDetector:
    """Images to regions.

    Args:
        name: ``fasterrcnn_resnet50_fpn``, ``fasterrcnn_resnet50_fpn_v2``, ...
        weights: a local ``.pth`` or ``.safetensors`` file with torchvision's own names, or ``random``. None:
            torchvision's published ones, where it keeps them; nothing is downloaded.
        max_regions: of an image, the most certain first. [M: max_features 100]
        min_score: regions below are left out. [VinVL's extraction: 0.2]
        device: where it runs.
        seed: of random weights.
        options: further arguments of the network (``min_size``).

    Attributes:
        identity: all that decides its regions, in plain values.
        classes: what it tells apart.
        width: numbers of a feature.

    Raises:
        UserError: for an unknown name, or a file that is absent or of another network.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: Path | str | None,
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
        path = default_weights(name) if weights is None else Path(weights).expanduser()
        state = None if weights == RANDOM else _read(path, name)
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
                raise UserError(f"{path} does not fit {name}: {str(error).splitlines()[-1].strip()[:160]}") from None
            if name in _EPS_ZERO:
                for module in net.backbone.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.eps = 0.0
        source = f"random, seed {seed}" if state is None else f"sha256 {sha256(path)[:16]}"
        self.identity = {
            "detector": name,
            "weights": source,
            "max_regions": max_regions,
            "min_score": min_score,
        } | options
        self.classes = tuple(torchvision.models.get_model_weights(name).DEFAULT.meta["categories"])
        self.width = int(net.roi_heads.box_predictor.cls_score.in_features)
        self._net: Any = net.eval().to(device)
        self._device = device

    def __call__(self, image: np.ndarray, *, where: str = "image") -> RegionFeatures:
        """The regions of one image.

        Args:
            image: RGB ``(H, W, 3)`` uint8.
            where: what to call it in an error.
        """
        return self.together([image], [where])[0]

    def together(self, images: Sequence[np.ndarray], where: Sequence[str]) -> list[RegionFeatures]:
        """The regions of images of one size: one of another would be padded, which moves its features.

        Args:
            images: RGB ``(H, W, 3)`` uint8.
            where: what to call each in an error.
        """
        import torch

        assert len({image.shape for image in images}) == 1, "images of one size"
        net = self._net
        height, width = images[0].shape[:2]
        with torch.inference_mode():
            pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(self._device) for image in images]
            batch, _ = net.transform([each.float() / 255 for each in pixels])
            maps = net.backbone(batch.tensors)
            proposals, _ = net.rpn(batch, maps)
            found, _ = net.roi_heads(maps, proposals, batch.image_sizes)
            pooled = net.roi_heads.box_roi_pool(maps, [each["boxes"] for each in found], batch.image_sizes)
            features = net.roi_heads.box_head(pooled).split([len(each["boxes"]) for each in found])
            placed = net.transform.postprocess(found, batch.image_sizes, [(height, width)] * len(images))
        return [
            checked_regions(
                features_ND.float().cpu().numpy(),
                each["boxes"].float().cpu().numpy(),
                size=(width, height),
                tags=[self.classes[label] for label in each["labels"].tolist()],
                scores=each["scores"].float().cpu().numpy(),
                where=name,
            )
            for features_ND, each, name in zip(features, placed, where, strict=True)
        ]


def default_weights(name: str) -> Path:
    """Where torchvision itself keeps the published weights of ``name``, whether or not they are there."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / _url(name).rpartition("/")[2]


def _url(name: str) -> str:
    import torchvision

    return str(torchvision.models.get_model_weights(name).DEFAULT.url)


def _read(path: Path, name: str) -> Any:
    """A file of weights, without unpickling anything but tensors."""
    import torch

    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file of weights; save {_url(name)} there, or name another with --weights FILE "
            f"(--weights {RANDOM}: to try the way only)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises what it likes
        raise UserError(f"{path}: cannot be read as weights: {str(error).splitlines()[0][:160]}") from None
