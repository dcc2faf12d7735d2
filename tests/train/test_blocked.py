"""The blocked losses are the plain ones: value, every gradient, over ranks; and they hold no matrix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.recipes.test_recipes import batch_of
from tests.train.conftest import on_ranks
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.recipes.unicl.variants import caption_loss
from vlbench.train.blocked import blocked_cross_entropy
from vlbench.train.config import PretrainConfig
from vlbench.train.distributed import ranks, session
from vlbench.train.loop import fit
from vlbench.train.losses import align_loss, clip_loss, image_to_text_loss, supcon_loss, unicl_loss

LABELS = torch.tensor([0, 0, 1, 2, -1, 1, -1, 5, 5, 5, -1, 3] * 4)

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "clip": lambda u, v, s, labels, block: clip_loss(u, v, s, block=block),
    "unicl": lambda u, v, s, labels, block: unicl_loss(u, v, labels, s, block=block),
    "image_to_text": lambda u, v, s, labels, block: image_to_text_loss(u, v, labels, s, block=block),
    "align": lambda u, v, s, labels, block: align_loss(u, v, 1 / s, block=block),
    "align, unsmoothed": lambda u, v, s, labels, block: align_loss(u, v, 1 / s, 0.0, block=block),
    "supcon": lambda u, v, s, labels, block: sum(supcon_loss(z, labels, 1 / s, block=block) for z in (u, v)),
    "captions": lambda u, v, s, labels, block: caption_loss(u, v, labels, s, block=block),
}


def inputs(dtype: torch.dtype, rows: int = 48, width: int = 9) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    u, v = (F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    tensors = (u.to(dtype), v.to(dtype), torch.tensor(14.3, dtype=dtype))
    return tuple(tensor.requires_grad_() for tensor in tensors)


def value_and_gradients(kind: str, given: tuple[torch.Tensor, ...], block: int | None) -> list[torch.Tensor]:
    loss = LOSSES[kind](*given, LABELS[: len(given[0])], block)
    return [loss.detach(), *torch.autograd.grad(3 * loss, given)]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("block", [1, 7, 16, 48, 1000])
def test_blocked_is_the_plain_loss_value_and_gradients(kind: str, block: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        given = inputs(dtype)
        plain, blocked = (value_and_gradients(kind, given, rows) for rows in (None, block))
        for mine, theirs in zip(blocked, plain, strict=True):
            assert mine.dtype == theirs.dtype
            assert theirs.abs().max() > 1e-3
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", LOSSES)
def test_blocked_gradient_is_that_of_finite_differences(kind: str) -> None:
    given = inputs(torch.float64, rows=12, width=3)
    assert torch.autograd.gradcheck(lambda *x: LOSSES[kind](*x, LABELS[:12], 5), given)


def test_blocked_survives_extreme_logits() -> None:
    """A softmax that is taken row by row must not overflow where the whole one does not."""
    u, v, _ = inputs(torch.float32)
    steep = torch.tensor(1e4, requires_grad=True)
    plain, blocked = (value_and_gradients("clip", (u, v, steep), rows) for rows in (None, 7))
    for mine, theirs in zip(blocked, plain, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_blocked_of_one_pair_and_without_gradient() -> None:
    u, v, s = inputs(torch.float64, rows=1)
    assert clip_loss(u, v, s, block=4).item() == 0.0
    with torch.no_grad():
        wide = inputs(torch.float64)
        assert clip_loss(*wide, block=5).item() == pytest.approx(clip_loss(*wide).item(), abs=1e-12)
    assert clip_loss(u.detach(), v.detach(), 7.0, block=1).item() == 0.0


def test_blocked_is_computed_in_float32_under_autocast() -> None:
    u, v, s = inputs(torch.float32)
    exact = clip_loss(u, v, s, block=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip_loss(u, v, s, block=5), exact)
    assert clip_loss(u.bfloat16(), v.bfloat16(), s, block=5).dtype == torch.float32


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("kind", LOSSES)
def test_blocked_holds_no_more_than_a_block_or_an_embedding_matrix(kind: str) -> None:
    """Forward and backward, truth values included: 48 x 48 never, 4 x 48 and 48 x 9 at most."""
    for block, largest in ((4, 48 * 9), (None, 48 * 48)):
        given = inputs(torch.float32)
        with Largest() as seen:
            value_and_gradients(kind, given, block)
        assert seen.elements == largest


@pytest.mark.parametrize("kind", LOSSES)
def test_blocked_over_two_ranks_equals_the_plain_loss_of_one_process(kind: str, tmp_path: Path) -> None:
    """Value on each rank; gradients of a rank's own rows, and the mean over ranks of the scale's."""

    def on_rank() -> None:
        with session("cpu"):
            rank = ranks().rank
            mine = slice(24 * rank, 24 * rank + 24)
            u, v, s = (tensor.detach() for tensor in inputs(torch.float64))
            given = tuple(tensor.clone().requires_grad_() for tensor in (u[mine], v[mine], s))
            loss = LOSSES[kind](*given, LABELS[mine], 7)
            found = [loss.item(), *(gradient.tolist() for gradient in torch.autograd.grad(loss, given))]
            (tmp_path / str(rank)).write_text(json.dumps(found))

    on_ranks(on_rank)
    given = inputs(torch.float64)
    loss = LOSSES[kind](*given, LABELS, None)
    whole = torch.autograd.grad(loss, given)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert [value[0] for value in found] == pytest.approx([loss.item()] * 2, abs=1e-12)
    for part in (1, 2):  # a mean over two ranks halves what either rank's rows got
        rows = np.concatenate([value[part] for value in found]) / 2
        np.testing.assert_allclose(rows, whole[part - 1].numpy(), rtol=0, atol=1e-12)
    assert np.mean([value[3] for value in found]) == pytest.approx(whole[2].item(), abs=1e-12)


@pytest.mark.parametrize("recipe", ["clip", "unicl", "unicl variant=image_to_text", "align"])
def test_recipes_take_their_losses_in_blocks(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noted(*args: torch.Tensor, block: int, **rest: object) -> torch.Tensor:
        asked.append(block)
        return blocked_cross_entropy(*args, block=block, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr("vlbench.train.losses.blocked_cross_entropy", noted)
    name, *settings = recipe.split()
    config = override(RECIPES.get(name).presets["tiny"], ["loss_block=5", *settings])
    pairs = RECIPES.get(name).contrastive(config)
    batch = {"labels_B": LABELS}
    blocked = pairs.contrast(*inputs(torch.float64), batch, config)
    assert asked
    assert set(asked) == {5}
    whole = pairs.contrast(*inputs(torch.float64), batch, override(config, ["loss_block=null"]))
    assert blocked.item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("labels", [[0], [-1], [0, 1, 2, -1], [-1] * 4, [3] * 4, [0, 0, -1, -1]])
@pytest.mark.parametrize("kind", ["supcon", "captions"])
def test_rows_that_count_for_nothing_are_worth_zero_in_blocks_too(kind: str, labels: list[int]) -> None:
    """No positive at all, no caption at all, no label at all; a batch of one."""
    given = inputs(torch.float64, rows=len(labels))
    plain, blocked = (LOSSES[kind](*given, torch.tensor(labels), block) for block in (None, 3))
    for mine, theirs in zip(
        (blocked, *torch.autograd.grad(blocked, given)), (plain, *torch.autograd.grad(plain, given))
    ):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["supcon", "multi_task", "label_embedding"])
def test_variants_take_their_own_losses_in_blocks(variant: str) -> None:
    """Through the model: the loss and every parameter's gradient are those of the whole matrix."""
    recipe = RECIPES.get("unicl")
    small = [
        "visual.image_size=32",
        "text.width=32",
        "text.layers=1",
        "text.heads=2",
        "embed_dim=16",
        f"variant={variant}",
    ]
    labels, found = [0, 0, 1, -1, -1, 1, -1, 2] if variant == "multi_task" else [0, 0, 1, 2, 1, 1, 0, 2], []
    for block in ("null", "3"):
        config = override(recipe.presets["tiny"], [*small, f"loss_block={block}"])
        torch.manual_seed(0)
        model = recipe.build(config, ("ring", "star", "wave"))
        loss = recipe.loss(model, batch_of(recipe, config, ["a ring", "two stars"] * 4, labels), config)["loss"]
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for mine, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("supervised", []),
        ("virtex", []),
        ("virtex", ["variant=masked_lm"]),
        ("muvla", []),
        ("unicl", ["variant=cross_entropy"]),
    ],
)
def test_a_block_where_there_is_no_matrix_is_refused_in_one_line(
    name: str, settings: list[str], tmp_path: Path
) -> None:
    recipe = RECIPES.get(name)
    config = override(recipe.presets["tiny"], ["loss_block=8", *settings])
    with pytest.raises(UserError, match=f"^loss_block=8: {name}.* does not compare .*; leave loss_block out$") as error:
        fit(recipe, config, out=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_block_of_no_rows_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="loss_block"):
        override(PretrainConfig(), ["loss_block=0"])
