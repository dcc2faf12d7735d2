"""Content hashes: two things have the same fingerprint exactly when they are the same thing.

The feature store, the result store and the task cards all key on these, never on a name or a path, so that a
renamed file changes nothing and a changed file changes everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def canonical_json(value: Any) -> str:
    """``value`` as JSON with sorted keys and no spaces. Not-a-number and infinities are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """A 16-digit hexadecimal fingerprint of any JSON value."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()[:16]


def fingerprint_words(words: Iterable[str]) -> str:
    """A 16-digit fingerprint of words in their order, however many: they are never held together."""
    total = hashlib.sha256()
    for word in words:
        encoded = word.encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.hexdigest()[:16]


def digest(data: bytes) -> str:
    """The 32-digit hexadecimal digest (BLAKE2b, 128 bits) by which the stores know one image or one text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_all(digests: Iterable[str]) -> str:
    """One 16-digit fingerprint of a set of digests. The order does not matter; how often each occurs does."""
    total = hashlib.sha256()
    for item in sorted(digests):
        total.update(item.encode("ascii"))
    return total.hexdigest()[:16]
