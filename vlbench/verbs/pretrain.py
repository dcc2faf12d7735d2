"""``vlbench pretrain``: train a backbone under a recipe, into one folder."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vlbench.core.config import difference, override, parse
from vlbench.core.errors import UserError
from vlbench.core.names import slug, unknown
from vlbench.data.shapes.reader import make_meanwhile
from vlbench.verbs import machine

if TYPE_CHECKING:
    from vlbench.train.config import PretrainConfig

RUNS = Path("runs")
LOCK = ".lock"
"""In a run's folder: held by the process that trains there."""


def run(args: argparse.Namespace) -> int:
    """Train, and say where the checkpoint is and how to measure it. Always 0: what fails raises."""
    pretrain(args)
    return 0


def pretrain(args: argparse.Namespace) -> Path:
    """Train as ``args`` says. Returns the checkpoint.

    With ``args.resume``, what is typed goes on with the folder's own settings and may leave them out. A caller that
    sets ``args.exact`` means the preset with its changes and nothing else; a folder of another run is then an error.
    """
    if not args.data and args.preset == "tiny" and os.environ.get("RANK", "0") == "0":
        make_meanwhile()  # every tiny preset trains on the embedded world
    from vlbench.train import distributed
    from vlbench.train.loop import fit

    machine.keep_freed_memory()
    recipe = _recipe(args)
    with distributed.session(args.device) as device, _claimed(args, recipe.presets[args.preset].seed) as out:
        first = distributed.ranks().first
        config, preset, unused = _settings(args, recipe, out)
        if first:
            _introduce(args.recipe, preset, config, recipe.presets[preset], out, device, unused)
        with _watcher(config, talk=first) as watcher:
            path = fit(recipe, config, out=out, resume=args.resume, device=device, preset=preset, watcher=watcher)
        if first:
            print(f"checkpoint: {path}")
            print(f"measure it: vlbench eval --model {path} --tasks {','.join(_kinds(path))}", flush=True)
    return path


def _kinds(path: Path) -> list[str]:
    """Kinds of task that suit what was trained, by what its card provides."""
    from vlbench.models.weights import read_checkpoint

    provides = read_checkpoint(path)["card"]["provides"]
    kinds = ["linear", "knn"] if "pooled" in provides else []  # fixed region features train no backbone
    kinds = ["zeroshot", "linear", "retrieval"] if "text" in provides else kinds
    return kinds + [kind for part, kind in (("captions", "captioning"), ("match", "matching")) if part in provides]


def check(args: argparse.Namespace) -> PretrainConfig:
    """The settings that ``pretrain`` would start a new run with, all data taken. Raises UserError as it would."""
    return _changed(args, _recipe(args).presets[args.preset])


def _recipe(args: argparse.Namespace) -> Any:
    from vlbench.core.catalog import RECIPES

    recipe = RECIPES.get(args.recipe)
    if args.preset not in recipe.presets:
        raise UserError(f"recipe {args.recipe}: {unknown('preset', args.preset, recipe.presets)}")
    return recipe


def _settings(args: argparse.Namespace, recipe: Any, out: Path) -> tuple[PretrainConfig, str, tuple[str, ...]]:
    """The resolved settings, the preset's name, and those of its data that the variant has no use for.

    A resumed run's own settings come before the preset's. Data that are named are taken as they are named.
    """
    preset, base = args.preset, recipe.presets[args.preset]
    stored = _stored(args, out) if args.resume and not getattr(args, "exact", False) else None
    if stored is not None:
        preset = stored["preset"] if stored["preset"] in recipe.presets else preset
        base = parse(type(base), stored["config"], where=str(out / "config.json"))
    config, unused = _changed(args, base), ()
    if not _names_data(args) and recipe.needs_of(config) != recipe.needs_of(base):
        from vlbench.train.batches import usable_data

        kept = usable_data(recipe, config)
        unused = tuple(spec for spec in config.data if spec not in kept)
        config = config.model_copy(update={"data": kept})
    return config, preset, unused


def _names_data(args: argparse.Namespace) -> bool:
    return bool(args.data) or any(assignment.partition("=")[0] == "data" for assignment in args.set)


def _changed(args: argparse.Namespace, base: PretrainConfig) -> PretrainConfig:
    """``base`` with what ``args`` changes."""
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
    if args.variant is not None:
        values["variant"] = _variant(args, type(base))
    config = parse(type(base), values, where=f"pretrain {args.recipe}")
    return override(config, args.set) if args.set else config


def _variant(args: argparse.Namespace, kind: type[PretrainConfig]) -> str:
    known = variants_of(kind)
    if not known:
        raise UserError(f"recipe {args.recipe} has no variants; leave --variant out")
    if args.variant not in known:
        raise UserError(f"recipe {args.recipe}: {unknown('variant', args.variant, known)}")
    return str(args.variant)


def variants_of(kind: type[PretrainConfig]) -> tuple[str, ...]:
    """The values that the setting ``variant`` takes; none where the recipe has no such setting."""
    field = kind.model_fields.get("variant")
    return get_args(field.annotation) if field is not None else ()


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


@contextlib.contextmanager
def _claimed(args: argparse.Namespace, default_seed: int) -> Iterator[Path]:
    """The run's folder, chosen and held by one rank for all: what is free for the first is taken for the second."""
    from vlbench.train import distributed

    with contextlib.ExitStack() as stack:
        out, refused = "", ""
        if distributed.ranks().first:
            try:
                out = str(stack.enter_context(_held(args, default_seed)))
            except UserError as error:
                refused = str(error)
        out, refused = distributed.from_first((out, refused))
        if refused:
            raise UserError(refused)
        yield Path(out)


@contextlib.contextmanager
def _held(args: argparse.Namespace, default_seed: int) -> Iterator[Path]:
    """The folder, locked against other processes; it is removed again where nothing came of it."""
    from filelock import FileLock, Timeout

    folder = _folder(args, default_seed)
    name = folder or RUNS / "new"
    absent = [path for path in (name, *name.parents) if not path.exists()]
    try:
        if folder is None:
            folder = _new_folder(args, default_seed)
            absent[0] = folder
        else:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {error.filename or folder} cannot be made: {error.strerror}") from None
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=_patience())
    except Timeout:
        raise UserError(
            f"{folder} is in use by another `vlbench pretrain`; wait for its end, or give another --out"
        ) from None
    try:
        yield folder
    finally:
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
        lock.release()
        with contextlib.suppress(OSError):  # raised where something is in it
            for path in absent:
                path.rmdir()


def _patience() -> float:
    """Seconds to wait for the lock.

    Where torchrun starts its processes again after one has died, the loader processes of the first rank before may
    still hold it: they look for their parent every five seconds.
    """
    return 60 if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else 0


def _folder(args: argparse.Namespace, default_seed: int) -> Path | None:
    """``--out``, or with --resume the last used folder of the default name. None: a new one is wanted."""
    if args.out is not None:
        return Path(args.out)
    last = None
    if args.resume:
        for name in _names(args, default_seed):
            if not (RUNS / name).exists():
                break
            last = RUNS / name
    return last


def _new_folder(args: argparse.Namespace, default_seed: int) -> Path:
    """The first free folder of the default name, made here: who makes a folder has it, however many look."""
    for name in _names(args, default_seed):
        with contextlib.suppress(FileExistsError):
            (RUNS / name).mkdir(parents=True)
            return RUNS / name
    raise AssertionError("there is always a next name")


def _names(args: argparse.Namespace, default_seed: int) -> Iterator[str]:
    seed = args.seed if args.seed is not None else default_seed
    words = [args.recipe, args.variant, args.preset, f"s{seed}"]
    return _numbered(slug("-".join(word for word in words if word is not None)))


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in itertools.count(2):
        yield f"{name}-{number}"


def _introduce(
    recipe: str, preset: str, config: PretrainConfig, base: Any, out: Path, device: Any, unused: Sequence[str]
) -> None:
    print(f"pretrain {recipe}, preset {preset}, on {device}: {config.steps} steps of {config.batch_size} images")
    print(f"  data: {', '.join(config.data) or 'none'}")
    if unused:
        from vlbench.train.run_config import learner

        print(f"    of the preset's; {learner(recipe, config)} has no use for {', '.join(unused)}")
    print(f"  backbone: {config.visual.identity()} at {config.visual.image_size} px")
    changed = difference(config, base)
    for key, (before, now) in changed.items():
        print(f"  {key} = {now} (preset: {before})")
    print(f"  run folder: {out}", flush=True)


def _watcher(config: PretrainConfig, *, talk: bool) -> Any:
    from vlbench.train.progress import Silent, watch

    sys.stdout.flush()
    return watch(config.steps, config.batch_size) if talk else contextlib.nullcontext(Silent())
