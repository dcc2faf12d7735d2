"""Captions that a model writes of test images, against human ones: CIDEr and BLEU-4.

For models that provide ``captions``: VirTex's head is thrown away when its backbone is used, and its captions show what
it has learnt (2006.06666, section 4.4; there CIDEr and SPICE, which needs Java).

CIDEr is a mean over images, with word statistics from the references of the whole test set, which stay as they are
when images are resampled. BLEU-4 is a ratio of counts over all captions: its interval is that of its jackknife
pseudo-values (``stats.ranked``). Entries with the same image bytes are one image with all their references.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.caption_scores import bleu, bleu_counts, cider, words
from vlbench.adapters.common.classification import IMAGE_DIGITS, estimates
from vlbench.adapters.common.copies import copies_note
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows
from vlbench.data.sources import without_images
from vlbench.stats.ranked import pseudo_values

_CHANCE_CAPTIONS = 2000
"""Captions of other images that chance is measured on, or as many as there are images: the scorers are slow."""
_SHOWN = 3


class Config(BaseConfig):
    """Settings of captioning."""

    language: str = Field(default="en", description="language of the references")


class Captioning:
    """The adapter. The unit of sampling is the image."""

    name: ClassVar[str] = "captioning"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "cider"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "text"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"captions"})
    splits: ClassVar[tuple[str, ...]] = ("test",)

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """One row an image: ``id, image, caption, references``."""
        source = data.split("test")
        digests = encoder.image_digests(source)
        rows: dict[str, dict[str, Any]] = {}
        for index, image in enumerate(digests):
            example = without_images(source, index)
            texts = example.texts.get(config.language, ())
            if not texts:
                has = ", ".join(sorted(example.texts)) or "none"
                raise UserError(
                    f"{source.spec} ({source.split}): {example.id}: no caption in language {config.language!r} "
                    f"(there: {has})"
                )
            row = rows.setdefault(image, {"id": example.id, "index": index, "references": []})
            row["references"] += texts
        references = [row["references"] for row in rows.values()]
        chance = _chance(references)  # before the model writes: without the scorer's package its work would be lost
        captions = encoder.captions(source)
        columns = {
            "id": [row["id"] for row in rows.values()],
            "image": [image[:IMAGE_DIGITS] for image in rows],
            "caption": [captions[row["index"]] for row in rows.values()],
            "references": references,
        }
        meta = {
            "language": config.language,
            "chance": chance,
            "distinct_captions": len(set(columns["caption"])),
            "notes": copies_note(source.ids(), digests),
        }
        return Rows(columns, meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``cider`` as a score an image, ``bleu4`` as pseudo-values."""
        captions = [words(caption) for caption in rows["caption"]]
        references = [[words(text) for text in texts] for texts in rows["references"]]
        ids, images = list(rows["id"]), list(rows["image"])
        bleu4_N = pseudo_values(bleu(bleu_counts(captions, references)))
        return {
            "cider": Outcomes(ids, cider(captions, references), images, binary=False),
            "bleu4": Outcomes(ids, bleu4_N, images, binary=False, pseudo=True),
        }

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Both metrics with their intervals."""
        return estimates(self.outcomes(rows, config))

    def shown(self, rows: Rows) -> list[str]:
        """Some captions to read, each over a human one: always of the same images, the first by their ids."""
        first = sorted(range(len(rows)), key=lambda row: str(rows["id"][row]))[:_SHOWN]
        lines = []
        for row in first:
            lines.append(f"{rows['id'][row]}: {_one_line(rows['caption'][row]) or '(nothing)'}")
            lines.append(f"    a reference: {_one_line(rows['references'][row][0])}")
        return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _chance(references: list[list[str]]) -> dict[str, float]:
    """What human captions of other images score: each image gets the first reference of some images after it."""
    of_image = [[words(text) for text in texts] for texts in references]
    n = len(of_image)
    scores, counts = [], []
    for shift in range(1, 1 + max(1, min(n - 1, _CHANCE_CAPTIONS // n))):
        others = [of_image[(number + shift) % n][0] for number in range(n)]
        scores.append(cider(others, of_image).mean())
        counts.append(bleu_counts(others, of_image))
    return {"cider": float(np.mean(scores)), "bleu4": bleu(np.concatenate(counts)).value}


ADAPTER = Captioning()
