"""From a class name to a text, for data that have labels instead of captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.types import Example


def clean_classname(name: str) -> str:
    """A class name as words: commas removed, ``+`` and ``_`` to spaces.

    The first two as UniCL's released code does them (``data/language/prompt_engineering.py``); the underscore because
    class names are often folder names.
    """
    return " ".join(name.replace(",", "").replace("+", " ").replace("_", " ").split())


def render(template: str, classname: str) -> str:
    """The class name in the place of ``{}`` (or CLIP_benchmark's ``{c}``). Raises UserError for neither."""
    if "{}" not in template and "{c}" not in template:
        raise UserError(f"template {template!r}: it needs {{}} where the class name goes")
    # Not str.format: a class name or template may hold braces of its own.
    return template.replace("{c}", "{}").replace("{}", classname)


def draw_text(
    example: Example,
    classname: str | None,
    templates: Sequence[str],
    rng: np.random.Generator,
    *,
    languages: Sequence[str] = ("en",),
) -> str | None:
    """One text for one training example.

    A caption drawn uniformly among those in ``languages``; where there is none, the class name in a template drawn
    uniformly (microsoft/UniCL, data/language/prompt_engineering.py); where there is no class name either, None.
    """
    captions = [text for language in languages for text in example.texts.get(language, ())]
    if captions:
        return captions[int(rng.integers(len(captions)))]
    if classname is None:
        return None
    assert templates, "a class name needs at least one template"
    return render(templates[int(rng.integers(len(templates)))], clean_classname(classname))
