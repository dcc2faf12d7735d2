"""Perceptual hashes: 64 bits of an image that survive re-encoding, resizing and small changes of colour.

The DCT hash that the field calls pHash: luminance (ITU-R 601, as PIL's "L"), 32 x 32 pixels with PIL's Lanczos filter,
the 8 x 8 lowest frequencies of its two-dimensional DCT-II, and of each whether it is above their median. Two images
are as far apart as their hashes differ in bits.

It replaces ALIGN's own near-duplicate search, whose embedding model is not published. It sees no crop, no mirror
image and no rotation.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from PIL import Image

SIDE, LOW = 32, 8
_FLAT = float(SIDE**2)
"""Largest coefficient but the mean's of an image that counts as flat: what a pattern of low frequency over the whole
image reaches with an amplitude of one grey level of 255."""
_DIGITS = 3


def perceptual_hash(image: Image.Image) -> int | None:
    """The hash of ``image``, or None where it shows nothing: all flat images would be one another's duplicates."""
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    # Rounded, so that the last bits of a sum, which differ between machines, never decide a comparison.
    low_FF = np.round(_low_frequencies(np.asarray(small, dtype=np.float64)), _DIGITS)
    if np.abs(low_FF.ravel()[1:]).max() <= _FLAT:
        return None
    bits = (low_FF > np.median(low_FF)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _low_frequencies(grey_HW: np.ndarray) -> np.ndarray:
    """The ``LOW`` lowest frequencies of each axis of the DCT-II, unnormalised (2 sum x cos)."""
    basis_FH = _basis()
    low_FF: np.ndarray = basis_FH @ grey_HW @ basis_FH.T
    return low_FF


@functools.cache
def _basis() -> np.ndarray:
    frequency_F1, place_1H = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    return 2 * np.cos(np.pi * frequency_F1 * (2 * place_1H + 1) / (2 * SIDE))


class HashSearch:
    """All hashes within a distance of given ones, exactly, without comparing all with all.

    Hashes that differ in at most ``t`` bits agree wholly in at least one of ``t + 1`` parts of them. So each part is
    looked up in a sorted table, and only what it turns up is compared in full: with 100,000 hashes and ``t = 4`` about
    60 comparisons a query instead of 100,000.

    Args:
        hashes_M: uint64, what is searched.
        distance: ``t``, at most 16.
    """

    def __init__(self, hashes_M: np.ndarray, distance: int) -> None:
        self.distance = distance
        self._hashes_U, self._first_U = np.unique(hashes_M, return_index=True)
        edges = np.linspace(0, 64, distance + 2).astype(int)
        self._parts = []
        for low, high in itertools.pairwise(edges):
            shift, mask = np.uint64(low), np.uint64((1 << int(high - low)) - 1)
            values_U = (self._hashes_U >> shift) & mask
            order_U = np.argsort(values_U, kind="stable")
            self._parts.append((shift, mask, values_U[order_U], order_U))

    def nearest(self, queries_N: np.ndarray, *, block: int = 1 << 21) -> tuple[np.ndarray, np.ndarray]:
        """``(index_N, distance_N)`` of the nearest hash within the distance, the first of equals; -1 and 65 without.

        ``block``: how many candidates are compared at once.
        """
        best_N = np.full(len(queries_N), 65 << 32, dtype=np.int64)  # distance, then index: one number to minimise
        for shift, mask, values_U, order_U in self._parts:
            part_N = (queries_N >> shift) & mask
            low_N, high_N = (np.searchsorted(values_U, part_N, side=side) for side in ("left", "right"))
            ends_N = np.cumsum(high_N - low_N)
            start = 0
            while start < len(queries_N):
                done = ends_N[start - 1] if start else 0
                stop = max(start + 1, int(np.searchsorted(ends_N, done + block, side="right")))
                self._compare(queries_N, best_N, np.arange(start, stop), low_N, high_N, order_U)
                start = stop
        distance_N, index_N = best_N >> 32, best_N & 0xFFFFFFFF
        near_N = distance_N <= self.distance
        return np.where(near_N, index_N, -1), np.where(near_N, distance_N, 65)

    def _compare(
        self,
        queries_N: np.ndarray,
        best_N: np.ndarray,
        chosen_Q: np.ndarray,
        low_N: np.ndarray,
        high_N: np.ndarray,
        order_U: np.ndarray,
    ) -> None:
        """Compare the chosen queries with their candidates ``order_U[low:high]``."""
        sizes_Q = high_N[chosen_Q] - low_N[chosen_Q]
        query_C = np.repeat(chosen_Q, sizes_Q)
        first_Q = np.cumsum(sizes_Q) - sizes_Q
        place_C = np.arange(len(query_C)) - np.repeat(first_Q, sizes_Q) + np.repeat(low_N[chosen_Q], sizes_Q)
        candidate_C = order_U[place_C]
        apart_C = np.bitwise_count(queries_N[query_C] ^ self._hashes_U[candidate_C]).astype(np.int64)
        np.minimum.at(best_N, query_C, (apart_C << 32) | self._first_U[candidate_C])
