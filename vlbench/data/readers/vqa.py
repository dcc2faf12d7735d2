"""VQA: questions about COCO's images with ten answers each, in the two JSON files a split of VQA v1 and v2.

``vqa:DIR`` reads ``v2_OpenEnded_mscoco_SPLIT_questions.json`` and ``v2_mscoco_SPLIT_annotations.json`` (the prefixes
may be absent) from ``DIR``, ``DIR/questions``, ``DIR/annotations``. A split without annotations (``test-dev``) has
questions alone. Images are COCO's, ``train2014/COCO_train2014_000000000009.jpg``, or carry their bare number; without
them the questions can still be read.

One example a question: ``extra`` has ``question_id``, ``image_id``, ``question`` and, where annotated, ``answers``
(the ten as people wrote them), ``answer_type``, ``question_type`` and ``multiple_choice_answer`` (the one that most
gave).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.core.errors import UserError
from vlbench.core.types import Example, Part
from vlbench.data.readers.annotations import (
    IMAGES_OPTION,
    AsksOfFiles,
    field,
    find_images,
    image_folders,
    objects,
    read_json,
    refuse_repeated,
    split_files,
)
from vlbench.data.sources import Reader, split_table
from vlbench.data.spec import DataSpec

N_ANSWERS = 10

_QUESTIONS = re.compile(r"(?!MultipleChoice)(?:v2_)?(?:OpenEnded_)?(?:mscoco_)?(?P<split>.+)_questions\.json")
_ANNOTATIONS = re.compile(r"(?:v2_)?(?:mscoco_)?(?P<split>.+)_annotations\.json")
_QUESTION_FOLDERS = ("", "questions", "Questions")
_ANNOTATION_FOLDERS = ("", "annotations", "Annotations")
_YEAR = re.compile(r"[_-]?\d{4}$")
_NAMES = ("COCO_{part}_{number:012d}.jpg", "{number:012d}.jpg", "{number}.jpg", "{number:012d}.png", "{number}.png")


@dataclass(frozen=True, slots=True)
class _Truth:
    """What people said of one question."""

    image: int
    answers: tuple[str, ...]
    answer_type: str
    question_type: str
    leading: str


@dataclass(frozen=True, slots=True)
class _Question:
    id: int
    image: int
    text: str
    truth: _Truth | None


@dataclass(frozen=True, slots=True)
class _Images:
    """Where the images of one split lie, and how their names are spelled."""

    folder: str
    spelling: str
    part: str

    def path(self, number: int) -> str:
        return f"{self.folder}/{self.spelling.format(part=self.part, number=number)}"


class VqaSource(AsksOfFiles):
    """The questions of one split. An id is the question's."""

    unit = "question_id "

    def __init__(self, spec: DataSpec, split: str, questions: Sequence[_Question], images: _Images | None) -> None:
        parts: set[Part] = {"question"} if images is None else {"image", "question"}
        super().__init__(spec.bare, split, provides=parts)
        self._questions = questions
        self._images = images

    def __len__(self) -> int:
        return len(self._questions)

    def without_images(self, index: int) -> Example:
        """A question and what people answered."""
        question = self._questions[index]
        extra: dict[str, Any] = {
            "question_id": question.id,
            "image_id": question.image,
            "image_key": str(question.image),
            "question": question.text,
        }
        if question.truth is not None:
            extra |= {
                "answers": question.truth.answers,
                "answer_type": question.truth.answer_type,
                "question_type": question.truth.question_type,
                "multiple_choice_answer": question.truth.leading,
            }
        return Example(id=str(question.id), extra=extra)

    def image_files(self, index: int) -> Mapping[str, str]:
        """The file that the question is about, where there are images."""
        return {} if self._images is None else {"image": self._images.path(self._questions[index].image)}

    def ids(self) -> Sequence[str]:
        """Question ids, in the order of the questions' file."""
        return [str(question.id) for question in self._questions]

    def labels(self) -> Sequence[int | None] | None:
        """None: a question has answers, not one label."""
        return None

    def leading_answers(self) -> Iterator[str]:
        """The answer that most people gave to each annotated question: what a vocabulary is counted from."""
        return (question.truth.leading for question in self._questions if question.truth is not None)


def _open(spec: DataSpec, split: str | None) -> VqaSource:
    assert split is not None, "VQA always has splits"
    questions = _question_files(spec)
    own = _split_names(questions)[split]
    file = _annotation_files(spec).get(own)
    return _source(spec, split, own, _read(questions[own], file))


def _source(spec: DataSpec, split: str, own: str, questions: Sequence[_Question]) -> VqaSource:
    part = own.replace("test-dev", "test")  # the questions of test-dev are about test's images
    folders = image_folders(spec, (part, _YEAR.sub("", part)))
    numbers = [question.image for question in questions[:20]]
    found = find_images(spec, folders, [[name.format(part=part, number=n) for n in numbers] for name in _NAMES])
    return VqaSource(spec, split, questions, None if found is None else _Images(found[0], _NAMES[found[1]], part))


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return tuple(_split_names(_question_files(spec)))


def _split_names(files: Mapping[str, Path]) -> dict[str, str]:
    """Standard split to the files' own name for it (``val`` to ``val2014``)."""
    plain: dict[str, str] = {}
    for name in sorted(files):
        short = _YEAR.sub("", name) or name
        if short in plain:
            raise UserError(f"{files[name]}: {plain[short]!r} and {name!r} both mean the {short} split; keep one")
        plain[short] = name
    return {standard: plain[name] for standard, name in split_table(plain, "the questions").items()}


def _question_files(spec: DataSpec) -> dict[str, Path]:
    return split_files(spec, _QUESTIONS, _QUESTION_FOLDERS, "v2_OpenEnded_mscoco_SPLIT_questions.json")


def _annotation_files(spec: DataSpec) -> dict[str, Path]:
    """There may be none: the answers of a test set are hidden."""
    return split_files(spec, _ANNOTATIONS, _ANNOTATION_FOLDERS, None)


def _read(questions: Path, annotations: Path | None) -> list[_Question]:
    truths = None if annotations is None else _truths(annotations)
    found: list[_Question] = []
    seen: dict[int, str] = {}
    for where, item in objects(read_json(questions), "questions", questions):
        number = field(item, "question_id", int, where)
        where = f"{where} (question_id {number})"
        refuse_repeated(number, where, seen, "question_id")
        image, text = field(item, "image_id", int, where), field(item, "question", str, where)
        truth = None
        if truths is not None:
            truth = truths.pop(number, None)
            if truth is None:
                raise UserError(f"{where}: it has no annotation in {annotations}")
            if truth.image != image:
                raise UserError(
                    f"{where}: it is about image {image}, its annotation in {annotations} about {truth.image}"
                )
        found.append(_Question(number, image, text, truth))
    if truths:
        raise UserError(f"{annotations}: question_id {next(iter(truths))} is annotated, and is not in {questions}")
    return found


def _truths(file: Path) -> dict[int, _Truth]:
    found: dict[int, _Truth] = {}
    seen: dict[int, str] = {}
    for where, item in objects(read_json(file), "annotations", file):
        number = field(item, "question_id", int, where)
        where = f"{where} (question_id {number})"
        refuse_repeated(number, where, seen, "question_id")
        found[number] = _Truth(
            image=field(item, "image_id", int, where),
            answers=_answers(field(item, "answers", list, where), where),
            answer_type=sys.intern(field(item, "answer_type", str, where)),
            question_type=sys.intern(field(item, "question_type", str, where)),
            leading=sys.intern(field(item, "multiple_choice_answer", str, where)),
        )
    return found


def _answers(items: Sequence[Any], where: str) -> tuple[str, ...]:
    """The answers as written; one may be empty, since people left some so."""
    if len(items) != N_ANSWERS:
        raise UserError(f"{where}: {N_ANSWERS} answers expected, {len(items)} found")
    answers = []
    for place, item in enumerate(items):
        answer = item.get("answer") if isinstance(item, dict) else None
        if not isinstance(answer, str):
            raise UserError(f"{where}: answer {place} has no 'answer' text")
        answers.append(sys.intern(answer))
    return tuple(answers)


def _present(spec: DataSpec) -> bool:
    """Whether questions and a folder of images are there, without reading 100 MB of JSON."""
    try:
        parts = [name.replace("test-dev", "test") for name in _question_files(spec)]
        names = [name for part in parts for name in (part, _YEAR.sub("", part))]
        return "images" in spec.options or any(folder.name in names for folder in image_folders(spec, names))
    except UserError:
        return False


READER = Reader(
    name="vqa",
    open=_open,
    splits=_splits,
    help="vqa:DIR with v2_OpenEnded_mscoco_SPLIT_questions.json and v2_mscoco_SPLIT_annotations.json; ?images=DIR",
    options=IMAGES_OPTION,
    present=_present,
)
