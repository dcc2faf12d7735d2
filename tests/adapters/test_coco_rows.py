from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.making import png, write_files
from tests.stats.coco_scenes import SIDE, nothing_found, nothing_there, perfect, pycocotools_metrics, scene
from vlbench.adapters.common.coco_rows import detection_outcomes, detection_rows
from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Rows
from vlbench.data.sources import open_source
from vlbench.finetune.detection.types import Detections
from vlbench.stats.coco_ap import METRICS
from vlbench.stats.coco_match import Scene
from vlbench.stats.intervals import estimate, mean_of
from vlbench.stats.paired import compare_outcomes
from vlbench.store.examples import rows_from_parquet, rows_to_parquet

NAMES = ["cat", "dog", "cow", "owl"]


def written(root: Path, scenes: list[Scene], *, masks: bool = True, ids: list[int] | None = None, **changes) -> str:
    """The objects of ``scenes`` in COCO's files; ``changes`` replace entries of every annotation."""
    ids = ids or [7 * i + 3 for i in range(len(scenes))]
    annotations = []
    for image_id, one in zip(ids, scenes):
        truth = one.truth
        for place in range(len(truth.classes_G)):
            item = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": 10 * int(truth.classes_G[place]) + 1,
                "bbox": truth.boxes_G4[place].tolist(),
                "area": float(truth.areas_G[place]),
                "iscrowd": int(truth.crowd_G[place]),
            } | ({"segmentation": truth.masks[place]} if masks else {})
            annotations.append({key: value for key, value in (item | changes).items() if value is not None})
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in ids],
        "annotations": annotations,
        "categories": [{"id": 10 * place + 1, "name": name} for place, name in enumerate(NAMES)],
    }
    files = {f"val/{i}.png": png(i, SIDE, SIDE) for i in ids}
    write_files(root, {"annotations/instances_val.json": json.dumps(content), **files})
    return f"coco:{root}"


def detections_of(scenes: list[Scene], *, masks: bool = True) -> list[Detections]:
    found = []
    for one in scenes:
        boxes = one.found.boxes_D4.astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        scores = one.found.scores_D.astype(np.float32)
        found.append(Detections(boxes, scores, one.found.classes_D, tuple(one.found.masks) if masks else None))
    return found


def as_stored(scenes: list[Scene], found: list[Detections]) -> list[Scene]:
    """The scenes with the boxes that the corners in single precision give."""
    stored = []
    for one, d in zip(scenes, found):
        boxes = np.concatenate([d.boxes_K4[:, :2], d.boxes_K4[:, 2:] - d.boxes_K4[:, :2]], axis=1)
        stored.append(replace(one, found=replace(one.found, boxes_D4=boxes.astype(np.float64))))
    return stored


def some_scenes(seed: int = 0, n: int = 24) -> list[Scene]:
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, objects=int(rng.integers(1, 7)), crowds=0.15, ties=12) for _ in range(n)]
    scenes[2], scenes[3] = nothing_found(scenes[2]), nothing_there(scenes[3])
    scenes[4] = nothing_there(nothing_found(scenes[4]))
    return scenes


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[list[Scene], list[Detections], Rows]:
    scenes = some_scenes()
    source = open_source(written(tmp_path_factory.mktemp("coco"), scenes), "val")
    found = detections_of(scenes)
    return scenes, found, detection_rows(source, found, meta={"chosen": {"step": 3}, "notes": ["a note"]})


def test_numbers_from_parquet_are_pycocotools_own(stored) -> None:
    scenes, found, rows = stored
    back = rows_from_parquet(rows_to_parquet(rows))
    outcomes = detection_outcomes(back)
    assert set(outcomes) == {f"{kind}_{name}" for kind in ("box", "mask") for name in METRICS}
    for kind in ("box", "mask"):
        known = pycocotools_metrics(as_stored(scenes, found), masks=kind == "mask", classes=4)
        for name, value in zip(METRICS, known):
            assert mean_of(outcomes[f"{kind}_{name}"]) == pytest.approx(value, abs=1e-9)
            assert back.meta["coco"][f"{kind}_{name}"] == pytest.approx(value, abs=1e-9)
    before = detection_outcomes(rows)
    for name, found_before in before.items():
        assert (found_before.values == outcomes[name].values).all()


def test_rows_hold_the_objects_as_annotated_and_what_was_found(stored) -> None:
    scenes, found, rows = stored
    back = rows_from_parquet(rows_to_parquet(rows))
    assert [int(name) for name in back["id"]] == [7 * i + 3 for i in range(len(scenes))]
    for place, (one, d) in enumerate(zip(scenes, found)):
        assert (back["height"][place], back["width"][place]) == (SIDE, SIDE)
        assert np.array_equal(np.reshape(back["true_boxes"][place], (-1, 4)), one.truth.boxes_G4)
        assert back["true_areas"][place] == one.truth.areas_G.tolist()
        assert back["true_crowd"][place] == one.truth.crowd_G.astype(int).tolist()
        assert back["true_classes"][place] == one.truth.classes_G.tolist()
        assert back["true_masks"][place] == [mask["counts"] for mask in one.truth.masks]
        assert np.array_equal(np.float32(back["boxes"][place]).reshape(-1, 4), d.boxes_K4)
        assert np.array_equal(np.float32(back["scores"][place]), d.scores_K)
        assert back["masks"][place] == [mask["counts"] for mask in d.masks]
    assert back.meta["chosen"] == {"step": 3}
    assert back.meta["notes"][0] == "a note"
    assert "classes without an object, left out of the mean: 1, first 'owl'" in back.meta["notes"]


def test_order_of_the_rows_changes_nothing(stored) -> None:
    *_, rows = stored
    order = np.random.default_rng(1).permutation(len(rows))
    turned = Rows({name: [rows[name][place] for place in order] for name in rows}, rows.meta)
    before, after = detection_outcomes(rows), detection_outcomes(turned)
    for name in before:
        assert mean_of(after[name]) == pytest.approx(mean_of(before[name]), abs=1e-12)
        assert after[name].values == pytest.approx(before[name].values[order], abs=1e-9)
        assert list(after[name].ids) == [before[name].ids[place] for place in order]


def test_perfect_detections_give_one(tmp_path) -> None:
    scenes = [perfect(one) for one in some_scenes(3)]
    source = open_source(written(tmp_path, scenes), "val")
    outcomes = detection_outcomes(detection_rows(source, detections_of(scenes)))
    for name in ("box_ap", "mask_ap", "mask_ap75", "box_ar100"):
        assert mean_of(outcomes[name]) == pytest.approx(1.0, abs=1e-9)
        assert estimate(outcomes[name]).hi == pytest.approx(1.0, abs=1e-9)


def test_no_detection_at_all_gives_zero(tmp_path) -> None:
    scenes = [nothing_found(one) for one in some_scenes(4)]
    source = open_source(written(tmp_path, scenes), "val")
    rows = rows_from_parquet(rows_to_parquet(detection_rows(source, detections_of(scenes))))
    outcomes = detection_outcomes(rows)
    assert {mean_of(found) for found in outcomes.values()} == {0.0}
    found = estimate(outcomes["mask_ap"])
    assert (found.value, found.lo) == (0.0, 0.0)
    assert 0 < found.hi < 0.5, "nothing found on a few images is no proof of nothing"


@pytest.mark.parametrize("truth, found", [(False, True), (True, False)])
def test_without_masks_there_are_numbers_of_boxes_alone(tmp_path, truth, found) -> None:
    scenes = some_scenes(5)
    source = open_source(written(tmp_path, scenes, masks=truth), "val")
    rows = detection_rows(source, detections_of(scenes, masks=found))
    assert "masks" not in set(rows)
    assert set(detection_outcomes(rows)) == {f"box_{name}" for name in METRICS}


def test_area_comes_from_the_mask_where_it_is_not_annotated(tmp_path) -> None:
    scenes = some_scenes(6)
    spec = written(tmp_path, scenes, area=None)
    rows = detection_rows(open_source(spec, "val"), detections_of(scenes))
    pixels = open_source(spec, "val")[0].regions[0].segmentation
    assert rows["true_areas"][0][0] == sum(_runs(pixels)[1::2])
    bare = detection_rows(
        open_source(written(tmp_path / "b", scenes, area=None, masks=False), "val"), detections_of(scenes)
    )
    assert bare["true_areas"][0][0] == pytest.approx(np.prod(scenes[0].truth.boxes_G4[0, 2:]))


def _runs(rle) -> list[int]:
    from vlbench.data.masks import run_lengths

    return run_lengths(rle["counts"])


def test_paired_test_finds_the_better_of_two_models(tmp_path) -> None:
    rng = np.random.default_rng(8)
    good = [scene(rng, objects=4, amount=0.03) for _ in range(40)]
    rng = np.random.default_rng(8)
    poor = [scene(rng, objects=4, amount=0.25, wrong=9) for _ in range(40)]
    poor = [replace(one, found=other.found) for one, other in zip(good, poor)]
    source = open_source(written(tmp_path, good), "val")
    a, b = (detection_outcomes(detection_rows(source, detections_of(scenes))) for scenes in (good, poor))
    test = compare_outcomes(a["mask_ap"], b["mask_ap"])
    assert test.diff == pytest.approx(mean_of(a["mask_ap"]) - mean_of(b["mask_ap"]))
    assert test.lo > 0
    assert test.p < 0.01
    assert test.method.startswith("jackknife pseudo-values, paired")
    same = compare_outcomes(a["mask_ap"], a["mask_ap"])
    assert (same.diff, same.p) == (0.0, 1.0)


def test_bad_input_is_one_clear_line(tmp_path) -> None:
    scenes = some_scenes(9, n=6)
    source = open_source(written(tmp_path / "a", scenes), "val")
    found = detections_of(scenes)
    odd = replace(found[0], scores_K=np.full(len(found[0]), np.nan, np.float32))
    with pytest.raises(UserError, match=r"val\): 3: a box or score of its detections is not finite"):
        detection_rows(source, [odd, *found[1:]])
    small = replace(found[0], masks=tuple({"size": [5, 5], "counts": "i0"} for _ in found[0].masks))
    with pytest.raises(AssertionError, match=r"masks of \[5, 5\] pixels found in an image of \[160, 160\]"):
        detection_rows(source, [small, *found[1:]])
    (tmp_path / "a/val/3.png").write_bytes(png(3, 80, 90))
    with pytest.raises(UserError, match=r"val\): 3: the image has 80 x 90 pixels .* annotations say 160 x 160"):
        detection_rows(source, found)
    bare = open_source(written(tmp_path / "b", [nothing_there(one) for one in scenes]), "val")
    with pytest.raises(UserError, match="has no boxes; detection needs annotated objects"):
        detection_rows(bare, found)
    crowds = [replace(one, truth=replace(one.truth, crowd_G=np.ones(len(one.truth.crowd_G), bool))) for one in scenes]
    with pytest.raises(UserError, match="no image has an object"):
        detection_rows(open_source(written(tmp_path / "c", crowds), "val"), found)
    outside = open_source(altered(written(tmp_path / "d", scenes), bbox=[150, 0, 40, 5]), "val")
    with pytest.raises(BadExample, match=r"instances_val.json annotation 2: bad box: .* reaches outside its image"):
        detection_rows(outside, [*found, found[0]])


def altered(spec: str, **changes) -> str:
    """The data with entries of its second annotation replaced."""
    file = Path(spec.removeprefix("coco:")) / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][1] |= changes
    file.write_text(json.dumps(content))
    return spec


def test_some_objects_with_masks_and_some_without_are_refused(tmp_path) -> None:
    scenes = some_scenes(10, n=6)
    with pytest.raises(UserError, match=r"objects have a mask and others have none, first in image 3: give all"):
        detection_rows(open_source(altered(written(tmp_path, scenes), segmentation=[]), "val"), detections_of(scenes))


def test_rows_that_no_longer_give_the_librarys_number_are_refused(stored) -> None:
    *_, rows = stored
    changed = Rows(rows.columns, {**rows.meta, "coco": {**rows.meta["coco"], "box_ap": 0.9}})
    with pytest.raises(UserError, match=r"box_ap of these rows is 0.* where faster-coco-eval gave 0.900000"):
        detection_outcomes(changed)


def test_objects_in_one_image_alone_have_no_interval(tmp_path) -> None:
    first, *others = some_scenes(11, n=5)
    scenes = [first, *map(nothing_there, others)]
    rows = detection_rows(open_source(written(tmp_path, scenes), "val"), detections_of(scenes))
    with pytest.raises(UserError, match=r"all objects lie in one image: .* no interval; report on more images"):
        detection_outcomes(rows)
