"""The parts that backbones are fine-tuned on, in the formats of VQA v2, NLVR2, SNLI-VE and RefCOCO+.

Splits never share a scene, and no held-out combination is drawn or named. What is asked of a picture depends on the
pictures before it in its split, since answers are kept in balance, and on nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.data.shapes import hypotheses, questions
from vlbench.data.shapes.annotators import ten_answers
from vlbench.data.shapes.balance import Asked, Balance
from vlbench.data.shapes.expressions import phrases
from vlbench.data.shapes.files import write_json, write_lines
from vlbench.data.shapes.language import caption, plans
from vlbench.data.shapes.pairs import IMAGES_PER_SET, Judged, Sentences
from vlbench.data.shapes.records import Maker, Record
from vlbench.data.shapes.scene import Scene
from vlbench.data.shapes.world import SHAPES, VERSION, Sizes

_VQA_FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015"}
_SNLI_VE = ("train", "dev", "test")
_NLVR2 = ("train", "dev", "test1")
_REFCOCO = ("train", "val", "testA", "testB")
_IDS_PER_SPLIT = 1_000_000  # so that an image's number does not depend on how many another split has
_FLICKR_BASE = 1_000_000_000  # Flickr's own numbers have ten digits
_REFS_PER_IMAGE = 2
_SETS_PER_DIRECTORY = 100  # NLVR2 spreads the images of its training split over numbered folders
_INFO = {"description": f"vlbench shapes {VERSION}"}


def write_finetune_parts(root: Path, make: Maker, sizes: Sizes, parts: Collection[str]) -> None:
    """Write those of the four parts that are in ``parts`` under ``root``."""
    writers: dict[str, Callable[[Path, Maker, Sizes], None]] = {
        "vqa": _write_vqa,
        "nlvr2": _write_nlvr2,
        "snli_ve": _write_snli_ve,
        "refcoco": _write_refcoco,
    }
    for part, write in writers.items():
        if part in parts:
            write(root / part, make, sizes)


# -------------------------------------------------------------------------------------------------- VQA


def _write_vqa(root: Path, make: Maker, sizes: Sizes) -> None:
    """``v2_OpenEnded_mscoco_SPLIT_questions.json``, ``v2_mscoco_SPLIT_annotations.json`` and ``SPLIT/NUMBER.png``."""
    counts = (sizes.vqa_train, sizes.vqa_val, sizes.vqa_test)
    for place, ((split, folder), count) in enumerate(zip(_VQA_FOLDERS.items(), counts, strict=True)):
        (root / folder).mkdir(parents=True)
        balance = Balance(questions.FAMILIES, questions.SHARES)
        asked: list[dict[str, Any]] = []
        told: list[dict[str, Any]] = []
        for record in make(f"vqa/{split}", range(count), annotated=False):
            image = place * _IDS_PER_SPLIT + record.index + 1
            (root / folder / f"{image:012d}.png").write_bytes(record.png)
            rng = _rng(record.scene)
            for number, question in enumerate(balance.choose(record.scene, questions.QUESTIONS_PER_IMAGE, rng)):
                ids = {"image_id": image, "question_id": 1000 * image + number}
                asked.append(ids | {"question": question.text})
                told.append(ids | _annotation(question, rng))
        kind = {"data_type": "mscoco", "data_subtype": folder, "info": _INFO}
        task = kind | {"task_type": "Open-Ended", "questions": asked}
        write_json(root / f"v2_OpenEnded_mscoco_{folder}_questions.json", task)
        write_json(root / f"v2_mscoco_{folder}_annotations.json", kind | {"annotations": told})


def _annotation(question: Asked, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "answers": ten_answers(question.answer, question.among, rng),
        "answer_type": questions.answer_type(question.answer),
        "question_type": questions.question_type(question.text),
        "multiple_choice_answer": question.answer,
    }


# ------------------------------------------------------------------------------------------------ NLVR2


def _write_nlvr2(root: Path, make: Maker, sizes: Sizes) -> None:
    """``SPLIT.json`` of lines, and ``images/SPLIT/[DIRECTORY/]SPLIT-SET-PAIR-img0.png`` (left) and ``-img1.png``."""
    for split, count in zip(_NLVR2, (sizes.nlvr2_train, sizes.nlvr2_dev, sizes.nlvr2_test1), strict=True):
        sentences = Sentences()
        lines: list[dict[str, Any]] = []
        records = make(f"nlvr2/{split}", range(count * IMAGES_PER_SET), annotated=False)
        for number, images in enumerate(zip(*[records] * IMAGES_PER_SET, strict=True)):
            pairs = list(zip(images[::2], images[1::2], strict=True))
            judged = sentences.choose([(left.scene, right.scene) for left, right in pairs], _rng(pairs[0][0].scene))
            directory = {"directory": number // _SETS_PER_DIRECTORY} if split == "train" else {}
            folder = root / "images" / split / str(directory.get("directory", ""))
            folder.mkdir(parents=True, exist_ok=True)
            for pair in sorted({pair for sentence in judged for pair in sentence.labels}):
                for place, record in enumerate(pairs[pair]):
                    (folder / f"{split}-{number}-{pair}-img{place}.png").write_bytes(record.png)
            lines += [line | directory for line in _lines(f"{split}-{number}", judged)]
        write_lines(root / f"{split}.json", lines)


def _lines(name: str, judged: list[Judged]) -> Iterator[dict[str, Any]]:
    for place, sentence in enumerate(judged):
        for pair, label in sentence.labels.items():
            yield {
                "identifier": f"{name}-{pair}-{place}",
                "sentence": sentence.text,
                "label": str(label),
                "synset": "shape",
            }


# ---------------------------------------------------------------------------------------------- SNLI-VE


def _write_snli_ve(root: Path, make: Maker, sizes: Sizes) -> None:
    """``snli_ve_SPLIT.jsonl`` and ``flickr30k-images/NUMBER.png``, the images of all splits in one folder."""
    folder = root / "flickr30k-images"
    folder.mkdir(parents=True)
    counts = (sizes.snli_ve_train, sizes.snli_ve_dev, sizes.snli_ve_test)
    for place, (split, count) in enumerate(zip(_SNLI_VE, counts, strict=True)):
        balance = Balance(hypotheses.FAMILIES, hypotheses.SHARES)
        lines: list[dict[str, Any]] = []
        for record in make(f"snli_ve/{split}", range(count), annotated=False):
            image = str(_FLICKR_BASE + place * _IDS_PER_SPLIT + record.index)
            (folder / f"{image}.png").write_bytes(record.png)
            wanted = 2 + record.index % 2
            told = plans(record.scene)
            for number, said in enumerate(balance.choose(record.scene, wanted, _rng(record.scene))):
                lines.append(
                    {
                        "Flickr30K_ID": image,
                        "captionID": f"{image}.jpg#{number}",
                        "pairID": f"{image}.jpg#{number}r1{said.answer[0]}",
                        "gold_label": said.answer,
                        "annotator_labels": [said.answer],
                        "sentence1": caption(record.scene, told[number], "en"),
                        "sentence2": said.text,
                    }
                )
        write_lines(root / f"snli_ve_{split}.jsonl", lines)


# --------------------------------------------------------------------------------------------- RefCOCO+


def _write_refcoco(root: Path, make: Maker, sizes: Sizes) -> None:
    """``refs(unc).json``, ``instances.json`` and ``train2014/NUMBER.png``, the images of all splits in one folder.

    In ``testA`` the main object is meant, in ``testB`` another; in the rest any.
    """
    folder = root / "train2014"
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    sentence_ids = itertools.count()
    counts = (sizes.refcoco_train, sizes.refcoco_val, sizes.refcoco_testA, sizes.refcoco_testB)
    for place, (split, count) in enumerate(zip(_REFCOCO, counts, strict=True)):
        for record in make(f"refcoco/{split}", range(count)):
            image = place * _IDS_PER_SPLIT + record.index + 1
            name = f"{image:012d}.png"
            (folder / name).write_bytes(record.png)
            images.append({"id": image, "file_name": name, "width": sizes.pixels, "height": sizes.pixels})
            rng = _rng(record.scene)
            listed = _instances(record, image, rng)
            annotations += listed.values()
            for meant in _meant(len(record.scene.objects), split, rng):
                said = [(next(sentence_ids), text) for text in phrases(record.scene, meant, rng)]
                refs.append(_reference(len(refs), listed[meant], split, name, said))
    categories = [{"id": number, "name": shape} for number, shape in enumerate(SHAPES, start=1)]
    write_json(
        root / "instances.json",
        {"info": _INFO, "images": images, "annotations": annotations, "categories": categories},
    )
    write_json(root / "refs(unc).json", refs)


def _instances(record: Record, image: int, rng: np.random.Generator) -> dict[int, dict[str, Any]]:
    """The annotations of an image by place in its scene, listed in random order: the main object is not the first."""
    found: dict[int, dict[str, Any]] = {}
    for number, place in enumerate(rng.permutation(len(record.scene.objects)).tolist()):
        left, top, right, bottom = record.annotations["boxes"][place]
        segmentation = record.segmentations[place]
        found[place] = {
            "id": 10 * image + number,
            "image_id": image,
            "category_id": record.scene.objects[place].combo.shape_index + 1,
            "bbox": [left, top, right - left, bottom - top],
            "area": sum(segmentation["counts"][1::2]),
            "segmentation": segmentation,
            "iscrowd": 0,
        }
    return found


def _meant(objects: int, split: str, rng: np.random.Generator) -> list[int]:
    """Which objects of a scene are referred to, by place. One alone is no choice, and none of it is meant."""
    if objects < 2:
        return []
    if split == "testA":
        return [0]
    eligible = range(1 if split == "testB" else 0, objects)
    return sorted(rng.choice(eligible, min(_REFS_PER_IMAGE, len(eligible)), replace=False).tolist())


def _reference(
    number: int, annotation: dict[str, Any], split: str, file_name: str, said: list[tuple[int, str]]
) -> dict[str, Any]:
    return {
        "ref_id": number,
        "ann_id": annotation["id"],
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "split": split,
        "file_name": file_name,
        "sent_ids": [sent_id for sent_id, _ in said],
        "sentences": [
            {"sent_id": sent_id, "sent": text, "raw": text, "tokens": text.split()} for sent_id, text in said
        ],
    }


def _rng(scene: Scene) -> np.random.Generator:
    """For what is asked of a scene; 1 and 2 are pixel noise and captions."""
    return np.random.default_rng([scene.key, 3])
