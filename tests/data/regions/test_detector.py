from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.making import encoded, pixels
from vlbench.core.errors import UserError
from vlbench.core.types import Example
from vlbench.data.regions.detector import TorchvisionDetector, extract
from vlbench.data.regions.npz import NpzFolder
from vlbench.data.sources import BaseSource

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"  # the smallest of them
SMALL = {"min_size": 64, "max_size": 96}


@pytest.fixture(scope="module")
def detector():
    """A random network whose statistics were set by a forward pass, so that its features differ between regions."""
    made = TorchvisionDetector(NAME, weights="random", max_regions=7, min_score=0.0, **SMALL)
    net = made._net
    for module in net.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.inference_mode():
        net.backbone.train()(torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 4 - 2)
        for weight in (net.roi_heads.box_predictor.cls_score.weight, net.roi_heads.box_head.fc6.weight):
            weight.mul_(20)
    net.eval()
    return made


class Pictures(BaseSource):
    def __init__(self, images):
        super().__init__("pictures", None, provides={"image"})
        self._images = images

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return Example(*list(self._images.items())[index])

    def ids(self):
        return list(self._images)

    def labels(self):
        return None


def test_regions_are_torchvision_s_detections_with_their_box_head_features(detector):
    net = detector._net
    for image in (pixels(0, 80, 120), pixels(1, 60, 50)):
        regions = detector(image)
        tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        assert 0 < len(regions) <= 7
        assert (regions.height, regions.width) == image.shape[:2]
        assert len(set(regions.tags)) > 1
        with torch.inference_mode():
            one = net([tensor])[0]
            np.testing.assert_allclose(regions.boxes_N4, one["boxes"].numpy(), atol=1e-3)
            np.testing.assert_allclose(regions.scores_N, one["scores"].numpy(), atol=1e-5)
            assert regions.tags == tuple(detector.classes[label] for label in one["labels"])
            # The features again, from the boxes that came out.
            batch, _ = net.transform([tensor])
            scale = torch.tensor(batch.image_sizes[0][::-1]) / torch.tensor(image.shape[1::-1])
            boxes = torch.from_numpy(regions.boxes_N4) * scale.repeat(2)
            pooled = net.roi_heads.box_roi_pool(net.backbone(batch.tensors), [boxes], batch.image_sizes)
            expected = net.roi_heads.box_head(pooled).numpy()
        assert regions.features_ND.shape == (len(regions), 1024)
        size = np.abs(expected).max()
        np.testing.assert_allclose(regions.features_ND, expected, atol=2e-3 * size)
        assert np.ptp(expected, axis=0).max() > 0.05 * size


def test_weights_come_from_a_local_file_and_a_seed(detector, tmp_path):
    path = tmp_path / "net.pth"
    torch.save(detector._net.state_dict(), path)
    options = {"max_regions": 3, "min_score": 0.0, **SMALL}
    image = pixels(2, 64, 64)
    same = TorchvisionDetector(NAME, weights=path, seed=9, **options)(image)
    expected = detector(image).features_ND[:3]
    np.testing.assert_allclose(same.features_ND, expected, atol=1e-5 * np.abs(expected).max())
    other = TorchvisionDetector(NAME, weights="random", seed=9, **options)(image)
    assert not np.allclose(same.features_ND, other.features_ND, atol=0.1 * np.abs(expected).max())


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    cases = [
        ("fasterrcnn_resnet51_fpn", "random", "did you mean 'fasterrcnn_resnet50_fpn'"),
        (NAME, tmp_path / "absent.pth", "there is no such file of weights"),
        (NAME, tmp_path / "text.pth", "cannot be read as weights"),
        (NAME, tmp_path / "other.pth", f"does not fit {NAME}"),
    ]
    for name, weights, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            TorchvisionDetector(name, weights=weights)
        assert "\n" not in str(caught.value)


def test_extraction_writes_the_npz_of_each_image_once(detector, tmp_path):
    pictures = {f"d/{i}": encoded(pixels(i, 40 + i, 64)) for i in range(5)} | {"bad": b"no image"}
    source = Pictures(pictures)
    counts = extract(source, detector, tmp_path)
    assert counts == {"written": 5, "kept": 0, "bad": 1, "regions": counts["regions"]}
    store = NpzFolder(tmp_path)
    assert store.ids() == [f"d/{i}" for i in range(5)]
    assert counts["regions"] == sum(len(store[name]) for name in store.ids())
    again = detector(pixels(3, 43, 64))
    np.testing.assert_allclose(store["d/3"].features_ND, again.features_ND, atol=2e-3 * np.abs(again.features_ND).max())
    assert store["d/3"].tags == again.tags
    (tmp_path / "d" / "1.npz").unlink()
    assert extract(source, detector, tmp_path) == counts | {"written": 1, "kept": 4, "regions": len(store["d/1"])}
