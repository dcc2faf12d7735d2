"""Names: what a typing error was meant to be, and how a name becomes a file name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_UNSAFE = re.compile(r"[^A-Za-z0-9._@+-]+")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None where nothing is near. Case is ignored."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line for an unknown name: ``unknown task 'liner'; did you mean 'linear'?``."""
    known = sorted(known)
    guess = nearest(name, known)
    if guess is not None:
        return f"unknown {what} {name!r}; did you mean {guess!r}?"
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"unknown {what} {name!r}; known: {shown or 'none'}"


def slug(name: str) -> str:
    """``name`` as one safe path component: ``timm:resnet50.a1_in1k`` becomes ``timm-resnet50.a1_in1k``.

    The result never contains a separator and never starts with a dot, so a model's name cannot leave the
    results folder.
    """
    cleaned = _UNSAFE.sub("-", name).strip("-.")
    return cleaned or "unnamed"
