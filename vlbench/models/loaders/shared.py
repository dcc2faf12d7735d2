"""What the loaders share: a seeded initialisation, and one way of saying that weights cannot be fetched."""

from __future__ import annotations

import contextlib
import importlib
import logging
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from vlbench.core.errors import UserError
from vlbench.core.names import unknown

RANDOM = "random"
TOKENIZER_PACKAGES = "'transformers>=5' sentencepiece protobuf"
"""What hub models and their tokenizers need beside vlbench, as pip reads it."""
NOT_CLAIMED: dict[str, None] = dict.fromkeys(("pretrain_data", "images_seen", "seed", "licence", "recipe"))
"""What a card said of its own weights and cannot say of others."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A fixed random state for an initialisation; the caller's own comes back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def importing_from_here() -> Iterator[None]:
    """Let modules of the working directory be imported; under a console script Python does not look there.

    Last in the order, so that a file of the user's hides no installed package.
    """
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Silence the root logger, on which open_clip reports every step of making a model."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # with no handler at all, logging.warning() would install one for good
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)


def check_tag(what: str, tag: str, known: Iterable[str]) -> None:
    """Raises UserError where ``tag`` is not among the pretrained weights of ``what``."""
    known = list(known)
    if not known:
        raise UserError(f"{what} has no pretrained weights; pass --weights FILE or --weights random")
    if tag not in known:
        raise UserError(f"{what}: {unknown('weights', tag, known)}")


@contextlib.contextmanager
def hub_offline_without_network() -> Iterator[None]:
    """Let the Hugging Face hub look into its cache only, where its server cannot be reached.

    Left alone it tries six times for each of two file names: three quarters of a minute before the one line that says
    what to do. Behind a proxy the server cannot be reached directly, so nothing is tested there.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname or "huggingface.co"
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or (not getproxies() and not _reachable(host))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


def cannot_fetch(ref: str, source: str, error: Exception, *, place: str | None = None) -> UserError:
    """The error for weights that are not on this machine and cannot be downloaded.

    Args:
        ref: the model that was asked for.
        source: where the file is to be had.
        error: what the download said.
        place: where the library would find the file by itself.
    """
    reason = (" ".join(str(error).split()) or type(error).__name__)[:120]
    put = f"put it at {place} or " if place else ""
    return UserError(
        f"{ref}: its weights are not on this machine and cannot be downloaded ({reason}); fetch {source} elsewhere and "
        f"{put}pass it with --weights FILE; or --weights random for a fresh initialisation"
    )
