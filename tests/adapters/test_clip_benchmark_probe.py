from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, label_in, labelled, noise_of
from vlbench.adapters.clip_benchmark_probe import ADAPTER
from vlbench.adapters.common.minibatch import content_order, random_head
from vlbench.core.errors import UserError

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
WIDTH = 10


def _encoder(signal: float = 0.8) -> FakeEncoder:
    return FakeEncoder(lambda image: signal * noise_of(CLASSES[label_in(image)], WIDTH) + noise_of(image, WIDTH))


def _data(*, val: int = 60, train: int = 130) -> FakeData:
    sizes = {"train": train, "val": val, "test": 120}
    return FakeData({name: labelled(name, np.arange(n) % 6, CLASSES) for name, n in sizes.items() if n})


def test_without_val_it_is_the_protocol_written_with_torch() -> None:
    encoder, data = _encoder(), _data(val=0)
    train, test = (encoder.images(data.split(name)) for name in ("train", "test"))
    labels = np.array(data.split("train").labels())
    order = content_order(train.digests, labels)
    x = torch.nn.functional.normalize(torch.from_numpy(train.embed_NE[order]), dim=1)
    y = torch.from_numpy(labels[order])
    linear = torch.nn.Linear(WIDTH, 6)
    weight, bias = random_head(CLASSES, WIDTH, seed=0)
    linear.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10 * 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for batch in torch.randperm(130, generator=generator).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    logits = linear(torch.nn.functional.normalize(torch.from_numpy(test.embed_NE), dim=1))
    rows = ADAPTER.predict(encoder, data, ADAPTER.Config())
    assert (rows["pred"] == logits.argmax(dim=1).numpy()).all()
    assert rows.meta["chosen"] == {"weight_decay": 0.0}
    assert 0.3 < ADAPTER.score(rows, ADAPTER.Config())["acc1"].value < 0.98


def test_with_val_the_decay_is_chosen_there_and_both_are_learnt_from() -> None:
    encoder, data = _encoder(), _data()
    before = ADAPTER.predict(encoder, data, ADAPTER.Config())
    assert before.meta["fit"]["searched"] <= 15
    assert before.meta["train_images"] == 190
    data.splits["test"]._labels = [(label + 1) % 6 for label in data.splits["test"]._labels]
    after = ADAPTER.predict(encoder, data, ADAPTER.Config())
    assert after.meta["chosen"] == before.meta["chosen"]
    assert (after["pred"] == before["pred"]).all()


def test_seed_and_images_alone_decide() -> None:
    """Whatever was drawn from torch's own generator before, and in any order of files."""
    data = _data()
    torch.manual_seed(0)
    first = ADAPTER.predict(_encoder(), data, ADAPTER.Config())
    torch.rand(1000)
    rows = np.random.default_rng(0).permutation(130)
    part = data.splits["train"]
    data.splits["train"] = FakeSource(
        [part.images[i] for i in rows], split="train", labels=[part._labels[i] for i in rows], classes=CLASSES
    )
    second = ADAPTER.predict(_encoder(), data, ADAPTER.Config())
    assert (first["pred"] == second["pred"]).all()
    assert first.meta["chosen"] == second.meta["chosen"]
    other = ADAPTER.predict(_encoder(), data, ADAPTER.Config(seed=1))
    assert (first["pred"] != other["pred"]).any()


def test_length_of_features_does_not_matter_and_the_joint_space_is_read() -> None:
    plain, data = _encoder(), _data(val=0)
    stretched = FakeEncoder(lambda image: np.zeros(3), embed=lambda image: 40 * plain.pooled(image))
    first, second = (ADAPTER.predict(encoder, data, ADAPTER.Config()) for encoder in (plain, stretched))
    assert (first["pred"] == second["pred"]).mean() > 0.98
    assert second.meta["feature"] == "embed"


def test_a_fit_that_diverges_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="diverged at learning rate 1e\\+38: lower the protocol's lr"):
        ADAPTER.predict(_encoder(), _data(val=0), ADAPTER.Config(lr=1e38))
