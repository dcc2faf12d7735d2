"""UniCL's and K-LITE's published files, made here under their authors' names and computed here by their model.py."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm
import torch
from torch.nn import functional as F

from tests.models.test_layouts import SWIN, swin_in_its_authors_names
from vlbench.core.errors import UserError
from vlbench.models.load import load_backbone
from vlbench.models.loaders.unicl import load

WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY, SPACE = 512, 12, 8, 77, 49_408, 512
TEXTS = ["a photo of a dog.", "a photo of a very small red fox beside an old wooden fence, behind it a field.", "x"]


@pytest.fixture(scope="module")
def image_net() -> Any:
    torch.manual_seed(0)
    return timm.create_model(SWIN, pretrained=False, num_classes=0).eval()


@pytest.fixture(scope="module")
def text_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int, std: float = 0.02) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    state = {
        "token_embedding.weight": drawn(VOCABULARY, WIDTH),
        "positional_embedding": drawn(CONTEXT, WIDTH),
        "ln_final.weight": 1 + drawn(WIDTH),
        "ln_final.bias": drawn(WIDTH),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "attn.in_proj_bias": (3 * WIDTH,),
            "attn.out_proj.weight": (WIDTH, WIDTH),
            "attn.out_proj.bias": (WIDTH,),
            "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            "mlp.c_fc.bias": (4 * WIDTH,),
            "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            "mlp.c_proj.bias": (WIDTH,),
            "ln_1.bias": (WIDTH,),
            "ln_2.bias": (WIDTH,),
        }.items():
            # Large enough that the activation and the attention bend.
            state[f"resblocks.{layer}.{name}"] = drawn(*shape, std=0.08)
        for name in ("ln_1.weight", "ln_2.weight"):
            state[f"resblocks.{layer}.{name}"] = 1 + drawn(WIDTH)
    return state


@pytest.fixture(scope="module")
def beside() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "image_projection": torch.randn(768, SPACE, generator=generator) * 0.02,
        "text_projection": torch.randn(WIDTH, SPACE, generator=generator) * 0.02,
        "logit_scale": torch.tensor(4.1),
    }


def published(image_net: Any, text: dict[str, Any], beside: dict[str, Any], images: str, texts: str) -> dict[str, Any]:
    """The whole file, with the prefixes of one of its versions."""
    projection = "vision_projection" if images == "visual." else "image_projection"
    return {
        **{f"{images}{name}": value for name, value in swin_in_its_authors_names(image_net).items()},
        **{f"{texts}{name}": value for name, value in text.items()},
        **{projection if name == "image_projection" else name: value for name, value in beside.items()},
    }


def text_embedding(state: dict[str, torch.Tensor], projection: torch.Tensor) -> torch.Tensor:
    """What model/text_encoder/transformer.py and ``encode_text`` compute, in float64, all texts padded to 77."""
    tokens_BL = open_clip.tokenizer.SimpleTokenizer()(TEXTS, context_length=CONTEXT)
    at = {name: value.double() for name, value in state.items()}
    x_BLD = at["token_embedding.weight"][tokens_BL] + at["positional_embedding"]
    causal_LL = torch.full((CONTEXT, CONTEXT), float("-inf"), dtype=torch.double).triu(1)
    for layer in range(LAYERS):
        of = {name.removeprefix(f"resblocks.{layer}."): value for name, value in at.items()}
        normed = F.layer_norm(x_BLD, (WIDTH,), of["ln_1.weight"], of["ln_1.bias"], eps=1e-12)
        qkv = F.linear(normed, of["attn.in_proj_weight"], of["attn.in_proj_bias"])
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + causal_LL).softmax(dim=-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        x_BLD = x_BLD + F.linear(mixed, of["attn.out_proj.weight"], of["attn.out_proj.bias"])
        normed = F.layer_norm(x_BLD, (WIDTH,), of["ln_2.weight"], of["ln_2.bias"], eps=1e-12)
        hidden = F.linear(normed, of["mlp.c_fc.weight"], of["mlp.c_fc.bias"])
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x_BLD = x_BLD + F.linear(hidden, of["mlp.c_proj.weight"], of["mlp.c_proj.bias"])
    x_BLD = F.layer_norm(x_BLD, (WIDTH,), at["ln_final.weight"], at["ln_final.bias"], eps=1e-12)
    return x_BLD[torch.arange(len(TEXTS)), tokens_BL.argmax(dim=-1)] @ projection.double()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("images", "texts"),
    [
        ("image_encoder.", "text_encoder."),  # microsoft/UniCL
        ("image_encoder.", "lang_encoder."),  # its older files, as it renames them
        ("visual.", "text."),  # microsoft/klite
    ],
)
def test_published_file_gives_both_towers(tmp_path, image_net, text_state, beside, images, texts):
    torch.save({"model": published(image_net, text_state, beside, images, texts), "epoch": 31}, tmp_path / "w.pth")
    backbone = load_backbone(f"unicl:{SWIN}", weights=str(tmp_path / "w.pth"))
    assert backbone.card.id == f"unicl:{SWIN}@w"
    assert {"embed", "text"} <= backbone.card.provides
    assert backbone.module.logit_scale.item() == pytest.approx(4.1)
    assert backbone.module.logit_scale_max is None
    pixels_BCHW = torch.randn(1, 3, 224, 224)
    features = backbone.encode_image(pixels_BCHW)
    with torch.inference_mode():
        pooled_BD = image_net(pixels_BCHW)
    torch.testing.assert_close(features.pooled_BD, pooled_BD, rtol=0, atol=1e-6)
    torch.testing.assert_close(features.embed_BE, pooled_BD @ beside["image_projection"], rtol=1e-4, atol=1e-5)
    expected_BE = text_embedding(text_state, beside["text_projection"])
    got_BE = backbone.encode_text(TEXTS).double()
    torch.testing.assert_close(got_BE, expected_BE, rtol=1e-3, atol=1e-4)
    assert F.cosine_similarity(got_BE, expected_BE).min() > 1 - 1e-8


def test_file_that_lacks_a_tensor_or_has_one_too_many_is_refused(tmp_path, image_net, text_state, beside):
    whole = published(image_net, text_state, beside, "image_encoder.", "text_encoder.")
    lacking = {name: value for name, value in whole.items() if not name.endswith("ln_final.bias")}
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(UserError, match=r"1 missing \(text\.net\.ln_final\.bias\)"):
        load(SWIN, weights=str(tmp_path / "lacking.pth"))
    torch.save(whole | {"text_encoder.resblocks.12.ln_1.bias": torch.zeros(WIDTH)}, tmp_path / "deeper.pth")
    with pytest.raises(UserError, match=r"1 unexpected \(text\.net\.transformer\.resblocks\.12\.ln_1\.bias\)"):
        load(SWIN, weights=str(tmp_path / "deeper.pth"))


def test_file_of_an_image_tower_alone_is_refused_with_what_reads_it(tmp_path, image_net):
    torch.save(swin_in_its_authors_names(image_net), tmp_path / "swin.pth")
    with pytest.raises(UserError, match=r"not a file of UniCL or K-LITE.*for an image tower alone take timm:NAME"):
        load(SWIN, weights=str(tmp_path / "swin.pth"))


def test_what_cannot_be_loaded_is_said():
    with pytest.raises(UserError, match=r"names no weights; .*--weights FILE"):
        load(SWIN)
    with pytest.raises(UserError, match="unknown image tower of UniCL's files 'resnet50'"):
        load("resnet50", weights="random")


def test_fresh_weights_begin_as_unicl_begins():
    backbone = load_backbone("unicl-swin-t-in21k-yfcc14m", weights="random:3")
    assert backbone.card.random
    assert backbone.module.logit_scale.item() == 1.0
    assert all(0.019 < weight.std().item() < 0.021 for weight in backbone.module.projections())
    assert backbone.encode_text(["a dog"]).shape == (1, SPACE)
