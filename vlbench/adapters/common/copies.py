"""Entries of one test set that show the same image: they are one image with all their captions, and that is said."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 3


def copies_note(ids: Sequence[str], digests: Sequence[str]) -> list[str]:
    """A note where an entry repeats an earlier one's image byte for byte, naming the first few; empty otherwise.

    Args:
        ids: of the entries.
        digests: of their images, in the same order.
    """
    first: dict[str, str] = {}
    pairs = []
    for entry, image in zip(ids, digests, strict=True):
        if image in first:
            pairs.append(f"{entry} (of {first[image]})")
        first.setdefault(image, entry)
    if not pairs:
        return []
    shown = ", ".join(pairs[:_SHOWN]) + (f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else "")
    whose = "1 entry repeats" if len(pairs) == 1 else f"{len(pairs)} entries repeat"
    return [f"{whose} an earlier image byte for byte and joined it: {shown}"]
