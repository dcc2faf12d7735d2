"""Training steps a second of a two-tower recipe on this machine, and on a GPU the share of its peak.

    python benchmarks/train_throughput.py                                            the tiny preset, on the CPU
    python benchmarks/train_throughput.py --visual open_clip:ViT-B-16 --batch-size 1024 --precision bf16 --paper-text

The data are one random batch, so the figure is the model's alone; ``data_wait`` in a run's log says what loading adds.
The operations are counted by torch's FlopCounterMode over one forward and backward pass.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.models.text import TextConfig
from vlbench.train.optim import build_optimizer

PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense, as the makers print them


def main() -> None:
    """Time steps after a warm-up and print images/s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="clip")
    parser.add_argument("--visual", help="default: the tiny preset's")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--paper-text", action="store_true", help="CLIP's 12-layer text tower and 77 tokens")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = RECIPES.get(args.recipe)
    config = override(recipe.presets["tiny"], [f"precision={args.precision}"])
    if args.visual:
        size = args.image_size or 224
        visual = config.visual.model_copy(update={"arch": args.visual, "image_size": size, "kwargs": {}})
        config = config.model_copy(update={"visual": visual, "embed_dim": 512})
    if args.paper_text:
        config = config.model_copy(update={"text": TextConfig(width=512, layers=12, heads=8, context_length=77)})
    torch.manual_seed(0)
    model = recipe.build(config, ()).to(device)
    if args.compile:
        model.compile()
    optimizer = build_optimizer(model, config.optim)
    batch = random_batch(config, args.batch_size, tokens=config.text.context_length if args.paper_text else 16)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = recipe.loss(model, batch, config)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    for _ in range(4):
        step()
    seconds = timed(step, args.steps, device)
    rate, flops = args.batch_size * args.steps / seconds, counter.get_total_flops() * args.steps / seconds
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = next((value for chip, value in PEAK_BF16.items() if chip in name), None)
    share = f", {100 * flops / peak:.1f}% of the {peak / 1e12:.0f} TFLOP/s bf16 peak" if peak else ""
    print(f"{args.recipe} {config.visual.identity()}, batch {args.batch_size}, {args.precision}, on {name}:")
    print(f"  {rate:,.0f} images/s, {flops / 1e12:.2f} TFLOP/s{share}")
    if device.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def random_batch(config: object, size: int, *, tokens: int) -> dict[str, torch.Tensor]:
    """Noise images and random token rows that end in the end-of-text token."""
    side = config.visual.image_size  # type: ignore[attr-defined]
    tokens_BL = torch.randint(1, 49_000, (size, tokens))
    tokens_BL[:, -1] = 49_407
    return {
        "images_BCHW": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        "tokens_BL": tokens_BL,
        "labels_B": torch.full((size,), -1),
    }


def timed(step: object, count: int, device: torch.device) -> float:
    """Wall seconds of ``count`` steps, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
