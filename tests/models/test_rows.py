"""A row's features are the same bits whatever stands beside it."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch

from vlbench.core.cards import ModelCard, Preprocess, TextSpec
from vlbench.core.types import Features
from vlbench.models.backbone import TorchBackbone
from vlbench.models.rows import ROW_STEP, filled, filled_list, first_rows
from vlbench.models.text import Tokenizer, causal_text_embedding

VISION = {"layers": 2, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 64}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}


def test_filled_repeats_the_last_row_up_to_a_whole_step() -> None:
    rows = torch.arange(10.0).view(5, 2)
    assert filled(rows).tolist() == [*rows.tolist(), *[[8.0, 9.0]] * 3]
    assert filled_list(["a", "b"]) == ["a", *"b" * (ROW_STEP - 1)]
    whole = torch.zeros(2 * ROW_STEP, 3)
    assert filled(whole) is whole
    assert filled(whole[:0]).shape == (0, 3)
    assert filled_list([]) == []


def test_first_rows_cuts_every_part() -> None:
    parts = Features(torch.zeros(8, 2), torch.zeros(8, 3), torch.zeros(8, 4, 2), {16: torch.zeros(8, 2, 4, 4)})
    cut = first_rows(parts, 5)
    assert cut.embed_BE is not None
    assert cut.tokens_BND is not None
    assert cut.maps is not None
    assert {len(part) for part in (cut.pooled_BD, cut.embed_BE, cut.tokens_BND, cut.maps[16])} == {5}
    assert first_rows(Features(torch.zeros(8, 2)), 5).embed_BE is None


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    net = open_clip.CLIP(embed_dim=96, vision_cfg=VISION, text_cfg=TEXT)
    spec = TextSpec(tokenizer="open_clip", context_length=32)
    card = ModelCard(
        id="x",
        loader="open_clip",
        arch="x",
        preprocess=Preprocess(image_size=(64, 64)),
        text=spec,
        provides=frozenset({"pooled", "embed", "text"}),
    )

    def images(images_BCHW: torch.Tensor) -> Features:
        embed_BE = net.encode_image(images_BCHW)
        return Features(embed_BE, embed_BE)

    return TorchBackbone(
        card, net, image_fn=images, text_fn=lambda ids_BL: causal_text_embedding(net, ids_BL), tokenizer=Tokenizer(spec)
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 13])
def test_images_and_texts_give_the_same_bits_in_any_batch(backbone: Any, size: int) -> None:
    torch.manual_seed(1)
    images_BCHW = torch.randn(40, 3, 64, 64)
    whole = backbone.encode_image(images_BCHW)
    parts = [backbone.encode_image(part) for part in images_BCHW.split(size)]
    assert torch.equal(torch.cat([part.embed_BE for part in parts]), whole.embed_BE)
    texts = [f"number {number}" + " and another one" * (number % 6) for number in range(40)]
    whole_BE = backbone.encode_text(texts)
    parts_BE = [backbone.encode_text(texts[start : start + size]) for start in range(0, 40, size)]
    assert torch.equal(torch.cat(parts_BE), whole_BE)
