"""``timm:NAME[.TAG]``: any timm network, with timm's weights, a local file or a fresh initialisation."""

from __future__ import annotations

import math
from typing import Any

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.errors import UserError
from vlbench.models.backbone import TorchBackbone, count_params
from vlbench.models.layouts import in_names_of
from vlbench.models.loaders.shared import RANDOM, cannot_fetch, check_tag, hub_offline_without_network, seeded
from vlbench.models.towers import TimmTower
from vlbench.models.vision import check_timm_name
from vlbench.models.weights import load_strictly, read_weights


def load(ref: str, *, weights: str | None = None, seed: int = 0) -> TorchBackbone:
    """The network ``ref``; without a tag, timm's default weights.

    Raises:
        UserError: for an unknown network or tag, weights that cannot be fetched, or a file that does not fit.
    """
    import timm

    check_timm_name(ref)
    architecture, _, tag = ref.partition(".")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag or weights is None:
        check_tag(f"timm:{architecture}", tag or (tags[0] if tags else ""), tags)
    config = timm.get_pretrained_cfg(ref)
    net = _network(ref, config, weights=weights, seed=seed)
    tower = TimmTower(net, architecture)
    used = config.tag if weights is None else tag
    card = ModelCard(
        id=f"timm:{architecture}.{used}" if used else f"timm:{architecture}",
        loader="timm",
        arch=architecture,
        weights=used or None,
        preprocess=timm_preprocess(net),
        provides=tower.parts,
        feature=tower.feature,
        params=count_params(tower),
        licence=config.license if weights != RANDOM else None,
    )
    return TorchBackbone(card, tower)


def timm_preprocess(net: Any) -> Preprocess:
    """What timm's own evaluation transform does, from the network's pretrained configuration."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(net)
    _, height, width = config["input_size"]
    if config["crop_mode"] not in ("center", "squash"):
        raise UserError(f"timm's crop mode {config['crop_mode']!r} is not supported")
    return Preprocess(
        image_size=(height, width),
        resize="squash" if config["crop_mode"] == "squash" else "shortest",
        resize_to=math.floor(min(height, width) / config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def _network(ref: str, config: Any, *, weights: str | None, seed: int) -> Any:
    import timm

    if weights is None:
        try:
            with hub_offline_without_network():
                return timm.create_model(ref, pretrained=True, num_classes=0)
        except Exception as error:  # the hub and requests raise what they like
            source = f"model.safetensors from huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            raise cannot_fetch(f"timm:{ref}", source, error) from None
    state = read_weights(weights) if weights != RANDOM else None
    with seeded(seed):
        net = timm.create_model(ref, pretrained=False, num_classes=0)
    if state is not None:
        heads = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
        ignore = [f"{head}." for head in heads]
        where = f"{weights} in timm:{ref}"
        load_strictly(net, in_names_of(net, state, where=where, ignore=ignore), where=where, ignore=ignore)
    return net
