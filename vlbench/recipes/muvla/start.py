"""Starting from BERT: mu-VLA's transformer and its head for masked words are initialised from bert-base-uncased."""

from __future__ import annotations

from pathlib import Path

import torch

from vlbench.core.errors import UserError
from vlbench.models.single_stream import bert_weights
from vlbench.models.weights import read_weights
from vlbench.recipes.muvla.model import RegionTextModel

_FILES = ("model.safetensors", "pytorch_model.bin")


def load_bert(model: RegionTextModel, folder: Path) -> None:
    """Copy BERT's weights into the stream and the heads; what BERT does not have stays as it is.

    Raises:
        UserError: where the folder holds no weights, or they are of other sizes.
    """
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"bert {folder}: neither {' nor '.join(_FILES)} is there")
    found = bert_weights(read_weights(file), layers=len(model.text_stream.layers))
    for part, module in (("stream", model.text_stream), ("heads", model.text_heads)):
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
