"""Heads: their losses against formulas written out in float64, their shapes, and who can never be chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlbench.finetune.fusion.heads import NO_REGION, AnswerHead, ClassHead, RegionHead


def log_softmax(row: np.ndarray) -> np.ndarray:
    top = row.max()
    return row - top - np.log(np.exp(row - top).sum())


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_class_loss_is_the_mean_negative_log_likelihood(scale: float) -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(7, 3)) * scale, [0, 2, 1, 1, 0, 2, 2]
    expected = np.mean([-log_softmax(row)[target] for row, target in zip(logits, targets)])
    head = ClassHead(3)
    found = head.loss(torch.tensor(logits, dtype=torch.float32), head.collate(targets))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("answers", [4, 3129])
def test_answer_loss_is_summed_over_answers_and_averaged_over_questions(answers: int) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, answers)) * 4
    targets = [{0: 1.0}, {}, {1: 0.3, 3: 0.6}, {answers - 1: 0.9}, {2: 1.0, 0: 0.3}]
    dense = np.zeros((5, answers))
    for row, target in enumerate(targets):
        for answer, score in target.items():
            dense[row, answer] = score
    # log s(z) = -log(1 + e^-z), log(1 - s(z)) = -log(1 + e^z)
    each = dense * np.log1p(np.exp(-logits)) + (1 - dense) * np.log1p(np.exp(logits))
    head = AnswerHead(answers)
    collated = head.collate(targets)
    assert collated.numpy() == pytest.approx(dense, abs=1e-7)
    found = head.loss(torch.tensor(logits, dtype=torch.float32), collated)
    assert found.item() == pytest.approx(each.sum(axis=1).mean(), rel=1e-5)
    # mu-VLA writes it as the mean times the number of answers.
    mean = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), collated.double())
    assert found.item() == pytest.approx(mean.item() * answers, rel=1e-5)


def test_answer_loss_has_its_minimum_at_the_soft_score() -> None:
    head = AnswerHead(1)
    target = head.collate([{0: 0.3}])
    at = np.log(0.3 / 0.7)
    best, less, more = (head.loss(torch.tensor([[at + step]]), target).item() for step in (0.0, -0.3, 0.3))
    assert best < less
    assert best < more


def test_region_loss_reads_real_regions_only() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(3, 5)) * 3
    counts, targets = [5, 2, 1], [4, 0, 0]
    expected = np.mean([-log_softmax(logits[i, : counts[i]])[targets[i]] for i in range(3)])
    filled = torch.tensor(logits, dtype=torch.float32)
    for row, count in enumerate(counts):
        filled[row, count:] = NO_REGION
    head = RegionHead()
    assert head.loss(filled, head.collate(targets)).item() == pytest.approx(expected, abs=1e-6)


def test_shapes() -> None:
    torch.manual_seed(0)
    assert ClassHead(3).build(8, views=1, init_std=0.02)(torch.zeros(5, 8)).shape == (5, 3)
    assert ClassHead(2).build(8, views=2, init_std=0.02)(torch.zeros(5, 16)).shape == (5, 2)
    assert AnswerHead(3129).build(8, views=1, init_std=0.02)(torch.zeros(5, 8)).shape == (5, 3129)
    assert RegionHead().build(8, views=1, init_std=0.02)(torch.zeros(5, 6, 8)).shape == (5, 6)


def test_region_head_is_linear_gelu_norm_linear() -> None:
    torch.manual_seed(0)
    head = RegionHead().build(4, views=1, init_std=0.5).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    weights = [tensor.detach().numpy() for tensor in head.parameters()]
    (w1, b1, gain, shift, w2, b2) = weights
    hidden = x.numpy() @ w1.T + b1
    erf = torch.erf(torch.tensor(hidden) / 2**0.5).numpy()
    hidden = 0.5 * hidden * (1 + erf)
    centred = hidden - hidden.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * gain + shift
    assert head(x).detach().numpy() == pytest.approx((normed @ w2.T + b2)[..., 0], abs=1e-10)
