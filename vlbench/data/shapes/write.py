"""The world on disk, in the formats that the field already uses, so that the real readers read it back.

``pairs`` is in img2dataset's layout, ``classes``, ``seen``, ``heldout`` and ``retrieval`` in CLIP_benchmark's,
``labels`` in class folders, ``coco`` in COCO's; ``write_finetune`` writes the parts that backbones are
fine-tuned on. The bytes depend on the seed and the sizes alone.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlbench.core.errors import UserError
from vlbench.core.files import sha256
from vlbench.data.shapes.files import json_bytes, write_json, write_text
from vlbench.data.shapes.language import captions
from vlbench.data.shapes.records import Maker, Record
from vlbench.data.shapes.scene import Scene, sample_scene
from vlbench.data.shapes.world import CLASS_NAMES, HELD_OUT, PARTS, SEEN, TEMPLATES, VERSION, Sizes
from vlbench.data.shapes.write_finetune import write_finetune_parts

MANIFEST = "MANIFEST.json"
_PER_SHARD = 4000
_HELD_OUT_NAMES = frozenset(combo.name for combo in HELD_OUT)


def write_world(
    root: Path | str,
    *,
    seed: int = 0,
    sizes: Sizes | None = None,
    workers: int = 2,
    parts: Collection[str] = PARTS,
) -> Path:
    """Make the world under ``root`` unless it lies there already, and return ``root``.

    It is built beside ``root`` and renamed into place, under a lock: nobody ever sees half a world.

    Args:
        root: a folder that does not exist yet or is empty, or that holds this very world.
        seed: which world.
        sizes: images per part; None takes what a world at ``root`` has, else the default.
        workers: processes to render with; the bytes are the same for any number.
        parts: which parts to make, of ``world.PARTS``; each is the same whether the others are made or not.

    Raises:
        UserError: where ``root`` holds something else.
    """
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.parent / f".{root.name}.lock"):
        if _is_there(root, seed, sizes):
            return root
        building = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".tmp", dir=root.parent))
        try:
            _write_parts(building, seed, sizes or Sizes(), workers, parts)
            building.chmod(0o755)  # mkdtemp makes private folders
            if root.exists():
                root.rmdir()
            building.rename(root)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return root


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of the world at ``root``, or None where there is none."""
    try:
        manifest = json.loads((root / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{root / MANIFEST}: cannot be read ({error}); remove {root} and let it be made anew") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{root / MANIFEST}: not a manifest; remove {root} and let it be made anew")
    return manifest


def _is_there(root: Path, seed: int, sizes: Sizes | None) -> bool:
    manifest = read_manifest(root)
    if manifest is None:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root}: holds something other than the world 'shapes'; name an empty or a new folder")
        return False
    found = (manifest.get("version"), manifest.get("seed"))
    if found != (VERSION, seed):
        raise UserError(
            f"{root}: holds the world {found[0]} with seed {found[1]}, not {VERSION} with seed {seed}; "
            "name another folder"
        )
    if sizes is not None and not _same_sizes(manifest.get("sizes"), sizes):
        raise UserError(f"{root}: holds this world in other sizes; name another folder")
    return True


def _same_sizes(found: Any, wanted: Sizes) -> bool:
    """A world that is older than a part says nothing of its size."""
    return isinstance(found, dict) and found.items() <= asdict(wanted).items()


# -------------------------------------------------------------------------------------------------- parts


def _write_parts(root: Path, seed: int, sizes: Sizes, workers: int, parts: Collection[str]) -> None:
    make = Maker(seed, sizes.pixels, workers)
    if "pairs" in parts:
        _write_pairs(root / "pairs", make("pairs", range(sizes.pairs)))
    if "labels" in parts:
        _write_labels(root / "labels" / "train", make("labels", range(sizes.labels), annotated=False))
    if "classes" in parts:  # and with it seen and heldout, which are its test images
        _write_classes(root, make, sizes)
    if "retrieval" in parts:
        chosen = distinct_scenes(seed, sizes.retrieval)
        _write_benchmark(root / "retrieval", "test", make("retrieval", chosen, detailed=True), _retrieval_files)
        write_text(root / "retrieval" / "dataset_type.txt", "retrieval\n")
    if "coco" in parts:
        for split, count in (("train", sizes.coco_train), ("val", sizes.coco_val)):
            _write_coco(root / "coco", split, make(f"coco/{split}", range(count)), sizes.pixels)
    write_finetune_parts(root, make, sizes, parts)
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    manifest = {
        "world": "shapes",
        "version": VERSION,
        "seed": seed,
        "sizes": asdict(sizes),
        "parts": [part for part in PARTS if part in parts],
        "classes": list(CLASS_NAMES),
        "held_out": sorted(_HELD_OUT_NAMES),
        "files": {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()},
    }
    write_json(root / MANIFEST, manifest, indent=1)


def distinct_scenes(seed: int, count: int) -> list[int]:
    """Indices of ``count`` scenes for retrieval: what is said of one is said of no other.

    A scene is taken only while none of its captions belongs to an earlier one, and none of what relational captions
    name (the main object, a neighbour and their relation) was true of an earlier one.
    """
    taken: set[object] = set()
    chosen: list[int] = []
    index = 0
    while len(chosen) < count:
        scene = sample_scene(seed, "retrieval", index)
        facts = _facts(scene)
        said = facts | set(captions(scene, detailed=True)["en"]) if facts else set()
        if said and not said & taken:
            taken |= said
            chosen.append(index)
        index += 1
        assert index < 1000 + 100 * count, f"there are not {count} scenes that can be told apart"
    return chosen


def _facts(scene: Scene) -> set[object]:
    return {
        (scene.main.name, scene.relation(0, place), other.name) for place, other in enumerate(scene.others, start=1)
    }


def _write_pairs(folder: Path, records: Iterator[Record]) -> None:
    """img2dataset: ``00000.tar`` of NAME.png, NAME.txt with one caption, NAME.json with everything."""
    _write_shards(folder, records, "{:05d}.tar".format, lambda record: (f"{record.index:09d}", _pair_files(record)))


def _pair_files(record: Record) -> list[tuple[str, bytes]]:
    texts = record.captions()
    return [
        ("png", record.png),
        ("txt", texts[record.index % len(texts)].encode()),
        ("json", json_bytes(record.annotations)),
    ]


def _write_labels(folder: Path, records: Iterator[Record]) -> None:
    for combo in SEEN:
        (folder / combo.name).mkdir(parents=True)
    for record in records:
        (folder / CLASS_NAMES[record.label] / f"{record.index:06d}.png").write_bytes(record.png)


def _write_classes(root: Path, make: Maker, sizes: Sizes) -> None:
    for split, count in (("train", sizes.classes_train), ("val", sizes.classes_val), ("test", sizes.classes_test)):
        records = list(make(f"classes/{split}", range(count)))
        _write_benchmark(root / "classes", split, iter(records), _class_files)
    for part, held_out in (("seen", False), ("heldout", True)):  # the test images again, in two halves
        half = [record for record in records if (CLASS_NAMES[record.label] in _HELD_OUT_NAMES) == held_out]
        _write_benchmark(root / part, "test", iter(half), _class_files)
    for part in ("classes", "seen", "heldout"):
        write_text(root / part / "classnames.txt", "".join(f"{name}\n" for name in CLASS_NAMES))
        write_text(root / part / "zeroshot_classification_templates.txt", "".join(f"{t}\n" for t in TEMPLATES))


def _class_files(record: Record) -> list[tuple[str, bytes]]:
    return [("png", record.png), ("cls", str(record.label).encode()), ("json", json_bytes(record.annotations))]


def _retrieval_files(record: Record) -> list[tuple[str, bytes]]:
    return [
        ("png", record.png),
        ("txt", "\n".join(record.captions()).encode()),
        ("json", json_bytes(record.annotations)),
    ]


def _write_benchmark(
    folder: Path, split: str, records: Iterator[Record], files: Callable[[Record], list[tuple[str, bytes]]]
) -> None:
    """CLIP_benchmark: ``SPLIT/0.tar`` ... and ``SPLIT/nshards.txt``."""
    shards = _write_shards(
        folder / split, records, "{}.tar".format, lambda record: (f"s{record.index:07d}", files(record))
    )
    write_text(folder / split / "nshards.txt", f"{shards}\n")


def _write_coco(folder: Path, split: str, records: Iterator[Record], pixels: int) -> None:
    """``SPLIT/*.png`` with ``annotations/instances_SPLIT.json`` and ``captions_SPLIT.json``; ids count from 1."""
    (folder / split).mkdir(parents=True)
    categories = [
        {"id": place, "name": combo.name, "supercategory": combo.shape} for place, combo in enumerate(SEEN, start=1)
    ]
    category_of = {category["name"]: category["id"] for category in categories}
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for record in records:
        image_id = record.index + 1
        name = f"{image_id:012d}.png"
        (folder / split / name).write_bytes(record.png)
        images.append({"id": image_id, "file_name": name, "width": pixels, "height": pixels})
        for tag, box, segmentation in zip(
            record.annotations["tags"], record.annotations["boxes"], record.segmentations, strict=True
        ):
            left, top, right, bottom = box
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": image_id,
                    "category_id": category_of[tag],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": sum(segmentation["counts"][1::2]),
                    "segmentation": segmentation,
                    "iscrowd": 0,
                }
            )
        captions += [
            {"id": len(captions) + place, "image_id": image_id, "caption": text}
            for place, text in enumerate(record.captions(), start=1)
        ]
    info = {"description": f"vlbench shapes {VERSION}"}
    notes = folder / "annotations"
    write_json(
        notes / f"instances_{split}.json",
        {"info": info, "images": images, "annotations": instances, "categories": categories},
    )
    write_json(notes / f"captions_{split}.json", {"info": info, "images": images, "annotations": captions})


# -------------------------------------------------------------------------------------------------- bytes


def _write_shards(
    folder: Path,
    records: Iterator[Record],
    shard_name: Callable[[int], str],
    entry: Callable[[Record], tuple[str, list[tuple[str, bytes]]]],
) -> int:
    """Tars of at most ``_PER_SHARD`` examples; returns how many. No example at all makes one empty tar."""
    folder.mkdir(parents=True)
    shards = 0
    waiting = next(records, None)
    while waiting is not None or shards == 0:
        with tarfile.open(folder / shard_name(shards), "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(_PER_SHARD):
                if waiting is None:
                    break
                key, files = entry(waiting)
                for extension, data in files:
                    _add(tar, f"{key}.{extension}", data)
                waiting = next(records, None)
        shards += 1
    return shards


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults are no owner, no names and the year 1970
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))
