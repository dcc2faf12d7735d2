"""A trained model as the backbone to be measured: what recipes call at the end of training.

Shapes: none; see backbone.py.
"""

from __future__ import annotations

from typing import Any

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.models.backbone import TorchBackbone, count_params
from vlbench.models.text import Tokenizer
from vlbench.models.towers import VisualTower
from vlbench.models.two_tower import TwoTower


def export_two_tower(
    model: TwoTower, *, model_id: str, recipe: str, preprocess: Preprocess, **card: Any
) -> TorchBackbone:
    """Both towers, sharing the model's weights.

    Args:
        model: the trained model.
        model_id: the card's id.
        recipe: the recipe's name.
        preprocess: how images are prepared; it has the size that the model was trained at.
        card: further fields of the card (pretrain_data, images_seen, seed, ...).
    """
    spec = model.text_config.spec()
    described = ModelCard(
        id=model_id,
        loader="native",
        recipe=recipe,
        # The text tower belongs to the identity: its heads and activation leave no trace in the weights.
        arch=f"{model.visual.arch} + {model.text_config.identity()}",
        preprocess=preprocess,
        text=spec,
        provides=model.visual.parts | {"embed", "text"},
        feature=model.visual.feature,
        params=count_params(model.visual),
        **card,
    )
    return TorchBackbone(
        described, model, image_fn=model.image_features, text_fn=model.encode_text, tokenizer=Tokenizer(spec)
    )


def export_visual(
    tower: VisualTower, *, model_id: str, recipe: str, preprocess: Preprocess, **card: Any
) -> TorchBackbone:
    """An image tower alone, sharing its weights: what is left of a classifier once its head is thrown away."""
    described = ModelCard(
        id=model_id,
        loader="native",
        recipe=recipe,
        arch=tower.arch,
        preprocess=preprocess,
        provides=tower.parts,
        feature=tower.feature,
        params=count_params(tower),
        **card,
    )
    return TorchBackbone(described, tower)
