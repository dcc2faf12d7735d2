"""A contrastive step over more pairs than fit in memory: embeddings first, gradients after (Gao et al., 2101.06983).

Accumulated gradients know the negatives of one part only. Here all parts are embedded without gradients; the loss of
the whole batch is taken on the embeddings, and its gradient with respect to them and to the logit scale; then each
part is embedded once more, and sends its share of that gradient back through the towers. By the chain rule the sum over
parts is the gradient of the whole batch, for towers that treat each pair alone. BatchNorm does not: its statistics
are a part's, as under any accumulation.

What makes it exact, and each is tested:

- both passes of a part draw the same dropout masks: the seed is set anew before each;
- the first pass leaves no trace in buffers, so that BatchNorm counts a part once;
- the logit scale's gradient is taken once for the batch and divided among the parts. Taken in each part of a cached
  loss it would come out n times too large;
- over ranks the loss is that of ``train/losses.py``: the embeddings' gradients are such that the mean over ranks of
  the parameters' gradients is the gradient of the whole batch. Ranks exchange it once, with the last part.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlbench.core.errors import UserError
from vlbench.core.types import Recipe
from vlbench.train.run_config import RunConfig, learner

Batch = Mapping[str, torch.Tensor]


class Contrastive(Protocol):
    """A recipe whose loss looks at a batch through the embeddings alone."""

    def embed(self, model: nn.Module, batch: Batch, config: Any) -> tuple[torch.Tensor, ...]:
        """``(image_BE, text_BE, logit_scale)``."""

    def loss(self, model: nn.Module, batch: Batch, config: Any) -> dict[str, torch.Tensor]:
        """As ``core.types.Recipe.loss``; it uses the model by ``embed`` and in no other way."""


def contrastive(recipe: Recipe, config: RunConfig) -> Contrastive:
    """The part of ``recipe`` that embeds and compares.

    Raises:
        UserError: for a recipe whose loss is no comparison of embeddings.
    """
    found = getattr(recipe, "contrastive", lambda _: None)(config)
    if found is None:
        raise UserError(
            f"grad_cache=true: {learner(recipe.name, config)} does not compare images with texts across the batch, so "
            "there is nothing to cache; leave grad_cache out, accumulate alone is exact or as near as it gets"
        )
    return cast(Contrastive, found)


def cached_gradients(
    recipe: Recipe,
    model: nn.Module,
    batch: Batch,
    config: RunConfig,
    *,
    seed: Callable[[int], None],
    exchange: Callable[..., contextlib.AbstractContextManager[None]],
) -> dict[str, torch.Tensor]:
    """Add the gradients of a step to the parameters' ``grad``.

    Args:
        recipe: one that ``contrastive`` takes.
        model: as it is called: the module, or its data-parallel wrapper.
        batch: this rank's whole share of the step; it is cut into ``config.accumulate`` parts here.
        config: of the run.
        seed: seeds what a part draws, given its number.
        exchange: given ``last``, the context of a part's backward pass, in which ranks exchange gradients or do not.

    Returns:
        What the recipe's loss returned for the whole batch, without gradients.
    """
    pairs = contrastive(recipe, config)
    parts = _cut(batch, config.accumulate)
    device = next(model.parameters()).device

    def precision() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    embedded = []
    module = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.no_grad(), _buffers_kept(module):
        for number, part in enumerate(parts):
            seed(number)
            with precision():
                embedded.append(pairs.embed(module, part, config))
    images, texts, scales = zip(*embedded, strict=True)
    cached = [torch.cat(images), torch.cat(texts), scales[0].clone()]
    with precision():
        losses = _loss_of(pairs, cached, model, batch, config)
    losses["loss"].backward()
    gradients = [_gradient(leaf) for leaf in cached]
    shares = zip(*(side.chunk(len(parts)) for side in gradients[:2]), strict=True)
    for number, (part, (image_BE, text_BE)) in enumerate(zip(parts, shares, strict=True)):
        seed(number)
        with exchange(last=number == len(parts) - 1):
            with precision():
                outputs = pairs.embed(model, part, config)
            sent = zip(outputs, (image_BE, text_BE, gradients[2] / len(parts)), strict=True)
            learned = [(output, gradient) for output, gradient in sent if output.requires_grad]
            torch.autograd.backward([output for output, _ in learned], [gradient for _, gradient in learned])
    return {name: value.detach().float() for name, value in losses.items()}


def _loss_of(
    pairs: Contrastive, cached: list[torch.Tensor], model: nn.Module, batch: Batch, config: RunConfig
) -> dict[str, torch.Tensor]:
    """The recipe's own loss, on embeddings that are there already and collect gradients."""
    for leaf in cached:
        leaf.requires_grad_()
    given: Any = copy.copy(pairs)
    given.embed = lambda *_: tuple(cached)
    losses: dict[str, torch.Tensor] = given.loss(model, batch, config)
    return losses


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None, "the recipe's loss uses what embed() returns, all of it"
    return leaf.grad


def _cut(batch: Batch, count: int) -> list[dict[str, torch.Tensor]]:
    """Equal parts of a batch; a scalar belongs to all."""
    rows = {len(tensor) for tensor in batch.values() if tensor.ndim}
    assert len(rows) == 1, f"a batch that can be cut has one row a pair, not {sorted(rows)}"
    assert rows.pop() % count == 0, "the loop has checked that parts are equal"
    columns = {name: tensor.chunk(count) if tensor.ndim else [tensor] * count for name, tensor in batch.items()}
    return [{name: column[number] for name, column in columns.items()} for number in range(count)]


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers as they were afterwards: running statistics, and whatever else a forward pass writes."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, content in before:
            buffer.copy_(content)
