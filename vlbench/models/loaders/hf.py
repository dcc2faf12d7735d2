"""``hf:REPO[@REVISION]`` or ``hf:FOLDER``: transformers' CLIP, SigLIP, ALIGN, DINOv2, ViT and ConvNeXt.

A folder is what ``save_pretrained`` writes: ``config.json``, the weights, ``preprocessor_config.json``, and for models
with a text tower the tokenizer's files. A repository is fetched into the Hugging Face cache first. Code that comes
with a repository is never run, and pickles are read as tensors only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vlbench.core.cards import ModelCard, Preprocess, TextSpec
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.names import unknown
from vlbench.models.backbone import TorchBackbone, count_params
from vlbench.models.hf_inputs import HfTokenizer, MissingTokenizer, hf_preprocess
from vlbench.models.hf_towers import FAMILIES, HfFamily
from vlbench.models.loaders.shared import (
    RANDOM,
    TOKENIZER_PACKAGES,
    hub_offline_without_network,
    quiet_logging,
    seeded,
)
from vlbench.models.tokenizer_files import has_tokenizer, how_to_place, tokenizer_place
from vlbench.models.weights import read_weights

_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+(@[\w./-]+)?")
_DESCRIPTION = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
)
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PICKLE = "pytorch_model.bin"
# Settings that change no feature: names, and what only training or other tasks read.
_NO_TRACE = frozenset(
    {
        *("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "is_encoder_decoder"),
        *("id2label", "label2id", "problem_type", "use_cache", "return_dict", "chunk_size_feed_forward"),
        *("output_attentions", "output_hidden_states", "initializer_range", "initializer_factor"),
        *("logit_scale_init_value", "temperature_init_value", "dropout", "dropout_rate", "drop_path_rate"),
        *("drop_connect_rate", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
        "classifier_dropout",
    }
)


def load(ref: str, *, weights: str | None = None, seed: int = 0, card: ModelCard | None = None) -> TorchBackbone:
    """The model in the folder or repository ``ref``.

    ``weights`` replaces its weights by a file of the same layout, or all of it by a folder. ``random`` needs no more
    than ``config.json``: without ``preprocessor_config.json`` it prepares images as CLIP does, without a tokenizer it
    reads no texts. A reference ``card`` that has the configuration needs no repository for ``random`` at all, and the
    tokenizer is looked for when it is known to be needed.

    Raises:
        UserError: for a package, folder, file or repository that is missing, a model type that is not known here, or
            weights that do not fit.
    """
    _require_transformers()
    where = f"hf:{ref}"
    name = f"hf:{Path(ref).expanduser().resolve().name}" if _is_folder(ref) else where
    if weights == RANDOM and card is not None and card.config is not None:
        return _fresh_of_card(card, seed)
    if weights is not None and weights != RANDOM and _is_folder(weights):
        where, folder, weights = f"hf:{weights}", Path(weights), None
    else:
        folder = _folder(ref, weights, card)
    config, family = _config(folder, where)
    with _quietly():
        if weights == RANDOM:
            model = _fresh(config, family, seed)
        elif weights is not None:
            model = _filled(config, family, read_weights(weights), where=f"{weights} in {where}")
        else:
            model = _filled(config, family, _state(folder, where), where=where)
        preprocess = _preprocess(folder, config, family, random=weights == RANDOM, where=where)
        tokenizer = None
        if family.text is not None and (weights != RANDOM or has_tokenizer(folder)):
            length = family.text.context(config)
            tokenizer = HfTokenizer(folder, context_length=length, trim=family.text.trim, where=where)
    return _backbone(name, config, family, model, preprocess, tokenizer)


def _fresh_of_card(card: ModelCard, seed: int) -> TorchBackbone:
    """A fresh initialisation of what ``card`` says of the repository's configuration."""
    from transformers import AutoConfig

    assert card.config is not None, card.id
    kind = card.config["model_type"]
    config = AutoConfig.for_model(**card.config)
    with _quietly():
        model = _fresh(config, FAMILIES[kind], seed)
        tokenizer = _tokenizer_of_card(card, FAMILIES[kind], config)
    return _backbone(f"hf:{card.arch}", config, FAMILIES[kind], model, card.preprocess, tokenizer)


def _tokenizer_of_card(card: ModelCard, family: HfFamily, config: Any) -> HfTokenizer | MissingTokenizer | None:
    """The tokenizer that was put in its place by hand, else the repository's, else one that says what to fetch."""
    if family.text is None:
        return None
    length, folder = family.text.context(config), tokenizer_place(card.arch)
    if not has_tokenizer(folder):
        source = f"huggingface.co/{card.arch}"
        line = f"{card.id}: its tokenizer is not on this machine and cannot be downloaded"
        line = f"{line}; {how_to_place(source, folder)}"
        try:
            folder = _snapshot(card.arch, None, list(_DESCRIPTION), "")
        except UserError:
            return MissingTokenizer(line, context_length=length)
        if not has_tokenizer(folder):
            return MissingTokenizer(line, context_length=length)
    return HfTokenizer(folder, context_length=length, trim=family.text.trim, where=f"hf:{card.arch}")


def _backbone(
    name: str,
    config: Any,
    family: HfFamily,
    model: Any,
    preprocess: Preprocess,
    tokenizer: HfTokenizer | MissingTokenizer | None,
) -> TorchBackbone:
    tower = family.tower(model, f"{config.model_type}-{fingerprint(_settings(config.to_dict()))[:8]}")
    card = ModelCard(
        id=name,
        loader="hf",
        arch=tower.arch,
        preprocess=preprocess,
        text=TextSpec(tokenizer=tokenizer.name, context_length=tokenizer.context_length) if tokenizer else None,
        provides=tower.parts | ({"text"} if tokenizer else set()),
        feature=tower.feature,
        params=count_params(tower),
    )
    if family.text is None or tokenizer is None:
        return TorchBackbone(card, model, image_fn=tower.features)
    text, pad_id = family.text, tokenizer.pad_id

    def encode(tokens_BL: torch.Tensor) -> torch.Tensor:
        return text.encode(model, tokens_BL, pad_id=pad_id)

    return TorchBackbone(card, model, image_fn=tower.features, text_fn=encode, tokenizer=tokenizer)


def _require_transformers() -> None:
    # Fetched files are hashed in loader processes that fork: the tokenizers library warns about its threads then.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(f"hf: models need the package transformers: pip install {TOKENIZER_PACKAGES}") from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters of them is an error here."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_logging():
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _is_folder(ref: str) -> bool:
    return Path(ref).expanduser().is_dir()


def _folder(ref: str, weights: str | None, card: ModelCard | None) -> Path:
    """The folder itself, or the repository's in the cache after whatever is missing was fetched."""
    if _is_folder(ref):
        return Path(ref).expanduser()
    if not _REPOSITORY.fullmatch(ref) or ref.startswith("."):
        raise UserError(f"hf:{ref}: no such folder, and not a repository's name (hf:facebook/dinov2-base)")
    repository, _, revision = ref.partition("@")
    wanted = [*_DESCRIPTION, *(_SAFETENSORS if weights is None else ())]
    advice = _by_hand(repository, weights, card)
    folder = _snapshot(repository, revision or None, wanted, advice)
    if weights is None and not any(folder.glob("model*.safetensors*")):
        folder = _snapshot(repository, revision or None, [*wanted, _PICKLE], advice)
    return folder


def _snapshot(repository: str, revision: str | None, patterns: list[str], advice: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with hub_offline_without_network():
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=patterns,
                    local_files_only=bool(constants.HF_HUB_OFFLINE),
                )
            )
    except Exception as error:  # the hub raises what it likes
        reason = (" ".join(str(error).split()) or type(error).__name__)[:120]
        if isinstance(error, LocalEntryNotFoundError):
            reason = "huggingface.co cannot be reached, and its cache here has nothing of it"
        raise UserError(f"hf:{repository}: not on this machine and cannot be downloaded ({reason}); {advice}") from None


def _by_hand(repository: str, weights: str | None, card: ModelCard | None) -> str:
    files, then = "config.json, preprocessor_config.json, model.safetensors and the tokenizer's files", ""
    if card is not None:  # --model hf:FOLDER would lose its name, its preprocessing and its published numbers
        if "text" not in card.provides:
            files = "config.json, preprocessor_config.json and model.safetensors"
        random = "; or --weights random for a fresh initialisation" if card.config is not None else ""
        return (
            f"fetch {files} from huggingface.co/{repository} elsewhere into one folder and pass --model {card.id} "
            f"--weights FOLDER{random}"
        )
    if weights == RANDOM:
        files, then = "config.json (and for tasks with texts the tokenizer's files)", " --weights random"
    elif weights is not None:
        files, then = "config.json, preprocessor_config.json and the tokenizer's files", f" --weights {weights}"
    return f"fetch {files} from huggingface.co/{repository} elsewhere into one folder and pass --model hf:FOLDER{then}"


def _config(folder: Path, where: str) -> tuple[Any, HfFamily]:
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{where}: no config.json in {folder}; it belongs to the files of every model on the hub")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not a JSON object") from None
    if kind not in FAMILIES:
        raise UserError(f"{where}: {unknown('model type', str(kind), FAMILIES)} (in its config.json)")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises what it likes
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if part is not None:
            part.dtype = torch.float32  # files in half precision are computed with in full, as everywhere here
    return config, FAMILIES[kind]


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration as far as it decides what the weights compute: heads, activation, eps, pooling, ..."""
    kept = {key: value for key, value in values.items() if key not in _NO_TRACE}
    return {key: _settings(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _class(family: HfFamily) -> Any:
    import transformers

    return getattr(transformers, family.model)


def _fresh(config: Any, family: HfFamily, seed: int) -> Any:
    with seeded(seed):
        return _class(family)(config, **family.options).eval()


def _filled(config: Any, family: HfFamily, state: dict[str, torch.Tensor], *, where: str) -> Any:
    """The model with ``state`` in it. transformers itself renames what older versions of it called otherwise."""
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        model, info = _class(family).from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True, **family.options
        )
    except Exception as error:  # shapes that do not fit, in words of several lines
        raise UserError(f"{where}: does not fit the architecture: {' '.join(str(error).split())[:200]}") from None
    missing = sorted(info["missing_keys"])
    unexpected = sorted(
        name for name in info["unexpected_keys"] if not name.startswith(family.ignore) and "position_ids" not in name
    )
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(info["mismatched_keys"])))
    problems = [f"{len(names)} {word} ({', '.join(map(str, names[:3]))})" for word, names in found if names]
    if problems:
        raise UserError(f"{where}: does not fit the architecture: {'; '.join(problems)}")
    return model.eval()


def _state(folder: Path, where: str) -> dict[str, torch.Tensor]:
    """The weights in a folder: one safetensors file or its shards, else the older pickle, read as tensors only."""
    single, index, pickled = (folder / name for name in ("model.safetensors", _SAFETENSORS[-1], _PICKLE))
    if single.is_file():
        return read_weights(single)
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        state: dict[str, torch.Tensor] = {}
        for name in shards:
            state |= read_weights(folder / Path(name).name)
        return state
    if pickled.is_file():
        return read_weights(pickled)
    raise UserError(
        f"{where}: no weights in {folder}; put model.safetensors there, or pass --weights FILE or --weights random"
    )


def _preprocess(folder: Path, config: Any, family: HfFamily, *, random: bool, where: str) -> Preprocess:
    size = getattr(config, "vision_config", config).image_size
    built_for = (size, size) if isinstance(size, int) else tuple(size)
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        if not random:
            raise UserError(f"{where}: no preprocessor_config.json in {folder}, which says how its images are prepared")
        return Preprocess(image_size=built_for)
    preprocess = hf_preprocess(folder, where=where)
    if not family.any_size and preprocess.image_size != built_for:
        raise UserError(
            f"{where}: preprocessor_config.json gives images of {preprocess.image_size} pixels, "
            f"config.json has a model for {built_for}"
        )
    return preprocess
