"""``open_clip:CONFIG[.TAG]``: contrastive models of open_clip, image and text tower.

``open_clip:local-dir:DIR`` and ``open_clip:hf-hub:OWNER/NAME`` take a configuration of its own with its weights, as
open_clip writes them: ``open_clip_config.json`` beside ``open_clip_model.safetensors``, or in older repositories beside
``open_clip_pytorch_model.bin``.

The tag decides more than the file: activation (OpenAI's weights and others need QuickGELU) and preprocessing differ
between tags of one configuration, and the wrong ones cost accuracy without an error. So they follow the tag, with
``--weights FILE`` too.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from vlbench.core.cards import ModelCard, Preprocess, TextSpec
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Features
from vlbench.models.backbone import TorchBackbone, count_params
from vlbench.models.loaders.shared import (
    RANDOM,
    cannot_fetch,
    check_tag,
    hub_offline_without_network,
    quiet_logging,
    seeded,
)
from vlbench.models.open_clip_import import import_open_clip
from vlbench.models.text import Tokenizer, causal_text_embedding
from vlbench.models.tokenizer_files import has_tokenizer, tokenizer_digest, tokenizer_place
from vlbench.models.towers import ClipOtherTower, ClipResNetTower, ClipTimmTower, ClipViTTower, VisualTower
from vlbench.models.vision import open_clip_config
from vlbench.models.weights import load_strictly, read_weights

_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
# What OpenAI's own files hold besides weights: three settings of the model, as tensors.
_OPENAI_MARKS = frozenset({"input_resolution", "context_length", "vocab_size"})
_CONFIG_FILE = "open_clip_config.json"
_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def load(ref: str, *, weights: str | None = None, seed: int = 0) -> TorchBackbone:
    """The model ``ref``. Without ``weights`` it must name a tag, unless the configuration has exactly one.

    Raises:
        UserError: for an unknown configuration or tag, weights that cannot be fetched, a file that does not fit or
            that needs another activation.
    """
    open_clip = import_open_clip()
    kind, _, place = ref.partition(":")
    if kind in ("local-dir", "hf-hub") and place:
        folder = _hub_folder(place, weights) if kind == "hf-hub" else Path(place).expanduser()
        return _from_folder(folder, weights, seed, repository=place if kind == "hf-hub" else None)
    name, _, tag = ref.partition(".")
    config = open_clip_config(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag:
        check_tag(f"open_clip:{name}", tag, tags)
    elif weights is None:
        tag = _only_tag(name, tags)
    tagged = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    quick_gelu = bool(tagged.get("quick_gelu", False) if tag else config.get("quick_gelu", False))
    state = read_weights(weights) if weights not in (None, RANDOM) else None
    like = tag
    if state is not None:
        recognised = _check_activation(name, Path(str(weights)), state, quick_gelu=quick_gelu)
        like = tag or (recognised if recognised in tags else "")
    preprocessing = _agreed_preprocessing(name, [like] if like else tags, needed=state is not None)
    model = _model(name, tag if weights is None else None, quick_gelu=quick_gelu, seed=seed)
    if state is not None:
        load_strictly(model, _adapted(model, state), where=f"{weights} in open_clip:{name}")
    return _backbone(model, name, tag, config, quick_gelu=quick_gelu, preprocessing=preprocessing)


def _from_folder(folder: Path, weights: str | None, seed: int, *, repository: str | None) -> TorchBackbone:
    """A model whose configuration lies beside its weights. ``weights`` come before the folder's own.

    The folder of a ``repository`` is named after a commit and lies in a cache: neither is a name for the model.
    """
    place = f"local-dir:{folder}"
    called = f"hf-hub:{repository}" if repository else place
    try:
        whole = json.loads((folder / _CONFIG_FILE).read_text("utf-8"))
        config, preprocessing = whole["model_cfg"], whole.get("preprocess_cfg") or {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"open_clip:{called}: cannot read its {_CONFIG_FILE} ({reason})") from None
    file = weights or next((str(folder / name) for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        holder = f"its copy {folder}" if repository else "it"
        names = ", ".join(_WEIGHT_FILES)
        raise UserError(f"open_clip:{called}: {holder} has none of {names}; pass --weights FILE or random")
    quick_gelu = bool(config.get("quick_gelu", False))
    # The configuration alone is the architecture's name: a folder that is renamed or moved holds the same model.
    name = f"open_clip-{fingerprint(config)[:8]}"
    model = _model(place, None, quick_gelu=quick_gelu, seed=seed)
    if file != RANDOM:
        load_strictly(model, _adapted(model, read_weights(file)), where=f"{file} in {folder / _CONFIG_FILE}")
    known = {key: preprocessing[key] for key in _PREPROCESSING if preprocessing.get(key) is not None}
    backbone = _backbone(model, name, "", config, quick_gelu=quick_gelu, preprocessing=known, folder=folder)
    displayed = f"open_clip:{called}" if repository else f"open_clip:{folder.resolve().name}-{fingerprint(config)[:8]}"
    backbone.card = backbone.card.model_copy(update={"id": displayed})
    return backbone


def _hub_folder(repository: str, weights: str | None) -> Path:
    """The repository's snapshot: its description, and its own weights unless ``weights`` come in their place.

    Repositories hold the same weights under several names, so one name after another is asked for, until one is there.
    """
    description = ["*.json", "*.txt", "*.model"]
    if weights is not None:
        return _snapshot(repository, description)
    for name in _WEIGHT_FILES:
        folder = _snapshot(repository, [*description, name])
        if (folder / name).is_file():
            break
    return folder


def _snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with hub_offline_without_network():
            return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub and requests raise what they like
        source = f"{_CONFIG_FILE} and {_WEIGHT_FILES[0]} (or {_WEIGHT_FILES[-1]}) from huggingface.co/{repository}"
        advice = f"{source} elsewhere, then --model open_clip:local-dir:FOLDER"
        raise UserError(
            f"open_clip:hf-hub:{repository}: not on this machine and cannot be downloaded "
            f"({' '.join(str(error).split())[:120]}); fetch {advice}"
        ) from None


def _only_tag(name: str, tags: list[str]) -> str:
    if len(tags) == 1:
        return tags[0]
    if not tags:
        check_tag(f"open_clip:{name}", "", tags)
    shown = ", ".join(f"open_clip:{name}.{tag}" for tag in tags[:4]) + (", …" if len(tags) > 4 else "")
    raise UserError(f"open_clip:{name}: say which weights: {shown}; or pass --weights FILE or --weights random")


def _check_activation(name: str, path: Path, state: dict[str, torch.Tensor], *, quick_gelu: bool) -> str:
    """Weights trained with one activation run with the other without an error, some points worse: name it.

    Returns:
        The tag of the published weights that the file is recognised as, by its name or its marks; else "".
    """
    import open_clip

    base = name.removesuffix("-quickgelu")
    published = {}
    for tag in open_clip.list_pretrained_tags_by_model(base):
        config = open_clip.get_pretrained_cfg(base, tag)
        if config.get("url"):
            published[PurePosixPath(config["url"]).name] = (tag, bool(config.get("quick_gelu", False)))
    tag, wants = published.get(path.name, ("openai", True) if state.keys() >= _OPENAI_MARKS else ("", quick_gelu))
    if wants != quick_gelu:
        uses = {True: "QuickGELU", False: "GELU"}
        raise UserError(
            f"{path}: these weights ({tag}) were trained with {uses[wants]}, and open_clip:{name} has "
            f"{uses[quick_gelu]}; ask for open_clip:{base}.{tag}"
        )
    marked = any(mark in path.name.lower() for mark in ("quickgelu", "quick_gelu", "openai"))
    if marked and not quick_gelu:
        warnings.warn(
            f"{path.name} sounds like weights trained with QuickGELU, and open_clip:{name} has GELU; "
            f"if so, ask for open_clip:{base}-quickgelu or name the tag",
            stacklevel=3,
        )
    return tag


def _agreed_preprocessing(name: str, tags: list[str], *, needed: bool) -> dict[str, Any]:
    """The preprocessing of these tags. Where they differ and weights depend on it, the user must name one."""
    import open_clip

    found = []
    for tag in tags:
        config = open_clip.get_pretrained_cfg(name, tag)
        wanted = {key: config[key] for key in _PREPROCESSING if config.get(key) is not None}
        if wanted not in found:
            found.append(wanted)
    if len(found) > 1 and needed:
        raise UserError(
            f"open_clip:{name}: its weights differ in how images are prepared; name the tag that yours follow: "
            + ", ".join(f"open_clip:{name}.{tag}" for tag in tags[:4])
        )
    return found[0] if found else {}


def _model(name: str, tag: str | None, *, quick_gelu: bool, seed: int) -> Any:
    import open_clip

    with seeded(seed), quiet_logging(), hub_offline_without_network(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # the activation follows the tag here
        try:
            return open_clip.create_model(
                name,
                pretrained=tag,
                load_weights=tag is not None,
                force_quick_gelu=quick_gelu,
                pretrained_text=False,
                precision="fp32",
            ).eval()
        except Exception as error:  # the hub and transformers raise what they like
            if tag is None:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"open_clip:{name} cannot be built here: {reason}") from None
            config = open_clip.get_pretrained_cfg(name, tag)
            repository = str(config.get("hf_hub", "")).strip("/")
            hub = [f"open_clip_model.safetensors from huggingface.co/{repository}"] if repository else []
            source = " or ".join([*hub, *filter(None, [config.get("url")])])
            raise cannot_fetch(f"open_clip:{name}.{tag}", source, error) from None


def _adapted(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Older layouts of open_clip's own files in today's names."""
    from open_clip.model import convert_to_custom_text_state_dict

    state = {key: value for key, value in state.items() if key not in _OPENAI_MARKS and "position_ids" not in key}
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
    return state


def _backbone(
    model: Any,
    name: str,
    tag: str,
    config: dict[str, Any],
    *,
    quick_gelu: bool,
    preprocessing: dict[str, Any],
    folder: Path | None = None,
) -> TorchBackbone:
    """``folder``: of a model that is not among open_clip's own; its tokenizer lies there too."""
    size = model.visual.image_size
    text, place = _text_spec(name, config, folder)
    tower = _tower(model.visual, name, int(config["embed_dim"]))
    model.visual = tower
    # The activation leaves no trace in the weights, so the architecture's name has to carry it.
    architecture = name if name.endswith("-quickgelu") or not quick_gelu else f"{name}-quickgelu"
    card = ModelCard(
        id=f"open_clip:{name}.{tag}" if tag else f"open_clip:{name}",
        loader="open_clip",
        arch=architecture,
        weights=tag or None,
        preprocess=_preprocess(name, size, preprocessing),
        text=text,
        provides=tower.parts | {"embed", "text"},
        feature=tower.feature,
        params=count_params(tower),
    )
    causal = _causal_text(model)
    read = Tokenizer(text, trim=causal is not None, place=place)

    def image_fn(images_BCHW: torch.Tensor, *, dense: bool = False) -> Features:
        return tower.features(images_BCHW, dense=dense)

    def text_fn(tokens_BL: torch.Tensor) -> torch.Tensor:
        if causal is not None:
            return causal_text_embedding(causal, tokens_BL)
        return model.encode_text(tokens_BL, normalize=False)  # CoCa normalises unless told not to

    return TorchBackbone(card, model, image_fn=image_fn, text_fn=text_fn, tokenizer=read)


def _tower(visual: Any, name: str, embed_dim: int) -> VisualTower:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return ClipResNetTower(visual, name)
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        return ClipViTTower(visual, name)
    if isinstance(visual, TimmModel):
        return ClipTimmTower(visual, name, embed_dim=embed_dim)
    return ClipOtherTower(visual, name, embed_dim=embed_dim)


def _causal_text(model: Any) -> Any | None:
    """The module whose text tower is causal and read at the end of text, so that padding may be cut; else None."""
    from open_clip.transformer import TextTransformer

    text = getattr(model, "text", model)
    if text is not model and not isinstance(text, TextTransformer):
        return None
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    plain = getattr(text, "cls_emb", None) is None and not getattr(text, "output_tokens", False)
    return text if pool == "argmax" and getattr(text, "attn_mask", None) is not None and plain else None


def _text_spec(name: str, config: dict[str, Any], folder: Path | None) -> tuple[TextSpec, str | None]:
    """What the text tower reads, and where open_clip finds that tokenizer, where its name does not say so.

    A tokenizer whose files are here is named after them. One of open_clip's own models has the hub's, named after the
    model, unless one was put in its place by hand.
    """
    text = config["text_cfg"]
    length, repository = text.get("context_length", 77), text.get("hf_tokenizer_name")
    if not (repository or text.get("tokenizer_kwargs") or (folder is None and "siglip" in name.lower())):
        return TextSpec(tokenizer="open_clip", context_length=length), None
    place = name if folder is None else f"local-dir:{folder}"
    if folder is None and repository and has_tokenizer(tokenizer_place(repository)):
        folder = tokenizer_place(repository)
    if folder is None:
        return TextSpec(tokenizer=f"open_clip:{name}", context_length=length), None
    settings = fingerprint({key: text.get(key) for key in ("tokenizer_kwargs", "tokenizer_mode")})
    named = f"open_clip:tokenizer-{tokenizer_digest(folder, settings=settings)}"
    return TextSpec(tokenizer=named, context_length=length), place


def _preprocess(name: str, size: int | tuple[int, int], preprocessing: dict[str, Any]) -> Preprocess:
    mode = preprocessing.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise UserError(f"open_clip:{name}: the resize mode {mode!r} is not supported")
    settings = {key: preprocessing[key] for key in ("mean", "std", "interpolation") if key in preprocessing}
    return Preprocess(image_size=size, resize=mode, **settings)
