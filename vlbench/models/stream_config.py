"""Sizes of the single-stream transformer (``models/single_stream.py``), for settings that must load without torch."""

from __future__ import annotations

from pydantic import Field

from vlbench.core.config import Config


class StreamConfig(Config):
    """Sizes of the transformer. The defaults are BERT-base's."""

    width: int = Field(default=768, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    hidden: int | None = Field(default=None, ge=1, description="width of the feed-forward layers; None: four widths")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="of embeddings, attention and sublayers")
    positions: int = Field(default=512, ge=1, description="rows of the position embedding")
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="of weights at the start: BERT's, which suits its width; a narrow stream wants more",
    )
    modality_embedding: bool = Field(
        default=True,
        description="add a type to regions and tags, as mu-VLA's paper says; its released code adds none",
    )
    sentence_norm: bool = Field(
        default=True, description="BERT's LayerNorm after a sentence's embedding; mu-VLA's released code leaves it out"
    )

    def identity(self) -> str:
        """The architecture in words: heads and options leave no trace in the weights."""
        options = f"{' types' if self.modality_embedding else ''}{' norm' if self.sentence_norm else ''}"
        return f"stream(w{self.width} l{self.layers} h{self.heads}{options})"
