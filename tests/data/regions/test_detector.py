from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tests.data.making import pixels
from tests.data.regions.calibrated import NAME, SMALL, calibrated
from vlbench.core.errors import UserError
from vlbench.data.regions.detector import TorchvisionDetector


@pytest.fixture(scope="module")
def detector():
    return calibrated()


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


def test_images_of_one_size_have_the_same_regions_together_and_alone(detector):
    images = [pixels(i, 80, 120) for i in range(3)]
    for image, regions in zip(images, detector.together(images, ["a", "b", "c"]), strict=True):
        alone = detector(image)
        assert regions.tags == alone.tags
        np.testing.assert_allclose(regions.boxes_N4, alone.boxes_N4, atol=1e-3)
        size = np.abs(alone.features_ND).max()
        np.testing.assert_allclose(regions.features_ND, alone.features_ND, atol=2e-3 * size)


def test_published_weights_are_taken_where_torchvision_keeps_them(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth"
    with pytest.raises(
        UserError, match=rf"{path}: there is no such .*save https://.*-907ea3f9\.pth there, or name ano"
    ):
        TorchvisionDetector(NAME, weights=None)
    path.parent.mkdir()
    # As the published files are: of frozen normalisation, which counts no batches, and without torch's metadata.
    state = {key: value for key, value in detector._net.state_dict().items() if "num_batches" not in key}
    torch.save(state, path)
    options = {"max_regions": 3, "min_score": 0.0, **SMALL}
    image = pixels(2, 64, 64)
    found = TorchvisionDetector(NAME, weights=None, **options)
    np.testing.assert_allclose(found(image).scores_N, detector(image).scores_N[:3], atol=1e-5)
    assert found.width == found(image).features_ND.shape[1]
    assert found.identity == {
        "detector": NAME,
        "weights": f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}",
        **options,
    }
