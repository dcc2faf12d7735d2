"""BERT's encoder as a text tower, from scratch: bidirectional, post-norm, read at its first token.

Shapes: B batch, L tokens, Q tokens that ask, D width, H heads, K width of a head, E joint space.

A batch is padded to its own longest text in steps of 16 tokens, and padding is masked: how far a batch is padded
changes no bit of an embedding (why 16: ``models/text.py``). On a CPU the rows of at most 16 tokens run apart from the
longer ones, as in the causal tower. The last layer asks for the first token alone, the only one that is read.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from vlbench.core.config import Config
from vlbench.core.errors import UserError
from vlbench.models.padding import LENGTH_STEP, runs_whole

PAD = 0
_HEAD_WIDTH = 64
_INIT_STD = 0.02


class BertConfig(Config):
    """Which encoder. The defaults are BERT-base's; mini is 4 x 256, large 24 x 1024."""

    width: int = Field(default=768, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int | None = Field(default=None, ge=1, description="None: one for every 64 of the width")
    context_length: int = Field(default=64, ge=3, description="learned positions")
    token_types: int = Field(
        default=0, ge=0, description="rows of BERT's segment embedding, of which one text uses the first; 0: none"
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="of embeddings, attention and both residual branches")
    layer_norm_eps: float = Field(default=1e-12, gt=0)

    def identity(self) -> str:
        """The architecture in words: heads leave no trace in the weights."""
        return f"bert(w{self.width} l{self.layers} h{self.n_heads} eps{self.layer_norm_eps:g})"

    @property
    def n_heads(self) -> int:
        """H."""
        return self.heads if self.heads is not None else max(1, self.width // _HEAD_WIDTH)


class BertTower(nn.Module):
    """BERT's encoder (Devlin et al., 1810.04805), its first token through a linear layer into the joint space.

    The layer has a bias and no activation, and BERT's pooler is not there (kakaobrain/coyo-align, align.py). All
    weights start from N(0, 0.02), biases from 0.

    Args:
        config: the architecture.
        embed_dim: E.
        vocabulary_size: rows of the token embedding; token 0 is padding.
    """

    def __init__(self, config: BertConfig, embed_dim: int, *, vocabulary_size: int) -> None:
        super().__init__()
        width = config.width
        if width % config.n_heads:
            raise UserError(f"text tower: a width of {width} cannot be shared by {config.n_heads} heads")
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.position_embedding = nn.Embedding(config.context_length, width)
        self.type_embedding = nn.Embedding(config.token_types, width) if config.token_types else None
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.head = nn.Linear(width, embed_dim)
        self.dropout = config.dropout
        self.in_one_call = False
        """Whether each layer is called once for a batch, whatever its texts. ``train/sharding`` sets it."""
        self.apply(_initialise)

    @property
    def projection(self) -> torch.Tensor:
        """The weight of the linear layer into the joint space."""
        return self.head.weight

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """``text_BE``, not normalised, of token ids padded with zeros to any length up to the context."""
        assert tokens_BL.shape[1] <= self.position_embedding.num_embeddings, (
            f"{tokens_BL.shape[1]} tokens in a context of {self.position_embedding.num_embeddings}"
        )
        return self.head(self._first(tokens_BL))

    def _first(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """``first_BD``: the last hidden state of the first token."""
        if runs_whole(tokens_BL, asked=self.in_one_call):
            return self._encode(tokens_BL)
        is_short_B = (tokens_BL[:, LENGTH_STEP:] == PAD).all(1)
        if not is_short_B.any():
            return self._encode(tokens_BL)
        short, long = is_short_B.nonzero()[:, 0], (~is_short_B).nonzero()[:, 0]
        first_BD = self._encode(tokens_BL[short, :LENGTH_STEP])
        if len(long):
            first_BD = torch.cat([first_BD, self._encode(tokens_BL[long])])
        return first_BD[torch.cat([short, long]).argsort()]

    def _encode(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        x_BLD = self.token_embedding(tokens_BL) + self.position_embedding.weight[: tokens_BL.shape[1]]
        if self.type_embedding is not None:
            x_BLD = x_BLD + self.type_embedding.weight[0]
        x_BLD = F.dropout(self.embedding_norm(x_BLD), self.dropout, self.training)
        visible_B11L = (tokens_BL != PAD)[:, None, None, :]
        *earlier, last = self.layers
        for layer in earlier:
            x_BLD = layer(x_BLD, visible_B11L)
        return last(x_BLD, visible_B11L, asking=1)[:, 0]


def build_bert(config: BertConfig, embed_dim: int, *, vocabulary_size: int) -> BertTower:
    """A freshly initialised tower into a joint space of ``embed_dim``."""
    return BertTower(config, embed_dim, vocabulary_size=vocabulary_size)


class _Layer(nn.Module):
    """Self-attention and a feed-forward net of four times the width, each added and then normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.n_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.out_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x_BLD: torch.Tensor, visible_B11L: torch.Tensor, *, asking: int | None = None) -> torch.Tensor:
        """``x_BQD``: the outputs of the first ``asking`` tokens, or of all."""
        parts = self.query_key_value(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query_BHLK, key_BHLK, value_BHLK = parts.unbind()
        mixed_BHQK = F.scaled_dot_product_attention(
            query_BHLK[:, :, :asking],
            key_BHLK,
            value_BHLK,
            attn_mask=visible_B11L,
            dropout_p=self.dropout if self.training else 0.0,
        )
        branch_BQD = self.attention_out(mixed_BHQK.transpose(1, 2).flatten(2))
        x_BQD = self.attention_norm(x_BLD[:, :asking] + F.dropout(branch_BQD, self.dropout, self.training))
        branch_BQD = self.down(F.gelu(self.up(x_BQD)))
        return self.out_norm(x_BQD + F.dropout(branch_BQD, self.dropout, self.training))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
