import hashlib
import io
import json
import multiprocessing
import tarfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlbench.core.errors import UserError
from vlbench.data.shapes import write as write_module
from vlbench.data.shapes.records import make_records
from vlbench.data.shapes.scene import sample_scene
from vlbench.data.shapes.world import CLASS_NAMES, GROUPS, HELD_OUT, PARTS, SEEN, TINY, VERSION, Sizes
from vlbench.data.shapes.write import distinct_scenes, read_manifest, write_world

HELD_OUT_NAMES = {combo.name for combo in HELD_OUT}


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_bytes_do_not_depend_on_run_or_processes(tiny_world, tmp_path):
    sizes = replace(TINY, pairs=260)  # more than one job, so that two processes do share the work
    alone = write_world(tmp_path / "alone", sizes=sizes, workers=1)
    together = write_world(tmp_path / "together", sizes=sizes, workers=2)
    ours = contents(alone)
    assert ours == contents(together)
    same = {name: sha for name, sha in contents(tiny_world).items() if not name.startswith(("pairs", "MANIFEST"))}
    assert same.items() <= ours.items()
    few, many = members(tiny_world / "pairs" / "00000.tar"), members(alone / "pairs" / "00000.tar")
    assert few.items() <= many.items(), "an image does not depend on how many are made"


def test_another_seed_is_another_world(tiny_world, tmp_path):
    other = write_world(tmp_path / "other", seed=1, sizes=TINY, workers=1)
    ours, theirs = contents(tiny_world), contents(other)
    assert not {ours[n] for n in ours if n.endswith((".png", ".tar"))} & {
        theirs[n] for n in theirs if n.endswith((".png", ".tar"))
    }


def test_manifest_lists_every_file_with_its_digest(tiny_world):
    manifest = read_manifest(tiny_world)
    found = contents(tiny_world)
    del found["MANIFEST.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    assert (manifest["version"], manifest["seed"], manifest["sizes"]) == (VERSION, 0, asdict(TINY))
    assert manifest["classes"] == list(CLASS_NAMES)
    assert set(manifest["held_out"]) == HELD_OUT_NAMES


def test_pairs_are_in_img2dataset_layout_without_held_out_combinations(tiny_world):
    files = members(tiny_world / "pairs" / "00000.tar")
    assert len(files) == 3 * TINY.pairs
    for index in range(TINY.pairs):
        record = json.loads(files[f"{index:09d}.json"])
        scene = sample_scene(0, "pairs", index)
        assert record["tags"] == [item.name for item in scene.objects]
        assert not set(record["tags"]) & HELD_OUT_NAMES
        assert len(record["boxes"]) == len(record["tags"]) == len(record["objects"])
        assert files[f"{index:09d}.txt"].decode() in record["captions"]["en"]
        assert not any(name in text for text in record["captions"]["en"] for name in HELD_OUT_NAMES)
        with Image.open(io.BytesIO(files[f"{index:09d}.png"])) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))


def test_tar_members_carry_nothing_of_this_machine(tiny_world):
    for path in tiny_world.rglob("*.tar"):
        with tarfile.open(path) as tar:
            facts = {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in tar}
        assert facts == {(0, 0, 0, 0o644, "", "")}


def test_labels_are_seen_classes_in_balance(tiny_world):
    counts = Counter(path.parent.name for path in (tiny_world / "labels" / "train").glob("*/*.png"))
    assert counts == {combo.name: TINY.labels // len(SEEN) for combo in SEEN}


def test_test_images_are_parted_between_seen_and_heldout(tiny_world):
    whole = members(tiny_world / "classes" / "test" / "0.tar")
    seen, held = (members(tiny_world / part / "test" / "0.tar") for part in ("seen", "heldout"))
    assert whole == seen | held
    assert not seen.keys() & held.keys()
    labels = {CLASS_NAMES[int(data)] for name, data in held.items() if name.endswith(".cls")}
    assert labels == HELD_OUT_NAMES
    assert not labels & {CLASS_NAMES[int(data)] for name, data in seen.items() if name.endswith(".cls")}
    for part in ("classes", "seen", "heldout"):
        assert (tiny_world / part / "classnames.txt").read_text().splitlines() == list(CLASS_NAMES)


def test_splits_share_no_image(tiny_world):
    digests = [
        hashlib.sha256(data).hexdigest()
        for path in [
            *tiny_world.glob("pairs/*.tar"),
            *tiny_world.glob("classes/*/*.tar"),
            *tiny_world.glob("r*/*/*.tar"),
        ]
        for name, data in members(path).items()
        if name.endswith(".png")
    ]
    digests += [hashlib.sha256(path.read_bytes()).hexdigest() for path in tiny_world.rglob("*.png")]
    assert len(set(digests)) == len(digests)


def test_retrieval_captions_differ_between_all_thousand_images():
    owner: dict[str, int] = {}
    from vlbench.data.shapes.language import captions  # here: it is the only test that needs it

    chosen = distinct_scenes(0, 1000)
    assert len(set(chosen)) == 1000
    for index in chosen:
        for texts in captions(sample_scene(0, "retrieval", index), detailed=True).values():
            for text in texts:
                assert owner.setdefault(text, index) == index


def test_retrieval_scenes_do_not_depend_on_their_number():
    assert distinct_scenes(0, 300)[:50] == distinct_scenes(0, 50)


def test_coco_boxes_and_areas_are_those_of_the_masks(tiny_world):
    instances = json.loads((tiny_world / "coco/annotations/instances_train.json").read_text())
    captions = json.loads((tiny_world / "coco/annotations/captions_train.json").read_text())
    assert len(instances["images"]) == TINY.coco_train
    assert len(captions["annotations"]) == 5 * TINY.coco_train
    assert not {category["name"] for category in instances["categories"]} & HELD_OUT_NAMES
    assert len({note["id"] for note in instances["annotations"]}) == len(instances["annotations"])
    for note in instances["annotations"]:
        counts, (height, width) = note["segmentation"]["counts"], note["segmentation"]["size"]
        flat = np.repeat(np.arange(len(counts)) % 2, counts)
        rows, columns = np.nonzero(flat.reshape(width, height).T)
        x, y, w, h = note["bbox"]
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + w, y + h)
        assert note["area"] == flat.sum()
    for image in instances["images"]:
        assert (tiny_world / "coco" / "train" / image["file_name"]).is_file()


def test_full_shard_is_not_followed_by_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "_PER_SHARD", 8)
    records = make_records(0, "pairs", range(16), pixels=16)
    write_module._write_pairs(tmp_path / "pairs", records)
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["00000.tar", "00001.tar"]


def test_existing_world_is_left_as_it_is(tiny_world):
    before = (tiny_world / "MANIFEST.json").stat().st_mtime_ns
    assert write_world(tiny_world) == tiny_world
    assert (tiny_world / "MANIFEST.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("arguments,message", [({"seed": 5}, "seed 0"), ({"sizes": Sizes()}, "other sizes")])
def test_another_world_is_not_overwritten(tiny_world, arguments, message):
    with pytest.raises(UserError, match=message):
        write_world(tiny_world, **arguments)


def test_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something other"):
        write_world(tmp_path, sizes=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_manifest_is_said(tmp_path):
    (tmp_path / "MANIFEST.json").write_text("{")
    with pytest.raises(UserError, match=r"MANIFEST\.json"):
        write_world(tmp_path)


def test_failure_leaves_no_half_world(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(write_module, "_write_coco", fail)
    with pytest.raises(OSError, match="disk full"):
        write_world(tmp_path / "world", sizes=TINY, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [".world.lock"]


def test_two_processes_make_one_world(tmp_path):
    context = multiprocessing.get_context("fork")
    helpers = [
        context.Process(target=write_world, args=(tmp_path / "world",), kwargs={"sizes": TINY, "workers": 1})
        for _ in range(2)
    ]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join(60)
    assert [helper.exitcode for helper in helpers] == [0, 0]
    assert read_manifest(tmp_path / "world")["seed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".world.lock", "world"]


def test_version_is_raised_with_every_change_of_the_world(tmp_path):
    """A cached world is known by its version alone, so its content may not change under it."""
    manifest = read_manifest(write_world(tmp_path / "world", sizes=TINY, workers=1))
    # Pictures are left out (how PNG compresses may differ between versions of zlib); test_draw.py holds their pixels.
    words = {name: file["sha256"] for name, file in manifest["files"].items() if not name.endswith((".png", ".tar"))}
    later = {name: digest for name, digest in words.items() if name.partition("/")[0] in GROUPS["finetune"]}
    digests = [
        hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
        for part in ({name: words[name] for name in words.keys() - later.keys()}, later)
    ]
    assert (VERSION, *digests) == ("v2", "b5637d534b4b39a7", "982ad8d680d945c9")


def test_parts_made_alone_are_the_same_bytes(tiny_world, tmp_path):
    whole = contents(tiny_world)
    for group, parts in GROUPS.items():
        made = contents(write_world(tmp_path / group, sizes=TINY, workers=1, parts=parts))
        made.pop("MANIFEST.json")
        assert made
        assert made.items() <= whole.items()
        assert {name.split("/")[0] for name in made} == set(parts)
    assert sorted(PARTS) == sorted(part for parts in GROUPS.values() for part in parts)
