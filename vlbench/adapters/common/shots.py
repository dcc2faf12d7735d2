"""What the few-shot protocols share: their settings, the draw by content, and what is said of the draws.

Shape suffixes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, PositiveInt

from vlbench.core.config import Config as BaseConfig
from vlbench.core.fingerprint import digest


class Config(BaseConfig):
    """Settings of a few-shot probe."""

    shots: tuple[PositiveInt, ...] = Field(
        default=(5, 20, 50), min_length=1, description="images a class (ELEVATER: 5, 20, 50)"
    )
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="draws of the shots (ELEVATER: 0, 1, 2)"
    )
    folds: int = Field(default=5, ge=2, description="of cross-validation; the shots, where they are fewer")
    c_low: float = Field(default=1e-3, gt=0, description="weakest C tried")
    c_high: float = Field(default=1e5, gt=0, description="strongest C tried")
    c_count: int = Field(default=9, ge=1, description="values of C, evenly on a log scale")
    max_iterations: int = Field(default=1000, ge=1, description="of L-BFGS")
    tolerance: float = Field(default=1e-5, gt=0, description="largest gradient entry of the final fit")
    search_tolerance: float = Field(default=1e-4, gt=0, description="largest gradient entry while C is searched")

    def grid(self) -> list[float]:
        """The values of C, the strongest penalty first; both ends are exact."""
        found: list[float] = np.geomspace(self.c_low, self.c_high, self.c_count).tolist()
        return found

    def at_grid_edge(self, c: float) -> bool:
        """Whether a better C may lie outside the grid."""
        return c in (self.c_low, self.c_high)


@dataclass(frozen=True)
class Draw:
    """The shots of one seed."""

    rows: np.ndarray
    """Of the training images."""
    folds: np.ndarray
    """The fold of each."""


def first_by_content(digests: Sequence[str], rows: np.ndarray, shots: int, *, seed: int) -> list[int]:
    """Those ``shots`` of ``rows`` whose content, hashed with the seed, comes first; all, where there are fewer.

    Copies of an image are one: of them, the first of ``rows`` stands.
    """
    first = {digests[row]: int(row) for row in rows[::-1]}
    ordered = sorted(first, key=lambda image: digest(f"{seed} {image}".encode()))[:shots]
    return [first[image] for image in ordered]


def spread_note(metric: str, found: Sequence[float]) -> list[str]:
    """A note of what each draw gave, where there are several: too few for an interval, worth seeing."""
    if len(found) < 2:
        return []
    return [f"{metric} of the {len(found)} draws: {', '.join(f'{100 * value:.1f}' for value in found)}%"]
