"""A single-stream transformer over words and image regions, with the heads that mu-VLA trains.

One post-norm BERT encoder (Devlin et al., 1810.04805) reads the words first, then the regions, and every token attends
to every other. A sentence's word is a word, a position and a type; a region is ``LN(W_v f) + LN(W_b box)``; a tag's
word is ``LN(word) + LN(W_b box)`` with the box of its region in place of a position, so that the model is told which
region a tag names. Tags and regions share ``W_b`` and its norm (mu-VLA, 2203.00242).

Only what the chosen objectives read is built: a parameter without a gradient stops distributed training.

Shapes: B batch, L words, R regions, N = L + R tokens of the stream, D width, F width of a region's feature, P of the
whole image's, V vocabulary, M places that a head reads. A box is ``[x1/W, y1/H, x2/W, y2/H, area/(W H)]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vlbench.core.errors import UserError
from vlbench.models.stream_config import StreamConfig as StreamConfig

_TEXT, _REGION = 0, 1  # rows of the type embedding
IGNORED = -100
"""The label of a place that no head reads."""
_EPS = 1e-12  # BERT's


class Regions(NamedTuple):
    """The image side of a batch."""

    features_BRF: torch.Tensor
    box_BR5: torch.Tensor
    valid_BR: torch.Tensor
    """False where a row is padding."""
    image_BP: torch.Tensor | None = None
    """The feature of the whole image, which becomes one more token; None where there is none."""


class SingleStream(nn.Module):
    """Embeddings and encoder.

    Args:
        config: sizes.
        words: V, the vocabulary's size. Word 0 is padding.
        feature_width: F.
        image_width: P, where the whole image is a token of its own.
        sentences: whether sentences are read.
        tags: whether tags are read.
    """

    def __init__(
        self,
        config: StreamConfig,
        *,
        words: int,
        feature_width: int,
        image_width: int | None = None,
        sentences: bool = True,
        tags: bool = True,
    ) -> None:
        super().__init__()
        if config.width % config.heads:
            raise UserError(f"stream: a width of {config.width} cannot be shared by {config.heads} heads")
        self.config = config
        width = config.width
        self.word = nn.Embedding(words, width, padding_idx=0)
        self.position = nn.Embedding(config.positions, width) if sentences else None
        self.kind = nn.Embedding(2, width) if sentences or config.modality_embedding else None
        self.sentence_norm = nn.LayerNorm(width, _EPS) if sentences and config.sentence_norm else None
        self.tag_norm = nn.LayerNorm(width, _EPS) if tags else None
        self.region = nn.Linear(feature_width, width)
        self.region_norm = nn.LayerNorm(width, _EPS)
        self.box = nn.Linear(5, width)
        self.box_norm = nn.LayerNorm(width, _EPS)
        self.image = nn.Linear(image_width, width) if image_width is not None else None
        self.image_norm = nn.LayerNorm(width, _EPS) if image_width is not None else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        initialise(self, config.init_std)

    def embed_sentence(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """``text_BLD``: word + position + type, normalised as BERT does unless the config says otherwise."""
        assert self.position is not None, "built without sentences"
        assert self.kind is not None, "built without sentences"
        length = tokens_BL.shape[1]
        assert length <= self.config.positions, f"{length} words, {self.config.positions} positions"
        text_BLD = self.word(tokens_BL) + self.position.weight[:length] + self.kind.weight[_TEXT]
        return self.dropout(text_BLD if self.sentence_norm is None else self.sentence_norm(text_BLD))

    def embed_tags(self, tokens_BL: torch.Tensor, box_BL5: torch.Tensor) -> torch.Tensor:
        """``text_BLD`` of tags: each word has the box of its region, and no position."""
        assert self.tag_norm is not None, "built without tags"
        return self.dropout(self._typed(self.tag_norm(self.word(tokens_BL)) + self._boxes(box_BL5), _TEXT))

    def embed_regions(self, regions: Regions, zeroed_BR: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """``region_BRD`` and ``valid_BR`` of the regions; the whole image, where it is a token, comes last.

        Args:
            regions: the image side.
            zeroed_BR: regions whose feature is replaced by zeros; their boxes stay.
        """
        features_BRF = regions.features_BRF
        if zeroed_BR is not None:
            features_BRF = features_BRF.masked_fill(zeroed_BR[..., None], 0.0)
        tokens_BRD = self.region_norm(self.region(features_BRF)) + self._boxes(regions.box_BR5)
        valid_BR = regions.valid_BR
        if self.image is not None and self.image_norm is not None:
            assert regions.image_BP is not None, "built with a token for the whole image"
            box_B15 = regions.box_BR5.new_tensor([0.0, 0.0, 1.0, 1.0, 1.0]).expand(len(valid_BR), 1, 5)
            image_B1D = self.image_norm(self.image(regions.image_BP))[:, None] + self._boxes(box_B15)
            tokens_BRD = torch.cat([tokens_BRD, image_B1D], dim=1)
            valid_BR = F.pad(valid_BR, (0, 1), value=True)
        return self.dropout(self._typed(tokens_BRD, _REGION)), valid_BR

    def forward(
        self, text_BLD: torch.Tensor, text_valid_BL: torch.Tensor, region_BRD: torch.Tensor, valid_BR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden_BLD`` of the words and ``hidden_BRD`` of the regions. Padding is attended to by nobody."""
        x_BND = torch.cat([text_BLD, region_BRD], dim=1)
        valid_BN = torch.cat([text_valid_BL, valid_BR], dim=1)
        # A row of padding alone would be a softmax over nothing.
        attend_B11N = (valid_BN | ~valid_BN.any(1, keepdim=True))[:, None, None]
        for layer in self.layers:
            x_BND = layer(x_BND, attend_B11N)
        return x_BND[:, : text_BLD.shape[1]], x_BND[:, text_BLD.shape[1] :]

    def _boxes(self, box_BR5: torch.Tensor) -> torch.Tensor:
        return self.box_norm(self.box(box_BR5))

    def _typed(self, tokens_BND: torch.Tensor, row: int) -> torch.Tensor:
        if not self.config.modality_embedding:
            return tokens_BND
        assert self.kind is not None, "built with types"
        return tokens_BND + self.kind.weight[row]


class _Layer(nn.Module):
    """BERT's layer: attention and feed-forward, each followed by dropout, the sum and LayerNorm."""

    def __init__(self, config: StreamConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden or 4 * config.width
        self.heads, self.p = config.heads, config.dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, _EPS)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_norm = nn.LayerNorm(width, _EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BND: torch.Tensor, attend_B11N: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part(x_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        p = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attend_B11N, dropout_p=p)
        x_BND = self.norm(x_BND + self.dropout(self.output(mixed.transpose(1, 2).flatten(2))))
        return self.ffn_norm(x_BND + self.dropout(self.down(F.gelu(self.up(x_BND)))))


class Transform(nn.Module):
    """BERT's head transform: dense, GELU, LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, _EPS)

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return self.norm(F.gelu(self.dense(hidden_MD)))


class Heads(nn.Module):
    """What is predicted from the stream's output. Every head but the words' is left out where it is not asked for.

    Args:
        width: D.
        words: V.
        tags: classes of regions (MRC).
        feature_width: width of the feature that is regressed (MRFR).
        match: whether image and sentence are matched (ITM).
        init_std: of weights at the start.
    """

    def __init__(
        self,
        width: int,
        *,
        words: int,
        tags: int | None = None,
        feature_width: int | None = None,
        match: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.word_transform = Transform(width)
        self.word_bias = nn.Parameter(torch.zeros(words))
        self.tag = nn.Sequential(Transform(width), nn.Linear(width, tags)) if tags is not None else None
        self.feature = (
            nn.Sequential(Transform(width), nn.Linear(width, feature_width)) if feature_width is not None else None
        )
        self.pooler = nn.Linear(width, width) if match else None
        self.matches = nn.Linear(width, 2) if match else None
        initialise(self, init_std)

    def words(self, hidden_MD: torch.Tensor, word_VD: torch.Tensor) -> torch.Tensor:
        """``logits_MV``, by the word embeddings themselves and a bias (BERT's tied head)."""
        return F.linear(self.word_transform(hidden_MD), word_VD, self.word_bias)

    def match(self, first_BD: torch.Tensor) -> torch.Tensor:
        """``logits_B2`` of the output at [CLS]; column 1 is "they match"."""
        assert self.pooler is not None, "built without the matching head"
        assert self.matches is not None, "built without the matching head"
        return self.matches(torch.tanh(self.pooler(first_BD)))


def initialise(whole: nn.Module, std: float) -> None:
    """As BERT: N(0, std), biases zero, the padding word zero."""
    for module in whole.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def bert_weights(published: Mapping[str, torch.Tensor], *, layers: int) -> dict[str, dict[str, torch.Tensor]]:
    """BERT's published weights under the names that they have here, for ``SingleStream`` and for ``Heads``.

    Both spellings of LayerNorm (``gamma``, ``weight``) and names with or without ``bert.`` before them are known. The
    tags' norm begins as the sentence's.

    Raises:
        UserError: naming the first weight that is not there.
    """
    found = {
        name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias"): tensor
        for name, tensor in published.items()
    }
    names = {"stream": _stream_names(layers), "heads": _HEAD_NAMES}
    missing = [there for there in names["stream"].values() if there not in found]
    if missing:
        raise UserError(f"BERT's weights lack {missing[0]!r} (and {len(missing) - 1} more): is this a BERT encoder?")
    # An encoder published alone has no head for masked words: the head then starts anew.
    return {
        part: {here: found[there] for here, there in table.items() if there in found} for part, table in names.items()
    }


def _stream_names(layers: int) -> dict[str, str]:
    names = {
        "word.weight": "embeddings.word_embeddings.weight",
        "position.weight": "embeddings.position_embeddings.weight",
        "kind.weight": "embeddings.token_type_embeddings.weight",
    }
    for kind in ("weight", "bias"):
        names |= {f"{norm}.{kind}": f"embeddings.LayerNorm.{kind}" for norm in ("sentence_norm", "tag_norm")}
        for i in range(layers):
            names |= {
                f"layers.{i}.{here}.{kind}": f"encoder.layer.{i}.{there}.{kind}" for here, there in _LAYER_NAMES.items()
            }
    return names


_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_HEAD_NAMES = {
    "word_transform.dense.weight": "cls.predictions.transform.dense.weight",
    "word_transform.dense.bias": "cls.predictions.transform.dense.bias",
    "word_transform.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "word_transform.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "word_bias": "cls.predictions.bias",
    "pooler.weight": "pooler.dense.weight",
    "pooler.bias": "pooler.dense.bias",
}
