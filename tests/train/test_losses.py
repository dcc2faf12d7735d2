"""The contrastive losses against float64 formulas, open_clip, their limits, and themselves over ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.train.conftest import on_ranks
from vlbench.train.distributed import gather_constant, ranks, session
from vlbench.train.losses import (
    _soft_cross_entropy,
    align_loss,
    clip_loss,
    cross_entropy,
    image_to_text_loss,
    own_classes,
    supcon_loss,
    unicl_loss,
)


def unit(seed: int, rows: int = 12, width: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_BD = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(rows_BD, dim=-1).to(dtype).requires_grad_()


def scale(value: float = 14.3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def grads(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def unicl_by_hand(image: np.ndarray, text: np.ndarray, labels: list[int], s: float) -> float:
    """Algorithm 1 in plain loops: captions (-1) are positives of nothing but themselves."""
    n = len(labels)
    total = 0.0
    for logits in (s * image @ text.T, s * text @ image.T):
        for i in range(n):
            positives = [j for j in range(n) if i == j or (labels[i] >= 0 and labels[i] == labels[j])]
            log_sum = math.log(sum(math.exp(x) for x in logits[i]))
            total += sum(log_sum - logits[i][j] for j in positives) / len(positives) / n
    return total / 2


def align_by_hand(image: np.ndarray, text: np.ndarray, sigma: float, eps: float) -> float:
    """Both directions in plain loops, the target written out."""
    n = len(image)
    total = 0.0
    for logits in (image @ text.T / sigma, text @ image.T / sigma):
        for i in range(n):
            log_sum = math.log(sum(math.exp(x) for x in logits[i]))
            total += sum(((1 - eps) * (i == j) + eps / n) * (log_sum - logits[i][j]) for j in range(n)) / n
    return total


def supcon_by_hand(z: np.ndarray, labels: list[int], tau: float) -> float:
    """L_out in plain loops over the anchors that have a positive."""
    terms = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i] >= 0]
        if positives:
            log_sum = math.log(sum(math.exp(z[i] @ z[a] / tau) for a in others))
            terms.append(sum(log_sum - z[i] @ z[p] / tau for p in positives) / len(positives))
    return sum(terms) / len(terms)


def test_clip_loss_is_open_clips_value_and_gradient() -> None:
    from open_clip.loss import ClipLoss

    image, text, s = unit(0), unit(1), scale()
    ours, theirs = clip_loss(image, text, s), ClipLoss()(image, text, s)
    assert abs(ours - theirs) < 1e-12
    for mine, other in zip(grads(ours, image, text, s), grads(theirs, image, text, s), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    single = [tensor.detach().float() for tensor in (image, text, s)]
    assert abs(clip_loss(*single) - ours) < 1e-6


@pytest.mark.parametrize("labels", [[0, 0, 1, 2, -1, 1, -1, 5, 5, 5, -1, 3], [-1] * 12, [4] * 12, list(range(12))])
def test_unicl_loss_is_the_formula_value_and_gradient(labels: list[int]) -> None:
    image, text, s = unit(2), unit(3), scale(9.0)
    given = torch.tensor(labels)
    loss = unicl_loss(image, text, given, s)
    by_hand = unicl_by_hand(image.detach().numpy(), text.detach().numpy(), labels, 9.0)
    assert loss.item() == pytest.approx(by_hand, abs=1e-12)
    assert given.tolist() == labels, "the caller's labels were changed"
    assert torch.autograd.gradcheck(lambda *x: unicl_loss(x[0], x[1], given, x[2]), (image, text, s))


def test_unicl_loss_with_distinct_labels_is_clip_loss_exactly() -> None:
    image, text, s = unit(4, 64, 16, torch.float32), unit(5, 64, 16, torch.float32), scale(30.0, torch.float32)
    for labels in (torch.randperm(64), torch.full((64,), -1), torch.tensor([*range(32), *[-1] * 32])):
        unicl, clip = unicl_loss(image, text, labels, s), clip_loss(image, text, s)
        assert torch.equal(unicl, clip)
        for mine, other in zip(grads(unicl, image, text, s), grads(clip, image, text, s), strict=True):
            assert torch.equal(mine, other)


def test_unicl_loss_floor_is_the_mean_log_number_of_positives() -> None:
    labels = torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [-1] * 2)
    centres = torch.eye(5, dtype=torch.float64)
    perfect = centres[torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [3, 4])]
    floor = (8 * math.log(8) + 4 * math.log(4) + 2 * math.log(2)) / 16
    assert unicl_loss(perfect, perfect, labels, 1000.0).item() == pytest.approx(floor, abs=1e-12)
    assert unicl_loss(perfect, perfect, labels, 5.0).item() > floor + 1e-3
    eight_classes = torch.arange(64) % 8  # 64 images of 8 classes: ln 8 = 2.08
    assert unicl_loss(
        torch.eye(8)[eight_classes], torch.eye(8)[eight_classes], eight_classes, 100.0
    ).item() == pytest.approx(math.log(8), abs=1e-5)


def test_unicl_floor_of_imagenets_1000_classes_in_a_batch_of_4096_is_1_543() -> None:
    """Labels drawn evenly from 1,000 classes, and an embedding that is the class."""
    drawn = [torch.randint(1000, (4096,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    floors = [labels.bincount()[labels].double().log().mean().item() for labels in drawn]
    assert np.mean(floors) == pytest.approx(1.543, abs=0.01)
    # Unit vectors whose closest pair is far enough apart for the scale: the loss at its minimum, in blocks for memory.
    classes = F.normalize(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    perfect = classes[drawn[0]]
    assert unicl_loss(perfect, perfect, drawn[0], 1000.0, block=256).item() == pytest.approx(floors[0], abs=1e-6)
    assert unicl_loss(perfect, perfect, drawn[0], 5.0, block=256).item() > floors[0] + 0.5


def test_image_to_text_loss_is_the_first_term_of_unicls() -> None:
    image, text, s = unit(12), unit(13), scale(9.0)
    labels = torch.tensor([0, 0, 1, 2, -1, 1, -1, 5, 5, 5, -1, 3])
    there = image_to_text_loss(image, text, labels, s)
    back = image_to_text_loss(text, image, labels, s)
    assert abs(there - back) > 1e-3, "one direction only"
    assert ((there + back) / 2).item() == pytest.approx(unicl_loss(image, text, labels, s).item(), abs=1e-14)
    logits = 9.0 * image @ text.T
    distinct = image_to_text_loss(image, text, torch.arange(12), s)
    assert distinct.item() == pytest.approx(F.cross_entropy(logits, torch.arange(12)).item(), abs=1e-12)
    assert torch.autograd.gradcheck(lambda *x: image_to_text_loss(x[0], x[1], labels, x[2]), (image, text, s))


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.7])
def test_align_loss_is_the_formula_value_and_gradient(eps: float) -> None:
    image, text, sigma = unit(14), unit(15), scale(0.05)
    loss = align_loss(image, text, sigma, eps)
    by_hand = align_by_hand(image.detach().numpy(), text.detach().numpy(), 0.05, eps)
    assert loss.item() == pytest.approx(by_hand, abs=1e-12)
    rows = torch.arange(12)
    logits = image @ text.T / sigma
    torchs = F.cross_entropy(logits, rows, label_smoothing=eps) + F.cross_entropy(logits.T, rows, label_smoothing=eps)
    assert loss.item() == pytest.approx(torchs.item(), abs=1e-12)
    assert torch.autograd.gradcheck(lambda *x: align_loss(*x, eps), (image, text, sigma))


def test_align_loss_without_smoothing_is_twice_clips() -> None:
    image, text = unit(14), unit(15)
    assert align_loss(image, text, 1 / 16, 0.0).item() == pytest.approx(2 * clip_loss(image, text, 16.0).item())
    assert align_loss(image, text, 1 / 16).item() == align_loss(image, text, 1 / 16, 0.1).item()


def test_align_loss_floor_at_the_papers_batch() -> None:
    """A few rows of the 16,384: equal gaps between all of them would take as many dimensions."""
    n = 16_384
    q_pos, q_neg = 0.9 + 0.1 / n, 0.1 / n
    positives = torch.eye(8, n, dtype=torch.bool)
    at = [
        float(_soft_cross_entropy(gap * positives.double(), positives, 0.1))
        for gap in (math.log(q_pos / q_neg), 11.5, 12.5)
    ]
    assert at[0] == pytest.approx(1.295, abs=5e-4)
    assert at[0] < min(at[1:])


@pytest.mark.parametrize(("n", "floor"), [(256, 0.876), (1024, 1.017)])
def test_align_loss_floor_is_the_targets_entropy(n: int, floor: float) -> None:
    """One direction's, for eps = 0.1, at the logit gap ln(q_pos / q_neg) that reaches it and no other."""
    q_pos, q_neg = 0.9 + 0.1 / n, 0.1 / n
    gap = math.log(q_pos / q_neg)
    entropy = -q_pos * math.log(q_pos) - (n - 1) * q_neg * math.log(q_neg)
    assert entropy == pytest.approx(floor, abs=5e-4)
    eye = torch.eye(n, dtype=torch.float64)
    assert align_loss(eye, eye, 1 / gap).item() == pytest.approx(2 * entropy, abs=1e-12)
    for other in (gap - 0.5, gap + 0.5):
        assert align_loss(eye, eye, 1 / other).item() > 2 * entropy + 1e-3


@pytest.mark.parametrize("labels", [[0, 0, 1, 2, -1, 1, -1, 5, 5, 5, -1, 3], [4] * 12, [0, 0, *range(1, 11)]])
def test_supcon_loss_is_the_formula_value_and_gradient(labels: list[int]) -> None:
    embed, tau, given = unit(16), scale(0.2), torch.tensor(labels)
    loss = supcon_loss(embed, given, tau)
    assert loss.item() == pytest.approx(supcon_by_hand(embed.detach().numpy(), labels, 0.2), abs=1e-12)
    assert torch.autograd.gradcheck(lambda *x: supcon_loss(x[0], given, x[1]), (embed, tau))


@pytest.mark.parametrize("labels", [[7], [3, -1, 0, 1], [-1, -1]])
def test_supcon_loss_of_a_batch_without_positives_is_zero_and_moves_nothing(labels: list[int]) -> None:
    embed = unit(17, rows=len(labels))
    loss = supcon_loss(embed, torch.tensor(labels), 0.1)
    assert loss.item() == 0
    assert torch.equal(grads(loss, embed)[0], torch.zeros_like(embed))


def test_supcon_loss_of_perfect_classes_is_the_log_number_of_positives() -> None:
    labels = torch.tensor([0] * 8 + [1] * 8)
    perfect = torch.eye(2, dtype=torch.float64)[labels]
    assert supcon_loss(perfect, labels, 1e-3).item() == pytest.approx(math.log(7), abs=1e-12)


def test_losses_do_not_depend_on_the_order_of_the_batch() -> None:
    image, text, labels = unit(6), unit(7), torch.tensor([0, 0, 1, -1, 2, 2, 2, -1, 1, 4, -1, 0])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for loss, again in (
        (clip_loss(image, text, 7.0), clip_loss(image[order], text[order], 7.0)),
        (unicl_loss(image, text, labels, 7.0), unicl_loss(image[order], text[order], labels[order], 7.0)),
        (align_loss(image, text, 0.1), align_loss(image[order], text[order], 0.1)),
        (supcon_loss(image, labels, 0.1), supcon_loss(image[order], labels[order], 0.1)),
    ):
        assert loss.item() == pytest.approx(again.item(), abs=1e-12)


def test_clip_loss_limits() -> None:
    one = unit(8, rows=1)
    assert clip_loss(one, unit(9, rows=1), 14.3).item() == 0.0
    same = torch.ones(32, 4, dtype=torch.float64) / 2
    assert clip_loss(same, same, 14.3).item() == pytest.approx(math.log(32))


def test_losses_are_computed_in_float32_under_autocast() -> None:
    image, text = unit(10, 64, 32, torch.float32), unit(11, 64, 32, torch.float32)
    exact = clip_loss(image, text, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip_loss(image, text, 100.0), exact)
        assert supcon_loss(image, torch.arange(64) % 8, 0.01).dtype == torch.float32
    assert clip_loss(image.bfloat16(), text.bfloat16(), 100.0).dtype == torch.float32


def test_own_classes_never_collide() -> None:
    assert own_classes(torch.tensor([3, -1, 3, -1, 0])).tolist() == [3, 5, 3, 7, 0]
    assert own_classes(torch.tensor([-1, -1])).tolist() == [0, 1]


def test_cross_entropy_is_torchs() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.equal(cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


class Towers(torch.nn.Module):
    """Two linear towers in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Linear(6, 5, dtype=torch.float64)
        self.text = torch.nn.Linear(6, 5, dtype=torch.float64)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, pairs_B2X: torch.Tensor) -> tuple[torch.Tensor, ...]:
        image, text = self.image(pairs_B2X[:, 0]), self.text(pairs_B2X[:, 1])
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.logit_scale.exp()


# Captions on both ranks (rows 0 and 8 are the first of each), labels that both ranks have.
LABELS = torch.tensor([-1, 0, 1, 1, 2, 4, -1, -1, -1, 0, 0, 1, 3, 3, 2, -1])


def measure(kind: str, rows: slice, *, wrap: bool) -> list[float]:
    """Value and all gradients, on the given rows of one whole batch."""
    torch.manual_seed(0)
    model, pairs, labels = Towers(), torch.randn(16, 2, 6, dtype=torch.float64)[rows], LABELS[rows]
    called = DistributedDataParallel(model, find_unused_parameters=kind == "cross_entropy") if wrap else model
    image, text, scale = called(pairs)
    if kind == "clip":
        loss = clip_loss(image, text, scale)
    elif kind == "align":
        loss = align_loss(image, text, 1 / scale)
    elif kind == "supcon":
        loss = supcon_loss(image, labels, 1 / scale) + supcon_loss(text, labels, 1 / scale)
    elif kind == "image_to_text":
        loss = image_to_text_loss(image, text, labels, scale)
    elif kind == "cross_entropy":
        loss = cross_entropy(image, labels.clamp(min=0))
    else:
        loss = unicl_loss(image, text, labels if kind == "unicl" else torch.full_like(labels, -1), scale)
    loss.backward()
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    return [loss.item(), *torch.cat(flat).tolist()]


@pytest.mark.parametrize("kind", ["clip", "unicl", "captions", "cross_entropy", "align", "supcon", "image_to_text"])
def test_losses_over_two_ranks_equal_one_process(kind: str, tmp_path: Path) -> None:
    """Value on each rank and the mean gradient of every parameter, logit scale included."""

    def on_rank() -> None:
        with session("cpu"):
            rank = ranks().rank
            found = measure(kind, slice(8 * rank, 8 * rank + 8), wrap=True)
            (tmp_path / str(rank)).write_text(json.dumps(found))

    on_ranks(on_rank)
    whole = measure(kind, slice(0, 16), wrap=False)
    assert max(map(abs, whole[1:])) > 1e-3
    for rank in (0, 1):
        found = json.loads((tmp_path / str(rank)).read_text())
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-12, err_msg=f"rank {rank}")


def test_a_detached_gather_would_be_wrong(tmp_path: Path) -> None:
    """The test above can fail: without the gradient through the gather, the direction changes too."""

    def on_rank() -> None:
        with session("cpu"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("vlbench.train.losses.gather", lambda local: gather_constant(local.detach()))
            rank = ranks().rank
            (tmp_path / str(rank)).write_text(json.dumps(measure("clip", slice(8 * rank, 8 * rank + 8), wrap=True)))

    on_ranks(on_rank)
    found, whole = (
        np.array(json.loads((tmp_path / "0").read_text())),
        np.array(measure("clip", slice(0, 16), wrap=False)),
    )
    assert found[0] == pytest.approx(whole[0], abs=1e-12)
    cosine = found[1:] @ whole[1:] / np.linalg.norm(found[1:]) / np.linalg.norm(whole[1:])
    assert cosine < 0.99
