"""Presets with their sources as data, which ``vlbench show recipe`` prints.

A value and the words that say where it was read are one entry, so that neither can be changed, added or dropped without
the other in sight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlbench.train.config import PretrainConfig

OURS = "ours: no result depends on it"


@dataclass(frozen=True)
class Preset:
    """Settings, and what their reader should know of them."""

    config: PretrainConfig
    about: str
    """What the preset is, what was published of it, and what of that is not done here."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Dotted setting, or a group of them, → where its value was read."""

    def source(self, key: str) -> tuple[str, str] | None:
        """The source of the setting ``key``, or of the smallest group around it: of what it is, and its words."""
        while key not in self.sources:
            key, dot, _ = key.rpartition(".")
            if not dot:
                return None
        return key, self.sources[key]


def published(base: type[PretrainConfig] | Preset, about: str, entries: Mapping[str, tuple[Any, str]]) -> Preset:
    """A preset of published values.

    Args:
        base: the recipe's Config, or another preset, whose other values and their sources are kept.
        about: see ``Preset``.
        entries: dotted setting, or a group of them, → its value and the source of that.

    Raises:
        ValidationError: at import, for a setting that is not there or a value that it cannot take.
    """
    kind, values, sources = (
        (type(base.config), base.config.model_dump(), base.sources) if isinstance(base, Preset) else (base, {}, {})
    )
    for key, (value, _) in entries.items():
        *groups, last = key.split(".")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return Preset(
        kind.model_validate(values), about, {**sources, **{key: words for key, (_, words) in entries.items()}}
    )


def configs(presets: Mapping[str, Preset]) -> dict[str, Any]:
    """The settings of each preset, which is all that training needs of it."""
    return {name: preset.config for name, preset in presets.items()}
