"""Reading weights from files that somebody else wrote, without ever running what is in them.

Only tensors and plain containers are read: ``torch.load(weights_only=True)``, safetensors, and the tensors of a
TorchScript archive. Two classes of settings that lie beside published weights are read as plain mappings, without
being imported. Everything that can be wrong with a file becomes one line that names it.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlbench.core.errors import UserError
from vlbench.core.names import nearest
from vlbench.models.torchscript import is_torchscript, read_torchscript

CHECKPOINT_FORMAT = "vlbench.checkpoint"
CHECKPOINT_VERSION = 1
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

# Where training scripts put the weights among other things; "teacher": DINO.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher")
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how PyTorch's files begin, since 1.6 and before
# Settings that training scripts save beside the weights (MAE's and DINO's arguments, Swin's and UniCL's configuration).
_SETTINGS = ("argparse.Namespace", "yacs.config.CfgNode")
_FORBIDDEN = re.compile(r"(?:GLOBAL|global) '?([\w.]+)")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, on the CPU.

    It may lie bare in the file or under ``state_dict``, ``model``, ``model_state_dict`` or ``teacher`` (DINO's
    average of its student, which is what is published); ``module.`` prefixes are removed.

    Raises:
        UserError: for a file that is missing, damaged, would run code, or holds no state dict.
    """
    path = existing_file(path)
    content: Any = _read(path)
    for _ in range(2):
        if _is_state_dict(content):
            break
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            shown = ", ".join(repr(str(key)) for key in list(content)[:6]) or "nothing"
            raise UserError(f"{path}: holds no state dict (a mapping of names to tensors); found {shown}")
        content = inner[0]
    if not _is_state_dict(content):
        raise UserError(f"{path}: holds no state dict (a mapping of names to tensors)")
    state = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ``vlbench pretrain``, checked for format, version and the keys that a loader needs.

    Raises:
        UserError: as read_weights, and for a file that is no vlbench checkpoint or one of another version.
    """
    path = existing_file(path)
    content = _read(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: weights without a description, not a vlbench checkpoint; name their architecture, "
            f"for instance --model timm:resnet50 --weights {path.name}"
        )
    version = content.get("version")
    if version != CHECKPOINT_VERSION:
        newer = isinstance(version, int) and version > CHECKPOINT_VERSION
        hint = "update vlbench" if newer else "write it again with this vlbench"
        raise UserError(f"{path}: a checkpoint of version {version!r}; this vlbench reads {CHECKPOINT_VERSION}: {hint}")
    expected = {"recipe": str, "config": dict, "classes": list, "card": dict, "model": dict}
    wrong = [key for key, kind in expected.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise UserError(f"{path}: a damaged checkpoint: {', '.join(wrong)} missing or of the wrong type")
    return content


def asset_tensors(assets: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """A recipe's assets (vocabularies) as a checkpoint holds them: plain tensors, which load with ``weights_only``."""
    return {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in assets.items()}


def checkpoint_assets(checkpoint: Mapping[str, Any]) -> dict[str, bytes]:
    """The assets in a checkpoint; none in those of older versions."""
    return {name: content.numpy().tobytes() for name, content in checkpoint.get("assets", {}).items()}


def existing_file(path: str | Path) -> Path:
    """``path`` as a Path. Raises UserError with the nearest file beside it where it does not exist."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the file in it")
    if path.is_file():
        return path
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"{path}: no such file; its folder {folder} does not exist either")
    names = [other.name for other in folder.iterdir() if not other.name.startswith(".")]
    guess = nearest(path.name, names)
    beside = sorted(name for name in names if name.endswith(WEIGHT_SUFFIXES))[:6]
    hint = f"did you mean {folder / guess}?" if guess else f"weights beside it: {', '.join(beside) or 'none'}"
    raise UserError(f"{path}: no such file; {hint}")


def load_strictly(
    module: nn.Module, state: Mapping[str, torch.Tensor], *, where: str, ignore: Iterable[str] = ()
) -> None:
    """Copy ``state`` into ``module``, every tensor of it.

    Args:
        module: receives the weights.
        state: names and tensors.
        where: what to call the file in an error.
        ignore: prefixes of names in ``state`` that the module has deliberately given up (a classifier).

    Raises:
        UserError: naming the first few keys that are missing, unexpected or of another shape. Nothing is copied then.
    """
    ignored = tuple(ignore)
    wanted = module.state_dict()
    # Old files lack BatchNorm's counters, which the network never reads at evaluation.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted and not name.startswith(ignored or ("\0",))]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {word} ({_first(names)})" for word, names in found if names]
    if problems:
        raise UserError(f"{where}: does not fit the architecture: {', '.join(problems)}")
    module.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted}, strict=False)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, torch.Tensor) for value in content.values())


def _read(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as handle:
            head = handle.read(4096)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path}: an empty file (0 bytes)")
    content = (
        _read_safetensors(path) if path.suffix == ".safetensors" or _is_safetensors(head) else _read_torch(path, head)
    )
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a mapping of names to tensors")
    return dict(content)


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a valid safetensors file: {_line(error)}") from None


def _read_torch(path: Path, head: bytes) -> Any:
    if not head.startswith((_ZIP, _PICKLE)):
        raise UserError(f"{path}: not a PyTorch or safetensors file")
    if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated: the end of the archive is missing; copy or download it again")
    try:
        if head.startswith(_ZIP) and is_torchscript(path):
            return read_torchscript(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is said below
            with torch.serialization.safe_globals([(OrderedDict, name) for name in _SETTINGS]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = _FORBIDDEN.search(str(error))
        does = f"would call {forbidden[1]}" if forbidden else "could run code"
        raise UserError(
            f"{path}: refused: reading it {does}; vlbench reads tensors and plain values only "
            "(save the state dict alone, best as safetensors)"
        ) from None
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, struct.error, ... on damaged files
        raise UserError(f"{path}: truncated or damaged: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
