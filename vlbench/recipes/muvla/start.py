"""Starting from BERT: mu-VLA's transformer and its head for masked words are initialised from bert-base-uncased."""

from __future__ import annotations

from pathlib import Path

from vlbench.models import stream_start
from vlbench.recipes.muvla.model import RegionTextModel


def load_bert(model: RegionTextModel, folder: Path) -> None:
    """Copy BERT's weights into the stream and the heads; what BERT does not have stays as it is.

    Raises:
        UserError: where the folder holds no weights, or they are of other sizes.
    """
    stream_start.load_bert(model.text_stream, model.text_heads, folder)
