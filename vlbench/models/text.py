"""The causal text tower and its tokenizer.

Shapes: B batch, L tokens, D width, E joint space.

A causal tower reads its feature at the end-of-text token, which nothing after it can reach. So a batch is padded to
its own longest text, rounded up to 16 tokens, rather than to the full context: the same embedding for a fraction of
the work (a caption has about 12 tokens, CLIP's context is 77). Why 16: a row of the softmax is summed in vector lanes,
and at a length that the lanes do not divide the last bit differs. Rounded, a text's embedding is the same to the bit
whatever the texts beside it, and a compiled tower sees five shapes instead of 77.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import nn

from vlbench.core.cards import TextSpec
from vlbench.core.config import Config
from vlbench.core.errors import UserError
from vlbench.models.byte_pairs import BytePairs
from vlbench.models.loaders.shared import TOKENIZER_PACKAGES, hub_offline_without_network, quiet_logging
from vlbench.models.open_clip_import import import_open_clip
from vlbench.models.padding import LENGTH_STEP, padded_ids, runs_whole
from vlbench.models.tokenizer_files import how_to_place, tokenizer_place

_CACHED_TEXTS = 100_000  # token tuples kept per tokenizer: about 30 MB; prompts and captions come back every epoch


class TextConfig(Config):
    """Which text tower. The defaults are those of CLIP's RN50, ViT-B/32 and ViT-B/16."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    context_length: int = Field(default=77, ge=3)
    tokenizer: str = Field(default="open_clip", description="'open_clip': its byte-level BPE of 49,408 tokens")
    quick_gelu: bool = Field(default=False, description="x * sigmoid(1.702 x), as OpenAI's CLIP and UniCL")
    layer_norm_eps: float = Field(default=1e-5, description="UniCL: 1e-12")

    def spec(self) -> TextSpec:
        """What goes into the model card."""
        return TextSpec(tokenizer=self.tokenizer, context_length=self.context_length)

    def identity(self) -> str:
        """The architecture in words: heads and activation leave no trace in the weights."""
        activation = "quick-gelu" if self.quick_gelu else "gelu"
        return f"text(w{self.width} l{self.layers} h{self.heads} {activation} eps{self.layer_norm_eps:g})"


class TextTower(nn.Module):
    """A pre-norm causal transformer, read at the end-of-text token, with a linear projection without bias.

    CLIP's text encoder (openai/CLIP, clip/model.py). The network and its initialisation (token embedding N(0.02),
    position N(0.01), attention width^-0.5, residual outputs scaled by depth) are open_clip's.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.in_one_call = False
        """Whether each block is called once for a batch, whatever its texts. ``train/sharding`` sets it."""

    @property
    def projection(self) -> torch.Tensor:
        """The weight of the projection into the joint space."""
        return self.net.text_projection

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """``text_BE``, not normalised, of token ids padded with zeros to any length up to the context."""
        return causal_text_embedding(self.net, tokens_BL, in_one_call=self.in_one_call)


def build_text(config: TextConfig, embed_dim: int) -> TextTower:
    """A freshly initialised text tower into a joint space of ``embed_dim``."""
    from functools import partial

    transformer = import_open_clip().transformer
    if config.width % config.heads:
        raise UserError(f"text tower: a width of {config.width} cannot be shared by {config.heads} heads")
    if config.tokenizer != "open_clip":
        raise UserError(f"text tower: tokenizer {config.tokenizer!r} cannot be trained with; use 'open_clip'")
    net = transformer.TextTransformer(
        context_length=config.context_length,
        vocab_size=_byte_pair_encoder().vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=embed_dim,
        act_layer=transformer.QuickGELU if config.quick_gelu else nn.GELU,
        norm_layer=partial(transformer.LayerNorm, eps=config.layer_norm_eps),
    )
    return TextTower(net)


def causal_text_embedding(net: Any, tokens_BL: torch.Tensor, *, in_one_call: bool = False) -> torch.Tensor:
    """``text_BE`` through the parts of an open_clip ``TextTransformer`` or ``CLIP`` (they share their names).

    open_clip's own forward wants the whole context; this one cuts the causal mask and the positions to the batch.
    The end-of-text token has the largest id, so ``argmax`` finds it. On a CPU short texts run apart from long ones
    unless the batch is to go ``in_one_call``.
    """
    length = tokens_BL.shape[1]
    assert length <= net.context_length, f"{length} tokens in a context of {net.context_length}"
    x_BLD = net.token_embedding(tokens_BL).to(net.transformer.get_cast_dtype())
    x_BLD = x_BLD + net.positional_embedding[:length].to(x_BLD.dtype)
    x_BD = net.ln_final(_at_the_end(net, x_BLD, tokens_BL.argmax(dim=-1), in_one_call=in_one_call))
    if net.text_projection is None:
        return x_BD
    return net.text_projection(x_BD) if isinstance(net.text_projection, nn.Linear) else x_BD @ net.text_projection


def _at_the_end(net: Any, x_BLD: torch.Tensor, end_B: torch.Tensor, *, in_one_call: bool = False) -> torch.Tensor:
    """``x_BD``: the transformer's output at each row's end-of-text token.

    Rows that end within the first 16 tokens may run apart from the longer ones: see ``padding.runs_whole``.
    """
    is_short_B = end_B < LENGTH_STEP
    if runs_whole(x_BLD, asked=in_one_call) or not is_short_B.any() or is_short_B.all():
        length = x_BLD.shape[1]
        x_BLD = net.transformer(x_BLD, attn_mask=net.attn_mask[:length, :length])
        return x_BLD[torch.arange(len(end_B), device=x_BLD.device), end_B]
    short, long = is_short_B.nonzero()[:, 0], (~is_short_B).nonzero()[:, 0]
    parts = _at_the_end(net, x_BLD[short, :LENGTH_STEP], end_B[short]), _at_the_end(net, x_BLD[long], end_B[long])
    return torch.cat(parts)[torch.cat([short, long]).argsort()]


class TextReader(Protocol):
    """What goes before a text tower: texts to ``tokens_BL``, and its name for the model card."""

    spec: TextSpec

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """``tokens_BL``, int64, padded with zeros."""


class Tokenizer:
    """Texts to token ids, padded no further than the batch needs where the tokenizer is CLIP's.

    A text longer than the context is cut and its last token replaced by end-of-text, as open_clip does.

    Args:
        spec: which tokenizer and context.
        trim: pad to the longest text only (in steps of 16). False for towers that are not causal, or not read at
            the end-of-text token.
        place: where open_clip finds the tokenizer, where that is not the name that ``spec`` has for it: ``local-dir:``
            and a folder, or the model whose tokenizer was put in its place by hand.

    A model's own tokenizer is looked for when the first text comes: it may be on the hub alone, and linear and knn
    read no text.

    Raises:
        UserError: for an unknown name; at the first text, for files that are not here and cannot be had.
    """

    def __init__(self, spec: TextSpec, *, trim: bool = True, place: str | None = None) -> None:
        library, _, model = spec.tokenizer.partition(":")
        if library != "open_clip":
            raise UserError(f"unknown tokenizer {spec.tokenizer!r}; known: 'open_clip', 'open_clip:<model>'")
        self.spec = spec
        self._place = place or model
        self._may_trim = trim
        self._known: dict[str, tuple[int, ...]] = {}
        if not model:
            _byte_pair_encoder()  # now, so that the processes of a data loader share it

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """``tokens_BL``, int64, padded with zeros."""
        assert not isinstance(texts, str), "a list of texts, not one text"
        if not (self._may_trim and hasattr(self._encoder, "eot_token_id")):
            return self._encoder(list(texts), context_length=self.spec.context_length)
        return padded_ids([self._tokens(text) for text in texts], most=self.spec.context_length)

    @cached_property
    def _encoder(self) -> Any:
        return _named_encoder(self.spec.tokenizer, self._place) if self._place else _byte_pair_encoder()

    @cached_property
    def _byte_pairs(self) -> BytePairs:
        return BytePairs(self._encoder)

    def _tokens(self, text: str) -> tuple[int, ...]:
        found = self._known.get(text)
        if found is None:
            encoder = self._encoder
            ids = [encoder.sot_token_id, *self._byte_pairs(text), encoder.eot_token_id]
            if len(ids) > self.spec.context_length:
                ids = [*ids[: self.spec.context_length - 1], encoder.eot_token_id]
            found = tuple(ids)
            if len(self._known) >= _CACHED_TEXTS:
                self._known.clear()
            self._known[text] = found
        return found


def _named_encoder(name: str, place: str) -> Any:
    """The tokenizer of the open_clip model ``place``: the one put there by hand where ``name`` is not the model's."""
    open_clip = import_open_clip()
    folder = place.partition(":")[2]
    text = _own_text_config(Path(folder)) if folder else (open_clip.get_model_config(place) or {}).get("text_cfg", {})
    repository = text.get("hf_tokenizer_name")
    try:
        with quiet_logging(), hub_offline_without_network():
            if folder or name == f"open_clip:{place}":
                return open_clip.get_tokenizer(place)
            return open_clip.tokenizer.HFTokenizer(
                str(tokenizer_place(repository)),
                context_length=text.get("context_length"),
                tokenizer_mode=text.get("tokenizer_mode"),
                **text.get("tokenizer_kwargs", {}),
            )
    except ImportError as error:
        raise UserError(f"tokenizer {name!r} needs a package: pip install {TOKENIZER_PACKAGES} ({error})") from None
    except Exception as error:  # the tokenizers library and the hub raise what they like
        reason = " ".join(str(error).split())[:120]
        source = f"huggingface.co/{repository}" if repository else "the model's repository"
        put = Path(folder) if folder else tokenizer_place(repository or place)
        raise UserError(
            f"tokenizer {name!r} is not on this machine and cannot be downloaded ({reason}); "
            f"{how_to_place(source, put)}"
        ) from None


def _own_text_config(folder: Path) -> dict[str, Any]:
    """What the configuration beside a model's weights says of its text tower."""
    return json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]


@cache
def _byte_pair_encoder() -> Any:
    return import_open_clip().tokenizer.SimpleTokenizer()
