"""What a fusion model learns from and is asked: sentences about one image or several.

Shapes: N questions, V images that each is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlbench.core.types import Source


@dataclass(frozen=True)
class Questions:
    """N questions of one split, each about V images.

    ``views[v][i].image`` is image ``v`` of question ``i``. Equal images are encoded once, whichever questions they
    belong to.
    """

    views: tuple[Source, ...]
    """V sources of N entries each: one, or two for a sentence about a pair."""
    texts: tuple[str, ...]
    targets: Sequence[Any]
    """N, what the head learns. ClassHead: the class. AnswerHead: a mapping of answer to its soft score in [0, 1], which
    may be empty. RegionHead: which of ``views[0][i].regions`` is meant. Questions that are only asked may have None."""
    regions: bool = False
    """Whether the image's tokens are its annotated boxes, ``views[0][i].regions``, and not the cells of a grid."""

    def __post_init__(self) -> None:
        assert self.views, "questions are about images"
        lengths = {len(self.texts), len(self.targets), *map(len, self.views)}
        assert len(lengths) == 1, f"one text, target and image of each question, not {sorted(lengths)}"

    def __len__(self) -> int:
        return len(self.texts)
