"""A trained model as the backbone to be measured: what recipes call at the end of training.

Shapes: none; see backbone.py.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import nn

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.errors import UserError
from vlbench.core.types import Features, Provides
from vlbench.models.backbone import TorchBackbone, count_params
from vlbench.models.captioner import Captioner
from vlbench.models.text import TextConfig, TextReader, Tokenizer
from vlbench.models.towers import VisualTower
from vlbench.models.two_tower import TwoTower


def export_two_tower(
    model: TwoTower,
    *,
    model_id: str,
    recipe: str,
    preprocess: Preprocess,
    tokenizer: TextReader | None = None,
    **card: Any,
) -> TorchBackbone:
    """Both towers, sharing the model's weights.

    Args:
        model: the trained model.
        model_id: the card's id.
        recipe: the recipe's name.
        preprocess: how images are prepared; it has the size that the model was trained at.
        tokenizer: what its texts are read with; None: the one that its settings name.
        card: further fields of the card (pretrain_data, images_seen, seed, ...).
    """
    if tokenizer is None:
        assert isinstance(model.text_config, TextConfig), "a learnt vocabulary comes with its tokenizer"
        tokenizer = Tokenizer(model.text_config.spec())
    described = _card(
        model.visual,
        # The text tower belongs to the identity: its heads and activation leave no trace in the weights.
        beside=model.text_config.identity(),
        more={"embed", "text"},
        text=tokenizer.spec,
        id=model_id,
        recipe=recipe,
        preprocess=preprocess,
        **card,
    )
    return TorchBackbone(
        described, model, image_fn=model.image_features, text_fn=model.encode_text, tokenizer=tokenizer
    )


def export_visual(
    tower: VisualTower, *, model_id: str, recipe: str, preprocess: Preprocess, **card: Any
) -> TorchBackbone:
    """An image tower alone, sharing its weights: what is left of a classifier once its head is thrown away."""
    return TorchBackbone(_card(tower, id=model_id, recipe=recipe, preprocess=preprocess, **card), tower)


def export_captioner(
    model: Captioner,
    *,
    captions_fn: Callable[[torch.Tensor], list[str]],
    writes: str,
    model_id: str,
    recipe: str,
    preprocess: Preprocess,
    **card: Any,
) -> TorchBackbone:
    """An image tower with the head that trained it: the tower is what transfers, the head writes captions.

    Args:
        model: the trained model.
        captions_fn: images to captions.
        writes: what decides captions and leaves no trace in the weights: beams, vocabulary.
        model_id: the card's id.
        recipe: the recipe's name.
        preprocess: how images are prepared; it has the size that the model was trained at.
        card: further fields of the card (pretrain_data, images_seen, seed, ...).
    """
    described = _card(
        model.visual,
        beside=f"captions({model.textual.size.identity()}, {writes})",
        more={"captions"},
        id=model_id,
        recipe=recipe,
        preprocess=preprocess,
        **card,
    )
    return TorchBackbone(described, model, image_fn=model.visual.features, captions_fn=captions_fn)


def export_matcher(
    model: nn.Module,
    *,
    tower: VisualTower | None,
    match: Callable[..., torch.Tensor] | None,
    described: str,
    model_id: str,
    recipe: str,
    preprocess: Preprocess,
    **card: Any,
) -> TorchBackbone:
    """A model that reads image and text together, with the image tower that it has, if it has one.

    Args:
        model: the trained model; it holds the tower.
        tower: what transfers; None where the image side is fixed features: then ``match`` is all that it offers.
        match: see ``TorchBackbone``; None where no matching was trained.
        described: the fusion part in words: what leaves no trace in the weights.
        model_id: the card's id.
        recipe: the recipe's name.
        preprocess: how images are prepared; it has the size that the model was trained at.
        card: further fields of the card (pretrain_data, images_seen, seed, ...).
    """
    more: set[Provides] = {"match"} if match is not None else set()
    found = _card(tower, beside=described, more=more, id=model_id, recipe=recipe, preprocess=preprocess, **card)
    return TorchBackbone(found, model, image_fn=tower.features if tower is not None else _no_tower, match_fn=match)


def _card(tower: VisualTower | None, *, beside: str = "", more: Set[Provides] = frozenset(), **card: Any) -> ModelCard:
    """The card of a trained model: what its tower says of itself, and what stands beside the tower."""
    arch = tower.arch if tower is not None else "fixed region features"
    return ModelCard(
        loader="native",
        arch=f"{arch} + {beside}" if beside else arch,
        provides=(tower.parts if tower is not None else frozenset()) | more,
        feature=tower.feature if tower is not None else "none: region features are given",
        params=count_params(tower) if tower is not None else 0,
        **card,
    )


def _no_tower(images_BCHW: torch.Tensor) -> Features:
    raise UserError("this model reads fixed region features and has no image tower: it can match, not be probed")
