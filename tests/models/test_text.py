from __future__ import annotations

import sys
import time

import pytest
import torch

from vlbench.core.cards import TextSpec
from vlbench.core.errors import UserError
from vlbench.models.text import TextConfig, Tokenizer, build_text

SPEC = TextSpec(tokenizer="open_clip", context_length=77)
TEXTS = [
    "a red circle",
    "",
    "the blue square left of the green &amp; yellow triangle, on white ground",
    "Ein grüner Kreis über einem Dreieck — čtverec",
    "x " * 200,
    "tab\tnew\nline   spaces \ud800 lone surrogate",
]


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return build_text(TextConfig(width=64, layers=3, heads=4), 24).eval()


def test_tokenizer_gives_open_clips_tokens_without_the_padding():
    import open_clip

    theirs_BL = open_clip.tokenize(TEXTS)
    for chosen in ([0], [1], [0, 1], [2], [3, 5], [4], list(range(6))):
        ours_BL = Tokenizer(SPEC)([TEXTS[i] for i in chosen])
        length = ours_BL.shape[1]
        assert torch.equal(ours_BL, theirs_BL[chosen][:, :length])
        assert not theirs_BL[chosen][:, length:].any(), "something was cut that is not padding"


def test_tokenizer_trims_to_the_batch_in_steps_of_sixteen():
    tokenizer = Tokenizer(SPEC)
    assert tokenizer(["a red circle"]).shape == (1, 16)
    assert tokenizer(["a red circle", "word " * 20]).shape == (2, 32)
    assert tokenizer(["x " * 200]).shape == (1, 77)
    assert Tokenizer(SPEC, trim=False)(["a red circle"]).shape == (1, 77)


def test_tokenizer_ends_a_long_text_with_end_of_text():
    tokens_BL = Tokenizer(TextSpec(tokenizer="open_clip", context_length=8))(["one two three four five six seven"])
    assert tokens_BL.shape == (1, 8)
    assert tokens_BL[0, -1] == 49407
    assert (tokens_BL == 49407).sum() == 1


def test_tokenizer_cache_changes_nothing():
    tokenizer = Tokenizer(SPEC)
    assert torch.equal(tokenizer(TEXTS), tokenizer(TEXTS))


def test_tokenizer_of_a_model_is_looked_for_at_the_first_text_and_at_once(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    tokenizer = Tokenizer(TextSpec(tokenizer="open_clip:ViT-B-16-SigLIP", context_length=64))
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"huggingface\.co/timm/ViT-B-16-SigLIP elsewhere and put") as caught:
        tokenizer(["a red circle"])
    assert "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 20, "a minute of trying again would be over half a minute"


def test_tokenizer_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("vlbench.models.loaders.shared._reachable", lambda host: False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install 'transformers>=5' sentencepiece protobuf"):
        Tokenizer(TextSpec(tokenizer="open_clip:ViT-B-16-SigLIP", context_length=64))(["a red circle"])


def test_tokenizer_unknown_name():
    with pytest.raises(UserError, match="unknown tokenizer 'bert'"):
        Tokenizer(TextSpec(tokenizer="bert", context_length=77))


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1, 3], [2, 0], [0, 1, 2, 3, 4, 5]])
def test_text_tower_trimmed_equals_padded_to_the_full_context(tower, chosen):
    import open_clip

    texts = [TEXTS[i] for i in chosen]
    with torch.inference_mode():
        trimmed_BE = tower(Tokenizer(SPEC)(texts))
        padded_BE = tower(open_clip.tokenize(texts))
        theirs_BE = tower.net(open_clip.tokenize(texts))  # open_clip's own forward
    assert torch.equal(padded_BE, theirs_BE)
    # To the bit on CPUs whose vectors divide 16 lanes; the bound is for others.
    torch.testing.assert_close(trimmed_BE, theirs_BE, rtol=1e-6, atol=1e-6)


def test_text_tower_trimmed_equals_padded_in_double_precision(tower):
    import copy

    double = copy.deepcopy(tower).double()
    tokens_BL = Tokenizer(SPEC, trim=False)(TEXTS[:4])
    with torch.inference_mode():
        whole_BE = double(tokens_BL)
        for text, row_E in zip(TEXTS[:4], whole_BE, strict=True):
            torch.testing.assert_close(double(Tokenizer(SPEC)([text]))[0], row_E, rtol=1e-13, atol=1e-13)


def test_text_tower_reads_nothing_after_the_end_of_text(tower):
    tokens_BL = Tokenizer(SPEC, trim=False)(["a red circle"])
    noisy_BL = tokens_BL.clone()
    noisy_BL[0, 6:] = torch.randint(1, 40_000, (71,))
    with torch.inference_mode():
        assert torch.equal(tower(tokens_BL), tower(noisy_BL))


def test_text_tower_reads_everything_before_the_end_of_text(tower):
    tokens_BL = Tokenizer(SPEC)(["a red circle", "a blue circle"])
    with torch.inference_mode():
        first_E, second_E = tower(tokens_BL)
    assert not torch.allclose(first_E, second_E, atol=1e-4)


def test_text_tower_short_and_long_rows_together_give_what_each_gives_alone(tower):
    tokens_BL = Tokenizer(SPEC)([*TEXTS[:4], *TEXTS[:2]])
    assert tokens_BL.shape[1] > 16
    alone = [tower(Tokenizer(SPEC)([text])) for text in [*TEXTS[:4], *TEXTS[:2]]]
    torch.testing.assert_close(tower(tokens_BL), torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_text_tower_short_and_long_rows_together_give_the_gradient_of_the_whole_batch():
    torch.manual_seed(1)
    tower = build_text(TextConfig(width=64, layers=2, heads=4), 24).double()
    padded_BL = torch.zeros(4, 77, dtype=torch.long)
    tokens_BL = Tokenizer(SPEC)(TEXTS[:4])
    padded_BL[:, : tokens_BL.shape[1]] = tokens_BL
    target_BE = torch.randn(4, 24, dtype=torch.float64)

    def gradients(read):
        tower.zero_grad()
        (read() * target_BE).sum().backward()
        return [parameter.grad.clone() for parameter in tower.parameters()]

    def as_one_batch():
        net = tower.net
        x_BLD = net.transformer(net.token_embedding(padded_BL) + net.positional_embedding, attn_mask=net.attn_mask)
        return net.ln_final(x_BLD[torch.arange(4), padded_BL.argmax(-1)]) @ net.text_projection

    for ours, theirs in zip(gradients(lambda: tower(tokens_BL)), gradients(as_one_batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_text_tower_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(UserError, match="3 heads"):
        build_text(TextConfig(width=64, heads=3), 8)


def test_text_identity_tells_activations_apart():
    assert TextConfig().identity() != TextConfig(quick_gelu=True).identity()
    assert TextConfig(heads=4).identity() != TextConfig(heads=8).identity()
