"""Sources as data: each is of a setting, each published value has one, and old settings mean what they meant."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vlbench.core.catalog import RECIPES
from vlbench.core.config import flatten, parse
from vlbench.recipes.clip import ClipConfig
from vlbench.recipes.published import Preset, published

NAMES = ("align", "clip", "muvla", "supervised", "unicl", "virtex")
NEW = {"directions", "multilabel_regions", "mrfr_target", "region_mean", "rows", "task_weights"}


@pytest.mark.parametrize("name", NAMES)
def test_sources_are_of_settings_and_published_values_have_them(name: str) -> None:
    recipe = RECIPES.get(name)
    assert list(recipe.described) == list(recipe.presets)
    for preset, described in recipe.described.items():
        assert described.config == recipe.presets[preset]
        assert described.about.endswith("."), preset
        keys = flatten(described.config.model_dump(mode="json"))
        for source, words in described.sources.items():
            assert any(key == source or key.startswith(f"{source}.") for key in keys), f"{preset}: no setting {source}"
            assert words.strip(), f"{preset}: {source} has no source"
        if preset == "tiny":
            continue
        # Built from nothing but what has a source: every other setting has its default.
        plain = flatten(described.config.model_construct().model_dump(mode="json"))
        for key, value in keys.items():
            is_default = key in plain and plain[key] == value
            assert is_default or described.source(key), f"{preset}: {key}={value!r} has no source"


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_recipes_own_says_what_it_does(name: str) -> None:
    for kind in RECIPES.get(name).Config.__mro__:
        if not kind.__module__.startswith("vlbench.recipes"):
            continue
        for field in vars(kind).get("__annotations__", {}):
            found = [
                parent.model_fields[field] for parent in kind.__mro__ if field in getattr(parent, "model_fields", {})
            ]
            groups = [info for info in found if hasattr(info.annotation, "model_fields")]
            assert groups or any(info.description for info in found), f"{kind.__name__}.{field}"


def test_preset_keeps_the_values_and_sources_of_the_one_it_is_made_of() -> None:
    base = published(
        ClipConfig,
        "One.",
        {
            "optim.lr": (0.5, "a page"),
            "visual": ({"arch": "timm:resnet18", "kwargs": {"x": 1}}, "another"),
            "visual.kwargs.y": (2, "a third"),
        },
    )
    assert isinstance(base.config, ClipConfig)
    assert (base.config.optim.lr, base.config.visual.kwargs) == (0.5, {"x": 1, "y": 2})
    more = published(base, "Two.", {"optim.lr": (0.25, "a later page")})
    assert (more.config.optim.lr, more.config.visual) == (0.25, base.config.visual)
    assert (base.source("optim.lr"), more.source("optim.lr")) == (("optim.lr", "a page"), ("optim.lr", "a later page"))
    assert more.source("visual.arch") == ("visual", "another")
    assert more.source("visual.kwargs.y") == ("visual.kwargs.y", "a third")
    assert more.source("optim.eps") is None
    assert Preset(base.config, "Three.").source("steps") is None
    with pytest.raises(ValidationError, match=r"optim\.learning_rate"):
        published(base, "Four.", {"optim.learning_rate": (0.1, "nowhere")})


@pytest.mark.parametrize("name", NAMES)
def test_settings_stored_before_these_options_mean_what_they_meant(name: str) -> None:
    """A run's config.json of before has none of them; a preset that leaves them alone comes back as it was."""
    for preset in RECIPES.get(name).presets.values():
        stored = preset.model_dump(mode="json")
        if any(
            stored[key] != type(preset).model_fields[key].get_default(call_default_factory=True)
            for key in NEW & stored.keys()
        ):
            continue
        old = {key: value for key, value in stored.items() if key not in NEW}
        assert parse(type(preset), old, where="config.json") == preset
