"""A folder of region features: filled once, gone on with after a kill, never mixed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.making import encoded, pixels, png
from vlbench.core.errors import UserError
from vlbench.core.types import Example
from vlbench.data.regions.extract import RECORD, extract
from vlbench.data.regions.features import RegionFeatures
from vlbench.data.regions.npz import NpzFolder
from vlbench.data.sources import BaseSource


class Pictures(BaseSource):
    def __init__(self, images, spec="pictures"):
        super().__init__(spec, None, provides={"image"})
        self._images = images

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return Example(*list(self._images.items())[index])

    def ids(self):
        return list(self._images)

    def labels(self):
        return None


class Corner:
    """One region an image, the whole of it, whose feature is its first pixel; none where that is black."""

    def __init__(self, dies_at=None, **identity):
        self.identity = {"detector": "corner"} | identity
        self.asked = []
        self.dies_at = dies_at

    def together(self, images, where):
        assert len({image.shape for image in images}) == 1
        if self.dies_at in where:
            raise KeyboardInterrupt
        self.asked.append(list(where))
        found = []
        for image in images:
            height, width = image.shape[:2]
            n = int(image[0, 0].any())
            boxes = np.array([[0, 0, width, height]] * n, dtype=np.float32)
            found.append(
                RegionFeatures(image[0, 0][None][:n].astype(np.float32), boxes, ("x",) * n, None, width, height)
            )
        return found


def pictures(n=7, **others):
    return {f"d/{i}": encoded(pixels(i, 40 + 8 * (i % 2), 64)) for i in range(n)} | others


@pytest.mark.parametrize("size, workers", [(1, 0), (2, 0), (3, 2)])
def test_every_image_is_written_once_and_bad_ones_are_counted(tmp_path, size, workers):
    images = pictures(bad=b"no image", black=encoded(np.zeros((8, 8, 3), np.uint8)))
    detector, shown = Corner(), []
    done = extract(
        [Pictures(images)],
        detector,
        tmp_path / "f",
        batch_size=size,
        workers=workers,
        progress=lambda n, of: shown.append((n, of)),
    )
    assert (done.written, done.kept, done.regions, done.empty) == (8, 0, 7, 1)
    assert done.bad.counts() == {"not an image": 1}
    assert "pictures (all): bad" in str(done.bad.seen)
    assert max(map(len, detector.asked)) <= size
    assert any(len(names) == size for names in detector.asked)
    assert shown[-1] == (9, 9)
    assert [n for n, _ in shown] == sorted(n for n, _ in shown)
    store = NpzFolder(tmp_path / "f")
    assert store.ids() == ["black", *(f"d/{i}" for i in range(7))]
    for i in range(7):
        assert store[f"d/{i}"].features_ND.tolist() == [pixels(i, 40 + 8 * (i % 2), 64)[0, 0].tolist()]
        assert (store[f"d/{i}"].height, store.tags(f"d/{i}")) == (40 + 8 * (i % 2), ("x",))


def test_a_killed_call_is_gone_on_with(tmp_path):
    source = Pictures(pictures())
    with pytest.raises(KeyboardInterrupt):
        extract([source], Corner(dies_at="d/4"), tmp_path)
    assert NpzFolder(tmp_path).ids() == [f"d/{i}" for i in range(4)]
    detector = Corner()
    done = extract([source], detector, tmp_path)
    assert detector.asked == [["d/4"], ["d/5"], ["d/6"]]
    assert (done.written, done.kept) == (3, 4)
    assert not list(tmp_path.rglob("*.tmp"))
    nothing = Corner()
    assert extract([source], nothing, tmp_path).kept == 7
    assert nothing.asked == []


def test_few_images_wait_for_others_of_their_size(tmp_path):
    images = {str(i): encoded(pixels(i, 10 + i, 20)) for i in range(40)}  # no two of one size
    seen = []

    class Counting(Pictures):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    class Watching(Corner):
        def together(self, found, where):
            waiting.append(len(seen) - sum(map(len, self.asked)))
            return super().together(found, where)

    waiting = []
    assert extract([Counting(images)], Watching(), tmp_path, batch_size=2).written == 40
    assert max(waiting) == 16


def test_regions_of_another_detector_or_of_other_images_are_never_mixed(tmp_path):
    extract([Pictures(pictures(2))], Corner(min_score=0.2), tmp_path)
    cases = [
        (Corner(min_score=0.3), pictures(2), "pictures", r"made with min_score 0\.2 \(now 0\.3\); name another folder"),
        (
            Corner(min_score=0.2),
            pictures(3),
            "others",
            r"some of these ids, of other data \(pictures\); name another fol",
        ),
    ]
    for detector, images, spec, line in cases:
        with pytest.raises(UserError, match=line) as caught:
            extract([Pictures(images, spec)], detector, tmp_path)
        assert "\n" not in str(caught.value)
        assert detector.asked == []
    more = {"e": encoded(pixels(9, 8, 8))}  # other ids: one folder may hold several data sets
    assert extract([Pictures(more, "others")], Corner(min_score=0.2), tmp_path).written == 1
    assert json.loads((tmp_path / RECORD).read_text()) == {
        "made_by": {"detector": "corner", "min_score": 0.2},
        "data": [["pictures", "all"], ["others", "all"]],
    }
    assert extract([Pictures(pictures(3))], Corner(min_score=0.2), tmp_path).kept == 2


def test_what_cannot_be_a_folder_of_regions_is_one_line(tmp_path):
    images = pictures(1)
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    np.savez(tmp_path / "foreign" / "7.npz", x=np.zeros(3))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RECORD).write_text("{")
    cases = [
        ([Pictures(images)], "file", "this is a file"),
        ([Pictures(images)], "foreign", rf"holds \.npz files of which no {RECORD} says"),
        ([Pictures(images)], "broken", "cannot be read; name another"),
        ([Pictures(images), Pictures(images, "more")], "new", "the image id 'd/0' occurs twice"),
        ([Pictures({"../up": b""})], "new", "cannot be a file name"),
    ]
    for sources, name, line in cases:
        with pytest.raises(UserError, match=line):
            extract(sources, Corner(), tmp_path / name)
    assert not (tmp_path / "new").exists()


def test_the_images_of_questions_are_called_by_their_own_ids(tmp_path):
    class Questions(Pictures):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return Example(example.id, example.image, extra={"image_key": f"im{index // 2}"})

    one, two = png(1), png(2)
    source = Questions({"q0": one, "q1": one, "q2": two})
    source.provides |= {"question"}
    done = extract([source], Corner(), tmp_path / "f")
    assert done.written == 2
    assert NpzFolder(tmp_path / "f").ids() == ["im0", "im1"]
    source.provides |= {"pair"}
    with pytest.raises(UserError, match="has two images an example"):
        extract([source], Corner(), tmp_path / "pairs")
