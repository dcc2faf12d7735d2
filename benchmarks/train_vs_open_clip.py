"""vlbench against open_clip's trainer: the same towers, batches, shards and precision, in turn; images/s and memory.

    python benchmarks/train_vs_open_clip.py                      a small ViT at 64 px, about five minutes
    python benchmarks/train_vs_open_clip.py --pairs 1 --steps 8  a first look
    python benchmarks/train_vs_open_clip.py --model ViT-B-32 --batch-size 1024 --workers 8 --data 'cc3m/{000..331}.tar'

The peer is ``open_clip_train``, which the package open_clip_torch brings along. It needs an older webdataset than ours;
that one package is put into a folder of its own on the first call and kept in the cache folder. On a GPU both train
with bfloat16 autocast, on a CPU in float32. Each run is a process of its own; they alternate, and the median of the
pairs' ratios counts.

What is the same: the architecture (the numbers of parameters are compared), batch size, image size, crop (area 0.9 to
1, bicubic), AdamW, loss, threads, loader processes, the shards. What each does in its own way, and is meant to: reading
shards (a stream with a shuffle buffer; by offset), padding captions (to the context; to the longest of a batch),
normalising (in the loader; on the device), the optimizer's kernel, the memory that is kept, what is logged.

Time is that between two optimizer steps after the warm-up, waiting for data included; the same hook of torch takes it
in both tools. Memory is the peak of the GPU's allocator, or on a CPU of the whole process tree, with pages that several
processes share counted once.

Data: the pairs of the embedded world, enlarged to JPEGs of 256 px as img2dataset would store photographs, in its
layout.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# CLIP's two towers with a quarter of the width and a third of the depth: what two cores train at some hundred images/s.
SMALL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
TOOLS = ("open_clip", "vlbench")
STORED_SIDE = 256  # img2dataset's default
SHARDS = 8
POLL_SECONDS = 0.5
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """What one run gave."""

    images_per_second: float
    peak_mib: float
    params: int


def main() -> int:
    """Run the pairs and print them. Returns 1 where ours is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small, or a ViT or ResNet of open_clip by name")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them that are not")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of either tool")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch threads of either tool"
    )
    parser.add_argument("--context", type=int, help="tokens of a caption at most (default: the model's)")
    parser.add_argument(
        "--data", help="shards of img2dataset, one path or a brace pattern (default: the embedded world)"
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU though there is a GPU")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="vlbench-train-") as folder:
        work = Path(folder)
        args.device = "cpu" if args.cpu or not has_cuda() else "cuda"
        args.shards = args.data or write_shards(work / "data", (args.warmup + args.steps) * args.batch_size)
        args.config = model_config(args)
        args.peer_packages = peer_packages()
        runs: dict[str, list[Run]] = {tool: [] for tool in TOOLS}
        for pair in range(args.pairs):
            for tool in TOOLS:
                runs[tool].append(run(tool, work / f"{tool}{pair}", args))
                done = runs[tool][-1]
                print(f"  pair {pair + 1}: {tool:9} {done.images_per_second:8.1f} images/s, {done.peak_mib:,.0f} MiB")
                sys.stdout.flush()
    return report(runs, args)


def report(runs: dict[str, list[Run]], args: argparse.Namespace) -> int:
    """Print the medians and the two ratios. Returns 1 where ours is slower."""
    from tabulate import tabulate

    rows = [
        (
            tool,
            f"{runs[tool][0].params:,}",
            f"{statistics.median(run.images_per_second for run in runs[tool]):.1f}",
            f"{statistics.median(run.peak_mib for run in runs[tool]):,.0f}",
        )
        for tool in TOOLS
    ]
    where = "GPU, bfloat16" if args.device == "cuda" else f"{args.threads} CPU threads, float32"
    print(f"\n{args.model}, batch {args.batch_size}, {args.workers} loader processes, {where}: {args.pairs} pairs")
    print("\n" + tabulate(rows, ("trainer", "parameters", "images/s", "peak MiB"), disable_numparse=True) + "\n")
    speed = ratios(runs, "images_per_second")
    memory = ratios(runs, "peak_mib")
    print(
        f"images/s, vlbench over open_clip: {statistics.median(speed):.2f} (pairs {min(speed):.2f} to {max(speed):.2f})"
    )
    print(f"memory, vlbench over open_clip: {statistics.median(memory):.2f}")
    if len({run.params for tool in TOOLS for run in runs[tool]}) > 1:
        raise SystemExit("the two models have not the same number of parameters: nothing was compared")
    return int(statistics.median(speed) < 1)


def ratios(runs: dict[str, list[Run]], name: str) -> list[float]:
    """Ours over theirs, pair by pair."""
    theirs, ours = (runs[tool] for tool in TOOLS)
    return [getattr(b, name) / getattr(a, name) for a, b in zip(theirs, ours, strict=True)]


# --------------------------------------------------------------------------------------------------- the two trainers


def run(tool: str, out: Path, args: argparse.Namespace) -> Run:
    """One training run in a process of its own."""
    out.mkdir()
    words = open_clip_words(out, args) if tool == "open_clip" else vlbench_words(out, args)
    report = out / "report.json"
    call = [sys.executable, __file__, "--probe", tool, str(report), str(args.warmup), str(args.steps), *words]
    first = args.peer_packages if tool == "open_clip" else Path(__file__).resolve().parents[1]
    quiet = {
        "OMP_NUM_THREADS": str(args.threads),
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(first), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if args.device == "cpu":
        quiet["CUDA_VISIBLE_DEVICES"] = ""
    with (out / "output.txt").open("w") as output:
        process = subprocess.Popen(call, cwd=out, env=os.environ | quiet, stdout=output, stderr=subprocess.STDOUT)
        memory = PeakMemory(process.pid)
        memory.start()
        status = process.wait()
    if status or not report.is_file():
        raise SystemExit(f"{tool} failed ({status}):\n{(out / 'output.txt').read_text()[-4000:]}")
    found = json.loads(report.read_text())
    rate = args.steps * args.batch_size / found["seconds"]
    return Run(rate, found["peak_mib"] if args.device == "cuda" else memory.peak_mib(), found["params"])


def open_clip_words(out: Path, args: argparse.Namespace) -> list[str]:
    """The peer's command line: one epoch of as many steps as are wanted."""
    model = args.model
    if model == "small" or args.context:
        (out / "model").mkdir()
        config = {"model_cfg": args.config, "preprocess_cfg": {}}
        (out / "model" / "open_clip_config.json").write_text(json.dumps(config))
        model = f"local-dir:{out / 'model'}"
    steps = -(-(args.warmup + args.steps) // max(1, args.workers)) * max(1, args.workers)
    return [
        *("--model", model, "--train-data", args.shards, "--dataset-type", "webdataset"),
        *("--train-num-samples", str(steps * args.batch_size), "--batch-size", str(args.batch_size), "--epochs", "1"),
        *("--workers", str(args.workers), "--device", args.device, "--logs", str(out), "--name", "run"),
        *("--precision", "amp_bf16" if args.device == "cuda" else "fp32", "--save-frequency", "0"),
        *("--lr", "5e-4", "--wd", "0.2", "--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-6", "--warmup", "10"),
        *("--grad-clip-norm", "1.0", "--log-every-n-steps", "20"),
    ]


def vlbench_words(out: Path, args: argparse.Namespace) -> list[str]:
    """Our command line for the same run."""
    vision, text = dict(args.config["vision_cfg"]), args.config["text_cfg"]
    settings = {
        "steps": args.warmup + args.steps,
        "batch_size": args.batch_size,
        "workers": args.workers,
        "embed_dim": args.config["embed_dim"],
        "visual.image_size": vision.pop("image_size"),
        "text.width": text["width"],
        "text.heads": text["heads"],
        "text.layers": text["layers"],
        "text.context_length": text["context_length"],
        "text.quick_gelu": args.config.get("quick_gelu", False),
        "optim.betas": [0.9, 0.98],
        "optim.eps": 1e-6,
        "optim.clip_norm": 1.0,
        "schedule.warmup": 10,
        "augment.crop_scale": [0.9, 1.0],
        "precision": "bf16" if args.device == "cuda" else "fp32",
        "log_every": 20,
        "checkpoint_every": 1_000_000,
    }
    backbone = "open_clip:ViT-B-32" if args.model == "small" else f"open_clip:{args.model}"
    if args.model == "small":
        settings["visual.kwargs"] = vision
    return [
        *("pretrain", "clip", "--preset", "paper", "--data", f"wds:{args.shards}", "--backbone", backbone),
        *("--device", args.device, "--out", str(out / "run")),
        *(word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")),
    ]


def probe(tool: str, report: Path, warmup: int, steps: int, words: list[str]) -> None:
    """Train in this process, and write the seconds between two steps, the GPU's peak and the number of parameters."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    done, began = 0, 0.0

    def after_step(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        nonlocal done, began
        done += 1
        if done in (warmup, warmup + steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if done == warmup:
            began = time.perf_counter()
        if done == warmup + steps:
            found = {
                "seconds": time.perf_counter() - began,
                "params": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
                "peak_mib": torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0.0,
            }
            report.write_text(json.dumps(found))

    register_optimizer_step_post_hook(after_step)
    if tool == "open_clip":
        from open_clip_train.main import main as train
    else:
        from vlbench.cli import main as train
    sys.exit(train(words))


# ---------------------------------------------------------------------------------------------------------- the machine


class PeakMemory(threading.Thread):
    """The largest memory of a process and its descendants (PSS: a page that n of them share counts 1/n for each)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._peak_kib = 0

    def run(self) -> None:
        """Look until the process has ended."""
        while found := sum(map(self._pss, self._family())):
            self._peak_kib = max(self._peak_kib, found)
            time.sleep(POLL_SECONDS)

    def peak_mib(self) -> float:
        """The peak, once the process has ended."""
        self.join()
        return self._peak_kib / 1024

    def _family(self) -> list[int]:
        family = [self._pid]
        for pid in family:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    family.extend(map(int, children.read_text().split()))
                except OSError:
                    continue  # it ended just now
        return family

    @staticmethod
    def _pss(pid: int) -> int:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def has_cuda() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------- what they train on


def peer_packages() -> Path:
    """The folder with the webdataset that open_clip's own ``training`` extra asks for, filled on the first call."""
    from vlbench.core.paths import cache_dir

    asked = next(r for r in metadata.requires("open_clip_torch") or () if r.startswith("webdataset"))
    requirement = asked.partition(";")[0].strip()
    home = cache_dir() / "peers" / "open_clip_train"
    folder, stamp = home / "packages", home / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != requirement:
        print(f"fetching {requirement} for open_clip_train into {folder} ...", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home / "pip")], check=True)
        pip = [str(home / "pip" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", str(folder), requirement], check=True)
        stamp.write_text(requirement)
    return folder


def model_config(args: argparse.Namespace) -> dict[str, Any]:
    """open_clip's configuration of the model, with the context that was asked for."""
    import open_clip

    config = SMALL if args.model == "small" else open_clip.get_model_config(args.model)
    if config is None:
        raise SystemExit(f"--model {args.model}: open_clip has no such model; open_clip.list_models() lists them")
    if args.context is None:
        return config
    return config | {"text_cfg": config["text_cfg"] | {"context_length": args.context}}


def write_shards(folder: Path, wanted: int) -> str:
    """At least ``wanted`` pairs (each at most once, so fewer where there are fewer) as shards; their brace pattern."""
    from PIL import Image

    from vlbench.data.sources import open_source

    source = open_source("shapes:pairs")
    folder.mkdir()
    count = min(wanted, len(source))
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                example = source[index]
                image = Image.open(io.BytesIO(example.image or b"")).convert("RGB")
                jpeg = io.BytesIO()
                image.resize((STORED_SIDE, STORED_SIDE), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=95)
                caption = example.texts["en"][0]
                record = json.dumps({"key": f"{index:09d}", "caption": caption, "status": "success"})
                members = {"jpg": jpeg.getvalue(), "txt": caption.encode(), "json": record.encode()}
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{index:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        kind, file, before, timed, *rest = sys.argv[2:]
        probe(kind, Path(file), int(before), int(timed), rest)
    else:
        sys.exit(main())
