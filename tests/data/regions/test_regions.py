from __future__ import annotations

import base64
import json
import pickle

import numpy as np
import pytest

from vlbench.core.errors import BadExample, UserError
from vlbench.data.regions.features import box_vector
from vlbench.data.regions.npz import NpzFolder, npz_path, read_npz, write_npz
from vlbench.data.regions.open import open_regions, stamp
from vlbench.data.regions.vinvl import VinvlTsv

BOXES = [[0.0, 0.0, 320.0, 240.0], [10.5, 20.0, 100.0, 60.0], [300.0, 200.0, 320.5, 240.9]]


def b64(values, kind="<f4"):
    return base64.b64encode(np.asarray(values, dtype=kind).tobytes()).decode()


def features(seed, n=3, width=2054):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def record(seed=0, n=3, width=2054, **changed):
    rows = features(seed, n, width)
    objects = [
        {"rect": BOXES[i], "class": f"thing {i}", "conf": 0.5 + i / 8, "feature": b64(rows[i]), "attributes": []}
        for i in range(n)
    ]
    return {"image_h": 240, "image_w": 320, "objects": objects, "predicates": []} | changed


def tsv(path, rows):
    path.write_text("".join(f"{name}\t{row if isinstance(row, str) else json.dumps(row)}\n" for name, row in rows))
    return path


def assert_first(regions, seed=0):
    assert regions.features_ND.dtype == np.float32
    assert np.array_equal(regions.features_ND, features(seed)[:, :2048])
    assert regions.tags == ("thing 0", "thing 1", "thing 2")
    assert regions.scores_N.tolist() == [0.5, 0.625, 0.75]
    assert (regions.width, regions.height, len(regions)) == (320, 240, 3)
    np.testing.assert_array_equal(regions.boxes_N4[:2], np.array(BOXES[:2], dtype=np.float32))
    assert regions.boxes_N4[2].tolist() == [300, 200, 320, 240]  # half a pixel outside is cut off


def test_box_vector_is_the_formula():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1, (50, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1) * [320, 240, 320, 240]
    vector = box_vector(boxes, 320, 240)
    for box, row in zip(boxes, vector):
        x1, y1, x2, y2 = box
        expected = [x1 / 320, y1 / 240, x2 / 320, y2 / 240, (x2 - x1) * (y2 - y1) / (320 * 240)]
        np.testing.assert_allclose(row, expected, rtol=1e-6)
    assert vector.dtype == np.float32
    assert box_vector([0, 0, 320, 240], 320, 240).tolist() == [[0, 0, 1, 1, 1]]
    assert box_vector(np.zeros((0, 4)), 320, 240).shape == (0, 5)


def test_vinvl_predictions_give_the_first_2048_numbers(tmp_path):
    rows = [("a/1", record(0)), ("b", record(1)), ("short", record(2, width=2048)), ("none", record(3, n=0))]
    store = open_regions(tsv(tmp_path / "predictions.tsv", rows))
    assert store.ids() == ["a/1", "b", "short", "none"]
    assert len(store) == 4
    assert "b" in store
    assert "c" not in store
    assert_first(store["a/1"], 0)
    assert_first(store["b"], 1)
    assert np.array_equal(store["short"].features_ND, features(2, width=2048))
    assert store["none"].features_ND.shape == (0, 2048)
    np.testing.assert_allclose(store["b"].box_vectors(), box_vector(store["b"].boxes_N4, 320, 240))
    with pytest.raises(KeyError):
        store["c"]
    assert_first(pickle.loads(pickle.dumps(store))["a/1"])


def test_vinvl_features_of_a_whole_image_and_labels_in_another_file(tmp_path):
    labels = record(0)
    for item in labels["objects"]:
        del item["feature"]
    whole = {"num_boxes": 3, "features": b64(features(0))}
    one = VinvlTsv(tsv(tmp_path / "one.tsv", [("a", labels | whole)]))
    two = VinvlTsv(tsv(tmp_path / "two.tsv", [("a", whole)]), labels=tsv(tmp_path / "labels.tsv", [("a", labels)]))
    columns = tsv(tmp_path / "columns.tsv", [("a", f"3\t{whole['features']}")])
    three = open_regions(columns, labels=tmp_path / "labels.tsv")
    for store in (one, two, three):
        assert_first(store["a"])
    with pytest.raises(UserError, match=r"columns\.tsv a: it has no 'objects'; give the file of labels") as caught:
        VinvlTsv(columns)["a"]
    assert not isinstance(caught.value, BadExample), "it is so of every line"
    for name in ("feature_labels=FILE (pretrain muvla)", "--labels FILE", "features=FEATURES.tsv?labels=FILE"):
        assert name in str(caught.value)
    with pytest.raises(BadExample, match=r"labels\.tsv has no line for it"):
        VinvlTsv(tsv(tmp_path / "more.tsv", [("z", whole)]), labels=tmp_path / "labels.tsv")["z"]


def test_a_path_may_name_the_file_of_labels(tmp_path):
    labels = record(0)
    for item in labels["objects"]:
        del item["feature"]
    rows = tsv(tmp_path / "labels.tsv", [("a", labels)])
    path = tsv(tmp_path / "features.tsv", [("a", {"num_boxes": 3, "features": b64(features(0))})])
    both = f"{path}?labels={rows}"
    store = open_regions(both)
    assert_first(store["a"])
    assert store.tags("a") == ("thing 0", "thing 1", "thing 2")
    assert stamp(both) == stamp(path, labels=rows) != stamp(path)
    before = stamp(both)
    rows.write_text(rows.read_text().replace("thing 0", "other thing"))
    assert stamp(both) != before
    for wrong, kwargs, line in (
        (both, {"labels": rows}, "two files of labels"),
        (f"{path}?labels={tmp_path / 'absent.tsv'}", {}, r"absent\.tsv: No such file"),
        (tmp_path, {"labels": rows}, r"a folder of \.npz files has its labels in them"),
    ):
        with pytest.raises(UserError, match=line):
            open_regions(wrong, **kwargs)


def test_tags_alone_are_those_of_the_regions_and_need_no_feature(tmp_path):
    damaged = {"objects": [{"rect": BOXES[0], "class": "cat", "feature": "%%%"}]}
    store = open_regions(
        tsv(tmp_path / "f.tsv", [("a", record(0)), ("none", record(1, n=0)), ("b", record(0) | damaged)])
    )
    assert store.tags("a") == store["a"].tags
    assert store.tags("none") == ()
    assert store.tags("b") == ("cat",)
    folder = tmp_path / "npz"
    for name in ("a", "none"):
        write_npz(npz_path(folder, name), store[name])
    np.savez(npz_path(folder, "plain"), x=features(0), bbox=np.array(BOXES), image_w=320, image_h=240)
    np.savez(npz_path(folder, "short"), x=features(0), bbox=np.array(BOXES), tags=np.array(["one"]))
    npz_path(folder, "cut").write_bytes(npz_path(folder, "a").read_bytes()[:200])
    found = open_regions(folder)
    assert [found.tags(name) for name in ("a", "none", "plain")] == [store["a"].tags, (), ()]
    for name, line in (("short", "3 boxes, 1 tags"), ("cut", "cannot be read")):
        with pytest.raises(BadExample, match=line):
            found.tags(name)
    for each in (store, found):
        with pytest.raises(KeyError):
            each.tags("nobody")


def test_vinvl_line_index_is_used_where_it_lies_beside(tmp_path):
    path = tsv(tmp_path / "f.tsv", [("a", record(0)), ("b", record(1)), ("c", record(2))])
    lines = path.read_bytes().splitlines(keepends=True)
    (tmp_path / "f.lineidx").write_text(f"0\n{len(lines[0]) + len(lines[1])}\n")  # leaves out the second
    store = VinvlTsv(path)
    assert store.ids() == ["a", "c"]
    assert_first(store["c"], 2)


@pytest.mark.parametrize(
    "broken, reason",
    [
        ({"objects": [{"rect": BOXES[0], "class": "x", "feature": b64(np.zeros(2000))}]}, "8000 bytes of features"),
        ({"objects": [{"rect": BOXES[0], "class": "x", "feature": "%%%"}]}, "object 0: .*not base64"),
        ({"objects": [{"rect": BOXES[0], "class": "x", "feature": 3}]}, "not base64"),
        ({"objects": [{"rect": BOXES[0], "class": "x"}]}, "object 0: .*no 'feature'"),
        ({"objects": [{"class": "x", "feature": b64(np.zeros(2048))}]}, "object 0: .*no 'rect'"),
        ({"objects": [{"rect": BOXES[0], "feature": b64(np.zeros(2048))}]}, "object 0: .*no 'class'"),
        ({"objects": [{"rect": BOXES[0], "class": "x", "feature": b64(np.full(2048, np.nan))}]}, "2048 .*not finite"),
        (
            {"objects": [{"rect": [0, 0, 400, 9], "class": "x", "feature": b64(np.zeros(2048))}]},
            "lies outside the image",
        ),
        ({"objects": [{"rect": [9, 0, 4, 9], "class": "x", "feature": b64(np.zeros(2048))}]}, "not left, top, right"),
        ({"objects": [{"rect": [9, 0, 4], "class": "x", "feature": b64(np.zeros(2048))}]}, r"boxes of shape \(1, 3\)"),
        ({"objects": [{"rect": ["a"] * 4, "class": "x", "feature": b64(np.zeros(2048))}]}, "boxes are not numbers"),
        ({"objects": "x"}, "not a list of objects"),
        ({"image_w": 0}, "an image of 0 x 240"),
        ({"image_w": None}, "the size of the image is None"),
        ({"num_boxes": 2, "features": b64(features(0))}, "num_boxes is 2, but it has 3"),
        ({"features": b64(features(0)[:2])}, "bytes of features, not 3 x 2048 or 3 x 2054"),
    ],
)
def test_damaged_vinvl_lines_are_one_line_with_file_and_id(tmp_path, broken, reason):
    path = tsv(tmp_path / "f.tsv", [("im7", record(0) | broken)])
    with pytest.raises(BadExample, match=reason) as caught:
        VinvlTsv(path)["im7"]
    assert caught.value.kind == "bad region features"
    assert str(caught.value).startswith(f"{path} im7")
    assert "\n" not in str(caught.value)


def test_damaged_vinvl_files_are_one_line(tmp_path):
    for text, reason in (("a\t{oops", "not JSON behind the tab"), ("a", "not JSON"), ("a\t[1]", "is a list")):
        (tmp_path / "f.tsv").write_text(text)
        with pytest.raises(BadExample, match=reason):
            VinvlTsv(tmp_path / "f.tsv")["a"]
    with pytest.raises(UserError, match="the id 'a' stands in two lines"):
        VinvlTsv(tsv(tmp_path / "f.tsv", [("a", record()), ("a", record())]))
    for path in (tmp_path / "absent.tsv", tmp_path / "no folder"):
        with pytest.raises(UserError):
            open_regions(path)


def test_npz_in_the_field_s_layout_is_read(tmp_path):
    x = features(0)
    np.savez(
        tmp_path / "7.npz", x=x, bbox=np.array(BOXES), image_w=320, image_h=240, num_bbox=3, info={"pickled": "never"}
    )
    regions = open_regions(tmp_path)["7"]
    assert np.array_equal(regions.features_ND, x)  # every number: it is not VinVL's
    assert regions.tags == ()
    assert regions.scores_N is None


def test_npz_round_trip(tmp_path):
    wanted = VinvlTsv(tsv(tmp_path / "f.tsv", [("a/b", record(0)), ("none", record(1, n=0))]))
    folder = tmp_path / "npz"
    for name in wanted.ids():
        write_npz(npz_path(folder, name), wanted[name])
    store = NpzFolder(folder)
    assert store.ids() == ["a/b", "none"]
    assert "a/b" in store
    assert_first(store["a/b"])
    assert len(store["none"]) == 0
    with pytest.raises(KeyError):
        store["c"]
    assert len(pickle.loads(pickle.dumps(store))) == 2


def test_damaged_npz_files_are_one_line_with_the_file(tmp_path):
    good = {"x": features(0), "bbox": np.array(BOXES), "image_w": 320, "image_h": 240}
    objects = np.array([{"a": 1}], dtype=object)
    cases = [
        ({"x": None}, "it has no 'x', only bbox"),
        ({"image_h": None}, "it has no 'image_h'"),
        ({"x": objects}, "cannot be read"),  # would need pickle
        ({"x": np.full((3, 4), np.inf)}, "12 numbers that are not finite"),
        ({"bbox": np.array(BOXES[:2])}, "3 features, 2 boxes"),
        ({"bbox": np.array(BOXES) * 2}, "lies outside the image of 320 x 240"),
        ({"image_w": np.array([320, 1])}, "not one number each"),
        ({"tags": np.array(["one"])}, "3 features, 3 boxes, 1 tags"),
        ({"scores": np.ones(4)}, "4 scores"),
        ({"x": np.ones(5)}, r"features of shape \(5,\)"),
    ]
    path = tmp_path / "im.npz"
    for changed, reason in cases:
        np.savez(path, **{key: value for key, value in (good | changed).items() if value is not None})
        with pytest.raises(BadExample, match=reason) as caught:
            read_npz(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    np.savez(path, **good)
    for data in (path.read_bytes()[:100], b"", b"text"):
        path.write_bytes(data)
        with pytest.raises(BadExample, match="cannot be read"):
            read_npz(path)


def test_npz_folders_and_ids_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no \.npz file"):
        NpzFolder(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        NpzFolder(tmp_path / "absent")
    for name in ("../up", "/abs", "", "a/../../b"):
        with pytest.raises(UserError, match="cannot be a file name"):
            npz_path(tmp_path, name)
