"""Starting a single-stream transformer from BERT: weights and vocabulary in a folder of its published files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.single_stream import SingleStream, bert_weights
from vlbench.models.weights import read_weights

_FILES = ("model.safetensors", "pytorch_model.bin")
_VOCABULARIES = ("tokenizer.json", "vocab.txt")


def load_bert(stream: SingleStream, heads: nn.Module, folder: Path) -> None:
    """Copy BERT's weights into the stream and the heads; what BERT does not have stays as it is.

    Args:
        stream: the transformer.
        heads: a module whose parameters are named as those of ``single_stream.Heads``, or some of them.
        folder: BERT's files.

    Raises:
        UserError: where the folder holds no weights, or they are of other sizes.
    """
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"bert {folder}: neither {' nor '.join(_FILES)} is there")
    found = bert_weights(read_weights(file), layers=len(stream.layers))
    for part, module in (("stream", stream), ("heads", heads)):
        own = module.state_dict()
        fitting = {name: tensor for name, tensor in found[part].items() if name in own}
        for name, tensor in fitting.items():
            if own[name].shape != tensor.shape:
                raise UserError(
                    f"{file}: {name} is {tuple(tensor.shape)} there and {tuple(own[name].shape)} here; set stream's "
                    "sizes, or the vocabulary, to BERT's"
                )
        with torch.no_grad():
            module.load_state_dict(fitting, strict=False)


def bert_vocabulary(folder: str | Path) -> Path:
    """The file of BERT's vocabulary.

    Raises:
        UserError: where there is none.
    """
    folder = Path(folder).expanduser()
    for name in _VOCABULARIES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"bert {folder}: no folder with a vocab.txt or tokenizer.json; give --set bert=FOLDER")
