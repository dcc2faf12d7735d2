"""From a class name to a text, for data that have labels instead of captions."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.types import Example

_CODE = re.compile(r"\d+|n\d{8}")
"""What is a class's number or WordNet code, and no name."""
_NEXT_TABLE = "---"


def class_names(lines: Sequence[str], own: Sequence[str], *, where: str) -> tuple[str, ...]:
    """The class names of a task, by the data's own labels.

    Args:
        lines: one class name a line by label; or ``own name<TAB>class name``, in any order and for more classes than
            the data have: then the data's order rules and a subset (ImageNet-A) needs no file of its own. Several own
            names may stand before the class name, which is an own name too. A line of ``---`` begins another table:
            the first one that has every class counts, else the first.
        own: the data's own class names by label.
        where: what to call the data in an error.

    Raises:
        UserError: for another number of names than classes, or a class that the table lacks. Data whose own names are
            words and none of which is in the table keep them: they were named by whoever made the shards.
    """
    if not any("\t" in line for line in lines):
        if len(lines) != len(own):
            raise UserError(f"data {where!r}: {len(lines)} class names were given for {len(own)} classes")
        return tuple(lines)
    tables = _tables(lines)
    table = next((table for table in tables if table.keys() >= set(own)), tables[0])
    if not any(name in table or _CODE.fullmatch(name) for name in own):
        return tuple(own)
    # Shards may call some classes by the table's own name and others by the task's (FER 2013: angry, disgusted).
    table = {name: name for name in table.values()} | table
    missing = [name for name in own if name not in table]
    if missing:
        raise UserError(
            f"data {where!r}: {len(missing)} of {len(own)} classes are not in the task's table of class names, for "
            f"instance {missing[0]!r}; are these the data that the task means?"
        )
    return tuple(table[name] for name in own)


def _tables(lines: Sequence[str]) -> list[dict[str, str]]:
    """Own name → class name, for every table of the file."""
    tables: list[dict[str, str]] = [{}]
    for line in lines:
        if line == _NEXT_TABLE:
            tables.append({})
            continue
        *keys, name = (cell.strip() for cell in line.split("\t"))
        for key in keys:
            if tables[-1].setdefault(key, name) != name:
                raise UserError(f"class names: {key!r} stands for both {tables[-1][key]!r} and {name!r}")
    return tables


def are_numbers(names: Sequence[str]) -> bool:
    """Whether every class name is a number, of which a prompt says nothing to a text tower."""
    return bool(names) and all(name.isdecimal() for name in names)


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
