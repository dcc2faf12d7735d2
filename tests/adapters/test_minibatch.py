from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlbench.adapters.common import minibatch
from vlbench.adapters.common.minibatch import Problem, Training, random_head, train_heads
from vlbench.adapters.common.search import coarse_to_fine
from vlbench.adapters.common.selection import Checked, qualities

N, WIDTH, NAMES = 129, 10, ("ant", "bee", "cat", "dog")
SETTINGS = [(0.1, 1e-3), (0.01, 0.1), (0.001, 0.0)]
ELEVATER = Training("sgd", "constant", True, False, 32, 3)
CLIP_BENCHMARK = Training("adamw", "cosine", False, False, 32, 3)
MANY_LABELS = Training("sgd", "constant", True, True, 32, 3)


def _images(seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((N, WIDTH)) * 2 + 1).astype(np.float32)
    return features, rng.integers(0, 4, N), [f"{i:04d}" for i in range(N)]


def _problem(features: np.ndarray, labels: np.ndarray, digests: list[str]) -> Problem:
    return Problem.of(features, labels, digests, device="cpu")


def _by_torch(features: np.ndarray, labels: np.ndarray, setting: tuple[float, float], training: Training) -> np.ndarray:
    """The same training with torch's own layers, loss, gradient and optimizers."""
    weight, bias = random_head(NAMES, WIDTH, seed=0)
    linear = torch.nn.Linear(WIDTH, 4)
    linear.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    norm = torch.nn.BatchNorm1d(WIDTH, affine=False) if training.batch_norm else torch.nn.Identity()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[training.optimizer]
    extra = {"momentum": 0.9} if training.optimizer == "sgd" else {}
    optimizer = kind(linear.parameters(), lr=setting[0], weight_decay=setting[1], **extra)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(training.seed)
    epochs, steps, step = 4, -(-N // 32), 0
    for _ in range(epochs):
        for batch in torch.randperm(N, generator=generator).split(32):
            if training.schedule == "cosine":
                optimizer.param_groups[0]["lr"] = setting[0] * 0.5 * (1 + np.cos(np.pi * step / (epochs * steps)))
            step += 1
            if len(batch) == 1 and training.batch_norm:
                continue
            logits = linear(norm(x[batch]))
            if training.multilabel:
                known = (y[batch] >= 0).float()
                losses = F.binary_cross_entropy_with_logits(logits, (y[batch] == 1).float(), reduction="none")
                loss = (losses * known).sum() / known.sum()
            else:
                loss = F.cross_entropy(logits, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    norm.eval()
    return linear(norm(x)).detach().numpy()


@pytest.mark.parametrize("training", [ELEVATER, CLIP_BENCHMARK, MANY_LABELS], ids=["elevater", "clip_benchmark", "voc"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_heads_side_by_side_end_where_torch_ends_with_each_alone(
    training: Training, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minibatch, "HEADS_BYTES", at_once * 4 * 4 * 4 * (WIDTH + 1))
    features, labels, digests = _images()
    if training.multilabel:
        labels = np.random.default_rng(1).choice([-1, 0, 1], p=[0.1, 0.6, 0.3], size=(N, 4)).astype(np.int8)
    heads = train_heads(
        _problem(features, labels, digests), random_head(NAMES, WIDTH, seed=0), SETTINGS, epochs=4, training=training
    )
    for head, setting in enumerate(SETTINGS):
        logits = heads.logits(torch.from_numpy(features), head).numpy()
        assert logits == pytest.approx(_by_torch(features, labels, setting, training), abs=2e-5)


def test_one_label_an_image_takes_one_number_an_image() -> None:
    """As rows of zeros and a one, the labels of ImageNet alone would fill five gigabytes."""
    features, labels, digests = _images()
    problem = _problem(features, labels, digests)
    assert (problem.target.dtype, problem.target.shape) == (torch.int64, (N,))
    assert problem.target.tolist() == labels.tolist()
    several = np.random.default_rng(1).choice([-1, 0, 1], size=(N, 4)).astype(np.int8)
    problem = _problem(features, several, digests)
    assert (problem.target.numpy() == (several == 1)).all()
    assert (problem.known_NC.numpy() == (several >= 0)).all()


def test_order_of_images_and_classes_does_not_matter() -> None:
    features, labels, digests = _images()
    start = random_head(NAMES, WIDTH, seed=0)
    before = train_heads(_problem(features, labels, digests), start, SETTINGS, epochs=3, training=ELEVATER)
    rows = np.random.default_rng(2).permutation(N)
    moved = _problem(features[rows], labels[rows], [digests[row] for row in rows])
    after = train_heads(moved, start, SETTINGS, epochs=3, training=ELEVATER)
    assert torch.equal(before.weight_KCD, after.weight_KCD)
    order = [2, 0, 3, 1]
    other_start = random_head([NAMES[c] for c in order], WIDTH, seed=0)
    relabelled = _problem(features, np.argsort(order)[labels], digests)
    after = train_heads(relabelled, other_start, SETTINGS, epochs=3, training=ELEVATER)
    assert torch.allclose(before.weight_KCD[:, order], after.weight_KCD, atol=1e-5)


def test_random_head_is_drawn_as_torch_draws_it_and_by_name() -> None:
    weight, bias = random_head([f"class {i}" for i in range(500)], 64, seed=0)
    assert abs(weight).max() <= 1 / 8
    assert abs(bias).max() <= 1 / 8
    assert weight.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    assert random_head(["a", "b"], 64, seed=0)[0][1].tolist() == random_head(["b"], 64, seed=0)[0][0].tolist()
    assert random_head(["a"], 64, seed=1)[0].tolist() != random_head(["a"], 64, seed=0)[0].tolist()


def test_a_head_that_diverges_is_the_worst_and_harms_no_other() -> None:
    features, labels, digests = _images()
    checked = Checked.of(features, labels, "acc1", device="cpu")
    wild = [(0.1, 1e6), *SETTINGS]
    found = qualities(
        _problem(features, labels, digests),
        random_head(NAMES, WIDTH, seed=0),
        wild,
        checked,
        epochs=20,
        training=ELEVATER,
        best_epoch=False,
    )
    assert found[0] == -np.inf
    assert min(found[1:]) > 0.2


def test_best_epoch_is_never_worse_than_the_last() -> None:
    features, labels, digests = _images()
    checked = Checked.of(*_images(1)[:2], "mean_per_class_recall", device="cpu")
    best, last = (
        qualities(
            _problem(features, labels, digests),
            random_head(NAMES, WIDTH, seed=0),
            SETTINGS,
            checked,
            epochs=6,
            training=ELEVATER,
            best_epoch=best_epoch,
        )
        for best_epoch in (True, False)
    )
    assert all(np.greater_equal(best, last))
    assert best != last


def test_search_tries_fifteen_of_ninety_seven_and_finds_the_peak() -> None:
    asked: list[tuple[int, int]] = []

    def evaluate(points):
        asked.extend(points)
        return [-abs(index - (37, 70)[search]) - search for search, index in points]

    found = coarse_to_fine(97, evaluate, stride=16, searches=2)
    assert found.best == (0, 37)
    assert not found.at_edge
    assert len(asked) == len(set(asked)) == found.tried
    assert [sum(search == of for search, _ in asked) for of in (0, 1)] == [15, 15]


def test_search_keeps_the_first_of_equals_and_says_where_the_edge_is() -> None:
    found = coarse_to_fine(97, lambda points: [0.5] * len(points), stride=16, searches=3)
    assert (found.best, found.at_edge) == ((0, 0), True)
    assert coarse_to_fine(1, lambda points: [1.0], stride=16).at_edge is False
    assert coarse_to_fine(97, lambda points: [float(i) for _, i in points], stride=16).best == (0, 96)
