"""Features of images and texts: each distinct image is encoded once, whoever asks and however often.

An image is known by the digest of its bytes, a model by its fingerprint and precision; what was ever computed for the
pair is read from the feature store. What is missing is decoded, encoded and appended shard by shard, so that a killed
run loses one shard at most. Several processes may divide what is missing between them.

Shape suffixes: B batch, N examples, C channels, H height, W width, D pooled width, E joint width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest, fingerprint

if TYPE_CHECKING:  # never at run time: adapters must load without torch
    import torch

    from vlbench.core.types import Backbone, Source
    from vlbench.data.transforms import EvalTransform

Share: TypeAlias = "Callable[[str, Sequence[str]], AbstractContextManager[Sequence[str]]]"
"""``with share("images", digests) as mine``, or ``("texts", texts)``: what this process is to encode and append. When
the block is left, all others have appended theirs."""

FEATURES_VERSION = 1
"""Part of every key of the feature store: raised by any change to decoding, transforms or towers that moves
features, so that what an older vlbench stored is not taken for what this one computes."""
SHARD_ROWS = 4096
"""Rows appended to the store at once: few enough that a kill loses seconds, many enough that files stay few."""
SHARD_SECONDS = 20.0
"""A slow model's shard is written after this long, however few rows it has."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of one source, in its order."""

    ids: tuple[str, ...]
    digests: tuple[str, ...]
    """Of each image's bytes; equal where two entries are the same image."""
    pooled_ND: np.ndarray
    embed_NE: np.ndarray | None
    """In the joint space, not normalised; None for a backbone without one."""


@dataclass
class EncoderStats:
    """What an Encoder has done so far."""

    images_encoded: int = 0
    images_reused: int = 0
    """Images whose features were there already, from this run or an earlier one."""
    texts_encoded: int = 0
    texts_reused: int = 0
    image_seconds: float = 0.0
    """Decoding and encoding images; reading stored features is not in it."""
    text_seconds: float = 0.0

    @property
    def images_per_second(self) -> float | None:
        """Rate of the images that were really encoded; None where none were."""
        return self.images_encoded / self.image_seconds if self.images_encoded and self.image_seconds else None

    def since(self, before: EncoderStats) -> EncoderStats:
        """What was done after ``before`` was taken with ``copy``."""
        return EncoderStats(**{name: value - getattr(before, name) for name, value in vars(self).items()})

    def copy(self) -> EncoderStats:
        """The counts as they are now."""
        return EncoderStats(**vars(self))


class Encoder:
    """One backbone, ready to be asked for features.

    Args:
        backbone: the model to be measured.
        store: a ``vlbench.store.features.FeatureStore``; None keeps features in memory for this run only. So it is,
            whatever the store, for a user's model whose source cannot be read (``code_is_known`` is then False): a
            later change to it would go unnoticed.
        batch_size: images (and texts) in one forward pass.
        precision: ``"fp32"`` (no TF32) or ``"bf16"`` (autocast). Features are kept in float32 either way.
        device: torch's name of the device.
        workers: processes that decode images; 0 decodes in this one.
        progress: called with ``(done, total)`` images after every batch.
        share: divides what is missing over processes, which must then have ``store`` in common; None: this one is
            alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: Any | None,
        *,
        batch_size: int = 64,
        precision: Literal["fp32", "bf16"] = "fp32",
        device: str = "cpu",
        workers: int = 0,
        progress: Callable[[int, int], None] | None = None,
        share: Share | None = None,
    ) -> None:
        from vlbench.models.backbone import backbone_fingerprint
        from vlbench.models.user_code import has_known_code

        self.backbone = backbone
        self.batch_size = batch_size
        self.precision = precision
        self.device = device
        self.workers = workers
        self.progress = progress
        self.share = share if share is not None else _keep
        self.stats = EncoderStats()
        self.fingerprint = backbone_fingerprint(backbone)
        self.code_is_known = has_known_code(backbone)
        self._tables = store if store is not None and (self.code_is_known or share is not None) else _MemoryStore()
        self._images, self._texts = self.table("images"), self.table("texts")
        self._digests: dict[int, tuple[Source, list[str]]] = {}

    def images(self, source: Source) -> ImageFeatures:
        """Features of every image of ``source``.

        Raises:
            BadExample: where an image cannot be read; a test set with a hole would give another number.
            UserError: where the model gives features that are not finite or not of the declared form.
        """
        digests = self.image_digests(source)
        first = {image: index for index, image in reversed(list(enumerate(digests)))}
        columns = ("pooled", "embed") if "embed" in self.backbone.card.provides else ("pooled",)
        missing = self._images.missing(sorted(first), columns)
        self.stats.images_reused += len(first) - len(missing)
        if missing:
            queue = sorted(missing, key=first.__getitem__)
            before, began = self.stats.image_seconds, time.perf_counter()
            with self.share("images", queue) as mine:
                self.encode_images(source, {image: first[image] for image in mine})
            self.stats.images_encoded += len(queue) - len(mine)
            if len(mine) < len(queue):  # the others' time counts as well
                self.stats.image_seconds = before + time.perf_counter() - began
                self.require(self._images, missing, columns)
        found = self._images.gather(digests, columns)
        return ImageFeatures(tuple(source.ids()), tuple(digests), found["pooled"], found.get("embed"))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """``text_NE``: embeddings in the joint space, float32, not normalised; one stream of batches for all texts."""
        keys = [digest(text.encode("utf-8")) for text in texts]
        by_key = dict(zip(keys, texts))
        missing = self._texts.missing(sorted(by_key), ("embed",))
        self.stats.texts_reused += len(by_key) - len(missing)
        # Texts of like length share a batch: it is padded only to its longest.
        queue = sorted((by_key[key] for key in missing), key=lambda text: (len(text), digest(text.encode("utf-8"))))
        if queue:
            with self.share("texts", queue) as mine:
                self.encode_texts(mine)
            self.stats.texts_encoded += len(queue) - len(mine)
            if len(mine) < len(queue):
                self.require(self._texts, missing, ("embed",))
        return self._texts.gather(keys, ("embed",))["embed"]

    def captions(self, source: Source) -> list[str]:
        """What the backbone says of each image of ``source``, in its order; equal images are described once.

        Captions are no features: they are kept with the results alone, and one process makes them all.

        Raises:
            BadExample: where an image cannot be read.
            UserError: where the backbone gives another number of captions than images.
        """
        from vlbench.data.transforms import normalise

        digests = self.image_digests(source)
        first = {image: index for index, image in reversed(list(enumerate(digests)))}
        queue = sorted(first, key=first.__getitem__)
        said: list[str] = []
        began = time.perf_counter()
        for images_BCHW in self._pixels(source, [first[image] for image in queue]):
            with self.mode():
                pixels_BCHW = normalise(images_BCHW.to(self.device), self.backbone.card.preprocess)
                found = self.backbone.describe(pixels_BCHW)
            if len(found) != len(images_BCHW):
                raise UserError(f"{self.backbone.card.id}: {len(found)} captions of {len(images_BCHW)} images")
            said += found
            if self.progress:
                self.progress(len(said), len(queue))
        self.stats.images_encoded += len(queue)
        self.stats.image_seconds += time.perf_counter() - began
        caption_of = dict(zip(queue, said, strict=True))
        return [caption_of[image] for image in digests]

    def match(
        self, source: Source, indices: Sequence[int], texts: Sequence[Sequence[str]], *, features: str | None = None
    ) -> list[np.ndarray]:
        """``p(match)`` of the image at each index with each of its texts, float32, from the two read together.

        Where several processes divide the pairs, all of them ask for the same ones.

        Args:
            source: the images, whose regions go along.
            indices: which images.
            texts: what each is compared with.
            features: a file of region features, for models that read such instead of pixels.

        Raises:
            BadExample: where an image cannot be read.
            UserError: where the model matches nothing, lacks the regions it reads, or gives what is no number.
        """
        from vlbench.adapters.common.pairs import match_scores

        return match_scores(self, source, indices, texts, features=features)

    def encode_images(self, source: Source, index_of: Mapping[str, int]) -> None:
        """Encode the images at ``index_of`` (digest → index) and append them, shard by shard, in the source's order."""
        queue = sorted(index_of, key=index_of.__getitem__)
        ids = source.ids()
        shard = _Shard()
        done = 0
        for images_BCHW in self._pixels(source, [index_of[image] for image in queue]):
            names = queue[done : done + len(images_BCHW)]
            shard.add(names, self._encode_images(images_BCHW, [ids[index_of[name]] for name in names]))
            done += len(names)
            if shard.is_full() or done == len(queue):
                self._images.append(shard.digests, shard.columns())
                self.stats.images_encoded += len(shard.digests)
                self.stats.image_seconds += shard.age()
                shard = _Shard()
            if self.progress:
                self.progress(done, len(queue))

    def encode_texts(self, texts: Sequence[str]) -> None:
        """Encode distinct texts and append them, shard by shard."""
        from vlbench.data.loading import in_batches

        for shard in in_batches(texts, SHARD_ROWS):
            began = time.perf_counter()
            rows = [self._encode_texts(part) for part in in_batches(shard, self.batch_size)]
            self.stats.text_seconds += time.perf_counter() - began
            self.stats.texts_encoded += len(shard)
            self._texts.append([digest(text.encode("utf-8")) for text in shard], {"embed": np.concatenate(rows)})

    def image_digests(self, source: Source) -> list[str]:
        """The digest of every image's bytes, in the order of ``source``; read once."""
        from vlbench.data.digests import image_digests

        # The source is kept beside its digests, so that its id cannot come to mean another object.
        if id(source) not in self._digests:
            self._digests[id(source)] = (source, list(image_digests(source)))
        return self._digests[id(source)][1]

    def table(self, of: str, **how: Any) -> Any:
        """The store's table of what this backbone says of ``of``; ``how`` is whatever else changes a number of it."""
        key = {
            "backbone_fingerprint": self.fingerprint,
            "precision": self.precision,
            "features_version": FEATURES_VERSION,
            "of": of,
            **how,
        }
        return self._tables.table(fingerprint(key), key | {"model": self.backbone.card.id})

    def require(self, table: Any, keys: Sequence[str], columns: Sequence[str]) -> None:
        """Raises UserError where rows are absent that another process has appended, or says so."""
        absent = table.missing(keys, columns)
        if absent:
            raise UserError(
                f"{len(absent)} of {len(keys)} features that other processes encoded are not in the feature store: all "
                "processes must see one folder (set VLBENCH_CACHE to one that they share) and have the same weights"
            )

    def _pixels(self, source: Source, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """uint8 ``images_BCHW`` of the examples at ``indices``, in order."""
        from vlbench.data.loading import in_batches, loaded
        from vlbench.data.transforms import eval_transform

        batches = in_batches(indices, self.batch_size)
        return loaded(
            partial(_transformed, source, eval_transform(self.backbone.card.preprocess)),
            batches,
            workers=min(self.workers, len(batches)),
            pin=self.device.startswith("cuda"),
        )

    def _encode_images(self, images_BCHW: torch.Tensor, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of float32 features of one batch of uint8 images."""
        from vlbench.data.transforms import normalise

        card = self.backbone.card
        with self.mode():
            images_BCHW = normalise(images_BCHW.to(self.device, non_blocking=True), card.preprocess)
            features = self.backbone.encode_image(images_BCHW)
        columns = {"pooled": features.pooled_BD}
        if "embed" in card.provides:
            columns["embed"] = features.embed_BE
        return {name: self._checked(values, name, ids, "images") for name, values in columns.items()}

    def _encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        with self.mode():
            text_BE = self.backbone.encode_text(texts)
        return self._checked(text_BE, "text", texts, "texts")

    def _checked(self, values: torch.Tensor | None, name: str, ids: Sequence[str], what: str) -> np.ndarray:
        """``values`` as a float32 array, refused with one line where it has a wrong form or is not finite."""
        model = self.backbone.card.id
        shape = tuple(values.shape) if values is not None else None
        if shape is None or len(shape) != 2 or shape[0] != len(ids):
            raise UserError(
                f"{model}: {name} features of {len(ids)} {what} have shape {shape}, expected (batch, width)"
            )
        array = values.float().cpu().numpy()
        broken = [str(ids[row]) for row in np.flatnonzero(~np.isfinite(array).all(axis=1))]
        if broken:
            shown = ", ".join(repr(item) for item in broken[:3])
            raise UserError(
                f"{model}: {name} features are not finite for {len(broken)} of {len(ids)} {what} in a batch, first "
                f"{shown}; check the weights, or run with --precision fp32"
            )
        return array

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """No gradient, and the arithmetic that ``precision`` names: no TF32 in convolutions and products."""
        import torch

        kind = torch.device(self.device).type
        autocast = torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        # Every flag is named: those that are not, this function of torch sets to False.
        as_it_is = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        before = matmul.allow_tf32
        matmul.allow_tf32 = False
        try:
            with torch.inference_mode(), autocast, cudnn.flags(**as_it_is, allow_tf32=False):
                yield
        finally:
            matmul.allow_tf32 = before


@dataclass
class _Shard:
    """Features waiting to be appended to the store."""

    digests: list[str] = field(default_factory=list)
    parts: list[dict[str, np.ndarray]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def add(self, digests: Sequence[str], columns: dict[str, np.ndarray]) -> None:
        self.digests.extend(digests)
        self.parts.append(columns)

    def columns(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}

    def age(self) -> float:
        return time.perf_counter() - self.began

    def is_full(self) -> bool:
        return len(self.digests) >= SHARD_ROWS or self.age() >= SHARD_SECONDS


class _MemoryStore:
    """What a FeatureStore does, without a disk."""

    def __init__(self) -> None:
        self._tables: dict[str, _MemoryTable] = {}

    def table(self, key: str, made_of: Mapping[str, Any] | None = None) -> _MemoryTable:
        return self._tables.setdefault(key, _MemoryTable())


class _MemoryTable:
    """What a FeatureTable does, without a disk."""

    def __init__(self) -> None:
        self._columns: dict[str, dict[str, np.ndarray]] = {}

    def missing(self, digests: Sequence[str], columns: Sequence[str]) -> list[str]:
        have = self._columns.get(columns[0], {})
        return [item for item in digests if item not in have]

    def append(self, digests: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
        for name, values in columns.items():
            self._columns.setdefault(name, {}).update(zip(digests, values))

    def gather(self, digests: Sequence[str], columns: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: np.stack([self._columns[name][item] for item in digests]) for name in columns}


def _transformed(source: Source, transform: EvalTransform, indices: Sequence[int]) -> torch.Tensor:
    """uint8 ``images_BCHW``."""
    import torch

    from vlbench.data.images import image_at

    return torch.stack([transform(image_at(source, index)[1]) for index in indices])


@contextlib.contextmanager
def _keep(what: str, keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """The share of a process that is alone: everything."""
    yield keys
