"""``vlbench pretrain``: train a backbone under a recipe, into one folder."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlbench.core.config import difference, override, parse
from vlbench.core.errors import UserError
from vlbench.core.names import slug, unknown

if TYPE_CHECKING:
    from vlbench.train.config import PretrainConfig

RUNS = Path("runs")


def run(args: argparse.Namespace) -> int:
    """Train, and say where the checkpoint is and how to measure it. Always 0: what fails raises."""
    pretrain(args)
    return 0


def pretrain(args: argparse.Namespace) -> Path:
    """Train as ``args`` says. Returns the checkpoint."""
    from vlbench.core.catalog import RECIPES
    from vlbench.train import distributed
    from vlbench.train.loop import fit

    recipe = RECIPES.get(args.recipe)
    if args.preset not in recipe.presets:
        raise UserError(f"recipe {args.recipe}: {unknown('preset', args.preset, recipe.presets)}")
    with distributed.session(args.device) as device:
        first = distributed.ranks().first
        # Chosen by one rank for all: a name that is free for the first to look is taken for the second.
        out = Path(distributed.from_first(str(_folder(args, recipe.presets[args.preset].seed))))
        config, preset = _settings(args, recipe, out)
        if first:
            _introduce(args.recipe, preset, config, recipe.presets[preset], out, device)
        with _watcher(config, talk=first) as watcher:
            path = fit(recipe, config, out=out, resume=args.resume, device=device, preset=preset, watcher=watcher)
        if first:
            print(f"checkpoint: {path}")
            tasks = "linear,knn" if "text" not in recipe.needs else "zeroshot,linear,retrieval"
            print(f"measure it: vlbench eval --model {path} --tasks {tasks}", flush=True)
    return path


def _settings(args: argparse.Namespace, recipe: Any, out: Path) -> tuple[PretrainConfig, str]:
    """The resolved settings and the preset's name. A resumed run's own settings come before the preset's."""
    preset, base = args.preset, recipe.presets[args.preset]
    stored = _stored(args, out) if args.resume else None
    if stored is not None:
        preset = stored["preset"] if stored["preset"] in recipe.presets else preset
        base = parse(type(base), stored["config"], where=str(out / "config.json"))
    changes = {
        "data": list(args.data) if args.data else None,
        "seed": args.seed,
        "steps": args.steps,
        "checkpoint_every": args.checkpoint_every,
        "precision": args.precision,
        "compile": args.compile,
    }
    values = base.model_dump() | {key: value for key, value in changes.items() if value is not None}
    if args.backbone is not None:
        # The constructor settings belong to the preset's own network.
        kept = values["visual"]["kwargs"] if args.backbone == base.visual.arch else {}
        values["visual"] = values["visual"] | {"arch": args.backbone, "kwargs": kept}
    config = parse(type(base), values, where=f"pretrain {args.recipe}")
    return override(config, args.set) if args.set else config, preset


def _stored(args: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    from vlbench.train.checkpoint import read_settings

    stored = read_settings(out)
    if stored is None:
        return None
    if stored.get("recipe") != args.recipe:
        raise UserError(f"{out} is a run of {stored.get('recipe')}, not of {args.recipe}; give another --out")
    if args.preset not in ("tiny", stored.get("preset")):
        raise UserError(f"{out} was made with --preset {stored.get('preset')}, not {args.preset}; give another --out")
    return stored


def _folder(args: argparse.Namespace, default_seed: int) -> Path:
    """``--out``, else ``runs/<recipe>-<preset>-s<seed>``: the first free one, or with --resume the last used one."""
    if args.out is not None:
        return Path(args.out)
    seed = args.seed if args.seed is not None else default_seed
    names = _numbered(slug(f"{args.recipe}-{args.preset}-s{seed}"))
    last = RUNS / next(names)
    if args.resume and not last.exists():
        return last
    while last.exists():
        free = RUNS / next(names)
        if args.resume and not free.exists():
            return last
        last = free
    return last


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in itertools.count(2):
        yield f"{name}-{number}"


def _introduce(recipe: str, preset: str, config: PretrainConfig, base: Any, out: Path, device: Any) -> None:
    print(f"pretrain {recipe}, preset {preset}, on {device}: {config.steps} steps of {config.batch_size} images")
    print(f"  data: {', '.join(config.data) or 'none'}")
    print(f"  backbone: {config.visual.identity()} at {config.visual.image_size} px")
    changed = difference(config, base)
    for key, (before, now) in changed.items():
        print(f"  {key} = {now} (preset: {before})")
    print(f"  run folder: {out}", flush=True)


def _watcher(config: PretrainConfig, *, talk: bool) -> Any:
    import contextlib

    from vlbench.train.progress import Silent, watch

    sys.stdout.flush()
    return watch(config.steps, config.batch_size) if talk else contextlib.nullcontext(Silent())
