"""Small dirty shards: what is planted, and which rule must find it."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.making import encoded, png, write_files, write_tar
from vlbench.data.filters.words import ngrams, words

_WORDS = """\
red green blue pink grey black white brown small large old new round flat warm cold wet dry quiet loud
cat dog car tree house boat bird fish chair table lamp stone river bridge tower clock hat shoe cup ball
sand grass snow ice wood brick water rock straw clay glass steel paper cloth leaf dust mud ash salt wax"""
ADJECTIVES, NOUNS, PLACES = (line.split() for line in _WORDS.split("\n"))

MIN_SIDE, MAX_TEXTS, MAX_IMAGES = 16, 20, 10
OPTIONS = ("--min-side", str(MIN_SIDE), "--max-texts", str(MAX_TEXTS), "--max-images", str(MAX_IMAGES))


def clean_text(number: int) -> str:
    """One of 8,000 texts; every word and pair of words occurs often in any thousand of them that follow one another."""
    adjective, noun, place = number % 20, number // 20 % 20, (number // 400 + number) % 20
    return f"a {ADJECTIVES[adjective]} {NOUNS[noun]} on {PLACES[place]}"


def flat_image(number: int, width: int = 24, height: int = 20) -> bytes:
    """One colour: cheap, without a perceptual hash, and no two alike."""
    colour = (number % 251, number // 251 % 251, 7)
    return encoded(Image.new("RGB", (width, height), colour), "PNG", compress_level=1)


def smooth_image(seed: int, side: int = 80) -> Image.Image:
    """Large patches of colour: what a perceptual hash is for."""
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@dataclass
class Planted:
    """Samples in order, and the rule that must remove each dirty one."""

    samples: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    """Of the usable samples: what n-grams are counted in."""

    def add(self, members: Mapping[str, bytes | str], rule: str = "") -> None:
        key = f"{len(self.samples):06}"
        data = {name: value.encode() if isinstance(value, str) else value for name, value in members.items()}
        self.samples.append((key, data))
        if rule:
            self.rules[key] = rule
        if rule not in ("unreadable", "incomplete"):
            self.texts.append(data["txt"].decode())

    def write(self, folder: Path, shards: int, seed: int = 0) -> Path:
        """Shuffled over ``shards`` tars."""
        order = random.Random(seed).sample(self.samples, len(self.samples))
        for shard in range(shards):
            own = order[shard::shards]
            members = {f"{key}.{name}": data for key, parts in own for name, data in parts.items()}
            write_tar(folder / f"{shard:05}.tar", members)
        return folder

    def frequent_ngrams(self) -> int:
        """How many words and pairs of words occur more than once."""
        counts: dict[str, int] = {}
        for text in self.texts:
            for ngram in ngrams(words(text)):
                counts[ngram] = counts.get(ngram, 0) + 1
        return sum(count > 1 for count in counts.values())


def plant(clean: int, seed: int = 0) -> Planted:
    """``clean`` good pairs, 30 more that are just within what is allowed, and 301 dirty ones."""
    planted = Planted()
    for number in range(clean):
        planted.add({"png": flat_image(number), "txt": clean_text(number), "json": "{}"})
    at = 40_000
    whole = png(seed)
    for number in range(20):
        at += 1
        good = {"png": flat_image(at), "txt": clean_text(number)}
        planted.add(good | {"png": whole[: 60 + number]}, "unreadable")
        planted.add(good | {"png": b"no image at all " * 9}, "unreadable")
        planted.add(good | {"txt": "caf\xe9 au lait".encode("latin-1")}, "unreadable")
        planted.add(good | {"json": "[1"}, "unreadable")
        planted.add({"png": good["png"]}, "incomplete")
        planted.add(good | {"txt": " \n"}, "incomplete")
        planted.add({"txt": good["txt"], "json": "{}"}, "incomplete")
        planted.add(good | {"png": flat_image(at, 40, MIN_SIDE)}, "small")
        planted.add(good | {"png": flat_image(at, 3 * 17, 17)}, "aspect")
        planted.add(good | {"txt": f"a {ADJECTIVES[number]}"}, "length")
        planted.add(good | {"txt": "very " * 16 + clean_text(number)}, "length")
        planted.add(good | {"txt": f"a red zq{number}x on sand"}, "rare-ngram")
        planted.add(good | {"txt": "click here to enlarge"}, "shared-text")
        near = smooth_image(1000 + number % 4)
        copy = encoded(near.resize((56, 56)) if number % 2 else near, "JPEG", quality=80)
        planted.add({"jpg": copy, "txt": good["txt"]}, "near-duplicate")
    for number in range(MAX_TEXTS + 1):
        planted.add({"png": flat_image(50_000), "txt": clean_text(400 + number)}, "many-texts")
    for number in range(MAX_TEXTS):  # as many as are allowed
        planted.add({"png": flat_image(50_001), "txt": clean_text(500 + number)})
    for number in range(MAX_IMAGES):  # as many as are allowed
        planted.add({"png": flat_image(51_000 + number), "txt": "a picture on grass"})
    return planted


def evaluation_images(folder: Path, seeds: Sequence[int] = range(1000, 1004)) -> str:
    """The spec of a test set that the planted near-duplicates were taken from."""
    for seed in seeds:
        write_files(folder, {f"test/a/{seed}.png": encoded(smooth_image(seed))})
    return f"imagefolder:{folder}"


def members_of(tar: Path) -> list[tuple[str, float, bytes]]:
    """Name, time and bytes of each member."""
    with tarfile.open(tar) as handle:
        return [(m.name, m.mtime, handle.extractfile(m).read() if m.isfile() else b"") for m in handle]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
