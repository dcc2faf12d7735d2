from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from pycocotools import mask as official

from vlbench.core.errors import BadExample
from vlbench.data.masks import (
    areas_of,
    box_problem,
    boxes_of,
    from_bitmap,
    from_bitmaps,
    mask_problem,
    run_lengths,
    to_bitmap,
    to_bitmaps,
    to_rle,
)

WHERE = "instances_val.json annotation 7"


def runs_of(mask: np.ndarray) -> list[int]:
    """COCO's run lengths written out: column by column, the first run of 0, which may be empty."""
    runs, value = [0], 0
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def some_masks(n: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = rng.integers(1, 70, (n, 2))
    masks = [rng.random(tuple(shape)) < rng.random() for shape in shapes]
    blocks = [np.kron(rng.random((3, 3)) < 0.5, np.ones(tuple(shape), bool)).astype(bool) for shape in shapes[:20]]
    return [*masks, *blocks, np.zeros((5, 7), bool), np.ones((5, 7), bool), np.ones((300, 200), bool)]


def test_all_three_forms_are_the_same_pixels() -> None:
    for mask in some_masks():
        rle = from_bitmap(mask)
        assert (to_bitmap(rle) == mask).all()
        assert run_lengths(rle["counts"]) == runs_of(mask)
        known = official.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle == {"size": list(mask.shape), "counts": known["counts"].decode()}
        for counts in (rle["counts"], rle["counts"].encode(), runs_of(mask)):
            assert to_rle({"size": list(mask.shape), "counts": counts}, *mask.shape, where=WHERE) == rle
        assert areas_of([rle]).tolist() == [mask.sum()]


def test_polygons_cover_the_pixels_that_pycocotools_gives_them() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        height, width = rng.integers(10, 80, 2).tolist()
        parts = [
            (rng.random((int(rng.integers(3, 9)), 2)) * [width + 2, height + 2] - 1).ravel().tolist() for _ in range(2)
        ]
        known = official.merge(official.frPyObjects(parts, height, width))
        both, first = (to_rle(of, height, width, where=WHERE) for of in (parts, parts[:1]))
        assert both == {"size": [height, width], "counts": known["counts"].decode()}
        assert (to_bitmap(first) <= to_bitmap(both)).all()


def test_a_rectangle_is_its_pixels() -> None:
    mask = to_bitmap(to_rle([[2, 1, 6, 1, 6, 4, 2, 4]], 8, 10, where=WHERE))
    expected = np.zeros((8, 10), bool)
    expected[1:4, 2:6] = True
    assert (mask == expected).all()
    rles = [from_bitmap(expected), from_bitmap(np.zeros((8, 10)))]
    assert boxes_of(rles).tolist() == [[2, 1, 6, 4], [0, 0, 0, 0]]
    assert (to_bitmaps(rles) == np.stack([expected, np.zeros((8, 10), bool)])).all()
    assert from_bitmaps(np.stack([expected])) == rles[:1]


def test_no_mask_is_no_error() -> None:
    assert (areas_of([]).shape, boxes_of([]).shape, from_bitmaps(np.zeros((0, 4, 5)))) == ((0,), (0, 4), [])
    assert mask_problem(None) is None
    assert mask_problem([]) is None
    with pytest.raises(ValueError, match="height and width are not known"):
        to_bitmaps([])


@pytest.mark.parametrize(
    "segmentation, words",
    [
        ([[1, 1, 5, 5]], "a polygon of 4 numbers: three points are the fewest"),
        ([[1, 1, 5, 1, 5, 5], [1, 1]], "a polygon of 2 numbers"),
        ([[1, 1, 5, 1, 5, 5, 2]], "a polygon of 7 numbers: x and y of each point make an even number"),
        ([[1, 1, 5, 1, 5, "5"]], "is not a list of numbers"),
        ([[1, 1, 5, 1, 5, True]], "is not a list of numbers"),
        ([1, 1, 5, 1, 5, 5], "is not a list of numbers"),
        ([[1, 1, 5, 1, math.nan, 5]], "not finite"),
        ([[1, 1, 1e12, 1, 5, 5]], "from 1 to 1e.12 in an image of 4 x 5 pixels"),
        ([[1, -30, 3, 1, 5, 5]], "from -30 to 5 in an image"),
        ("polygon", "is neither polygons nor run lengths"),
        ({"size": [5, 4], "counts": [20]}, r"run lengths of size \[5, 4\], but the image is 4 x 5 pixels"),
        ({"size": [4], "counts": [20]}, r"size \[4\], which is not \[height, width\]"),
        ({"size": [4, 5.0], "counts": [20]}, "which is not"),
        ({"counts": [20]}, "size None"),
        ({"size": [4, 5], "counts": [3, 4]}, "add up to 7, not to 4 x 5 = 20 pixels"),
        ({"size": [4, 5], "counts": []}, "add up to 0, not to"),
        ({"size": [4, 5], "counts": [30, -10]}, "a negative run, -10"),
        ({"size": [4, 5], "counts": [3.5, 16.5]}, "not all whole numbers"),
        ({"size": [4, 5]}, "neither a list nor a string"),
        ({"size": [4, 5], "counts": "d1"}, "add up to 52, not to"),
        ({"size": [4, 5], "counts": "922 3"}, "the character ' ', which"),
        ({"size": [4, 5], "counts": "d0d"}, "end within a number"),
        ({"size": [4, 5], "counts": "dé"}, "the character 'Ã'"),
    ],
)
def test_a_malformed_mask_is_one_line_with_its_place(segmentation, words) -> None:
    with pytest.raises(BadExample, match=words) as caught:
        to_rle(segmentation, 4, 5, where=WHERE)
    assert (caught.value.kind, caught.value.where) == ("bad mask", WHERE)
    assert "\n" not in str(caught.value)


def test_a_mask_without_a_polygon_has_no_form() -> None:
    for empty in (None, [], {}):
        with pytest.raises(BadExample, match=f"{WHERE}: bad mask: no polygon and no run lengths"):
            to_rle(empty, 4, 5, where=WHERE)


@pytest.mark.parametrize(
    "box, words",
    [
        ([1, 2, 3], "is not"),
        (None, "is not"),
        ([1, 2, 3, "4"], "is not"),
        ([1, 2, -3, 4], "negative size"),
        ([1, 2, math.nan, 4], "not finite"),
        ([1, 2, math.inf, 4], "not finite"),
        ([9, 2, 3.1, 4], "outside its image of 12 x 11 pixels"),
        ([9, 9, 1, 5], "outside its image"),
        ([-2, 2, 4, 4], "outside its image"),
        ([2, -1.5, 4, 4], "outside its image"),
        ([200, 2, 0, 0], "outside its image"),
    ],
)
def test_a_malformed_box_is_told(box, words) -> None:
    problem = box_problem(box, 12, 11)
    assert problem is not None
    assert words in problem
    assert repr(box) in problem


@pytest.mark.parametrize("box", [[0, 0, 11, 12], [1.5, 2, 0, 0], (1, 2, 3, 4), [-0.4, 0, 11.9, 13]])
def test_boxes_of_cocos_kind_are_right(box) -> None:
    assert box_problem(box, 12, 11) is None


def test_a_box_of_many_numbers_is_told_in_one_line() -> None:
    assert len(str(box_problem([1] * 10_000))) < 200


def test_without_the_size_of_the_image_the_rest_is_still_checked() -> None:
    assert box_problem([500, 2, 3, 4]) is None
    assert "negative" in str(box_problem([500, 2, -3, 4]))
    assert mask_problem({"size": [4, 5], "counts": [20]}) is None
    assert "add up to 7" in str(mask_problem({"size": [4, 5], "counts": [7]}))


def test_importing_it_loads_no_library_of_masks_and_no_torch() -> None:
    code = "import sys, vlbench.data.masks; print({'torch', 'faster_coco_eval', 'pycocotools'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
