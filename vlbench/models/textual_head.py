"""VirTex's textual head: a transformer that reads an image grid and predicts caption tokens, in one direction or two.

VirTex, section 3 (Desai & Johnson, CVPR 2021, 2006.06666); details as kdexd/virtex, virtex/modules. The two directions
share the visual projection, the embeddings and the output layer, whose weight is the word embedding; their transformer
blocks are their own. Nothing inside a decoder looks both ways.

Shapes: B batch, N grid cells, D width of a cell, L tokens, H width of the head, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from vlbench.core.errors import UserError

_NAME = re.compile(r"L(\d+)_H(\d+)(?:_A(\d+))?(?:_F(\d+))?")
_HEAD_WIDTH = 64
_EMBEDDING_EPS = 1e-8


@dataclass(frozen=True)
class HeadSize:
    """How large a textual head is."""

    layers: int
    width: int
    """H."""
    heads: int
    feedforward: int

    @staticmethod
    def parse(name: str) -> HeadSize:
        """``L1_H2048`` or ``L1_H2048_A32_F8192``: layers, width, attention heads (width/64), feed-forward (4 widths).

        Raises:
            UserError: for another form, or a width that the heads cannot share.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise UserError(f"textual head {name!r}: write it as L<layers>_H<width>, for instance L1_H2048")
        layers, width = int(found[1]), int(found[2])
        heads = int(found[3]) if found[3] else max(1, width // _HEAD_WIDTH)
        size = HeadSize(layers, width, heads, int(found[4]) if found[4] else 4 * width)
        if min(layers, width, heads, size.feedforward) < 1 or width % heads:
            raise UserError(f"textual head {name!r}: a width of {width} cannot be shared by {heads} attention heads")
        return size

    def identity(self) -> str:
        """The whole name: heads leave no trace in the weights."""
        return f"L{self.layers}_H{self.width}_A{self.heads}_F{self.feedforward}"


class CaptionEmbedding(nn.Module):
    """Word plus learned position, LayerNorm, dropout; zero where the token is padding."""

    def __init__(self, vocabulary: int, width: int, *, max_length: int, dropout: float, pad: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=pad)
        self.positions = nn.Embedding(max_length, width)
        self.layer_norm = nn.LayerNorm(width, eps=_EMBEDDING_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """``(B, L, H)``."""
        length = tokens_BL.shape[1]
        assert length <= self.positions.num_embeddings, f"{length} tokens, {self.positions.num_embeddings} positions"
        x_BLH = self.words(tokens_BL) + self.positions.weight[:length]
        kept_BL1 = (tokens_BL != self.words.padding_idx).unsqueeze(-1)
        return self.dropout(self.layer_norm(x_BLH)) * kept_BL1


class Decoder(nn.Module):
    """Post-norm transformer blocks: self-attention, attention to the grid, a feed-forward layer with GELU.

    Args:
        size: how large.
        dropout: after every part and on attention weights.
        causal: a token sees itself and what stands before it; else all tokens of its caption (masked LM).
    """

    def __init__(self, size: HeadSize, *, dropout: float, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                size.width, size.heads, size.feedforward, dropout, activation="gelu", batch_first=True, norm_first=False
            )
            for _ in range(size.layers)
        )

    def forward(self, x_BLH: torch.Tensor, grid_BNH: torch.Tensor, is_pad_BL: torch.Tensor) -> torch.Tensor:
        """``(B, L, H)``."""
        length = x_BLH.shape[1]
        # Both masks are boolean (true: not seen): torch warns of a mixture with a float one.
        hidden_LL = torch.ones(length, length, dtype=torch.bool, device=x_BLH.device).triu(1) if self.causal else None
        for layer in self.layers:
            x_BLH = layer(
                x_BLH, grid_BNH, tgt_mask=hidden_LL, tgt_key_padding_mask=is_pad_BL, tgt_is_causal=self.causal
            )
        return x_BLH


class TextualHead(nn.Module):
    """From a grid of image cells and tokens to the logits of tokens.

    No position is added to the cells: a convolutional grid knows its places by its borders. Weights of linear layers,
    attention and embeddings start from N(0, std), the padding row at zero; biases of linear layers keep torch's
    uniform start, as they do in VirTex's released code.

    Args:
        size: how large.
        visual_width: D.
        vocabulary: V.
        max_length: longest sequence, start and end included.
        dropout: see Decoder.
        pad: the padding token's id.
        causal: see Decoder.
        backward: whether there is a second decoder, for the reversed sequence.
        std: of the initial weights. At VirTex's 0.02 a layer of width 2048 keeps the size of what passes through it; a
            narrow head wants more (0.9 over the root of its width), or the image is hardly heard at the start.
    """

    def __init__(
        self,
        size: HeadSize,
        *,
        visual_width: int,
        vocabulary: int,
        max_length: int = 30,
        dropout: float = 0.1,
        pad: int = 0,
        causal: bool = True,
        backward: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        assert causal or not backward, "two directions are two causal decoders"
        self.size = size
        self.max_length = max_length
        self.pad = pad
        self.visual_projection = nn.Linear(visual_width, size.width)
        self.embedding = CaptionEmbedding(vocabulary, size.width, max_length=max_length, dropout=dropout, pad=pad)
        self.transformer = Decoder(size, dropout=dropout, causal=causal)
        self.backward_transformer = Decoder(size, dropout=dropout, causal=True) if backward else None
        self.output_bias = nn.Parameter(torch.empty(vocabulary))
        nn.init.uniform_(self.output_bias, -(size.width**-0.5), size.width**-0.5)
        self.apply(partial(_initialise, std=std))

    def forward(
        self, cells_BND: torch.Tensor, tokens_BL: torch.Tensor, backward_BL: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """``(logits_BLV,)`` of ``tokens_BL``, and of the reversed tokens where the head has a second decoder.

        The logits at position l are about token l + 1 where the decoder is causal, else about token l.
        """
        grid_BNH = self.visual_projection(cells_BND)
        logits = [self._decode(self.transformer, grid_BNH, tokens_BL)]
        if self.backward_transformer is not None:
            assert backward_BL is not None, "the second decoder reads the reversed tokens"
            logits.append(self._decode(self.backward_transformer, grid_BNH, backward_BL))
        return tuple(logits)

    def next_token(self, cells_BND: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
        """``log_probabilities_BV``, float32, of the token after ``tokens_BL``, which has no padding in it."""
        x_BLH = self._hidden(self.transformer, self.visual_projection(cells_BND), tokens_BL)
        return F.log_softmax(self._logits(x_BLH[:, -1]).float(), dim=-1)

    def _decode(self, decoder: Decoder, grid_BNH: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
        return self._logits(self._hidden(decoder, grid_BNH, tokens_BL))

    def _hidden(self, decoder: Decoder, grid_BNH: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
        return decoder(self.embedding(tokens_BL), grid_BNH, tokens_BL == self.pad)

    def _logits(self, x_BH: torch.Tensor) -> torch.Tensor:
        return F.linear(x_BH, self.embedding.words.weight, self.output_bias)


@torch.no_grad()
def _initialise(module: nn.Module, *, std: float) -> None:
    if isinstance(module, nn.Linear):
        module.weight.normal_(0.0, std)
    elif isinstance(module, nn.MultiheadAttention):
        module.in_proj_weight.normal_(0.0, std)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(0.0, std)
        if module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
