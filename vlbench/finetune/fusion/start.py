"""What a fusion model begins with: a vocabulary, and weights of mu-VLA's or BERT's transformer where they are given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlbench.core.errors import UserError
from vlbench.data.wordpiece import WordPieceTokenizer, read_wordpiece, train_wordpiece
from vlbench.finetune.fusion.model import FusionModel
from vlbench.models.single_stream import SingleStream
from vlbench.models.stream_start import bert_vocabulary, load_bert
from vlbench.models.weights import checkpoint_assets, read_checkpoint

_SIZES = ("width", "layers", "heads", "hidden", "modality_embedding", "sentence_norm")
"""What must agree for a stream's weights to mean the same; the number of heads leaves no trace in them."""


def vocabulary_of(config: Any, texts: Sequence[str]) -> bytes:
    """The vocabulary of ``init`` or ``bert``, or one learnt from the texts, in lower case.

    Raises:
        UserError: where the folder or checkpoint has none, or there is not a word in the texts.
    """
    if config.init is not None:
        return _words_of(_checkpoint(config.init), config.init)
    if config.bert is not None:
        return read_wordpiece(bert_vocabulary(config.bert))
    return train_wordpiece(texts, config.words)


def check_start(config: Any) -> None:
    """Look whether a model of these settings can begin with ``init`` or ``bert``, without having one.

    Raises:
        UserError: as ``vocabulary_of`` and ``start_from``.
    """
    if config.init is not None:
        checkpoint = _checkpoint(config.init)
        _words_of(checkpoint, config.init)
        _check_sizes(config, checkpoint)
        return
    words = vocabulary_of(config, ())
    folder = Path(config.bert).expanduser()
    _check_heads(config, folder)
    # Neither the image side nor the head has a part in what is taken of BERT: any width does.
    with torch.random.fork_rng(devices=()):
        size = WordPieceTokenizer(words, context_length=config.max_words).size
        stream = SingleStream(config.stream, words=size, feature_width=1, tags=False)
    load_bert(stream, torch.nn.ModuleDict(), folder)


def start_from(model: FusionModel, config: Any) -> list[str]:
    """Copy the weights of ``init`` or ``bert`` into a fresh model. Returns in words what was taken and what was not.

    Raises:
        UserError: where sizes differ in a way that leaves nothing to take.
    """
    if config.bert is not None:
        heads = torch.nn.ModuleDict({"pooler": model.pooler} if model.pooler is not None else {})
        load_bert(model.stream, heads, Path(config.bert).expanduser())
        return [f"stream and vocabulary begin as BERT's ({config.bert}); what reads the image and the head begin anew"]
    if config.init is None:
        return []
    checkpoint = _checkpoint(config.init)
    _check_sizes(config, checkpoint)
    source = {
        name.replace("text_stream.", "stream.", 1).replace("text_heads.pooler.", "pooler.", 1): tensor
        for name, tensor in checkpoint["model"].items()
        if name.startswith(("text_stream.", "text_heads.pooler."))
    }
    theirs = _features_of(checkpoint)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("stream.", "pooler."))}
    taken, left = {}, []
    for name, tensor in own.items():
        other = source.get(name)
        if other is None or not _same_meaning(name, config, theirs):
            left.append(name)
        elif name == "stream.position.weight" and len(other) != len(tensor):
            rows = min(len(other), len(tensor))
            taken[name] = torch.cat([other[:rows], tensor[rows:]])
        elif other.shape == tensor.shape:
            taken[name] = other
        else:
            left.append(name)
    with torch.no_grad():
        model.load_state_dict(taken, strict=False)
    said = f"stream and vocabulary begin as those of {config.init}"
    parts = sorted({name.removeprefix("stream.").partition(".")[0] for name in left})
    return [said + (f"; begun anew, since it has none that fit: {', '.join(parts)}, the head" if parts else "")]


def _same_meaning(name: str, config: Any, theirs: str) -> bool:
    """Whether what the projections of features read there is what they read here."""
    if not name.startswith(("stream.region.", "stream.region_norm.", "stream.image.", "stream.image_norm.")):
        return True
    ours = "fixed" if config.features is not None else "maps"
    return ours == theirs and not config.scale_features


def _features_of(checkpoint: Mapping[str, Any]) -> str:
    return "fixed" if checkpoint["config"].get("features") is not None else "maps"


def _check_sizes(config: Any, checkpoint: Mapping[str, Any]) -> None:
    theirs, ours = checkpoint["config"]["stream"], config.stream.model_dump()
    wrong = [key for key in _SIZES if theirs.get(key, ours[key]) != ours[key]]
    if wrong:
        settings = " ".join(f"stream.{key}={json.dumps(theirs[key])}" for key in wrong)
        raise UserError(f"init {config.init}: its stream has other sizes; set {settings}")


def _check_heads(config: Any, folder: Path) -> None:
    """The weights do not tell the number of heads; the configuration that lies beside them as a rule does."""
    file = folder / "config.json"
    try:
        heads = json.loads(file.read_text(encoding="utf-8")).get("num_attention_heads")
    except (OSError, ValueError, AttributeError):
        return
    if heads is not None and heads != config.stream.heads:
        raise UserError(f"bert {folder}: its config.json says {heads} attention heads; set stream.heads={heads}")


def _checkpoint(init: str) -> dict[str, Any]:
    path = Path(init).expanduser()
    checkpoint = read_checkpoint(path / "ckpt.pt" if path.is_dir() else path)
    if checkpoint["recipe"] != "muvla":
        raise UserError(f"init {init}: a checkpoint of {checkpoint['recipe']}; only mu-VLA trains a stream over words")
    return checkpoint


def _words_of(checkpoint: Mapping[str, Any], init: str) -> bytes:
    words = checkpoint_assets(checkpoint).get("words")
    if words is None:
        raise UserError(f"init {init}: the checkpoint has no vocabulary")
    return words
