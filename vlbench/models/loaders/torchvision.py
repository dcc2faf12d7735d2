"""``torchvision:NAME[.TAG]``: torchvision's classifiers, read before their last linear layer."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.models.backbone import TorchBackbone, count_params
from vlbench.models.layouts import in_names_of
from vlbench.models.loaders.shared import RANDOM, cannot_fetch, check_tag, seeded
from vlbench.models.towers import TorchvisionTower
from vlbench.models.weights import load_strictly, read_weights


def load(ref: str, *, weights: str | None = None, seed: int = 0) -> TorchBackbone:
    """The network ``ref``; without a tag, torchvision's default weights.

    Raises:
        UserError: for an unknown network or tag, weights that cannot be fetched, or a file that does not fit.
    """
    import torchvision

    name, _, tag = ref.partition(".")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(unknown("torchvision architecture", name, known))
    entries = torchvision.models.get_model_weights(name)
    if tag:
        check_tag(f"torchvision:{name}", tag, {*entries.__members__, "DEFAULT"})
    entry = entries[tag] if tag and tag != "DEFAULT" else entries.DEFAULT
    preprocess = torchvision_preprocess(entry)
    state = None
    if weights is None:
        state = _download(f"torchvision:{name}.{entry.name}", entry)
    elif weights != RANDOM:
        state = read_weights(weights)
    with seeded(seed):
        net = torchvision.models.get_model(name, weights=None, **_settings(name, preprocess, trained=state is not None))
    tower = TorchvisionTower(net, name)
    if state is not None:
        where = f"{weights or entry.name} in torchvision:{name}"
        state = in_names_of(net, state, where=where, ignore=tower.removed)
        load_strictly(net, state, where=where, ignore=tower.removed)
    used = entry.name if tag or weights is None else None
    card = ModelCard(
        id=f"torchvision:{name}.{used}" if used else f"torchvision:{name}",
        loader="torchvision",
        arch=name,
        weights=used,
        preprocess=preprocess,
        provides=tower.parts,
        feature=tower.feature,
        params=count_params(tower),
    )
    return TorchBackbone(card, tower)


def torchvision_preprocess(entry: Any) -> Preprocess:
    """The transform that torchvision publishes with the weights."""
    transform = entry.transforms()
    return Preprocess(
        image_size=transform.crop_size[0],
        resize_to=transform.resize_size[0],
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )


def _settings(name: str, preprocess: Preprocess, *, trained: bool) -> dict[str, Any]:
    """What torchvision itself sets when it loads these weights."""
    if name.startswith("vit_"):
        return {"image_size": preprocess.image_size[0]}
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True, "init_weights": not trained}
    return {}


def _download(ref: str, entry: Any) -> dict[str, Any]:
    import torch

    place = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(entry.url).name)
    if place.is_file():
        return read_weights(place)
    try:
        # torchvision's own get_state_dict would unpickle without weights_only.
        return torch.hub.load_state_dict_from_url(
            entry.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # urllib and the hash check raise what they like
        raise cannot_fetch(ref, entry.url, error, place=str(place)) from None
