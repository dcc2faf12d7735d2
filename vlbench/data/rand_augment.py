"""RandAugment (Cubuk et al., 1909.13719) as timm does it, under this repository's rule of randomness.

timm's operations draw from the generators of the process, Python's and numpy's. A sample must be a function of its own
generator, or a resumed run would see other images: so those two are seeded from it for the time of the call, and
get back the state that they had.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

_PARTS = {
    r"m\d+": "magnitude",
    r"n[1-9]": "operations an image",
    r"p(0(\.\d+)?|1(\.0+)?)": "probability of each",
    r"mstd\d+(\.\d+)?": "standard deviation of the magnitude",
    r"mmax[1-9]\d*": "largest magnitude",
    r"inc[01]": "operations that grow with it",
    r"t(weights|3a|3aw)": "other sets of operations",
}


def check_words(words: str) -> str:
    """``words`` if timm has a meaning for all of them: it passes over some that it does not know. Else a ValueError."""
    first, *rest = words.split("-")
    kinds = [kind for word in rest for kind in _PARTS if re.fullmatch(kind, word)]
    if first != "rand" or len(kinds) < len(rest) or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"rand_augment: expected timm's words, each once, for instance rand-m9-mstd0.5-inc1, got {words!r}"
        )
    return words


def rand_augment(
    image: Image.Image,
    rng: np.random.Generator,
    words: str,
    *,
    resample: Image.Resampling,
    fill: tuple[float, float, float],
) -> Image.Image:
    """A few random changes of colour and place to an RGB image.

    Args:
        image: at the size of the view: shifts are shares of it.
        rng: the generator of this sample; one number is drawn.
        words: timm's, as ``check_words`` takes them.
        resample: of what turns, shears and shifts.
        fill: the colour, from 0 to 1, of what comes in from outside. timm takes the mean that images are normalised by.

    Returns:
        An image of the same size.
    """
    colour = tuple(min(255, round(255 * part)) for part in fill)
    with _seeded(int(rng.integers(2**32))):
        changed: Image.Image = _transform(words, int(0.45 * min(image.size)), colour, resample)(image)
    return changed


@cache
def _transform(words: str, shift: int, fill: tuple[int, ...], resample: Image.Resampling) -> Any:
    """What timm's create_transform makes of ``words``: its largest shift is 0.45 of the shorter side."""
    from timm.data import auto_augment

    hints = {"translate_const": shift, "img_mean": fill, "interpolation": resample}
    transform = auto_augment.rand_augment_transform(words, hints)
    for operation in transform.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, which asks for no bits at all at the largest magnitude; Pillow made that black once, and now refuses."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators as a function of ``seed``; afterwards as they were."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
