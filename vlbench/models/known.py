"""Models that were loaded before: who asks for stored features only need not build the network again.

What a result says of a model (its card, the hash of its weights) follows from the files it is made of and from the
code that reads them. It is kept under the digest of both, and the network itself is built when an image or a text is
to be encoded, if one ever is. So a second call on stored features imports no model library and reads no weights.

Kept only where local files say everything: a checkpoint, ``--weights FILE``, a folder with weights and configuration.
Never for a user's own code, a third party's loader or recipe, random weights, or weights that a library finds in a
cache of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from vlbench.core.cards import ModelCard, model_cards
from vlbench.core.errors import UserError
from vlbench.core.files import sha256, write_text
from vlbench.core.fingerprint import fingerprint
from vlbench.core.paths import cache_dir
from vlbench.core.types import Backbone
from vlbench.models.tokenizer_files import placed_files

_LIBRARIES = ("open_clip", "timm", "torchvision", "hf", "unicl")
_FOLDERS = ("open_clip:local-dir:", "hf:")
_PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "transformers", "tokenizers")
_PACKAGE = Path(__file__).resolve().parent.parent


class KnownBackbone:
    """A backbone that is loaded when it is first asked to compute something.

    Args:
        card: what ``load`` will say it is.
        weights_hash: of the weights that ``load`` will give it.
        load: makes the backbone itself.
        record: the file that this was read from.
    """

    built_by = None

    def __init__(self, card: ModelCard, weights_hash: str, *, load: Callable[[], Backbone], record: Path) -> None:
        self.card = card
        self.weights_hash = weights_hash
        self._load = load
        self._record = record
        self._loaded: Any = None

    def __getattr__(self, name: str) -> Any:
        """Whatever else a backbone has and does, from the loaded one."""
        if name.startswith("__"):  # copy and pickle ask for these
            raise AttributeError(name)
        if self._loaded is None:
            self._loaded = self._load()
            if (self._loaded.card, self._loaded.weights_hash) != (self.card, self.weights_hash):
                self._record.unlink(missing_ok=True)
                raise UserError(
                    f"{self.card.id}: is not the model that it was when it was loaded before, although its files are; "
                    "what was kept of it is deleted now: give the same command again"
                )
        return getattr(self._loaded, name)


def open_backbone(spec: str, *, weights: str | None = None, name: str | None = None, device: str = "cpu") -> Any:
    """``models.load.load_backbone`` of the same arguments, or a ``KnownBackbone`` where it was loaded before."""

    def load() -> Backbone:
        import torch

        from vlbench.models.load import load_backbone

        # The first to ask may be in inference mode, where some models cannot be built and none could be trained later.
        with torch.inference_mode(False), torch.enable_grad():
            return load_backbone(spec, weights=weights, name=name, device=device)

    key = _key(spec, weights, name)
    if key is None:
        return load()
    record = cache_dir() / "models" / f"{key}.json"
    found = _read(record)
    if found is not None:
        return KnownBackbone(*found, load=load, record=record)
    backbone = load()
    if _is_ours(backbone):
        content = {"card": backbone.card.model_dump(mode="json"), "weights_hash": backbone.weights_hash}
        write_text(record, json.dumps(content))
    return backbone


def _read(record: Path) -> tuple[ModelCard, str] | None:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return ModelCard(**content["card"]), str(content["weights_hash"])
    except (OSError, ValueError, KeyError, TypeError):  # absent, or half of something: it is written again
        return None


def _key(spec: str, weights: str | None, name: str | None) -> str | None:
    """The digest of all that decides what is loaded, or None where that is not in local files alone."""
    files = list(_files(spec, weights))
    if not files:
        return None
    card = model_cards().get(spec) if _may_be_a_card(spec) else None
    if (card.loader if card is not None else spec.partition(":")[0]) == "open_clip":
        files += placed_files()  # one of them may be this model's, and its name is then in the card
    return fingerprint(
        {
            "spec": spec,
            "weights": weights,
            "name": name,
            "card": card.model_dump(mode="json") if card is not None else None,
            "files": [[path.name, sha256(path)] for path in files],
            "packages": [[package, _version(package)] for package in _PACKAGES],
            "code": _code(),
        }
    )


def _files(spec: str, weights: str | None) -> Iterator[Path]:
    """The files that a model is made of; none where there are others that nobody knows of."""
    place = Path(spec).expanduser()
    prefix = next((prefix for prefix in _FOLDERS if spec.startswith(prefix)), "")
    named = Path(spec.removeprefix(prefix)).expanduser()
    folder = named if named.is_dir() else None
    if weights is not None:
        by_name = spec.partition(":")[0] in _LIBRARIES or (_may_be_a_card(spec) and spec in model_cards())
        given = Path(weights).expanduser()
        if not (given.is_file() and (by_name or folder is not None or place.is_file())):
            return
        yield given
    if folder is not None:
        # What a run keeps beside its checkpoint changes while the checkpoint does not.
        names = ("ckpt.pt",) if (folder / "ckpt.pt").is_file() else None
        yield from sorted(path for path in folder.iterdir() if path.is_file() and (names is None or path.name in names))
    elif place.is_file():
        yield place


def _may_be_a_card(spec: str) -> bool:
    """Whether the cards must be read to know: that takes longer than all else here."""
    return ":" not in spec and not Path(spec).expanduser().exists()


def _is_ours(backbone: Any) -> bool:
    """Whether nothing but vlbench and the libraries whose versions are in the key had a part in it."""
    from vlbench.core.catalog import RECIPES

    if backbone.card.loader != "native":
        return backbone.card.loader in _LIBRARIES and getattr(backbone, "built_by", None) is None
    recipe = backbone.card.recipe.partition(" (")[0]  # without the variant: "unicl (supcon)"
    return type(RECIPES.get(recipe)).__module__.partition(".")[0] == "vlbench"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _code() -> str:
    """The digest of the code that makes backbones: a change of it may change what they are."""
    total = hashlib.sha256((_PACKAGE / "core" / "cards.py").read_bytes())
    for folder in ("models", "recipes"):
        for path in sorted((_PACKAGE / folder).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()
