"""The backbone that every loader and recipe hands to the measurements, and the identity of its weights.

Shapes: B batch, C channels, H height, W width, L tokens, D pooled width, E joint space.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vlbench.core.cards import ModelCard, Preprocess, TextSpec
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Features, Provides, Region
from vlbench.models.rows import filled, filled_list, first_rows
from vlbench.models.towers import VisualTower
from vlbench.models.user_code import code_fingerprint, is_of_user


class TorchBackbone:
    """Any torch network as a Backbone.

    Args:
        card: what it is and how its images are prepared.
        module: holds every weight that the two functions below use: it is moved, hashed and put into evaluation mode.
        image_fn: images to ``Features``, or to ``pooled_BD`` alone; default: a VisualTower's ``features``, of another
            module its forward. Where it takes a keyword ``dense``, that asks for tokens and maps.
        text_fn: ``tokens_BL`` to ``text_BE``.
        tokenizer: texts to ``tokens_BL``.
        captions_fn: images to one caption each.
        match_fn: images, texts, the image that each text is paired with, and the images' regions (or None), to ``p_M``.
    """

    def __init__(
        self,
        card: ModelCard,
        module: nn.Module,
        *,
        image_fn: Callable[..., Features | torch.Tensor] | None = None,
        text_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        tokenizer: Callable[[Sequence[str]], torch.Tensor] | None = None,
        captions_fn: Callable[[torch.Tensor], list[str]] | None = None,
        match_fn: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        assert (text_fn is None) == (tokenizer is None), "a text tower and its tokenizer come together"
        assert ("text" in card.provides) == (text_fn is not None), f"{card.id}: its card is wrong about text"
        assert ("captions" in card.provides) == (captions_fn is not None), (
            f"{card.id}: its card is wrong about captions"
        )
        assert ("match" in card.provides) == (match_fn is not None), f"{card.id}: its card is wrong about matching"
        self.card = card
        self.module = module
        if image_fn is None:
            image_fn = module.features if isinstance(module, VisualTower) else module
        self._image_fn = image_fn
        self._takes_dense = "dense" in inspect.signature(image_fn).parameters
        self._text_fn = text_fn
        self._tokenizer = tokenizer
        self._captions_fn = captions_fn
        self._match_fn = match_fn
        self.built_by: Callable[..., Any] | None = None
        """The user's function that made it, where one did."""
        self.device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    @cached_property
    def weights_hash(self) -> str:
        """Fingerprint of the weights as they are at the first use of this attribute."""
        return weights_hash(self.module)

    def to(self, device: torch.device | str) -> TorchBackbone:
        """Move the weights. Returns the backbone itself."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    def encode_image(self, images_BCHW: torch.Tensor, *, dense: bool = False) -> Features:
        """Features of preprocessed float images, float32, on the backbone's device.

        Tokens and maps only where ``dense`` asks for them: at 224 pixels they take a hundred times the memory of the
        pooled feature, and most tasks read that alone.
        """
        with _evaluation(self.module):
            ask = {"dense": True} if dense and self._takes_dense else {}
            out = self._image_fn(filled(images_BCHW.to(self.device)), **ask)
            features = out if isinstance(out, Features) else Features(pooled_BD=_pooled(out, self.card.id))
            features = first_rows(features, len(images_BCHW))
            embed_BE = None if features.embed_BE is None else features.embed_BE.float()
            return replace(features, pooled_BD=features.pooled_BD.float(), embed_BE=embed_BE)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """``text_BE``, float32, not normalised."""
        if self._text_fn is None or self._tokenizer is None:
            raise UserError(f"{self.card.id} has no text tower; it can be probed (linear, knn), not prompted")
        with _evaluation(self.module):
            return self._text_fn(self._tokenizer(filled_list(texts)).to(self.device))[: len(texts)].float()

    def describe(self, images_BCHW: torch.Tensor) -> list[str]:
        """A caption for each of these preprocessed float images, the same whatever images stand beside it."""
        if self._captions_fn is None:
            raise UserError(f"{self.card.id} writes no captions; vlbench pretrain virtex trains a model that does")
        with _evaluation(self.module):
            return self._captions_fn(filled(images_BCHW.to(self.device)))[: len(images_BCHW)]

    def match(
        self,
        images_BCHW: torch.Tensor,
        texts: Sequence[str],
        *,
        image_of: Sequence[int] | None = None,
        regions: Sequence[Sequence[Region]] | None = None,
    ) -> torch.Tensor:
        """``p_M``: the probability that image and text belong together, float32, of pairs that are read together.

        Args:
            images_BCHW: preprocessed float images.
            texts: one of each pair.
            image_of: index of the image of each pair; None: text i with image i.
            regions: of each image, boxes in pixels of ``images_BCHW``; None where there are none.

        Raises:
            UserError: where the model matches nothing, or reads regions that are not there.
        """
        if self._match_fn is None:
            raise UserError(f"{self.card.id} scores no pairs; vlbench pretrain muvla trains a model that does")
        assert image_of is not None or len(texts) == len(images_BCHW), "a text for each image, or image_of"
        with _evaluation(self.module):
            image_of_M = torch.arange(len(texts)) if image_of is None else torch.as_tensor(image_of, dtype=torch.long)
            p_M = self._match_fn(
                filled(images_BCHW.to(self.device)),
                filled_list(texts),
                filled(image_of_M),
                None if regions is None else filled_list(regions),
            )
            return p_M[: len(texts)].float()


def wrap(
    module: nn.Module,
    *,
    preprocess: Preprocess | int,
    name: str,
    text: Callable[[Sequence[str]], torch.Tensor] | None = None,
    **card: Any,
) -> TorchBackbone:
    """Make a backbone of any image network, for ``--model pkg.mod:build``.

    Args:
        module: images ``(B, 3, H, W)`` to ``pooled_BD`` or ``Features``; its output is what the probes read.
        preprocess: how its images are prepared; a number is the side in pixels, with CLIP's other settings.
        name: the id under which results are stored.
        text: texts to ``text_BE`` for zero-shot tasks; the module must then return Features with ``embed_BE``.
        card: further fields of the model card (licence, pretrain_data, ...).
    """
    if isinstance(preprocess, int):
        preprocess = Preprocess(image_size=(preprocess, preprocess))
    provides: set[Provides] = {"pooled"} if text is None else {"pooled", "embed", "text"}
    described = {
        "id": name,
        "loader": "build",
        "arch": type(module).__name__,
        "preprocess": preprocess,
        "provides": frozenset(provides),
        "params": count_params(module),
        **card,
    }
    if text is None:
        return TorchBackbone(ModelCard(**described), module)
    described.setdefault("text", TextSpec(tokenizer="own", context_length=1))
    # The user's function tokenises by itself: the texts pass the tokenizer's place untouched.
    return TorchBackbone(ModelCard(**described), module, text_fn=text, tokenizer=_Texts)


class _Texts(list[str]):
    """Texts in the place of tokens, for a text function that tokenises by itself."""

    def to(self, device: torch.device) -> _Texts:
        return self


def count_params(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def weights_hash(module: nn.Module) -> str:
    """A 16-digit fingerprint of all tensors by name, dtype, shape and content.

    It does not depend on the file they came from, nor on device or memory layout. BatchNorm's batch counters are left
    out: they have no part in what the network computes, and older files lack them.
    """
    total = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(content.numpy())
    return total.hexdigest()


def backbone_fingerprint(backbone: Any) -> str:
    """Fingerprint of everything that makes a backbone's features what they are.

    Weights, architecture, chosen feature, preprocessing and text spec, and of a user's own model the code (one and
    the same state dict can be computed with in many ways); not its name. The key of the feature store.
    """
    card = backbone.card
    made_of = {
        "weights": backbone.weights_hash,
        "loader": card.loader,
        "arch": card.arch,
        "feature": card.feature,
        "preprocess": card.preprocess.model_dump(mode="json"),
        "text": card.text.model_dump(mode="json") if card.text is not None else None,
    }
    if is_of_user(backbone):
        made_of["code"] = code_fingerprint(backbone)
    return fingerprint(made_of)


@contextlib.contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; what was in training mode before is in training mode again afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for child in training:
            child.training = True


def _pooled(out: Any, model: str) -> torch.Tensor:
    if not isinstance(out, torch.Tensor) or out.ndim != 2:
        found = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
        raise UserError(f"{model}: expected a pooled feature of shape (batch, width) or Features, got {found}")
    return out
