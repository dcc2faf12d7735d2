"""A checkpoint of ``vlbench pretrain``: one file that says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlbench.core.cards import ModelCard
from vlbench.core.catalog import RECIPES
from vlbench.core.config import Config, parse
from vlbench.core.errors import UserError
from vlbench.models.loaders.shared import RANDOM, seeded
from vlbench.models.weights import checkpoint_assets, load_strictly, read_checkpoint, read_weights

# What the trainer knows and the recipe's export does not, and the preprocessing, which travels with the weights even
# where a later version of the recipe would prepare images in another way.
_FROM_CHECKPOINT = ("id", "preprocess", "pretrain_data", "images_seen", "seed", "licence", "published")


def load(ref: str, *, weights: str | None = None, seed: int = 0) -> Any:
    """The backbone in the checkpoint file ``ref``.

    The recipe builds the model, the file fills it, the recipe's export says what is measured.

    Raises:
        UserError: for a file that cannot be read, an unknown recipe, or settings and weights that do not fit.
    """
    checkpoint = read_checkpoint(ref)
    try:
        recipe = RECIPES.get(checkpoint["recipe"])
    except UserError as error:
        raise UserError(f"{ref}: {error} (is the package that brings this recipe installed?)") from None
    recipe = recipe.with_assets(checkpoint_assets(checkpoint))
    kind: type[Config] = type(next(iter(recipe.presets.values())))
    config = parse(kind, checkpoint["config"], where=f"{ref}, config")
    classes = tuple(checkpoint["classes"])
    with seeded(seed):
        model = recipe.build(config, classes)
    if weights is None:
        load_strictly(model, checkpoint["model"], where=ref)
    elif weights != RANDOM:
        load_strictly(model, read_weights(weights), where=f"{weights} in {ref}")
    backbone = recipe.export(model, config, classes)
    stored = {key: checkpoint["card"][key] for key in _FROM_CHECKPOINT if checkpoint["card"].get(key) is not None}
    stored.setdefault("id", Path(ref).resolve().parent.name)
    stored.setdefault("images_seen", checkpoint.get("samples_seen"))
    backbone.card = parse(ModelCard, backbone.card.model_dump() | stored, where=f"{ref}, card")
    return backbone
