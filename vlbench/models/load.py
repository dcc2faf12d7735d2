"""``--model`` and ``--weights``: from a text to a backbone, whatever it names."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from vlbench.core.cards import ModelCard, model_cards
from vlbench.core.catalog import LOADERS
from vlbench.core.errors import UserError
from vlbench.core.files import sha256
from vlbench.core.names import nearest
from vlbench.core.types import Backbone
from vlbench.models.loaders.shared import NOT_CLAIMED, RANDOM, importing_from_here
from vlbench.models.weights import WEIGHT_SUFFIXES, existing_file

FORMS = (
    "a run folder or checkpoint (runs/a, ckpt.pt), a reference model (vlbench list models), "
    "timm:NAME, open_clip:NAME.TAG, torchvision:NAME, hf:REPO or hf:FOLDER, unicl:SWIN, baseline:shuffled, or "
    "pkg.mod:build"
)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# From a reference card, whatever the loader finds out by itself: who made it, and how it is to be measured.
_FROM_CARD = ("id", "recipe", "sha256", "preprocess", "pretrain_data", "images_seen", "licence", "published")


def load_backbone(
    spec: str, *, weights: str | None = None, name: str | None = None, device: str | torch.device = "cpu"
) -> Backbone:
    """The backbone that ``spec`` names.

    Args:
        spec: a run folder or checkpoint file, a reference card's id, ``timm:``, ``open_clip:``, ``torchvision:``,
            ``hf:`` or ``unicl:`` with a name, or ``pkg.mod:build``.
        weights: a local file for that architecture, for ``hf:`` models also a folder with all their files; ``random``
            or ``random:SEED`` for a fresh initialisation (seed 0 where none is given); None for the weights that
            ``spec`` itself names.
        name: the id under which results are stored, instead of the card's.
        device: where the weights go.

    Raises:
        UserError: one line that says what is wrong and what to write instead.
    """
    loader, ref, card = _resolve(spec)
    source, seed = _parse_weights(weights, folders=loader == "hf")
    target = _device(device)
    if card is not None and source is None:
        _check_named(card)
    known = {"card": card} if card is not None and loader == "hf" else {}
    backbone: Any = LOADERS.get(loader)(ref, weights=source, seed=seed, **known)
    if card is not None:
        backbone.card = _merged(card, backbone.card)
    backbone.card = _relabelled(backbone.card, source, seed)
    if name is not None:
        backbone.card = backbone.card.model_copy(update={"id": name})
    return backbone.to(target) if hasattr(backbone, "to") else backbone


def _parse_weights(weights: str | None, *, folders: bool) -> tuple[str | None, int]:
    """``weights`` as None, ``"random"`` or an existing file (with ``folders``, or folder), and the seed."""
    if weights is None:
        return None, 0
    word, separator, number = weights.partition(":")
    if word == RANDOM:
        if separator and not number.isdecimal():
            raise UserError(f"--weights {weights}: write it as random or random:SEED, for instance random:1")
        return RANDOM, int(number or 0)
    if folders and Path(weights).expanduser().is_dir():
        return str(Path(weights).expanduser()), 0
    try:
        return str(existing_file(weights)), 0
    except UserError as error:
        hint = " (or random?)" if nearest(weights, [RANDOM]) else ""
        raise UserError(f"--weights {error}{hint}") from None


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {str(device)!r}; known: cpu, cuda, cuda:0, mps") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch sees no CUDA device on this machine; use cpu")
    return target


def _resolve(spec: str) -> tuple[str, str, ModelCard | None]:
    """The loader, what it is to load, and the reference card where ``spec`` names one."""
    if not spec:
        raise UserError(f"--model: no model named; expected {FORMS}")
    prefix, separator, rest = spec.partition(":")
    if separator and prefix in LOADERS.names():
        return prefix, rest, None
    path = Path(spec).expanduser()
    if path.is_dir():
        return "native", str(_checkpoint_in(path)), None
    if path.is_file():
        return "native", str(path), None
    cards = model_cards()
    if spec in cards:
        card = cards[spec]
        return card.loader, f"{card.arch}.{card.weights}" if _names_weights(card) else card.arch, card
    if separator:
        guess = nearest(prefix, LOADERS.names())
        if _FUNCTION.fullmatch(spec) and (guess is None or _importable(prefix)):
            return "build", spec, None
        hint = f"did you mean {guess}:{rest}?" if guess else f"expected {FORMS}"
        raise UserError(f"--model {spec}: unknown prefix {prefix!r}; {hint}")
    if spec.endswith(WEIGHT_SUFFIXES) or len(path.parts) > 1:
        _raise_no_path(path)
    guess = nearest(spec, cards)
    hint = f"did you mean {guess!r}?" if guess else f"expected {FORMS}"
    raise UserError(f"--model {spec}: neither a file nor a reference model; {hint}")


def _names_weights(card: ModelCard) -> bool:
    return card.weights is not None and "://" not in card.weights


def _check_named(card: ModelCard) -> None:
    """Without a tag a library gives its default weights, and they would go under another recipe's name."""
    if _names_weights(card) or "." in card.arch or card.loader == "hf":
        return
    fetch = f"fetch {card.weights} and " if card.weights else ""
    raise UserError(
        f"{card.id}: its weights are not downloaded from here; {fetch}pass them with --weights FILE, in the layout of "
        f"{card.loader}:{card.arch}; or --weights random for a fresh initialisation"
    )


def _importable(module: str) -> bool:
    try:
        with importing_from_here():
            return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _raise_no_path(path: Path) -> None:
    try:
        existing_file(path)
    except UserError as error:
        raise UserError(f"--model {error}") from None


def _checkpoint_in(folder: Path) -> Path:
    preferred = folder / "ckpt.pt"
    if preferred.is_file():
        return preferred
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    if len(files) == 1:
        return files[0]
    found = f"it has {', '.join(path.name for path in files[:4])}: name one" if files else "it has no weights at all"
    raise UserError(f"--model {folder}: no ckpt.pt in this folder; {found}")


def _merged(card: ModelCard, loaded: ModelCard) -> ModelCard:
    """The loader's findings under the reference card's statements."""
    return loaded.model_copy(update={key: getattr(card, key) for key in _FROM_CARD})


def _relabelled(card: ModelCard, weights: str | None, seed: int) -> ModelCard:
    """A card that does not claim for other weights what was said of the named ones."""
    if weights is None:
        return card
    if weights == RANDOM:
        update: dict[str, Any] = {
            "id": f"{card.id}-random-s{seed}",
            "random": True,
            "seed": seed,
            "weights": None,
            "sha256": None,
            "pretrain_data": (),
            "images_seen": 0,
            "published": (),
        }
        return card.model_copy(update=update)
    if card.sha256 is not None and Path(weights).is_file() and sha256(Path(weights)) == card.sha256:
        return card
    file = Path(weights)
    update = {"id": f"{card.id}@{file.stem}", "weights": file.name, "sha256": None, "published": ()}
    # A checkpoint of ours speaks for itself; a user's function that takes the file made its card with it in hand, and
    # for one that does not, its loader has taken the claims back.
    if card.loader not in ("native", "build"):
        update |= NOT_CLAIMED
    return card.model_copy(update=update)
