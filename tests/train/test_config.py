from __future__ import annotations

import pytest

from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.train.config import PretrainConfig


@pytest.mark.parametrize(
    ("assignment", "answer"),
    [
        ("crop_scale=[0, 1]", "crop_scale: expected 0 < smallest <= largest <= 1"),
        ("crop_scale=[0.9, 0.5]", "crop_scale: expected"),
        ("crop_scale=[0.5, 1.1]", "crop_scale: expected"),
        ("crop_ratio=[0, 1]", "crop_ratio: expected 0 < smallest <= largest"),
        ("crop_ratio=[2, 1]", "crop_ratio: expected"),
        ("crop_ratio=[.nan, 1]", "crop_ratio: expected"),
        ("color_jitter=[0, 0, 0, 0.6]", "the hue's strength is at most 0.5, got 0.6"),
        ("color_jitter=[0, -0.1, 0, 0]", "strengths are not negative"),
        ("jitter_p=1.5", "less than or equal to 1"),
        ("random_erasing=-0.1", "greater than or equal to 0"),
    ],
)
def test_augmentation_that_cannot_be_is_refused(assignment: str, answer: str) -> None:
    with pytest.raises(UserError) as error:
        override(PretrainConfig(), [f"augment.{assignment}"])
    assert answer in str(error.value)
    assert "\n" not in str(error.value)


def test_augmentation_at_its_limits_is_accepted() -> None:
    edges = ["crop_scale=[1, 1]", "crop_ratio=[1, 1]", "color_jitter=[2, 2, 2, 0.5]", "jitter_p=0", "random_erasing=1"]
    assert override(PretrainConfig(), [f"augment.{edge}" for edge in edges]).augment.crop_scale == (1, 1)


def test_a_crop_larger_than_the_square_it_is_cut_from_is_refused() -> None:
    with pytest.raises(UserError, match=r"augment\.resize_to 60: a crop of visual\.image_size=64 is not in it"):
        override(PretrainConfig(), ["augment.resize_to=60"])
    assert override(PretrainConfig(), ["augment.resize_to=64"]).augment.resize_to == 64
