"""The textual head against its formula, beam search against enumeration, and which towers can carry a head."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from vlbench.core.errors import UserError
from vlbench.models.beam import beam_search
from vlbench.models.captioner import DESCRIBED_AT_ONCE, Captioner, settle_grid
from vlbench.models.textual_head import HeadSize, TextualHead
from vlbench.models.vision import VisualConfig, build_visual

PAD, START, END = 0, 1, 2
TINY = VisualConfig(arch="timm:test_resnet", image_size=64)


# ------------------------------------------------------------------------------------------------ head sizes


@pytest.mark.parametrize(
    "name, one, second",
    [("L1_H512", 10.4, 4.2), ("L1_H768", 18.7, 9.5), ("L1_H1024", 29.2, 16.8), ("L1_H2048", 91.9, 67.2)],
)
def test_head_has_the_published_number_of_parameters(name: str, one: float, second: float) -> None:
    """In millions, with VirTex's 10,000 tokens on ResNet-50; a second direction adds its transformer alone."""

    def millions(backward: bool) -> float:
        with torch.device("meta"):
            head = TextualHead(HeadSize.parse(name), visual_width=2048, vocabulary=10_000, backward=backward)
        return sum(parameter.numel() for parameter in head.parameters()) / 1e6

    assert millions(False) == pytest.approx(one, abs=0.06)
    assert millions(True) - millions(False) == pytest.approx(second, abs=0.06)


def test_head_size_fills_in_heads_and_feedforward() -> None:
    assert HeadSize.parse("L1_H2048") == HeadSize.parse("L1_H2048_A32_F8192") == HeadSize(1, 2048, 32, 8192)
    assert HeadSize.parse("L4_H1024").identity() == "L4_H1024_A16_F4096"
    assert HeadSize.parse("L2_H32").heads == 1
    for wrong in ("H512_L1", "L1_H", "L1_H512_F8_A2", "tiny"):
        with pytest.raises(UserError, match="write it as L<layers>_H<width>"):
            HeadSize.parse(wrong)
    for wrong in ("L1_H100_A3", "L0_H64", "L1_H64_A0"):
        with pytest.raises(UserError, match="cannot be shared by"):
            HeadSize.parse(wrong)


# -------------------------------------------------------------------------------------- the head's formula


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * gain + bias


def attention(p: dict, name: str, queries: np.ndarray, keys: np.ndarray, heads: int, seen: np.ndarray) -> np.ndarray:
    """One caption: queries (L, H), keys (M, H), seen (L, M)."""
    width = queries.shape[1]
    wq, wk, wv = p[f"{name}.in_proj_weight"].reshape(3, width, width)
    bq, bk, bv = p[f"{name}.in_proj_bias"].reshape(3, width)
    q, k, v = queries @ wq.T + bq, keys @ wk.T + bk, keys @ wv.T + bv
    out = []
    for part in np.split(np.arange(width), heads):
        scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))
        out.append(softmax(np.where(seen, scores, -np.inf)) @ v[:, part])
    return np.concatenate(out, 1) @ p[f"{name}.out_proj.weight"].T + p[f"{name}.out_proj.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def decoded(
    p: dict, cells: np.ndarray, tokens: list[int], *, size: HeadSize, transformer: str, causal: bool
) -> np.ndarray:
    """Logits of one caption without padding, in float64, from VirTex's description."""
    grid = cells @ p["visual_projection.weight"].T + p["visual_projection.bias"]
    x = p["embedding.words.weight"][tokens] + p["embedding.positions.weight"][: len(tokens)]
    x = layer_norm(x, p["embedding.layer_norm.weight"], p["embedding.layer_norm.bias"], 1e-8)
    seen = np.tril(np.ones((len(tokens), len(tokens)), dtype=bool)) if causal else np.ones((len(tokens),) * 2, bool)
    for number in range(size.layers):
        layer = f"{transformer}.layers.{number}"
        q = {name.removeprefix(layer + "."): value for name, value in p.items() if name.startswith(layer + ".")}
        norm = [lambda x, n=n, q=q: layer_norm(x, q[f"norm{n}.weight"], q[f"norm{n}.bias"], 1e-5) for n in (1, 2, 3)]
        x = norm[0](x + attention(q, "self_attn", x, x, size.heads, seen))
        x = norm[1](x + attention(q, "multihead_attn", x, grid, size.heads, np.ones((len(x), len(grid)), bool)))
        hidden = gelu(x @ q["linear1.weight"].T + q["linear1.bias"])
        x = norm[2](x + hidden @ q["linear2.weight"].T + q["linear2.bias"])
    return x @ p["embedding.words.weight"].T + p["output_bias"]


@pytest.mark.parametrize("causal, backward", [(True, True), (True, False), (False, False)])
def test_head_is_the_formula(causal: bool, backward: bool) -> None:
    """Against float64 numpy, caption by caption: padding and neighbours change nothing."""
    torch.manual_seed(0)
    size = HeadSize.parse("L2_H16_A4_F24")
    head = TextualHead(size, visual_width=6, vocabulary=11, max_length=8, causal=causal, backward=backward).double()
    with torch.no_grad():  # so that gains, biases and padding matter
        for name, parameter in head.named_parameters():
            if not name.startswith("embedding.words"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    head.eval()
    p = {name: value.numpy() for name, value in head.state_dict().items()}
    cells = torch.randn(3, 4, 6, dtype=torch.float64)
    captions = [[1, 5, 6, 7, 8, 2], [1, 9, 2], [1, 5, 5, 10]]
    tokens = torch.zeros(3, 6, dtype=torch.long)
    reversed_ = torch.zeros(3, 6, dtype=torch.long)
    for row, caption in enumerate(captions):
        tokens[row, : len(caption)] = torch.tensor(caption)
        reversed_[row, : len(caption)] = torch.tensor(caption[::-1])
    with torch.no_grad():
        found = head(cells, tokens, reversed_ if backward else None)
    assert len(found) == 1 + backward
    for logits, transformer, step in zip(found, ("transformer", "backward_transformer"), (1, -1)):
        for row, caption in enumerate(captions):
            expected = decoded(
                p, cells[row].numpy(), caption[::step], size=size, transformer=transformer, causal=causal
            )
            np.testing.assert_allclose(logits[row, : len(caption)].numpy(), expected, atol=1e-10)
    if causal:
        log_p = head.next_token(cells[:1], tokens[:1, :3])
        np.testing.assert_allclose(log_p[0].detach().numpy(), found[0][0, 2].log_softmax(-1).numpy(), rtol=0, atol=1e-5)


def test_directions_share_all_but_their_blocks_and_the_output_is_the_embedding() -> None:
    head = TextualHead(HeadSize.parse("L1_H64"), visual_width=8, vocabulary=20, backward=True)
    own = {name for name, _ in head.named_parameters() if name.startswith(("transformer", "backward_transformer"))}
    shared = {name for name, _ in head.named_parameters()} - own
    assert shared == {
        "visual_projection.weight",
        "visual_projection.bias",
        "embedding.words.weight",
        "embedding.positions.weight",
        "embedding.layer_norm.weight",
        "embedding.layer_norm.bias",
        "output_bias",
    }
    first, second = head.transformer.state_dict(), head.backward_transformer.state_dict()
    assert first.keys() == second.keys()
    assert not torch.equal(first["layers.0.linear1.weight"], second["layers.0.linear1.weight"])


def test_head_starts_as_virtex_starts_it() -> None:
    torch.manual_seed(0)
    head = TextualHead(HeadSize.parse("L1_H512"), visual_width=512, vocabulary=2000, backward=True)
    for name, parameter in head.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    assert not head.embedding.words.weight[PAD].any()
    assert head.transformer.layers[0].linear1.bias.any(), "torch's own start, as in the released code"
    assert head.embedding.layer_norm.eps == 1e-8


def test_padding_is_embedded_as_zero_and_has_no_gradient() -> None:
    head = TextualHead(HeadSize.parse("L1_H64"), visual_width=8, vocabulary=20, dropout=0.0, backward=False)
    tokens = torch.tensor([[START, 7, END, PAD, PAD]])
    assert not head.embedding(tokens)[0, 3:].any()
    (logits,) = head(torch.randn(1, 4, 8), tokens)
    logits[:, :3].sum().backward()
    assert torch.isfinite(head.embedding.words.weight.grad).all()


# ------------------------------------------------------------------------------------------------ beam search


def table(vocabulary: int, seed: int) -> Any:
    """Log-probabilities that depend on the row's first token and on everything written so far."""

    def next_token(tokens_RL: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in tokens_RL.tolist():
            rng = np.random.default_rng([seed, *row])
            rows.append(rng.normal(0, 2, vocabulary))
        return torch.log_softmax(torch.tensor(np.array(rows)), dim=-1)

    return next_token


def best_of_all(
    next_token: Any, first: int, vocabulary: int, length: int, never: tuple[int, ...]
) -> tuple[list[int], float]:
    """Every sequence that may be written, one by one."""
    best, best_score = [], -math.inf
    allowed = [token for token in range(vocabulary) if token not in never]
    for n in range(1, length):
        for tail in itertools.product(allowed, repeat=n):
            row = [first, *tail]
            if END in tail[:-1] or (n < length - 1 and tail[-1] != END):
                continue
            if any(a == b for a, b in itertools.pairwise(tail)):
                continue
            score = sum(next_token(torch.tensor([row[:k]]))[0, row[k]].item() for k in range(1, n + 1))
            if score > best_score:
                best, best_score = row, score
    return best, best_score


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("never", [(), (0,)])
def test_a_wide_beam_finds_the_best_sequence_of_all(seed: int, never: tuple[int, ...]) -> None:
    vocabulary, length = 5, 5
    next_token = table(vocabulary, seed)
    starts = torch.tensor([1, 3, 4])
    tokens, scores = beam_search(next_token, start_B=starts, end=END, max_length=length, beams=400, never=never)
    for row, score, first in zip(tokens.tolist(), scores.tolist(), starts.tolist()):
        expected, expected_score = best_of_all(next_token, first, vocabulary, length, never)
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {END}
        assert score == pytest.approx(expected_score, abs=1e-4)


def test_one_beam_is_greedy_and_more_beams_never_score_less_here() -> None:
    next_token = table(6, 7)
    start = torch.tensor([1])
    row, greedy = [1], 0.0
    while len(row) < 8 and row[-1] != END:
        log_p = next_token(torch.tensor([row]))[0].float()
        if len(row) > 1:
            log_p[row[-1]] = -torch.inf
        row.append(int(log_p.argmax()))
        greedy += log_p.max().item()
    tokens, score = beam_search(next_token, start_B=start, end=END, max_length=8, beams=1)
    assert tokens[0].tolist() == row
    assert score.item() == pytest.approx(greedy, abs=1e-4)
    wide = beam_search(next_token, start_B=start, end=END, max_length=8, beams=500)[1].item()
    assert wide >= greedy


def test_no_token_follows_itself_and_length_is_held() -> None:
    def stubborn(tokens_RL: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(torch.tensor([0.0, 0.0, -9.0, 5.0, 4.0]), 0).expand(len(tokens_RL), -1)

    tokens, _ = beam_search(stubborn, start_B=torch.tensor([1, 1]), end=END, max_length=6, beams=3, per_beam=2)
    assert tokens.tolist() == [[1, 3, 4, 3, 4, 3]] * 2


def test_beam_may_be_wider_than_the_vocabulary() -> None:
    def certain(tokens_RL: torch.Tensor) -> torch.Tensor:
        return torch.log(torch.tensor([0.0, 0.0, 0.3, 0.7])).expand(len(tokens_RL), -1)

    tokens, score = beam_search(certain, start_B=torch.tensor([1]), end=END, max_length=4, beams=9)
    # The end at once: 0.3. A 3 first can only be followed by the end: 0.7 * 0.3.
    assert tokens[0].tolist()[:2] == [1, END]
    assert score.item() == pytest.approx(math.log(0.3), abs=1e-6)


# ------------------------------------------------------------------------------------------------ the whole model


def captioner(**changes: Any) -> Captioner:
    torch.manual_seed(0)
    settings = {"vocabulary": 30, "max_length": 9} | changes
    return Captioner(TINY, HeadSize.parse("L1_H64"), **settings)


def test_untrained_model_knows_as_much_as_a_die() -> None:
    """About ln V a token: 2 x 9.21 for VirTex's 10,000 in both directions."""
    model = captioner(vocabulary=10_000, max_length=30).eval()
    tokens = torch.randint(5, 10_000, (4, 30))
    with torch.no_grad():
        for logits in model(torch.randn(4, 3, 64, 64), tokens, tokens.flip(1)):
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            assert loss.item() == pytest.approx(math.log(10_000), abs=0.6)


def test_every_parameter_has_a_gradient() -> None:
    """DistributedDataParallel waits for all of them."""
    tokens = torch.randint(5, 30, (2, 7))
    for changes in ({}, {"backward": False}, {"backward": False, "causal": False}):
        model = captioner(**changes)
        sum(logits.sum() for logits in model(torch.randn(2, 3, 64, 64), tokens, tokens)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_captions_do_not_depend_on_the_batch() -> None:
    model = captioner(std=0.3).eval()  # so that images matter more than they do at the start
    with torch.no_grad():
        images = 3 * torch.randn(DESCRIBED_AT_ONCE + 3, 3, 64, 64)
        settings: dict[str, Any] = {"start": START, "end": END, "beams": 3, "per_beam": 2, "never": (PAD, START)}
        together = model.describe(images, **settings)
        apart = [model.describe(image[None], **settings)[0] for image in images]
        backwards = model.describe(images.flip(0), **settings)
    assert len({tuple(row) for row in together}) > 1
    assert together == apart == backwards[::-1]
    assert not {PAD, START, END} & {token for row in together for token in row}
    assert all(len(row) <= 8 for row in together)


def test_grid_is_the_last_map() -> None:
    model = captioner()
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    features = model.visual.features(images, dense=True)
    torch.testing.assert_close(model.cells(images), features.maps[32].flatten(2).transpose(1, 2))
    torch.testing.assert_close(model.cells(images).mean(1), features.pooled_BD)
    assert settle_grid(model.visual, 64, stride=32).shape == (1, 4, 96)


def test_unsuitable_towers_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"its grid is 2 x 2, a stride of 32, not grid_stride=16"):
        captioner(grid_stride=16)
    with pytest.raises(UserError, match=r"weights that captions never train \(net\.attnpool"):
        settle_grid(build_visual(VisualConfig(arch="open_clip:RN50", image_size=64, kwargs={"width": 8})), 64)
    with pytest.raises(UserError, match="has no grid of image tokens"):
        settle_grid(build_visual(VisualConfig(arch="torchvision:mobilenet_v3_small", image_size=64)), 64)


def test_a_norm_behind_the_pooling_is_frozen() -> None:
    tower = build_visual(VisualConfig(arch="timm:test_convnext", image_size=64))
    before = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    settle_grid(tower, 64)
    frozen = before - {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert frozen == {"net.head.norm.weight", "net.head.norm.bias"}
