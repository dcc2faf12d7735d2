"""Detection through the fine-tuning of everything else: resumes, ranks, choosing; and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.finetune.detection.scenes import (
    CLASSES,
    Scenes,
    backbone,
    example,
    mispaired,
    renamed,
    shuffled,
    small,
    with_examples,
)
from tests.train.conftest import on_ranks
from vlbench.adapters.common.coco_rows import detection_rows
from vlbench.core.errors import BadExample
from vlbench.finetune.detection.feed import DetectionFeed
from vlbench.finetune.detection.recipe import DetectionTuner, detect_all, renew_norms
from vlbench.finetune.detection.types import Detections
from vlbench.finetune.run import finetune
from vlbench.train.distributed import Ranks, ranks, session

NEAR_CHANCE = 0.2
"""Six seeds gave 0.52 to 0.63 where chance is 0.50. A ranking makes much of a small tendency: where all of one kind
are a little surer than all of the other, AP is 1 or, the other way round, 0.3."""
NO_MORE_THAN_BLIND = 0.15
"""Four seeds gave 0.02 to 0.10, and what they found in an empty picture 0.03 to 0.07 when said of all."""


class Stop(Exception):
    pass


def tuned(folder: Path, config, *, source=None, judge=lambda model: 0.5, seen=None):
    feed = DetectionFeed(source or Scenes(6), config)
    return finetune(DetectionTuner(seen or backbone()), config, feed=feed, judge=judge, folder=folder, device="cpu")


def test_a_stopped_run_goes_on_to_the_same_weights_and_the_backbone_stays(tmp_path: Path) -> None:
    config = small(steps=4, workers=0, short_sides=(64, 96))
    seen = backbone()
    before = {name: value.clone() for name, value in seen.module.state_dict().items()}
    whole = tuned(tmp_path / "whole", config, seen=seen)
    assert all(torch.equal(value, before[name]) for name, value in seen.module.state_dict().items())
    calls = []

    def judge(model):
        calls.append(1)
        if len(calls) == 1:
            raise Stop
        return 0.5

    with pytest.raises(Stop):
        tuned(tmp_path / "stopped", config, judge=judge)
    resumed = tuned(tmp_path / "stopped", config, judge=judge)
    assert len(calls) == 3  # the one that was interrupted, and one each for both steps
    assert whole.weights.read_bytes() == resumed.weights.read_bytes()
    assert any(name.startswith("visual.") for name in whole.module.state_dict())


def test_the_rate_of_the_backbone_is_its_own(tmp_path: Path) -> None:
    from vlbench.train.optim import parameter_groups

    config = small(backbone_lr=0.1).at_rate(1.0)
    model = DetectionTuner(backbone()).build(config, ("a", "b"))
    factors = {
        (group["lr_factor"], id(parameter))
        for group in parameter_groups(model, config.optim)
        for parameter in group["params"]
    }
    visual = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("visual.")}
    assert visual == {which for factor, which in factors if factor == 0.1}


def _loss_and_gradient(model, config, batch):
    model.train()
    torch.manual_seed(5)
    recipe = DetectionTuner(backbone())
    loss = recipe.loss(model, batch, config)["loss"]
    loss.backward()
    return loss


def test_two_ranks_give_the_mean_of_their_halves(tmp_path: Path) -> None:
    """With batch norm frozen nothing but the mean over ranks joins them: losses and gradients are the halves' mean."""
    config = small(batch_size=4, backbone_norm="frozen", flip=False)
    source = Scenes(4)

    def rank() -> None:
        with session("cpu"):
            here = ranks()
            torch.manual_seed(0)
            model = DetectionTuner(backbone()).build(config, source.classes)
            batch = next(DetectionFeed(source, config).batches(None, config, start=0, here=here, pin=False))
            loss = _loss_and_gradient(DistributedDataParallel(model), config, batch)
            if here.first:
                found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                torch.save({"loss": loss.detach(), "grads": found}, tmp_path / "two.pt")

    on_ranks(rank)
    two = torch.load(tmp_path / "two.pt")
    losses, total = [], {}
    for place in range(2):
        torch.manual_seed(0)
        model = DetectionTuner(backbone()).build(config, source.classes)
        half = next(DetectionFeed(source, config).batches(None, config, start=0, here=Ranks(place, 2), pin=False))
        losses.append(_loss_and_gradient(model, config, half).detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad / 2
    assert float(two["loss"]) == pytest.approx(float(sum(losses)) / 2, rel=1e-5)
    assert two["grads"].keys() == total.keys()
    for name, gradient in total.items():
        assert torch.allclose(two["grads"][name], gradient, rtol=1e-4, atol=1e-6), name


def test_statistics_taken_anew_are_plain_means_over_batches() -> None:
    config = small(steps=3, batch_size=4, precise_norm=3, workers=0)
    feed = DetectionFeed(Scenes(8), config)
    model = DetectionTuner(backbone()).build(config, feed.classes).eval()
    norm = next(child for child in model.modules() if isinstance(child, torch.nn.modules.batchnorm._BatchNorm))
    momentum, seen = norm.momentum, []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    renew_norms(model, feed, config)
    handle.remove()
    assert len(seen) == 3
    assert norm.momentum == momentum
    assert not model.training
    means = torch.stack([values.mean((0, 2, 3)) for values in seen]).mean(0)
    variances = torch.stack([values.transpose(0, 1).flatten(1).var(1) for values in seen]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-4)  # a running average would be off by tenths
    assert torch.allclose(norm.running_var, variances, rtol=1e-3)
    before = norm.running_mean.clone()
    renew_norms(model, feed, config.model_copy(update={"precise_norm": 0}))
    assert torch.equal(norm.running_mean, before)


def test_detections_come_in_the_order_of_the_images_and_a_broken_one_is_an_error() -> None:
    source = Scenes(0, split="test")
    sizes = [(40, 60), (64, 32), (50, 50)]
    source.examples = [
        example(f"i{n}", np.full((*size, 3), 40 * n, dtype=np.uint8), []) for n, size in enumerate(sizes)
    ]
    config = small(score_threshold=0.0, workers=0)
    model = DetectionTuner(backbone()).build(config, source.classes).eval()
    found = detect_all(model, source, config, device="cpu")
    assert [tuple(one.masks[0]["size"]) for one in found] == sizes
    forked = detect_all(model, source, config.model_copy(update={"workers": 1}), device="cpu")
    assert all(np.array_equal(a.boxes_K4, b.boxes_K4) for a, b in zip(found, forked))
    broken = source.examples[1]
    source.examples[1] = type(broken)(id="i1", image=broken.image[:60], regions=())
    with pytest.raises(BadExample, match="i1"):
        detect_all(model, source, config.model_copy(update={"workers": 1}), device="cpu")


def learnt(source, test, folder: Path, *, steps: int) -> list[Detections]:
    """What is found in ``test`` after training on ``source``."""
    config = small(
        steps=steps,
        batch_size=4,
        channels=32,
        box_width=128,
        mask_convolutions=(32, 32),
        sampled_boxes=32,
        anchor_sizes=(16, 32, 64, 128, 256),
        short_sides=(96,),
        proposals=100,
        sampled_anchors=128,
        optim={"lr": 3e-3},
        flip=False,
        select="last",
        judge_every=10_000,
        checkpoint_every=10_000,
    )
    model = tuned(folder, config, source=source).module
    return detect_all(model, test, config, device="cpu")


def numbers(test, found) -> dict[str, float]:
    """COCO's."""
    return detection_rows(test, found).meta["coco"]


def of_chance(test, found) -> tuple[float, float]:
    """Mask AP50 blind to classes, and that of names that say nothing of what they name.

    Blind: what is found under a name against all objects, as if each had that name; the mean over names. Of chance: of
    what is found under a name, the share is right that the name has of the objects. (Over K names the shares add up to
    1, so that with equal shares it is the blind one over K.)
    """
    said_N = np.concatenate([one.extra["categories"] for one in test.examples])
    blind, chance = [], []
    for number in range(len(CLASSES)):
        under = []
        for one in found:
            keep_K = one.classes_K == number
            masks = [mask for mask, keep in zip(one.masks, keep_K) if keep]
            under.append(Detections(one.boxes_K4[keep_K], one.scores_K[keep_K], one.classes_K[keep_K], masks))
        all_so = with_examples(test, [renamed(one, [number] * len(one.regions)) for one in test.examples])
        blind.append(numbers(all_so, under)["mask_ap50"])
        chance.append(blind[-1] * (said_N == number).mean())
    return float(np.mean(blind)), float(np.mean(chance))


@pytest.mark.slow
def test_eight_images_are_learnt_by_heart(tmp_path: Path) -> None:
    source = Scenes(8)
    found = numbers(source, learnt(source, source, tmp_path / "a", steps=200))
    assert min(found["box_ap"], found["mask_ap"]) >= 0.95


@pytest.mark.slow
def test_shuffled_names_are_right_by_chance(tmp_path: Path) -> None:
    """Boxes and masks are learnt all the same; the names are not."""
    train, test = Scenes(60), Scenes(40, seed=7, split="test")
    assert numbers(test, learnt(train, test, tmp_path / "a", steps=150))["mask_ap50"] > 0.9
    found = learnt(shuffled(train), test, tmp_path / "b", steps=150)
    blind, chance = of_chance(test, found)
    assert blind > 0.9
    assert numbers(test, found)["mask_ap50"] == pytest.approx(chance, abs=NEAR_CHANCE)


@pytest.mark.slow
def test_objects_of_other_pictures_teach_where_objects_may_be_and_no_more(tmp_path: Path) -> None:
    """What is found is worth no more than the same boxes said of every picture."""
    train, test = mispaired(Scenes(60)), Scenes(40, seed=7, split="test")
    found = learnt(train, test, tmp_path / "a", steps=150)
    own = numbers(test, found)
    everywhere = numbers(test, [max(found, key=len)] * len(test))
    for name in ("box_ap50", "mask_ap50"):
        assert max(own[name], everywhere[name]) < NO_MORE_THAN_BLIND
        assert own[name] == pytest.approx(everywhere[name], abs=0.08)


def test_the_log_has_every_loss(tmp_path: Path) -> None:
    run = tuned(tmp_path / "run", small(steps=1, log_every=1))
    lines = [json.loads(line) for line in (run.folder / "lr-0.002" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "loss_mask", "loss_box_reg", "loss_objectness"} <= lines[0].keys()
