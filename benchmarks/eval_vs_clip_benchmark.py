"""vlbench against CLIP_benchmark 1.6.2: the same photographs, the same weights, one go, numbers compared.

    python benchmarks/eval_vs_clip_benchmark.py                       both models: ViT-S-32-alt at 224 px, tiny at 64 px
    python benchmarks/eval_vs_clip_benchmark.py --models tiny         a minute or two
    python benchmarks/eval_vs_clip_benchmark.py --parity              numbers only, on all 10,000 test photos

Zero-shot, linear probe and retrieval with random weights in a file: the peer in three runs, as it is used, vlbench in
one; then vlbench again from its feature store. The peer gets an environment of its own (made on the first call, kept
in the cache folder), with this environment's torch, torchvision and open_clip.

What is compared is told as it is:

- Zero-shot and retrieval are the same protocol; their numbers must agree to 1e-6.
- The linear probes are not: the peer's is ten epochs of AdamW at one learning rate, vlbench's a converged logistic
  regression whose penalty is chosen on held-out training images. So ours must be no worse than its interval allows.
- The peer's probe refuses to run without CUDA. On a CPU it runs "shimmed": under ``python -O``, which drops that
  assertion, with ``.cuda()`` doing nothing. Its arithmetic is untouched.

Photographs: CIFAR-10, or the images of ``--images``, enlarged to 320 x 240 and written as JPEG, so
that decoding costs what it does for photographs from the web. Captions are made up, all different, and as long as
people's (11.9 words on average).
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEER = "clip-benchmark==1.6.2"
BESIDE_PEER = ("requests", "numpy<2.4")  # not declared by it; with a newer numpy its accuracy() raises
SHARED = ("torch", "torchvision", "open_clip_torch", "timm", "pillow")
PHOTOGRAPHS = "hf:../shared/data/cifar10"
CAPTIONS = 5
TEMPLATES = ("a photo of a {c}.", "a blurry photo of a {c}.", "a photo of the small {c}.")
METRICS = {
    "zeroshot": ("acc1", "acc5", "mean_per_class_recall"),
    "retrieval": tuple(f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)),
}
# CLIP's two towers with a seventh of the width: what a 64-pixel model costs beside the harness around it.
TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
WORDS = (
    ("near", "beside", "behind", "under", "above", "across", "before", "opposite"),
    ("the", "a", "one", "another", "some", "this"),
    ("small", "large", "old", "new", "bright", "dark", "wet", "dusty", "quiet", "busy", "distant", "narrow"),
    ("street", "field", "harbour", "garden", "bridge", "kitchen", "hill", "window", "fence", "river", "market"),
)
SHIM = """
import sys, torch
torch.Tensor.cuda = lambda self, *a, **k: self
torch.nn.Module.cuda = lambda self, *a, **k: self
from clip_benchmark.cli import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Model:
    """One model, as each tool is told of it."""

    name: str
    title: str
    peer: tuple[str, ...]
    ours: tuple[str, ...]


@dataclass
class Run:
    """Wall seconds and numbers of one tool."""

    seconds: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)

    def total(self) -> float:
        """Seconds of all processes together."""
        return sum(self.seconds.values())


def main() -> int:
    """Run what was asked for. Returns 1 where numbers disagree."""
    from vlbench.data.sources import is_present

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-S-32-alt,tiny", help="of ViT-S-32-alt and tiny, by commas")
    parser.add_argument(
        "--images",
        help="labelled images with train and test, a data spec (default: CIFAR-10, else the embedded world)",
    )
    parser.add_argument("--test", type=int, default=1000, help="test photographs")
    parser.add_argument("--train", type=int, default=2000, help="training photographs of the probe")
    parser.add_argument("--parity", action="store_true", help="all test photographs as they are, and no timing")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="torch threads and loader processes of either tool"
    )
    parser.add_argument("--keep", metavar="DIR", help="work here and leave everything there")
    args = parser.parse_args()
    if args.images is None:
        args.images = PHOTOGRAPHS if is_present(PHOTOGRAPHS) else "shapes:classes"

    work = Path(args.keep or tempfile.mkdtemp(prefix="vlbench-peer-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        peer = peer_environment()
        write_data(work, args)
        return max([compare(model, work, peer, args) for model in write_models(work, args.models.split(","))])
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)


def compare(model: Model, work: Path, peer: Path, args: argparse.Namespace) -> int:
    """Run both tools on one model and print what came out. Returns 1 where numbers disagree."""
    print(f"\n## {model.title}", flush=True)
    theirs = run_peer(model, work, peer, args)
    ours = run_vlbench(model, work, args)
    again = run_vlbench(model, work, args, from_store=True)
    wrong = report_numbers(theirs, ours, again)
    if not args.parity:
        report_times(theirs, ours, again)
    return wrong


# --------------------------------------------------------------------------------------------------- the two tools


def run_peer(model: Model, work: Path, python: Path, args: argparse.Namespace) -> Run:
    """The peer's runs, one a task, each a process of its own as its command line has it."""
    run = Run()
    shutil.rmtree(work / model.name, ignore_errors=True)  # features of an earlier call, in a folder that was kept
    common = ["eval", *model.peer, "--num_workers", str(args.threads), "--batch_size", "64", "--no_amp"]
    jobs = {
        "zeroshot": ("zeroshot_classification", work / "photos", []),
        "retrieval": ("zeroshot_retrieval", work / "captioned", ["--recall_k", "1", "5", "10"]),
        "linear": (
            "linear_probe",
            work / "photos",
            ["--train_split", "train", "--test_split", "test", "--feature_root", str(work / model.name / "features")],
        ),
    }
    if args.parity:
        del jobs["linear"]
    for task, (name, data, more) in jobs.items():
        out = work / model.name / f"peer-{task}.json"
        out.parent.mkdir(exist_ok=True)
        words = [*common, "--dataset", f"wds/{data.name}", "--dataset_root", str(data), "--task", name]
        call = [str(python), "-O", "-c", SHIM] if task == "linear" else [str(python), "-m", "clip_benchmark.cli"]
        run.seconds[task] = timed([*call, *words, *more, "--output", str(out)], work, args.threads)
        run.numbers[task] = json.loads(out.read_text())["metrics"]
        print(f"  CLIP_benchmark {task}: {run.seconds[task]:.1f} s", flush=True)
    return run


def run_vlbench(model: Model, work: Path, args: argparse.Namespace, *, from_store: bool = False) -> Run:
    """Vlbench on all tasks in one call; ``from_store``: once more, with the features of the first call."""
    run = Run()
    results = work / model.name / ("again" if from_store else "results")
    if not from_store:
        shutil.rmtree(work / "cache", ignore_errors=True)
    tasks = "zeroshot,retrieval" if args.parity else "zeroshot,linear,retrieval"
    data = [word for name in ("photos", "captioned") for word in ("--data", f"wds:{work / name}")]
    call = [sys.executable, "-m", "vlbench", "eval", *model.ours, "--tasks", tasks, *data, "--name", "model"]
    call += ["--batch-size", "64", "--workers", str(args.threads), "--results", str(results)]
    run.seconds["all"] = timed(call, work, args.threads)
    for task, name in (("zeroshot", "photos"), ("linear", "photos"), ("retrieval", "captioned")):
        if task in tasks.split(","):
            stored = json.loads((results / "model" / task / f"{name}@v1.json").read_text())
            run.numbers[task] = {metric: found["value"] for metric, found in stored["estimates"].items()}
            run.numbers[task] |= {f"{metric}/hi": found["hi"] for metric, found in stored["estimates"].items()}
    print(f"  vlbench{' from its store' if from_store else ''}: {run.seconds['all']:.1f} s", flush=True)
    return run


def timed(call: list[str], work: Path, threads: int) -> float:
    """Wall seconds of one process. Both tools get the same threads, and OpenMP that does not spin while it waits."""
    quiet = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "3000",
        "HF_HUB_OFFLINE": "1",
    }
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {"VLBENCH_CACHE": str(work / "cache"), "PYTHONPATH": paths} if "vlbench" in call else {}
    began = time.perf_counter()
    done = subprocess.run(
        call, cwd=work, env={**os.environ, **quiet, **ours, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(call[:6])} ... failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return seconds


# -------------------------------------------------------------------------------------------------------- the report


def report_numbers(theirs: Run, ours: Run, again: Run) -> int:
    """Print every number beside the peer's. Returns 1 where they disagree."""
    from tabulate import tabulate

    rows, wrong = [], False
    for task, metrics in METRICS.items():
        for metric in metrics:
            pair = theirs.numbers[task][metric], ours.numbers[task][metric]
            same = abs(pair[0] - pair[1]) <= 1e-6 and again.numbers[task] == ours.numbers[task]
            wrong |= not same
            rows.append((task, metric, f"{pair[0]:.6f}", f"{pair[1]:.6f}", "equal" if same else "DIFFERENT"))
    if "linear" in theirs.numbers:
        peer, value = theirs.numbers["linear"]["lp_acc1"], ours.numbers["linear"]["acc1"]
        no_worse = ours.numbers["linear"]["acc1/hi"] >= peer
        wrong |= not no_worse
        verdict = "another protocol; ours no lower" if no_worse else "OURS IS LOWER"
        rows.append(("linear", "acc1", f"{peer:.6f}", f"{value:.6f}", verdict))
    headers = ("task", "metric", "CLIP_benchmark", "vlbench", "")
    print("\n" + tabulate(rows, headers, disable_numparse=True), flush=True)
    return int(wrong)


def report_times(theirs: Run, ours: Run, again: Run) -> None:
    """Print wall times and ratios."""
    shimmed = ", its probe shimmed" if not has_cuda() else ""
    print(
        f"\nCLIP_benchmark {theirs.total():.1f} s in three runs{shimmed}; vlbench {ours.total():.1f} s in one: "
        f"{theirs.total() / ours.total():.1f} times faster\n"
        f"vlbench from its feature store {again.total():.1f} s: {theirs.total() / again.total():.1f} times faster",
        flush=True,
    )


def has_cuda() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


# -------------------------------------------------------------------------------------------------- what they run on


def peer_environment() -> Path:
    """The Python of an environment with the peer in it, made on the first call."""
    from vlbench.core.paths import cache_dir

    shared = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in SHARED]
    home = cache_dir() / "peers" / PEER.replace("==", "-")
    python, stamp = home / "bin" / "python", home / "installed.txt"
    wanted = "\n".join([PEER, *BESIDE_PEER, *shared])
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making an environment for {PEER} in {home} ...", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted.split("\n")], check=True)
        stamp.write_text(wanted)
    return python


def write_data(work: Path, args: argparse.Namespace) -> None:
    """``photos`` (train, test) and ``captioned`` (the same test photographs) in the peer's webdataset layout."""
    from vlbench.data.sources import open_source

    splits = {split: open_source(args.images, split) for split in ("train", "test")}
    classes = splits["test"].classes
    if classes is None:
        raise SystemExit(f"{args.images}: has no labels")
    samples = {}
    for split, wanted in (("train", args.train), ("test", len(splits["test"]) if args.parity else args.test)):
        source = splits[split]
        chosen = random.Random(0).sample(range(len(source)), min(wanted, len(source)))
        samples[split] = [photograph(source[index], as_it_is=args.parity) for index in sorted(chosen)]
    labelled = {
        split: [[(ext, image), ("cls", str(label).encode())] for ext, image, label in found]
        for split, found in samples.items()
    }
    write_wds(work / "photos", labelled)
    (work / "photos" / "classnames.txt").write_text("\n".join(classes) + "\n")
    (work / "photos" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    sentences = captions(classes)
    captioned = [
        [(ext, image), ("txt", "\n".join(next(sentences)(label) for _ in range(CAPTIONS)).encode())]
        for ext, image, label in samples["test"]
    ]
    write_wds(work / "captioned", {"test": captioned})
    (work / "captioned" / "dataset_type.txt").write_text("retrieval\n")
    print(f"{len(samples['test']):,} test and {len(samples['train']):,} training photographs, {CAPTIONS} captions each")


def photograph(example: Any, *, as_it_is: bool) -> tuple[str, bytes, int]:
    """Extension, bytes and label of one example."""
    from PIL import Image

    image = Image.open(io.BytesIO(example.image))
    if as_it_is:
        return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[str(image.format)], example.image, example.label
    buffer = io.BytesIO()
    image.convert("RGB").resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return "jpg", buffer.getvalue(), example.label


def captions(classes: tuple[str, ...]) -> Iterator[Callable[[int], str]]:
    """An endless stream of makers of captions, no two alike, of 5 to 25 words: 11.9 on average, give or take 3.8.

    That is how long the English captions of Multi30k's test set of 2016 are. Length matters: the peer pads every
    caption to 77 tokens.
    """
    rng = random.Random(1)
    seen = set()
    while True:
        words = min(25, max(5, round(rng.gauss(11.9, 3.8))))
        tail = ["waits", *(rng.choice(WORDS[place % len(WORDS)]) for place in range(words - 3))]
        text = " ".join(tail)
        if text not in seen:
            seen.add(text)
            yield lambda label, text=text: f"a {classes[label]} {text}"


def write_wds(root: Path, splits: dict[str, list[list[tuple[str, bytes]]]], per_shard: int = 500) -> None:
    """Shards of samples, each a list of (extension, bytes)."""
    for split, samples in splits.items():
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(samples), per_shard)
        for shard, start in enumerate(starts):
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for number, files in enumerate(samples[start : start + per_shard], start=start):
                    for extension, content in files:
                        member = tarfile.TarInfo(f"s{number:07d}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        (folder / "nshards.txt").write_text(f"{len(starts)}\n")


def write_models(work: Path, wanted: list[str]) -> list[Model]:
    """Random weights in files, as both tools read them."""
    import open_clip
    import torch

    models = []
    for name in wanted:
        torch.manual_seed(0)
        if name == "tiny":
            folder = work / "tiny-model"
            folder.mkdir(exist_ok=True)
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
            config = {key: TINY[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
            model = open_clip.CLIP(**config)
            torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
            title = "a tiny model at 64 px: the harness is the work"
            peer = ("--model", f"local-dir:{folder}", "--pretrained", "tiny")
            models.append(Model(name, title, peer, ("--model", f"open_clip:local-dir:{folder}")))
        else:
            file = work / f"{name}.pt"
            torch.save(open_clip.create_model(name, pretrained=None).state_dict(), file)
            peer = ("--model", name, "--pretrained", str(file))
            ours = ("--model", f"open_clip:{name}", "--weights", str(file))
            models.append(Model(name, f"{name}: the encoder is the work", peer, ours))
    return models


if __name__ == "__main__":
    sys.exit(main())
