"""mu-VLA's loss from what the heads say: section 3 of Zhou et al., 2203.00242.

Every term is ``sum_i w_i l_i / n`` over the n masked places (or pairs) of the whole batch of all ranks: the weights do
not enter the divisor, so that a batch of doubtful pairs counts less, not the same.

Shapes: M places, B pairs, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F

from vlbench.recipes.muvla.model import Read
from vlbench.train.distributed import gather_constant, mean_over_ranks, ranks

_OF_PAIRS = {
    **dict.fromkeys(("rn_words", "rn_regions", "rn_features"), ("rn_match",)),
    **dict.fromkeys(("is_words", "is_tags", "is_features"), ("mlm_match", "match")),
}
"""Terms of a sentence, and where its pair's ``p(match)`` is: the first that is there."""
_OF_REGIONS = ("rt_tags", "rt_features", "rn_features", "is_tags", "is_features")
_SLOT_WEIGHT = 6.67  # as written in [M:visual_bert.py]'s settings: 1 / 0.15
_BY_BATCH = ("rt_words", "rn_words", "is_words")
"""What the released code multiplies by its batch's mean."""


def muvla_loss(
    found: Mapping[str, Read],
    *,
    itm_weight: Literal["pair", "batch_mean", "none"],
    weigh_itm: bool,
    weighted: torch.Tensor,
    mrfr: Literal["l2", "smooth_l1"] | None,
    slots: int | None = None,
    task_weights: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """The loss, and its terms by name.

    Args:
        found: what ``RegionTextModel`` gives.
        itm_weight: see ``MuvlaConfig``. Without the ITM head (IS left out) all weights are 1.
        weigh_itm: whether ITM's retrieved pairs are weighed too, by their own probability; its negatives never are.
        weighted: whether the weights apply yet, a boolean scalar.
        mrfr: the regression's criterion.
        slots: places for regions in this rank's batch, which MRC and MRFR are then a mean over; None: the masked ones.
        task_weights: factors on the terms of "rt", "rn", "is" and "itm".

    Returns:
        ``loss``, every term, and ``p_match``, the mean probability of the retrieved pairs that IS has drawn.
    """
    p_match = {
        name: read.predicted_MX.detach().float().softmax(-1)[:, 1] for name, read in found.items() if _pairs(name)
    }
    # One decision for all: a tensor, so that no step waits for the device.
    p_match = {name: torch.where(weighted, p_B, torch.ones_like(p_B)) for name, p_B in p_match.items()}
    batch_mean = _batch_mean(found, p_match) if itm_weight == "batch_mean" and p_match else None
    terms: dict[str, torch.Tensor] = {}
    for name, read in found.items():
        if name in ("rn_match", "mlm_match"):
            continue
        each_M = _each(name, read, mrfr)
        weight_M = None
        if name == "match":
            if weigh_itm and itm_weight != "none":
                weight_M = torch.where(read.target_M == 1, p_match[name], 1.0)
        elif itm_weight == "pair":
            pair = next((pair for pair in _OF_PAIRS.get(name, ()) if pair in p_match), None)
            weight_M = None if pair is None else p_match[pair][read.row_M]
        elif batch_mean is not None and name in _BY_BATCH:
            weight_M = batch_mean.expand_as(each_M)
        n = slots / _SLOT_WEIGHT if slots is not None and name in _OF_REGIONS else None
        shown = "itm" if name == "match" else name
        terms[shown] = mean_over_places(each_M, weight_M, n=n) * task_weights.get(shown.partition("_")[0], 1.0)
    losses = {"loss": torch.stack(list(terms.values())).sum(), **terms}
    if "match" in found:
        is_pair_B = found["match"].target_M == 1
        p_B = found["match"].predicted_MX.detach().float().softmax(-1)[:, 1]
        losses["p_match"] = mean_over_places(p_B[is_pair_B])
    return losses


def mean_over_places(
    each_M: torch.Tensor, weight_M: torch.Tensor | None = None, *, n: float | None = None
) -> torch.Tensor:
    """``sum_i w_i l_i / n`` over all ranks, whose numbers of places may differ; 0 where there is none.

    ``n`` is this rank's share of the divisor, the same on all; None: the places are counted.
    """
    total = (each_M if weight_M is None else each_M * weight_M).sum()
    if n is not None:
        return mean_over_ranks(total / n)
    counted = gather_constant(torch.tensor([len(each_M)], device=each_M.device)).sum().clamp(min=1)
    return mean_over_ranks(total * ranks().world / counted)


def _each(name: str, read: Read, mrfr: str | None) -> torch.Tensor:
    """``(M,)``: cross-entropy; of MRFR the squared or smooth error, a mean over the feature."""
    predicted_MX = read.predicted_MX.float() if read.predicted_MX.dtype != torch.float64 else read.predicted_MX
    if not name.endswith("_features"):
        return F.cross_entropy(predicted_MX, read.target_M, reduction="none")
    error = F.mse_loss if mrfr == "l2" else F.smooth_l1_loss
    return error(predicted_MX, read.target_M.to(predicted_MX.dtype), reduction="none").mean(-1)


def _batch_mean(found: Mapping[str, Read], p_match: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The mean over the retrieved pairs of the whole batch."""
    return mean_over_places(torch.cat([p_B[found[name].target_M == 1] for name, p_B in p_match.items()]))


def _pairs(name: str) -> bool:
    return name in ("match", "rn_match", "mlm_match")
