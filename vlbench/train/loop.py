"""The training loop, one for every recipe.

A run is a function of its settings: the data of a step, its learning rate and its random numbers (dropout, stochastic
depth) are computed from the step, never carried along. So a resumed run needs weights and optimizer state alone
to be, bit for bit, the run that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vlbench.core.cards import ModelCard
from vlbench.core.errors import RunError, UserError
from vlbench.core.types import Recipe
from vlbench.data.stream import BadTally
from vlbench.models.weights import asset_tensors, checkpoint_assets
from vlbench.train import checkpoint
from vlbench.train.batches import Batch
from vlbench.train.blocked import check_blocks
from vlbench.train.config import PretrainConfig
from vlbench.train.distributed import Ranks, barrier, from_first, gather_objects, ranks
from vlbench.train.feed import Feed, MixtureFeed
from vlbench.train.gradcache import cached_gradients, contrastive
from vlbench.train.optim import build_optimizer, set_learning_rate
from vlbench.train.progress import Silent, Watcher
from vlbench.train.recompute import recompute_blocks
from vlbench.train.run_config import RunConfig
from vlbench.train.schedule import learning_rate
from vlbench.train.sharding import clip_gradients, cut_model_state, cut_optimizer_state, shard_weights, whole_state

_INIT, _STEP = 0, 1  # keeps the two uses of one seed apart


class Diverged(RunError):
    """The loss or its gradient is not finite."""


@dataclass
class _Run:
    """What the steps of one run share."""

    recipe: Recipe
    config: RunConfig
    out: Path
    device: torch.device
    here: Ranks
    feed: Feed
    module: nn.Module
    """The model itself: what is saved."""
    model: nn.Module
    """The model as it is called: the module, or its data-parallel wrapper."""
    optimizer: torch.optim.Optimizer
    card: ModelCard
    identity: list[dict[str, Any]]
    """Of the data, as ``Feed.identity`` gives it."""
    assets: dict[str, bytes]
    """What the recipe learnt of the data before training."""
    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Spent on them, earlier sessions included."""
    saved_at: int | None = None
    clock: _Clock = field(default_factory=lambda: _Clock())


@dataclass
class _Clock:
    """Wall time since the last line of the log, and the part of it spent waiting for data."""

    start: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0


def fit(
    recipe: Recipe,
    config: RunConfig,
    *,
    out: Path,
    resume: bool = False,
    device: torch.device | str = "cpu",
    preset: str | None = None,
    watcher: Watcher | None = None,
    feed: Feed | None = None,
    after_save: Callable[[int, nn.Module], None] | None = None,
) -> Path:
    """Train, and return the path of the checkpoint.

    Args:
        recipe: what to train.
        config: an instance of the recipe's Config.
        out: the run's folder.
        resume: go on from the folder's checkpoint, or start where there is none yet.
        device: where to train. Under ``torchrun``, call this within ``distributed.session``.
        preset: the preset's name, noted in the run's settings.
        watcher: follows the run.
        feed: what to learn from; None: the mixture that ``config.data`` names.
        after_save: called on every rank, with the step and the model, once a checkpoint is on disk. The modes of the
            model (training, evaluation) are set back after it. A run killed before it returned goes on without it.

    Raises:
        UserError: for data that do not suit the recipe, a folder that holds a run, and settings, data or a number of
            ranks that changed before a resume.
        RunError: for too many bad examples.
        Diverged: for a loss or gradient that is not finite (the last good checkpoint stays).
    """
    here, watcher, device = ranks(), watcher or Silent(), torch.device(device)
    path = out / checkpoint.CHECKPOINT
    _check_division(config, here)
    if config.grad_cache:
        contrastive(recipe, config)
    check_blocks(recipe, config)
    if not resume:
        checkpoint.check_unused(out)
    saved = checkpoint.load(out, recipe=recipe.name, config=config) if resume else None
    if saved is not None and saved["step"] >= config.steps:
        watcher.say(f"this run is finished ({saved['step']} steps)")
        return path
    if feed is None:
        assert isinstance(config, PretrainConfig), "settings that name no data come with a feed"
        feed = MixtureFeed(recipe, config, here=here)
    assets = None if saved is None else checkpoint_assets(saved)
    run = _prepare(recipe, config, feed, out=out, device=device, here=here, assets=assets)
    if saved is not None:
        _restore(run, saved)
        watcher.say(f"resuming from step {run.step} of {config.steps}")
    barrier()  # every rank has looked into the folder before the first one writes there
    log = None
    if here.first:
        checkpoint.write_settings(out, recipe=recipe.name, preset=preset, config=config)
        log = checkpoint.Log(out / checkpoint.LOG, step=run.step)
    try:
        _train(run, log, watcher, after_save)
    finally:
        if log is not None:
            log.close()
    return path


def _train(
    run: _Run, log: checkpoint.Log | None, watcher: Watcher, after_save: Callable[[int, nn.Module], None] | None
) -> None:
    config = run.config
    stream = run.feed.batches(run.recipe, config, start=run.step, here=run.here, pin=run.device.type == "cuda")
    run.model.train()
    run.clock = _Clock()
    for step in range(run.step, config.steps):
        rate, parts, norm = _one_step(run, step, stream)
        run.step = step + 1
        run.clock.steps += 1
        last = run.step == config.steps
        elapsed = time.perf_counter() - run.clock.start
        watcher.step(
            run.step, loss=parts["loss"], images_per_second=run.clock.steps * config.batch_size / max(elapsed, 1e-9)
        )
        if run.step % config.log_every == 0 or last:
            record = _record(run, rate, parts, norm)
            if log is not None:
                log.write(record)
            watcher.record(record)
        if config.saves_at(run.step):
            _save(run, finished=last)
            if after_save is not None:
                _call(after_save, run)
    summary = _tally_of_all(run).summary()
    if summary:
        watcher.say(f"bad examples, replaced by others: {summary}")


def _call(after_save: Callable[[int, nn.Module], None], run: _Run) -> None:
    """Let it look at the model; its time is not the run's."""
    modes = [(module, module.training) for module in run.module.modules()]
    began = time.perf_counter()
    after_save(run.step, run.module)
    run.clock.start += time.perf_counter() - began
    for module, training in modes:
        module.training = training


def _one_step(run: _Run, step: int, stream: Iterator[Batch]) -> tuple[float, dict[str, float], float]:
    """One optimizer step. Returns the learning rate, the losses and the gradient norm before clipping."""
    config, optim = run.config, run.config.optim
    rate = learning_rate(step, steps=config.steps, peak=optim.lr, schedule=config.schedule)
    set_learning_rate(run.optimizer, rate)
    run.optimizer.zero_grad(set_to_none=True)
    total = _gradients(run, step, stream)
    limit = optim.clip_norm if optim.clip_norm is not None else math.inf
    clip = clip_gradients if config.shard else nn.utils.clip_grad_norm_
    norm = clip(run.module.parameters(), limit)
    # One transfer, hence one wait for the device, for everything that is looked at in a step.
    values = torch.stack([*total.values(), norm.float()]).tolist()
    parts, gradient = dict(zip(total, values)), values[-1]
    if not all(map(math.isfinite, values)):
        raise Diverged(_diverged(run, step, rate, parts, gradient))
    run.optimizer.step()
    run.recipe.after_step(run.module)
    return rate, parts, gradient


def _gradients(run: _Run, step: int, stream: Iterator[Batch]) -> dict[str, torch.Tensor]:
    """Leave the gradients of a step in the parameters, and return its losses: the mean over its parts."""
    config, exchange = run.config, partial(_synchronised, run.model)

    def seed(part: int) -> None:
        _seed(config.seed, _STEP, step, part, run.here.rank)  # after the loader, which draws numbers when it starts

    if config.grad_cache:
        return cached_gradients(run.recipe, run.model, _next(run, step, stream), config, seed=seed, exchange=exchange)
    total: dict[str, torch.Tensor] = {}
    for part in range(config.accumulate):
        batch = _next(run, step, stream)
        seed(part)
        with exchange(last=part == config.accumulate - 1):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                losses = run.recipe.loss(run.model, batch, config)
            (losses["loss"] / config.accumulate).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + value.detach().float() / config.accumulate
    return total


def _next(run: _Run, step: int, stream: Iterator[Batch]) -> Batch:
    start = time.perf_counter()
    batch = next(stream)
    run.clock.waited += time.perf_counter() - start
    batch["epoch"] = torch.tensor(step * run.config.batch_size / len(run.feed))
    return {name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()}


def _prepare(
    recipe: Recipe,
    config: RunConfig,
    feed: Feed,
    *,
    out: Path,
    device: torch.device,
    here: Ranks,
    assets: dict[str, bytes] | None,
) -> _Run:
    if assets is None:
        assets = from_first(recipe.learn_assets(config, feed.data) if here.first else {})
    recipe = recipe.with_assets(assets)
    _seed(config.seed, _INIT)
    module = recipe.build(config, feed.classes)
    card = recipe.export(module, config, feed.classes).card
    card = card.model_copy(update={"id": out.resolve().name, "seed": config.seed})
    if not config.shard:  # what is sharded must lie in the plain order, and goes to the device block by block
        # Channels last: convolutions are up to 1.4 times faster for it on CPUs, and GPUs prefer it in bfloat16.
        module = module.to(device, memory_format=torch.channels_last)
    if config.checkpoint_activations:
        recompute_blocks(module)
    if config.shard:
        shard_weights(module, device, bf16=config.precision == "bf16")
    if config.compile:
        module.compile()
    model: nn.Module = module
    if here.world > 1 and not config.shard:
        model = DistributedDataParallel(
            module, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    optimizer = build_optimizer(module, config.optim)
    return _Run(recipe, config, out, device, here, feed, module, model, optimizer, card, feed.identity(), assets)


def _restore(run: _Run, saved: dict[str, Any]) -> None:
    train = saved["train"]
    if train.get("world") != run.here.world:
        # Dropout masks belong to a rank, and sums over ranks are rounded differently.
        raise UserError(
            f"{run.out / checkpoint.CHECKPOINT}: made by {train.get('world')} processes, now {run.here.world}: a "
            f"resumed run would not be the same run; start {train.get('world')}, or a new run with another --out"
        )
    changed = _changed_data(train.get("data", []), run.identity)
    if changed:
        raise UserError(
            f"{run.out / checkpoint.CHECKPOINT}: the data have changed since ({'; '.join(changed)}): a resumed run "
            "would not be the same run; start a new one with another --out"
        )
    weights, moments = saved["model"], train["optimizer"]
    if run.config.shard:
        weights, moments = cut_model_state(run.module, weights), cut_optimizer_state(run.optimizer, moments)
    run.module.load_state_dict(weights)
    run.optimizer.load_state_dict(moments)
    run.step, run.saved_at, run.seconds = saved["step"], saved["step"], train["seconds"]
    run.feed.tally.add(train["bad"][run.here.rank])


def _changed_data(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """What differs, source by source, in words. Where they lie is a setting, which has been compared, or no matter."""
    if len(before) != len(now):
        return [f"{len(before)} sources, now {len(now)}"]
    return [
        f"{new['spec']}: {key} {old.get(key)}, now {new[key]}" if key == "examples" else f"{new['spec']}: other {key}"
        for old, new in zip(before, now)
        for key in new
        if key != "spec" and old.get(key) != new[key]
    ]


def _tally_of_all(run: _Run) -> BadTally:
    """The bad examples that all ranks met. Every rank must ask."""
    if run.here.world == 1:
        return run.feed.tally
    whole = BadTally(run.feed.tally.max_bad)
    for state in gather_objects(run.feed.tally.state()):
        whole.add(state)
    return whole


def _save(run: _Run, *, finished: bool) -> None:
    """Write the checkpoint. The last one needs no optimizer, which is two thirds of the file."""
    bad = gather_objects(run.feed.tally.state())
    weights, moments = run.module.state_dict(), None if finished else run.optimizer.state_dict()
    if run.config.shard:  # all ranks give their shards
        weights, moments = whole_state(weights), whole_state(moments)
    if run.here.first:
        samples = run.step * run.config.batch_size
        content: dict[str, Any] = {
            "recipe": run.recipe.name,
            "config": run.config.model_dump(mode="json"),
            "classes": list(run.feed.classes),
            "assets": asset_tensors(run.assets),
            "card": run.card.model_copy(update={"images_seen": samples}).model_dump(mode="json"),
            "model": weights,
            "step": run.step,
            "samples_seen": samples,
        }
        if not finished:
            content["train"] = {
                "optimizer": moments,
                "seconds": run.seconds + time.perf_counter() - run.clock.start,
                "world": run.here.world,
                "data": run.identity,
                "bad": bad,
            }
        checkpoint.save(run.out / checkpoint.CHECKPOINT, **content)
    run.saved_at = run.step


def _record(run: _Run, rate: float, parts: dict[str, float], norm: float) -> dict[str, Any]:
    """A line of the log; the clock starts anew."""
    now, clock = time.perf_counter(), run.clock
    elapsed = max(now - clock.start, 1e-9)
    run.seconds += elapsed
    run.clock = _Clock(start=now)
    return {
        "step": run.step,
        **parts,
        "lr": rate,
        "grad_norm": norm,
        "images_per_second": round(clock.steps * run.config.batch_size / elapsed, 1),
        "data_wait": round(clock.waited / elapsed, 4),
        "seconds": round(run.seconds, 3),
        "samples_seen": run.step * run.config.batch_size,
        "bad_examples": sum(_tally_of_all(run).counts().values()),
    }


def _diverged(run: _Run, step: int, rate: float, parts: dict[str, float], norm: float) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    path = run.out / checkpoint.CHECKPOINT
    kept = (
        "there is no checkpoint yet" if run.saved_at is None else f"the checkpoint of step {run.saved_at} stays: {path}"
    )
    return (
        f"step {step + 1}: not finite: {shown}, gradient norm {norm:.4g}, learning rate {rate:.3g}; {kept}. "
        "Try a lower optim.lr, a longer schedule.warmup or optim.clip_norm=1"
        + (", or precision=fp32" if run.config.precision == "bf16" else "")
        + f"; {run.out / checkpoint.LOG} shows how the gradient norm went"
    )


def _check_division(config: RunConfig, here: Ranks) -> None:
    if config.batch_size % (config.accumulate * here.world):
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {here.world} ranks in accumulate={config.accumulate} "
            f"parts; make it a multiple of {config.accumulate * here.world}"
        )


def _seed(*words: int) -> None:
    """Seed torch on all devices from several numbers, so that neighbouring steps and ranks share nothing."""
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))


def _synchronised(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """Ranks exchange gradients once a step, after its last part."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
