"""mu-VLA: what is masked, every loss term against float64 arithmetic on the model's own hidden states, and the loop."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.recipes.conftest import IDS, TAGS, batcher, config_of, entry, logged, losses_on_ranks, samples, setting
from tests.train.conftest import in_process, on_ranks
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.core.types import Region, Sample
from vlbench.data.weak.corpus import open_corpus
from vlbench.data.wordpiece import SPECIAL, read_wordpiece
from vlbench.models.load import load_backbone
from vlbench.models.single_stream import IGNORED, StreamConfig
from vlbench.recipes.muvla import MuvlaConfig
from vlbench.recipes.muvla.batch import Masking
from vlbench.recipes.muvla.corpus import find_corpus
from vlbench.recipes.muvla.loss import muvla_loss
from vlbench.recipes.muvla.model import RegionTextModel
from vlbench.train.loop import fit

# ----------------------------------------------------------------------------------------------------- masking


def test_masking_has_berts_shares(corpus_path: Path, assets: dict[str, bytes]) -> None:
    made = batcher(corpus_path, assets, Masking(words=0.15, tags=0.15, regions=0.15, linked=0.15))
    plain = batcher(corpus_path, assets, Masking(words=0.0, tags=0.0, regions=0.0, linked=0.0))
    masked, hidden, kept, total, regions, zeroed = 0, 0, 0, 0, 0, 0
    n_regions = 0
    for seed in range(150):
        rows = [
            Sample(s.image_CHW, None, -1, id=s.id, regions=s.regions, seed=seed * 100 + i)
            for i, s in enumerate(samples())
        ]
        found, before = made(rows), plain(rows)
        read = found["rt_labels"] != IGNORED
        assert torch.equal(found["rt_labels"][read], before["rt_words"][read])
        assert torch.equal(found["rt_words"][~read], before["rt_words"][~read])
        masked += int(read.sum())
        hidden += int((found["rt_words"][read] == made.vocabulary.mask).sum())
        kept += int((found["rt_words"][read] == before["rt_words"][read]).sum())
        total += int((before["rt_words"] != 0).sum())
        regions += int(found["rt_masked"].sum())
        zeroed += int(found["rt_zeroed"].sum())
        n_regions += int(found["valid_BR"].sum())
        assert not (found["rt_zeroed"] & ~found["rt_masked"]).any()
        # [CLS], [SEP] and padding are never masked.
        inner = (found["is_words"] != 0) & (found["is_words"] != made.vocabulary.start)
        assert not ((found["is_labels"] != IGNORED) & ~inner).any()
    assert masked / total == pytest.approx(0.15, abs=0.012)
    assert hidden / masked == pytest.approx(0.8, abs=0.035)
    assert kept / masked == pytest.approx(0.1 + 0.1 / len(made.vocabulary.plain), abs=0.03)
    assert regions / n_regions == pytest.approx(0.15, abs=0.02)
    assert zeroed / regions == pytest.approx(0.9, abs=0.04)


def test_phrases_are_masked_by_similarity_and_one_modality_a_row(corpus_path: Path, assets: dict[str, bytes]) -> None:
    made = batcher(corpus_path, assets, Masking(words=0.15, tags=0.15, regions=0.15, linked=0.6), objectives=("rn",))
    words_masked, regions_masked, rows = np.zeros(2), np.zeros(2), 0
    for seed in range(250):
        for sample in samples(4):
            sample.seed = seed * 17 + int(sample.id)
            found = made([sample])
            tags = [made.vocabulary.encode(region.category) for region in sample.regions]
            labels, places = found["rn_labels"][0], found["rn_region_labels"][0]
            read = labels != IGNORED
            assert not (read.any() and (places != IGNORED).any()), "one modality at a time"
            assert set(labels[read].tolist()) <= set(tags[0]) | set(tags[1]), "linked phrases only"
            for region, tag in enumerate(tags):
                if places[region] != IGNORED:
                    assert found["rn_masked"][0, region]
                    assert places[region].item() in tag, "a word of the linked phrase"
                    regions_masked[region] += 1
            text = [made.vocabulary.encode(entry(int(sample.id)).aligned[0].text)]
            for number, tag in enumerate(tags):
                at = next(i for i in range(len(text[0])) if text[0][i : i + len(tag)] == tag) + 1
                hit = read[at : at + len(tag)]
                assert hit.all() or not hit.any(), "a phrase is masked as a whole"
                words_masked[number] += hit.all()
            rows += 1
    # Half the rows mask words, half regions; similarities 1 and 0.5.
    np.testing.assert_allclose(words_masked / rows, [0.3, 0.15], atol=0.045)
    np.testing.assert_allclose(regions_masked / rows, [0.3, 0.15], atol=0.045)


def test_released_masking_is_uniform_over_words(corpus_path: Path, assets: dict[str, bytes]) -> None:
    made = batcher(
        corpus_path,
        assets,
        Masking(words=0.5, tags=0.5, regions=0.5, linked=0.5, linked_only=False),
        objectives=("rn",),
    )
    tags = {word for tag in TAGS for word in made.vocabulary.encode(tag)}
    both, outside = 0, 0
    for seed in range(40):
        found = made([Sample(s.image_CHW, None, -1, id=s.id, regions=s.regions, seed=seed) for s in samples(1)])
        labels = set(found["rn_labels"][found["rn_labels"] != IGNORED].tolist())
        outside += bool(labels - tags)
        both += bool(labels) and bool(found["rn_masked"].any())
    assert both > 10
    assert outside > 30


def test_negatives_are_other_images_sentences_and_are_not_learnt(corpus_path: Path, assets: dict[str, bytes]) -> None:
    made = batcher(corpus_path, assets, Masking(words=0.3, tags=0.3, regions=0.0, linked=0.0), objectives=("is",))
    own, matched, masked = {}, [], {True: 0, False: 0}
    for item in open_corpus(corpus_path):
        own[item.id] = made.vocabulary.sentence(item.aligned[0].text, 32)
    clean = batcher(corpus_path, assets, Masking(words=0.0, tags=0.0, regions=0.0, linked=0.0), objectives=("is",))
    for seed in range(60):
        rows = [
            Sample(s.image_CHW, None, -1, id=s.id, regions=s.regions, seed=seed * 31 + i)
            for i, s in enumerate(samples())
        ]
        found, before = made(rows), clean(rows)
        for row, sample in enumerate(rows):
            match = bool(found["is_match"][row])
            words = before["is_words"][row]
            assert (words[words != 0].tolist() == own[sample.id]) == match
            labels = found["is_labels"][row]
            assert match or (labels == IGNORED).all()
            masked[match] += int((found["is_words"][row] == made.vocabulary.mask).sum())
            matched.append(match)
    assert np.mean(matched) == pytest.approx(0.5, abs=0.06)
    # Both kinds are masked alike: else the masks would say which is which.
    assert masked[True] / masked[False] == pytest.approx(np.mean(matched) / (1 - np.mean(matched)), rel=0.15)


def test_batch_is_a_function_of_seeds_and_not_of_its_company(corpus_path: Path, assets: dict[str, bytes]) -> None:
    made = batcher(corpus_path, assets, Masking(words=0.4, tags=0.4, regions=0.4, linked=0.8))
    whole, half = made(samples(8)), made(samples(4, start=4))
    for name, tensor in half.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, whole[name][4:]), name
            continue
        width = tensor.shape[1]
        assert torch.equal(tensor, whole[name][4:, :width]), name
        beyond = whole[name][4:, width:]  # padding, where the other half had a longer row
        assert beyond.numel() == 0 or beyond.unique().numel() == 1, name


def test_regions_that_a_crop_took_keep_the_links_of_the_others(corpus_path: Path, assets: dict[str, bytes]) -> None:
    made = batcher(
        corpus_path,
        assets,
        Masking(words=0.0, tags=0.0, regions=0.0, linked=1.0, hidden=0.0, random=0.0),
        objectives=("rn",),
    )
    seen = set()
    for seed in range(30):
        sample = samples(1)[0]
        sample.regions, sample.seed = sample.regions[1:], seed
        found = made([sample])
        places = found["rn_region_labels"][0]
        seen |= set(places[places != IGNORED].tolist())
    assert seen
    assert seen <= set(made.vocabulary.encode(entry(0).tags[1]))
    strange = samples(1)[0]
    strange.regions = (Region("purple hat", (0, 0, 9, 9)),)
    with pytest.raises(UserError, match="image '000' has no region 'purple hat' there: it was made of other data"):
        made([strange])


# -------------------------------------------------------------------------------------------------------- loss


def ce64(logits: torch.Tensor, label: int) -> float:
    scores = logits.double()
    return float(torch.log(torch.exp(scores - scores.max()).sum()) + scores.max() - scores[label])


def independent_terms(
    model: RegionTextModel, batch: dict, images: torch.Tensor, config: MuvlaConfig
) -> dict[str, list]:
    """(row, loss) of every masked place, one by one, from the stream's hidden states, in float64."""
    import copy

    heads = copy.deepcopy(model.text_heads).double()
    words = model.text_stream.word.weight.double()
    given = model.read_regions(batch["box_BR5"], batch["valid_BR"], images_BCHW=images, boxes_BR4=batch["boxes_BR4"])
    found: dict[str, list] = {name: [] for name in ("rt_words", "rt_tags", "rn_words", "rn_regions", "is_words")}
    boxes = torch.stack([box[owner] for box, owner in zip(given.box_BR5, batch["rt_owners"])])
    states = {
        "rt": model.hidden(given, batch["rt_words"], tags=boxes, zeroed_BR=batch["rt_zeroed"]),
        "rn": model.hidden(given, batch["rn_words"], tags=None, zeroed_BR=batch["rn_zeroed"]),
        "is": model.hidden(given, batch["is_words"], tags=None, zeroed_BR=None),
    }
    for name, (text, places) in states.items():
        for row, place in (batch[f"{name}_labels"] != IGNORED).nonzero().tolist():
            logits = heads.word_transform(text[row, place].double()) @ words.T + heads.word_bias
            found[f"{name}_words"].append((row, ce64(logits, batch[f"{name}_labels"][row, place])))
        if name == "rt":
            for row, place in batch["rt_masked"].nonzero().tolist():
                found["rt_tags"].append(
                    (row, ce64(heads.tag(places[row, place].double()), batch["tags_BR"][row, place]))
                )
        if name == "rn":
            for row, place in (batch["rn_region_labels"] != IGNORED).nonzero().tolist():
                logits = heads.word_transform(places[row, place].double()) @ words.T + heads.word_bias
                found["rn_regions"].append((row, ce64(logits, batch["rn_region_labels"][row, place])))
    pair = {name: heads.matches(torch.tanh(heads.pooler(states[name][0][:, 0].double()))) for name in ("rn", "is")}
    found["roi_tags"] = []
    for row, place in batch["valid_BR"].nonzero().tolist():
        logits = (
            given.features_BRF[row, place].double() @ model.detector.weight.double().T + model.detector.bias.double()
        )
        found["roi_tags"].append((row, ce64(logits, batch["tags_BR"][row, place])))
    found["itm"] = [(row, ce64(pair["is"][row], int(match))) for row, match in enumerate(batch["is_match"])]
    found["p"] = {name: (logits[:, 1] - logits[:, 0]).sigmoid().tolist() for name, logits in pair.items()}  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("weight, epoch", [("pair", 0.5), ("pair", 1.0), ("batch_mean", 1.0), ("none", 3.0)])
def test_every_term_is_the_papers(weight: str, epoch: float, corpus_path: Path, assets: dict[str, bytes]) -> None:
    recipe, config, model, batch = setting(corpus_path, assets, f"itm_weight={weight}", "weigh_itm=true")
    batch["epoch"] = torch.tensor(epoch)
    with torch.no_grad():
        losses = recipe.loss(model, batch, config)
        expected = independent_terms(model, batch, recipe.images(batch, config), config)
    p = expected.pop("p")
    match = batch["is_match"].tolist()
    on = epoch >= 1 and weight != "none"
    retrieved = [*p["rn"], *(value for value, yes in zip(p["is"], match) if yes)]
    mean = sum(retrieved) / len(retrieved)
    total = 0.0
    for name, places in expected.items():
        assert places, f"{name}: nothing is masked, so nothing is tested"
        pairs = {"rn_words": p["rn"], "rn_regions": p["rn"], "is_words": p["is"]}.get(name)
        if not on:
            weights = [1.0] * len(places)
        elif name == "itm":
            weights = [p["is"][row] if match[row] else 1.0 for row, _ in places]
        elif weight == "pair":
            weights = [1.0 if pairs is None else pairs[row] for row, _ in places]
        else:
            weights = [mean if name in ("rt_words", "rn_words", "is_words") else 1.0] * len(places)
        value = sum(w * loss for w, (_, loss) in zip(weights, places)) / len(places)
        assert losses[name].item() == pytest.approx(value, rel=2e-5, abs=1e-6), name
        total += value
    assert losses["loss"].item() == pytest.approx(total, rel=2e-5)
    assert set(losses) == {*expected, "loss", "p_match"}


def test_pairs_are_weighed_one_by_one_and_by_their_mean_where_asked() -> None:
    """Two pairs, one believed and one not: the paper forgives the second, the released code half of each."""
    from vlbench.recipes.muvla.model import Read

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    target, row = torch.tensor([1, 1]), torch.tensor([0, 1])
    p = torch.tensor([[10.0, -10.0], [-10.0, 10.0]])  # p(match) 0 and 1
    found = {"rn_words": Read(logits, target, row), "rn_match": Read(p, target, row)}
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    kwargs: dict[str, Any] = {"weigh_itm": True, "mrfr": None, "weighted": torch.tensor(True)}
    by_pair = muvla_loss(found, itm_weight="pair", **kwargs)["loss"]
    by_batch = muvla_loss(found, itm_weight="batch_mean", **kwargs)["loss"]
    assert by_pair.item() == pytest.approx(each[1].item() / 2, rel=1e-5)
    assert by_batch.item() == pytest.approx(each.mean().item() / 2, rel=1e-5)
    early = muvla_loss(found, itm_weight="pair", **(kwargs | {"weighted": torch.tensor(False)}))["loss"]
    assert early.item() == pytest.approx(each.mean().item())
    by_pair.backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().max() < 1e-6, "no gradient from a pair of weight 0"


def test_no_gradient_flows_through_the_weights(corpus_path: Path, assets: dict[str, bytes]) -> None:
    recipe, config, model, batch = setting(corpus_path, assets, 'objectives=["rn","is"]', "weigh_itm=true")
    batch["epoch"] = torch.tensor(2.0)
    losses = recipe.loss(model, batch, config)
    (losses["loss"] - losses["itm"]).backward()
    assert all(
        parameter.grad is None or not parameter.grad.any() for parameter in model.text_heads.matches.parameters()
    )


@pytest.mark.parametrize("objectives", [["rt"], ["rn"], ["is"], ["rt", "is"], ["rt", "rn", "is"]])
@pytest.mark.parametrize("masked", [True, False])
def test_every_parameter_has_a_gradient_and_nothing_masked_is_no_nan(
    objectives: list[str], masked: bool, corpus_path: Path, assets: dict[str, bytes]
) -> None:
    changes = [f"objectives={json.dumps(objectives)}", "mask_regions=0.5"]
    changes += [] if masked else ["mask_words=0", "mask_tags=0", "mask_regions=0", "mask_linked=0"]
    recipe, config, model, batch = setting(corpus_path, assets, *changes)
    losses = recipe.loss(model, batch, config)
    assert all(torch.isfinite(value) for value in losses.values())
    losses["loss"].backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"distributed training would stop: {without}"
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    of_masks = losses["loss"] - losses["roi_tags"]
    assert (of_masks.item() > 1e-6) == (masked or "is" in objectives)


def test_masked_pixels_do_not_reach_the_tower(corpus_path: Path, assets: dict[str, bytes]) -> None:
    recipe, config, model, batch = setting(
        corpus_path,
        assets,
        'objectives=["rt"]',
        "roi.mask_pixels=true",
        "mask_regions=0.6",
        "mask_words=0",
        "mask_tags=0",
    )
    with torch.no_grad():
        before = recipe.loss(model, batch, config)["loss"]
        for row, region in batch["rt_zeroed"].nonzero().tolist():
            x1, y1, x2, y2 = (int(side) for side in batch["boxes_BR4"][row, region])
            batch["images_BCHW"][row, :, y1:y2, x1:x2] = 255
        after = recipe.loss(model, batch, config)["loss"]
        assert batch["rt_zeroed"].any()
        assert torch.equal(before, after)
        open_config = override(config, ["roi.mask_pixels=false"])
        model.mask_pixels = False
        assert recipe.loss(model, batch, open_config)["loss"] != after


# ---------------------------------------------------------------------------------------------- fixed features


@pytest.mark.parametrize("criterion", ["l2", "smooth_l1"])
def test_mrfr_regresses_the_feature_as_it_was_and_real_regions_only(
    criterion: str, corpus_path: Path, assets: dict[str, bytes], features: Path
) -> None:
    changes = [f"features={features}", "feature_width=8", f"mrfr={criterion}", "mask_regions=0.5", 'objectives=["rt"]']
    recipe, config, model, batch = setting(corpus_path, assets, *changes)
    assert "images_BCHW" not in batch
    assert recipe.needs_of(config) == frozenset()
    batch["valid_BR"][0, 1] = batch["rt_masked"][0, 1] = False
    batch["features_BRF"][0, 1] = 1e6  # padding: what stands there is nothing
    with torch.no_grad():
        losses = recipe.loss(model, batch, config)
        read = model(batch)["rt_features"]
        given = model.read_regions(batch["box_BR5"], batch["valid_BR"], features_BRF=batch["features_BRF"])
        boxes = torch.stack([box[owner] for box, owner in zip(given.box_BR5, batch["rt_owners"])])
        _, places = model.hidden(given, batch["rt_words"], tags=boxes, zeroed_BR=batch["rt_zeroed"])
        errors = []
        for row, region in batch["rt_masked"].nonzero().tolist():
            target = batch["features_BRF"][row, region].double()
            assert target.any(), "not the zeros that the stream saw"
            gap = (model.text_heads.feature(places[row, region]).double() - target).abs()
            each = gap**2 if criterion == "l2" else torch.where(gap < 1, 0.5 * gap**2, gap - 0.5)
            errors.append(each.mean().item())
    assert batch["rt_zeroed"].any()
    assert read.target_M.shape == (len(errors), 8)
    assert losses["rt_features"].item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_fixed_features_train_no_tower_and_the_export_only_matches(
    corpus_path: Path, assets: dict[str, bytes], features: Path
) -> None:
    recipe, config, model, batch = setting(corpus_path, assets, f"features={features}", "feature_width=8", "mrfr=l2")
    assert model.visual is None
    losses = recipe.loss(model, batch, config)
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    backbone = recipe.export(model, config, ())
    assert backbone.card.provides == {"match"}
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match="has no image tower"):
        backbone.encode_image(images)
    with pytest.raises(UserError, match="reads fixed region features and has none"):
        backbone.match(images, ["a red ring"])
    from vlbench.adapters.common.pairs import _regions_from  # type: ignore[attr-defined]
    from vlbench.core.types import Example

    regions = _regions_from(str(features))(Example(IDS[0]))
    p = backbone.match(images, ["a red ring"], regions=[regions])
    assert 0 < p.item() < 1


def test_features_of_another_width_or_without_an_image_are_one_line(
    corpus_path: Path, assets: dict[str, bytes], features: Path
) -> None:
    recipe = RECIPES.get("muvla").with_assets(assets)
    config = config_of(corpus_path, f"features={features}", "feature_width=11")
    with pytest.raises(UserError, match="have 10 numbers, not 11; set feature_width"):
        recipe.collate(config, samples(1))


def test_released_rows_are_masked_apart_and_pairs_are_whole(corpus_path: Path, assets: dict[str, bytes]) -> None:
    masking = Masking(words=0.4, tags=0.4, regions=0.5, linked=0.8)
    made = batcher(corpus_path, assets, masking, objectives=("is",), released_rows=True)
    clean = Masking(words=0.0, tags=0.0, regions=0.0, linked=0.0)
    own = {item.id: made.vocabulary.sentence(item.aligned[0].text, 32) for item in open_corpus(corpus_path)}
    before = batcher(corpus_path, assets, clean, objectives=("is",), released_rows=True)(samples())
    found = made(samples())
    words = found["is_words"]
    assert (found["is_labels"] == IGNORED).all()
    assert not (words == made.vocabulary.mask).any(), "ITM's pair is not masked"
    for row, sample in enumerate(samples()):
        assert (words[row][words[row] != 0].tolist() == own[sample.id]) == bool(found["is_match"][row])
        retrieved = before["mlm_words"][row]
        assert retrieved[retrieved != 0].tolist() == own[sample.id], "MLM reads the retrieved sentence of every image"
    assert ((found["mlm_labels"] != IGNORED).sum(1) > 0).float().mean() > 0.9, "also where ITM has a negative"
    assert 0 < found["mlm_masked"].sum() < found["valid_BR"].sum()
    assert not (found["mlm_zeroed"] & ~found["mlm_masked"]).any()


@pytest.mark.parametrize("weight", ["batch_mean", "pair"])
@pytest.mark.parametrize("target, mean", [("seen", "slots"), ("feature", "masked"), ("seen", "masked")])
def test_released_terms_are_the_released_codes(
    weight: str, target: str, mean: str, corpus_path: Path, assets: dict[str, bytes], features: Path
) -> None:
    """RN regresses too, IS has MRC and MRFR, targets are what was seen, means are over all slots times 6.67."""
    changes = ["feature_width=8", "mrfr=smooth_l1", "rows=released", f"mrfr_target={target}", f"region_mean={mean}"]
    changes += ["mask_regions=0.5", f"itm_weight={weight}", "max_regions=3", "task_weights={is: 3, itm: 0.5}"]
    recipe, config, model, batch = setting(corpus_path, assets, f"features={features}", *changes)
    batch["epoch"] = torch.tensor(1.0)
    with torch.no_grad():
        losses = recipe.loss(model, batch, config)
        given = model.read_regions(batch["box_BR5"], batch["valid_BR"], features_BRF=batch["features_BRF"])
        boxes = torch.stack([box[owner] for box, owner in zip(given.box_BR5, batch["rt_owners"])])
        heads = model.text_heads
        for row, name in (("rt", "rt"), ("rn", "rn"), ("mlm", "is")):
            tags = boxes if row == "rt" else None
            text, places = model.hidden(given, batch[f"{row}_words"], tags=tags, zeroed_BR=batch[f"{row}_zeroed"])
            p = heads.match(text[:, 0]).double().softmax(-1)[:, 1]
            errors, classes = [], []
            for at, region in batch[f"{row}_masked"].nonzero().tolist():
                goal = batch["features_BRF"][at, region].double()
                if target == "seen" and batch[f"{row}_zeroed"][at, region]:
                    goal = torch.zeros_like(goal)
                gap = (heads.feature(places[at, region]).double() - goal).abs()
                factor = p[at].item() if weight == "pair" and row != "rt" else 1.0
                errors.append(factor * torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean().item())
                classes.append(factor * ce64(heads.tag(places[at, region]), batch["tags_BR"][at, region]))
            n = len(errors) if mean == "masked" else len(samples()) * 3 / 6.67
            scale = 3 if name == "is" else 1
            assert losses[f"{name}_features"].item() == pytest.approx(scale * sum(errors) / n, rel=1e-4)
            if row != "rn":
                assert losses[f"{name}_tags"].item() == pytest.approx(scale * sum(classes) / n, rel=1e-4)
        assert "rn_tags" not in losses
        plain = recipe.loss(model, batch, config.model_copy(update={"task_weights": {}}))
    assert losses["itm"].item() == pytest.approx(plain["itm"].item() / 2)
    assert losses["is_words"].item() == pytest.approx(3 * plain["is_words"].item())
    assert losses["rn_words"].item() == plain["rn_words"].item()
    parts = [value for name, value in losses.items() if name not in ("loss", "p_match")]
    assert losses["loss"].item() == pytest.approx(sum(parts).item(), rel=1e-6)


@pytest.mark.parametrize("objectives", [["rn"], ["is"], ["rt", "rn", "is"]])
def test_released_rows_use_every_parameter(
    objectives: list[str], corpus_path: Path, assets: dict[str, bytes], features: Path
) -> None:
    changes = ["feature_width=8", "mrfr=smooth_l1", "rows=released", f"objectives={json.dumps(objectives)}"]
    recipe, config, model, batch = setting(corpus_path, assets, f"features={features}", *changes)
    recipe.loss(model, batch, config)["loss"].backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"distributed training would stop: {without}"


# -------------------------------------------------------------------------------------------- presets, weights


def test_settings_that_do_not_go_together_are_refused(corpus_path: Path) -> None:
    for change, line in (
        ("mrfr=l2", "mrfr regresses fixed features"),
        ("rows=released|roi.mask_pixels=true", "rows=released masks features, not pixels"),
        ("task_weights={rt: -1}", "a factor is not negative"),
        ("task_weights={itn: 1}", "task_weights"),
        ("aligned=0.5", "leave pool and aligned out"),
        ("max_words=40", "more than stream.positions 32"),
        ('objectives=["rt","rt"]', "each objective once"),
    ):
        with pytest.raises(UserError, match=line):
            config_of(corpus_path, *change.split("|"))


def test_paper_preset_is_bert_base_with_mu_vlas_additions() -> None:
    """BERT-base has 109,482,240 parameters; counted here from its published sizes, head by head."""
    words, width, hidden, layers = 30_522, 768, 3072, 12
    content = "\n".join([*SPECIAL, *(f"w{number}" for number in range(words - len(SPECIAL)))])
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text(content)
        recipe = RECIPES.get("muvla").with_assets(
            {"words": read_wordpiece(file), "tags": json.dumps([f"t{n}" for n in range(1511)]).encode()}
        )
    paper = recipe.presets["paper"]
    with torch.device("meta"):
        model = recipe.build(paper, ())
    norm = 2 * width
    layer = 4 * (width * width + width) + norm + 2 * width * hidden + hidden + width + norm
    embeddings = (words + 512 + 2) * width + norm
    pooler = width * width + width
    assert embeddings + layers * layer + pooler == 109_482_240
    transform = width * width + width + norm
    added = {
        "region, box and tag norms": (2048 * width + width + norm) + (5 * width + width + norm) + norm,
        "MLM": transform + words,
        "MRC": transform + width * 1511 + 1511,
        "MRFR": transform + width * 2048 + 2048,
        "ITM": width * 2 + 2,
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == 109_482_240 + sum(added.values())


def test_presets_hold_the_sources_values() -> None:
    presets = RECIPES.get("muvla").presets
    paper, code = presets["paper"], presets["paper_code"]
    assert (paper.optim.lr, paper.batch_size, paper.schedule.warmup) == (6e-5, 480, 0.1)
    # Its 20 epochs are samples of four tasks, a step of the released code trains one, a step here all.
    assert paper.steps == 20 * 3_000_600 // 480 // 4
    assert (code.optim.lr, code.steps, code.schedule.warmup) == (5e-5, 130_000 / 4, 13_000 / 4)
    assert (paper.itm_weight, code.itm_weight, code.rn_masking) == ("pair", "batch_mean", "uniform")
    assert (paper.rows, paper.mrfr_target, paper.region_mean) == ("paper", "feature", "masked")
    assert (code.rows, code.mrfr_target, code.region_mean) == ("released", "seen", "slots")
    books = presets["paper_code_bc"]
    assert (books.optim.lr, books.steps, books.schedule.warmup) == (6e-5, 195_000 / 4, 19_500 / 4)
    assert {task: weight / 4 for task, weight in books.task_weights.items()} == pytest.approx(
        {"is": 0.3, "itm": 0.2, "rt": 0.3, "rn": 0.2}
    )
    assert (books.itm_weight, books.rows, books.k) == ("none", "released", 10)
    assert (paper.stream.modality_embedding, code.stream.modality_embedding) == (True, False)
    assert (paper.k, paper.mask_words, paper.mask_regions, paper.itm_from_epoch) == (5, 0.15, 0.15, 1.0)
    for preset in presets.values():
        assert MuvlaConfig.model_validate(json.loads(json.dumps(preset.model_dump(mode="json")))) == preset


def test_recipe_with_assets_travels_by_pickle(corpus_path: Path, assets: dict[str, bytes]) -> None:
    recipe, config, _, batch = setting(corpus_path, assets)
    again = pickle.loads(pickle.dumps(recipe)).collate(config, samples())
    assert all(torch.equal(tensor, batch[name]) for name, tensor in again.items())


def test_bert_folder_gives_weights_and_vocabulary(corpus_path: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    content = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    bert = transformers.BertConfig(
        vocab_size=len(content),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    theirs = transformers.BertForPreTraining(bert)
    theirs.save_pretrained(tmp_path)
    config = config_of(corpus_path, f"bert={tmp_path}")
    recipe = RECIPES.get("muvla")

    class Sources:
        sources = ()

    with pytest.raises(UserError, match=r"no folder with a vocab.txt or tokenizer.json; give --set bert=FOLDER"):
        recipe.learn_assets(config, Sources())
    (tmp_path / "vocab.txt").write_text("\n".join(content))
    assets = recipe.learn_assets(config, Sources())
    model = recipe.with_assets(assets).build(config, ())
    assert torch.equal(model.text_stream.word.weight, theirs.bert.embeddings.word_embeddings.weight)
    assert torch.equal(model.text_stream.layers[0].up.weight, theirs.bert.encoder.layer[0].intermediate.dense.weight)
    with pytest.raises(UserError, match="here; set stream's sizes, or the vocabulary, to BERT's"):
        recipe.with_assets(assets).build(
            config.model_copy(update={"stream": StreamConfig(width=32, layers=1, heads=2)}), ()
        )


# -------------------------------------------------------------------------------------------------- the loop


def test_killed_run_goes_on_to_the_same_bits(run_config: MuvlaConfig, tmp_path: Path) -> None:
    recipe = RECIPES.get("muvla")
    whole = fit(recipe, run_config, out=tmp_path / "whole")

    def first_half() -> None:
        from vlbench.train import checkpoint

        keep = checkpoint.save

        def save_and_die(path: Path, **content: Any) -> None:
            keep(path, **content)
            import os

            os._exit(9)

        checkpoint.save = save_and_die  # type: ignore[assignment]
        fit(recipe, run_config, out=tmp_path / "killed")

    process = in_process(first_half)
    process.join(60)
    assert process.exitcode == 9
    again = fit(recipe, run_config, out=tmp_path / "killed", resume=True)
    one, two = (torch.load(path, weights_only=True) for path in (whole, again))
    assert all(torch.equal(tensor, two["model"][name]) for name, tensor in one["model"].items())
    assert all(torch.equal(tensor, two["assets"][name]) for name, tensor in one["assets"].items())

    backbone = load_backbone(str(whole))
    assert backbone.card.provides >= {"pooled", "maps", "match"}
    assert "adaptation" in backbone.card.arch
    images = torch.randn(3, 3, 32, 32)
    regions = [sample.regions for sample in samples(3)]
    texts = ["a red ring", "a blue box and a green star", "nothing"]
    p = backbone.match(images, texts, regions=regions)
    alone = torch.cat(
        [backbone.match(images[i : i + 1], texts[i : i + 1], regions=regions[i : i + 1]) for i in range(3)]
    )
    torch.testing.assert_close(p, alone, atol=1e-6, rtol=1e-5)
    turned = backbone.match(images, texts[::-1], image_of=[2, 1, 0], regions=regions)
    torch.testing.assert_close(turned.flip(0), p, atol=1e-6, rtol=1e-5)
    assert torch.isfinite(backbone.match(images, texts)).all(), "without boxes the whole image is read"


def test_corpus_is_made_once_and_again_where_the_file_is_damaged(run_config: MuvlaConfig, world: Path) -> None:
    from vlbench.data.sources import open_source

    sources = [open_source(f"coco:{world}")]
    made = find_corpus(run_config, sources)
    before = made.path.stat().st_mtime_ns
    assert find_corpus(run_config, sources).path.stat().st_mtime_ns == before
    other = find_corpus(override(run_config, ["k=2"]), sources)
    assert other.path != made.path
    assert max(len(item.aligned) for item in other) == 2
    made.path.write_bytes(b"half a file")
    again = find_corpus(run_config, sources)
    assert again.path == made.path
    assert set(again.ids()) == set(sources[0].ids())
    for item in again:
        named = [tag for tag in item.tags if tag in item.aligned[0].text]
        assert named, "the nearest sentence speaks of the image's tags"


def test_corpus_of_other_images_is_refused_at_the_start(
    run_config: MuvlaConfig, corpus_path: Path, world: Path
) -> None:
    from vlbench.data.sources import open_source

    config = run_config.model_copy(update={"corpus": str(corpus_path), "pool": ()})
    with pytest.raises(UserError, match=r"24 images of the data are not in it, first '0'; make it of these data"):
        find_corpus(config, [open_source(f"coco:{world}")])


def test_two_ranks_are_one_process(run_config: MuvlaConfig, tmp_path: Path) -> None:
    """Ranks hold unequal numbers of masked places; the sums are divided by what all ranks counted."""
    # A tower without BatchNorm, whose statistics are each rank's own; no dropout, whose masks are too.
    config = override(
        run_config,
        ["steps=3", "visual.arch=timm:test_vit", "roi.strides=[16]", "stream.dropout=0", "itm_from_epoch=0.5"],
    )
    fit(RECIPES.get("muvla"), config, out=tmp_path / "one")
    on_ranks(losses_on_ranks, config, str(tmp_path / "two"))
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    for alone, together in zip(one, two, strict=True):
        for name in (
            "loss",
            "rt_words",
            "rt_tags",
            "rn_words",
            "rn_regions",
            "is_words",
            "itm",
            "grad_norm",
            "p_match",
        ):
            assert together[name] == pytest.approx(alone[name], rel=2e-4, abs=1e-6), name


def test_one_objective_alone_trains_on_ranks(run_config: MuvlaConfig, tmp_path: Path) -> None:
    config = override(run_config, ["steps=2", 'objectives=["rt"]', "mask_regions=0.02"])
    on_ranks(losses_on_ranks, config, str(tmp_path / "rt"))
    assert set(logged(tmp_path / "rt")[0]) >= {"rt_words", "rt_tags"}
    assert "corpus" not in torch.load(tmp_path / "rt" / "ckpt.pt", weights_only=True)["assets"]
