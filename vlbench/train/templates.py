"""Named sets of prompt templates for training: what turns a class name into a text."""

from __future__ import annotations

from pathlib import Path

from vlbench.core.cards import prompt_lines
from vlbench.core.errors import UserError
from vlbench.core.names import unknown

SIMPLE = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a photo of the {}.",
    "a close-up of a {}.",
    "there is a {} here.",
    "this is a {}.",
    "{}.",
)
"""Ours: short, and without words that change what is to be seen (blurry, sculpture, small)."""


def named_templates(name: str, own: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The templates behind a recipe's ``templates`` setting.

    Args:
        name: ``auto``, ``simple``, ``imagenet81`` or a file with one template a line.
        own: the templates that lie beside the data, for ``auto``.

    Raises:
        UserError: for an unknown name, or a template without a place for the class name.
    """
    if name == "auto":
        return own or SIMPLE
    if name == "simple":
        return SIMPLE
    if name == "imagenet81":
        return prompt_lines("imagenet81")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"templates: {unknown('set', name, ('auto', 'simple', 'imagenet81'))} (and no such file)")
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").split("\n"))
    templates = tuple(line for line in lines if line and not line.startswith("#"))
    for template in templates:
        if "{}" not in template and "{c}" not in template:
            raise UserError(f"{path}: template {template!r} has no {{}} where the class name goes")
    if not templates:
        raise UserError(f"{path}: there is no template in it")
    return templates
