"""BERT's encoder: transformers' numbers, its published size, and texts that do not feel their neighbours."""

from __future__ import annotations

import pytest
import torch

from vlbench.core.errors import UserError
from vlbench.models.bert import BertConfig, BertTower, build_bert
from vlbench.models.two_tower import TwoTower
from vlbench.models.vision import VisualConfig

SMALL = BertConfig(width=64, layers=3, heads=4, context_length=64, token_types=2)
WORDS = 50


def tower(config: BertConfig = SMALL, embed_dim: int = 24) -> BertTower:
    torch.manual_seed(0)
    return build_bert(config, embed_dim, vocabulary_size=WORDS)


def shaken(config: BertConfig = SMALL) -> BertTower:
    """A tower whose gains and biases are not 1 and 0, so that leaving one out shows."""
    model = tower(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(lengths: list[int], padded_to: int) -> torch.Tensor:
    tokens_BL = torch.zeros(len(lengths), padded_to, dtype=torch.long)
    generator = torch.Generator().manual_seed(2)
    for row_L, length in zip(tokens_BL, lengths):
        row_L[:length] = torch.randint(1, WORDS, (length,), generator=generator)
    return tokens_BL


def inside(model: BertTower, embed_dim: int) -> int:
    """Parameters without the layer into the joint space."""
    width = model.head.in_features
    return sum(parameter.numel() for parameter in model.parameters()) - (width + 1) * embed_dim


@pytest.mark.parametrize(("layers", "width"), [(4, 256), (12, 768), (24, 1024)])
def test_parameters_are_those_of_berts_structure(layers: int, width: int) -> None:
    """By hand, and by transformers' own model without its pooler, which ALIGN does not have."""
    transformers = pytest.importorskip("transformers")
    config = BertConfig(width=width, layers=layers, context_length=512, token_types=2)
    with torch.device("meta"):
        model = BertTower(config, 640, vocabulary_size=30_522)
        published = transformers.BertModel(
            transformers.BertConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                intermediate_size=4 * width,
            ),
            add_pooling_layer=False,
        )
    norm, ffn = 2 * width, 2 * 4 * width**2 + 5 * width
    by_hand = (30_522 + 512 + 2) * width + norm + layers * (4 * width**2 + 4 * width + ffn + 2 * norm)
    assert inside(model, 640) == by_hand == sum(parameter.numel() for parameter in published.parameters())
    assert config.n_heads == width // 64
    # BERT-base and large with their poolers: 109.5M and 335.1M.
    if width >= 768:
        assert by_hand + width**2 + width == {768: 109_482_240, 1024: 335_141_888}[width]


def test_forward_equals_transformers_with_the_same_weights() -> None:
    transformers = pytest.importorskip("transformers")
    model = shaken()
    peer = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
        add_pooling_layer=False,
    ).eval()
    state = {
        "embeddings.word_embeddings.weight": model.token_embedding.weight,
        "embeddings.position_embeddings.weight": model.position_embedding.weight,
        "embeddings.token_type_embeddings.weight": model.type_embedding.weight,
        "embeddings.LayerNorm.weight": model.embedding_norm.weight,
        "embeddings.LayerNorm.bias": model.embedding_norm.bias,
    }
    names = {
        "attention.output.dense": "attention_out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "up",
        "output.dense": "down",
        "output.LayerNorm": "out_norm",
    }
    for number, layer in enumerate(model.layers):
        for part in ("weight", "bias"):
            stacked = getattr(layer.query_key_value, part).chunk(3)
            for name, tensor in zip(("query", "key", "value"), stacked):
                state[f"encoder.layer.{number}.attention.self.{name}.{part}"] = tensor
            for theirs, ours in names.items():
                state[f"encoder.layer.{number}.{theirs}.{part}"] = getattr(getattr(layer, ours), part)
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("_ids") for name in missing)
    tokens_BL = tokens([40, 5, 16, 17, 2], 48)
    with torch.no_grad():
        hidden_BLD = peer(input_ids=tokens_BL, attention_mask=(tokens_BL != 0).long()).last_hidden_state
        expected_BE = model.head(hidden_BLD[:, 0])
        torch.testing.assert_close(model(tokens_BL), expected_BE, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 9, 16, 2], [20, 30, 17, 32], [40, 48, 33, 36]])
def test_padding_in_steps_of_sixteen_changes_no_bit(lengths: list[int]) -> None:
    model, whole_BL = shaken(), tokens(lengths, 64)
    with torch.no_grad():
        whole_BE = model(whole_BL)
        for length in range(-(-max(lengths) // 16) * 16, 65, 16):
            # To the bit on CPUs whose vectors divide 16 lanes; the bound is for others.
            torch.testing.assert_close(model(whole_BL[:, :length]), whole_BE, rtol=1e-6, atol=1e-6)


def test_short_and_long_rows_together_give_what_each_gives_alone() -> None:
    model = shaken()
    lengths = [3, 30, 16, 17, 12, 64]
    whole_BL = tokens(lengths, 64)
    with torch.no_grad():
        whole_BE = model(whole_BL)
        alone_BE = torch.cat([model(whole_BL[row : row + 1, :length]) for row, length in enumerate(lengths)])
        torch.testing.assert_close(alone_BE, whole_BE, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.head(model._encode(whole_BL)), whole_BE, rtol=1e-5, atol=1e-6)
        order = torch.tensor([5, 2, 0, 4, 1, 3])
        torch.testing.assert_close(model(whole_BL[order]), whole_BE[order], rtol=1e-5, atol=1e-6)
        long_BE = model(whole_BL[[1, 5]])
        torch.testing.assert_close(long_BE, whole_BE[[1, 5]], rtol=1e-5, atol=1e-6)


def test_every_token_of_a_text_matters_and_no_padding_does() -> None:
    model = shaken()
    tokens_BL = tokens([9], 16)
    with torch.no_grad():
        before_BE = model(tokens_BL)
        for place in range(9):
            other_BL = tokens_BL.clone()
            other_BL[0, place] = other_BL[0, place] % (WORDS - 1) + 1
            assert not torch.equal(model(other_BL), before_BE), f"token {place} is not read"
        model.token_embedding.weight[0] += 100
        assert torch.equal(model(tokens_BL), before_BE)
        # In another order it is another text.
        assert not torch.allclose(model(tokens_BL[:, [0, 2, 1, *range(3, 16)]]), before_BE, atol=1e-4)


def test_every_parameter_learns_and_dropout_is_on_in_training_alone() -> None:
    model = tower()
    tokens_BL = tokens([20, 7], 32)
    torch.manual_seed(0)
    first_BE = model.train()(tokens_BL)
    first_BE.square().sum().backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not silent, "data-parallel training refuses parameters without a gradient"
    torch.manual_seed(1)
    assert not torch.equal(model(tokens_BL), first_BE)
    torch.manual_seed(0)
    assert torch.equal(model(tokens_BL), first_BE)
    model.eval()
    assert torch.equal(model(tokens_BL), model(tokens_BL))
    plain = tower(SMALL.model_copy(update={"dropout": 0.0})).train()
    assert torch.equal(plain(tokens_BL), plain(tokens_BL))
    assert torch.equal(plain(tokens_BL), model(tokens_BL))


def test_weights_start_as_berts() -> None:
    model = tower(BertConfig(width=256, layers=2))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_a_width_that_heads_do_not_share_is_refused() -> None:
    with pytest.raises(UserError, match="a width of 64 cannot be shared by 5 heads"):
        build_bert(BertConfig(width=64, heads=5), 8, vocabulary_size=WORDS)


@pytest.mark.parametrize("embed_dim", [96, 40])
def test_two_towers_project_images_only_where_the_widths_differ(embed_dim: int) -> None:
    visual = VisualConfig(arch="timm:test_resnet", image_size=32)  # 96 wide
    model = TwoTower(visual, SMALL, embed_dim=embed_dim, vocabulary_size=WORDS, project_equal=False).eval()
    assert (model.image_projection is None) == (embed_dim == 96)
    with torch.no_grad():
        images_BCHW = torch.randn(2, 3, 32, 32)
        features = model.image_features(images_BCHW)
        assert features.embed_BE.shape == (2, embed_dim)
        assert torch.equal(features.embed_BE, features.pooled_BD) == (embed_dim == 96)
        assert torch.equal(model.encode_image(images_BCHW), features.embed_BE)
        image_BE, text_BE, _ = model(images_BCHW, tokens([5, 3], 16))
        torch.testing.assert_close(image_BE.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(text_BE.norm(dim=1), torch.ones(2))
    assert len(model.projections()) == (1 if embed_dim == 96 else 2)
    always = TwoTower(visual, SMALL, embed_dim=embed_dim, vocabulary_size=WORDS)
    assert always.image_projection is not None
