"""RandAugment is timm's, on the sample's own generator, and leaves those of the process as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.data.making import pixels
from vlbench.core.catalog import RECIPES
from vlbench.data.rand_augment import _posterize, _transform, rand_augment
from vlbench.data.transforms import Augment, augment

WORDS = "rand-m9-mstd0.5-inc1"
MEAN = (0.485, 0.456, 0.406)


def image(side: int = 48) -> Image.Image:
    return Image.fromarray(pixels(3, 9, 9)).resize((side, side), Image.Resampling.BICUBIC)


def changed(seed: int, words: str = WORDS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(rand_augment(image(), rng, words, resample=Image.Resampling.BICUBIC, fill=MEAN))


def test_it_is_what_timms_own_pipeline_makes_of_the_words() -> None:
    """UniCL's pipeline is ``create_transform``: the same operations with the same constants, and no color jitter."""
    from timm.data import create_transform
    from timm.data.auto_augment import RandAugment

    steps = create_transform(
        224, is_training=True, auto_augment=WORDS, color_jitter=0.4, re_prob=0.25, interpolation="bicubic", mean=MEAN
    ).transforms
    (theirs,) = (step for step in steps if isinstance(step, RandAugment))
    ours = _transform(WORDS, int(0.45 * 224), (124, 116, 104), Image.Resampling.BICUBIC)
    assert not any("ColorJitter" in type(step).__name__ for step in steps)
    assert (ours.num_layers, ours.choice_weights) == (theirs.num_layers, theirs.choice_weights)
    assert [op.name for op in ours.ops] == [op.name for op in theirs.ops]
    for mine, its in zip(ours.ops, theirs.ops, strict=True):
        differing = {key for key in vars(its) if vars(mine)[key] != vars(its)[key]}
        assert differing == ({"aug_fn"} if mine.name == "PosterizeIncreasing" else set())


def test_posterize_is_timms_and_no_bits_are_black() -> None:
    """A magnitude of 10, which words with mstd reach, asks for 0 bits: an error of Pillow's in the midst of a run."""
    from timm.data.auto_augment import posterize

    given = image()
    for bits in range(1, 10):
        assert np.array_equal(np.asarray(_posterize(given, bits)), np.asarray(posterize(given, bits)))
    assert not np.asarray(_posterize(given, 0)).any()
    assert _posterize(given, 0).size == given.size
    for seed in range(150):
        changed(seed, "rand-m10-p1-inc1")


def test_it_draws_from_the_samples_generator_alone() -> None:
    for seed in range(20):
        random.seed(1)
        np.random.seed(1)
        first = changed(seed)
        random.seed(2)
        np.random.seed(2)
        before = random.getstate(), np.random.get_state()
        assert np.array_equal(changed(seed), first)
        after = random.getstate(), np.random.get_state()
        assert before[0] == after[0]
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(before[1], after[1], strict=True))
    different = {changed(seed, "rand-m9-p1").tobytes() for seed in range(20)}
    assert len(different) == 20, "two samples have the same changes"


def test_the_generators_of_the_process_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        def fail(_: Image.Image) -> Image.Image:
            raise RuntimeError

        return fail

    monkeypatch.setattr("vlbench.data.rand_augment._transform", broken)
    before = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(RuntimeError):
        changed(0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_augment_without_it_draws_nothing_more_and_with_it_changes_images() -> None:
    same, moved = Augment(crop_scale=(1, 1), crop_ratio=(1, 1)), {}
    for words in (None, "rand-m9-p0", "rand-m9-p1-inc1"):
        settings = same.model_copy(update={"rand_augment": words})
        rng = np.random.default_rng(0)
        moved[words] = augment(image(), rng, settings, (48, 48), fill=MEAN)[0], rng.integers(2**63)
    assert moved[None][1] == _after_the_crop()
    assert torch.equal(moved["rand-m9-p0"][0], moved[None][0]), "with a probability of 0 nothing is done"
    assert not torch.equal(moved["rand-m9-p1-inc1"][0], moved[None][0])


def _after_the_crop() -> int:
    rng = np.random.default_rng(0)
    augment(image(), rng, Augment(crop_scale=(1, 1), crop_ratio=(1, 1)), (48, 48))
    return int(rng.integers(2**63))


@pytest.mark.parametrize(
    "words", ["rand", "rand-m9-mstd0.5-inc1", "rand-n3-p0.7-mmax20-m15", "rand-m5-t3aw", "rand-p1.0"]
)
def test_words_of_timms_make_an_image(words: str) -> None:
    assert Augment(rand_augment=words).rand_augment == words
    assert changed(0, words).shape == (48, 48, 3)


@pytest.mark.parametrize(
    "words",
    ["", "m9", "augmix-m9", "rand-", "rand-m", "rand-x3", "rand-m9-m8", "rand-p2", "rand-n0", "rand-inc2", "rand-tx"],
)
def test_words_that_timm_would_pass_over_are_one_clear_line(words: str) -> None:
    with pytest.raises(ValidationError, match=r"rand_augment: expected timm's words.*rand-m9-mstd0.5-inc1, got "):
        Augment(rand_augment=words)


def test_the_papers_unicl_has_it_and_no_tiny_preset() -> None:
    assert RECIPES.get("unicl").presets["paper"].augment.rand_augment == WORDS
    for name in RECIPES.names():
        assert RECIPES.get(name).presets["tiny"].augment.rand_augment is None
