"""A tokenizer's files: whether a folder holds one, which one it is, and where one that the hub has is put by hand.

A tokenizer decides what a text tower reads and leaves no trace in the weights, so it is known by the content of its
files, never by the folder that they lie in. Nothing is imported here that takes time: what was stored of a model
(``models.known``) is looked up by these files too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlbench.core.paths import cache_dir

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary in ``folder``."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def tokenizer_digest(folder: Path, *, settings: str = "") -> str:
    """Eight hexadecimal digits of the tokenizer's files in ``folder`` and of what they are read with."""
    digest = hashlib.sha256(settings.encode())
    for name in TOKENIZER_FILES:
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"\0")
    return digest.hexdigest()[:8]


def tokenizer_place(repository: str) -> Path:
    """Where a repository's tokenizer is put by hand: ``<cache>/tokenizers/<owner>/<name>``. Not created here."""
    return cache_dir() / "tokenizers" / repository


def placed_files() -> list[Path]:
    """Every file of every tokenizer that was put there."""
    return sorted(path for path in (cache_dir() / "tokenizers").rglob("*") if path.name in TOKENIZER_FILES)


def how_to_place(source: str, folder: Path) -> str:
    """What to fetch from ``source`` and that it goes into ``folder``, as the end of an error."""
    return (
        f"fetch tokenizer.json, tokenizer_config.json and special_tokens_map.json from {source} elsewhere and put them "
        f"into {folder}; linear and knn need no tokenizer"
    )
