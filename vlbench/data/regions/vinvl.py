"""VinVL's TSV files: a line is an image, ``id TAB json``, features in base64.

Three layouts are read, as the tools of the field write them:

- ``predictions.tsv`` of scene_graph_benchmark: ``{"image_w", "image_h", "objects": [{"rect", "class", "conf",
  "feature"}]}``, one feature an object;
- ``features.tsv``: ``{"num_boxes", "features"}``, all features of the image in one text, with ``objects`` in the same
  line or in a second file of labels (``labels=``: ``id TAB json`` with ``objects``, or a list of them);
- the same with the number and the features in columns of their own: ``id TAB num_boxes TAB base64``.

A feature is 2,048 numbers, or these and six of position (2,054): the first 2,048 are kept, as mu-VLA keeps them, since
boxes have an embedding of their own. [M:data_preparation/convert_cc_vinvl.py]
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.data.regions.features import BAD_REGIONS, RegionFeatures, checked_regions

WIDTH = 2048
_POSITION = 6
_ID_BYTES = 4096
_NO_OBJECTS = (
    "give the file of labels too: feature_labels=FILE (pretrain muvla), --labels FILE (data weakly-align) or "
    "features=FEATURES.tsv?labels=FILE (a task)"
)


class VinvlTsv:
    """A TSV file by image id. Lines are found by ``.lineidx`` beside it where there is one, else by reading it once.

    Args:
        path: the features.
        labels: a second TSV file with objects (``rect``, ``class``, ``conf``) and sizes, for layouts without them.
        width: how many numbers of a feature are kept; a stored feature has as many, or six more.

    Raises:
        UserError: for a file that is absent, or holds an id twice; for a line without objects, where there are no
            labels: all lines are so then, and not one of them is damaged.
    """

    def __init__(self, path: Path | str, *, labels: Path | str | None = None, width: int = WIDTH) -> None:
        self.path = Path(path)
        self._width = width
        self._offsets = _index(self.path)
        self._labels = _index(Path(labels)) if labels is not None else None
        self._labels_path = Path(labels) if labels is not None else None

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._offsets

    def __getitem__(self, image_id: str) -> RegionFeatures:
        """The regions of an image. Raises KeyError, or BadExample where its line is damaged."""
        return self._regions(self._record(image_id), f"{self.path} {image_id}")

    def tags(self, image_id: str) -> tuple[str, ...]:
        """The classes of an image's regions. Raises as ``[image_id]``."""
        where = f"{self.path} {image_id}"
        return _classes(_objects(self._record(image_id), where), where)

    def ids(self) -> Sequence[str]:
        """All ids, in the order of the lines."""
        return list(self._offsets)

    def _record(self, image_id: str) -> Any:
        """What is said of an image, in one."""
        where = f"{self.path} {image_id}"
        columns = _columns(self.path, self._offsets[image_id])
        if len(columns) == 3:
            record: Any = {"num_boxes": columns[1], "features": columns[2]}
        else:
            record = _parsed(columns[1] if len(columns) == 2 else "", where)
        if self._labels is not None and self._labels_path is not None:
            if image_id not in self._labels:
                raise BadExample(BAD_REGIONS, where, f"{self._labels_path} has no line for it")
            text = _columns(self._labels_path, self._labels[image_id])[1:]
            record = _joined(record, _parsed(text[0] if text else "", f"{self._labels_path} {image_id}"))
        elif isinstance(record, dict) and "objects" not in record:
            raise UserError(f"{where}: it has no 'objects'; {_NO_OBJECTS}")
        return record

    def _regions(self, record: Any, where: str) -> RegionFeatures:
        objects = _objects(record, where)
        if "features" in record:
            features = self._decoded(record["features"], where, rows=len(objects))
            stated = record.get("num_boxes", len(objects))
            if str(stated) != str(len(objects)):
                raise BadExample(BAD_REGIONS, where, f"num_boxes is {stated}, but it has {len(objects)} objects")
        else:
            texts = [_value(item, "feature", f"{where} object {row}") for row, item in enumerate(objects)]
            rows = [self._decoded(text, f"{where} object {row}", rows=1) for row, text in enumerate(texts)]
            features = np.concatenate([np.zeros((0, self._width), dtype=np.float32), *rows])
        boxes = [_value(item, "rect", f"{where} object {row}") for row, item in enumerate(objects)]
        scored = all("conf" in item for item in objects)
        return checked_regions(
            features,
            boxes,
            size=(_value(record, "image_w", where), _value(record, "image_h", where)),
            tags=_classes(objects, where),
            scores=[item["conf"] for item in objects] if scored else None,
            where=where,
        )

    def _decoded(self, text: Any, where: str, *, rows: int) -> np.ndarray:
        """``(rows, width)`` float32 from base64."""
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise BadExample(BAD_REGIONS, where, f"its feature is not base64: {error}") from None
        for width in (self._width, self._width + _POSITION):
            if len(data) == 4 * rows * width:
                return np.frombuffer(data, dtype="<f4").reshape(rows, width)[:, : self._width]
        expected = f"{rows} x {self._width} or {rows} x {self._width + _POSITION}"
        raise BadExample(BAD_REGIONS, where, f"{len(data)} bytes of features, not {expected} numbers of 4 bytes")


def _joined(record: Any, labels: Any) -> dict[str, Any]:
    """Features with the objects and sizes that a file of labels has for them."""
    both = {**labels} if isinstance(labels, dict) else {"objects": labels}
    return both | (record if isinstance(record, dict) else {})


def _objects(record: Any, where: str) -> list[dict[str, Any]]:
    objects = _value(record, "objects", where)
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise BadExample(BAD_REGIONS, where, "its objects are not a list of objects")
    return objects


def _classes(objects: Sequence[dict[str, Any]], where: str) -> tuple[str, ...]:
    return tuple(str(_value(item, "class", f"{where} object {row}")) for row, item in enumerate(objects))


def _value(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict):
        raise BadExample(BAD_REGIONS, where, f"its JSON is a {type(record).__name__}, not an object")
    if key not in record:
        raise BadExample(BAD_REGIONS, where, f"it has no {key!r}")
    return record[key]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadExample(BAD_REGIONS, where, f"not JSON behind the tab: {error}") from None


def _columns(path: Path, offset: int) -> list[str]:
    with path.open("rb") as handle:
        handle.seek(offset)
        return handle.readline().decode("utf-8", "replace").rstrip("\r\n").split("\t")


def _index(path: Path) -> dict[str, int]:
    """Image id to the place of its line."""
    offsets: dict[str, int] = {}
    try:
        for image_id, offset in _lines(path):
            if image_id in offsets:
                raise UserError(f"{path}: the id {image_id!r} stands in two lines")
            offsets[image_id] = offset
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return offsets


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    known = path.with_suffix(".lineidx")
    with path.open("rb") as handle:
        if known.is_file():
            for start in map(int, known.read_text().split()):
                handle.seek(start)
                yield handle.read(_ID_BYTES).partition(b"\t")[0].decode("utf-8", "replace"), start
            return
        offset = 0
        for line in handle:
            if line.strip():
                yield line.partition(b"\t")[0].decode("utf-8", "replace"), offset
            offset += len(line)
