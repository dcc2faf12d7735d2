from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.report.toy import N, Toy, overlapping
from vlbench.report.leaderboard import render


def page(toy: Toy, **more: object) -> str:
    return render(toy.results, toy.outcomes_of, **more)  # type: ignore[arg-type]


def row(text: str, name: str, section: str) -> list[str]:
    """The cells of the row ``name`` in the first table of ``## section``."""
    lines = text.split(f"## {section}\n")[1].splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {name} ")][:1]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def toy() -> Toy:
    return example()


def example() -> Toy:
    toy = Toy()
    for name, right in (("clip", 300), ("supervised", 230)):
        toy.add(name, right=right)
        toy.add(name, "zeroshot/shapes", right=right - 100, chance=0.02)
    toy.add("noise", right=120, model={"random": True, "pretrain_data": None, "recipe": None, "seed": 0})
    return toy


def test_page_shows_values_intervals_ranks_and_the_separated_winner(toy: Toy) -> None:
    text = page(toy)
    assert row(text, "clip", "linear")[1] == "**75.0** [70.5, 79.0] ¹"
    assert row(text, "supervised", "linear")[1] == "57.5 [52.6, 62.3] ²"
    assert row(text, "noise (random weights)", "linear")[1] == "30.0 [25.7, 34.7] ³"
    assert row(text, "*chance*", "linear")[1] == "10.0"
    assert row(text, "*chance*", "zeroshot")[1] == "2.0"
    assert "95% intervals: wilson; ranks: exact McNemar, Holm over 3 pairs." in text


def test_inseparable_models_have_no_bold_winner() -> None:
    toy = Toy()
    toy.add("a", right=overlapping(301, 200, 0))
    toy.add("b", right=overlapping(300, 200, 1))
    text = page(toy)
    assert "**7" not in text
    assert row(text, "a", "linear")[1].endswith("¹")
    assert row(text, "b", "linear")[1].endswith("¹")


def test_missing_cells_are_dashes_not_numbers(toy: Toy) -> None:
    toy.add("clip", "linear/other")
    assert row(page(toy), "supervised", "linear")[2] == "–"
    assert "noise" not in page(toy).split("## zeroshot")[1].split("##")[0]


def test_rows_are_ordered_by_mean_rank_then_value(toy: Toy) -> None:
    names = [line.split("|")[1].strip() for line in page(toy).split("## linear")[1].split("\n\n")[1].splitlines()[2:]]
    assert names == ["clip", "supervised", "noise (random weights)", "*chance*"]


def test_page_is_the_same_bytes_in_any_order_and_process(toy: Toy) -> None:
    before = page(toy)
    rng = np.random.default_rng(0)
    for _ in range(5):
        order = rng.permutation(len(toy.results))
        assert render([toy.results[i] for i in order], toy.outcomes_of) == before
    # A new process has another hash seed for strings: nothing may depend on the order of a set.
    code = (
        "import sys; from tests.report.test_leaderboard import example, page;"
        "sys.stdout.buffer.write(page(example()).encode())"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert done.stdout == before.encode()


def test_page_has_no_time_of_its_own(toy: Toy) -> None:
    later = [result.model_copy(update={"created": "2031-01-01T00:00:00Z"}) for result in toy.results]
    assert render(later, toy.outcomes_of) == page(toy)


def test_model_table_says_what_is_known() -> None:
    toy = Toy()
    toy.add("known", model={"seed": 3}, images_per_second=812.4)
    toy.add("closed", model={"pretrain_data": None, "params": 86_000_000, "images_seen": None})
    text = page(toy)
    assert row(text, "known", "Models")[1:] == [
        "clip", "timm:test_resnet", "shapes:pairs", "412.3k", "960k", "3", "812 cpu",
    ]  # fmt: skip
    assert row(text, "closed", "Models")[3:] == ["not disclosed", "86M", "–", "–", "–"]


def test_speeds_are_of_one_kind_of_device_and_one_number_of_processes() -> None:
    toy = Toy()
    runs = [("cuda:0", 1, 100.0), ("cuda:1", 1, 200.0), ("cuda:0", 8, 900.0), ("cuda:3", 8, 1100.0), ("cpu", 1, 7.0)]
    for place, (device, processes, speed) in enumerate(runs):
        settings = {"device": device} | ({"processes": processes} if processes > 1 else {})
        toy.add("a", f"linear/{place}", settings=settings, images_per_second=speed)
    assert row(page(toy), "a", "Models")[-1] == "7 cpu, 150 cuda, 1000 cuda (8 processes)"


def test_different_data_are_said_and_not_ranked_together(toy: Toy) -> None:
    toy.add("late", right=390, data={"spec": "hf:x", "split": "test", "n": N, "fingerprint": "other"})
    text = page(toy)
    assert "never ranked together: linear/cifar10" in text
    cells = row(text, "late", "linear")
    assert sorted(cells[1:]) == ["97.5 [95.5, 98.6]", "–"]


def test_over_seeds_shows_spread_beside_the_interval() -> None:
    toy = Toy()
    for seed, right in enumerate((280, 300, 320)):
        toy.add(f"clip-tiny-s{seed}", right=right, model={"seed": seed})
    toy.add("unicl-tiny-s0", right=310, model={"seed": 0, "recipe": "unicl"})
    cells = row(page(toy), "clip-tiny-s*", "linear")
    # 70, 75, 80%: mean 75, deviation 5; Wilson's half-width at 75% of 400 is 4.2.
    assert cells == ["clip-tiny-s*", "0, 1, 2", "75.0 ± 5.0 (3); ±4.2"]
    assert "unicl-tiny-s*" not in page(toy)


def test_over_seeds_joins_models_named_freely_but_not_other_data() -> None:
    toy = Toy()
    toy.add("first", model={"seed": 1})
    toy.add("second", model={"seed": 2}, right=250)
    toy.add("third", model={"seed": 3, "pretrain_data": ("wds:cc3m",)})
    assert row(page(toy), "clip, timm:test_resnet", "linear")[1] == "1, 2"


def test_over_seeds_leaves_out_a_seed_that_occurs_twice() -> None:
    toy = Toy()
    toy.add("lr1", model={"seed": 1})
    toy.add("lr2", model={"seed": 1})
    for seed in (0, 1):
        toy.add(f"x-s{seed}", model={"seed": seed})
    text = page(toy)
    assert "otherwise equal models: lr1, lr2." in text
    assert row(text, "x-s*", "linear")[1] == "0, 1"


def test_precisions_that_differ_are_said(toy: Toy) -> None:
    assert "Precision of the forward pass: fp32." in page(toy)
    toy.add("half", settings={"precision": "bf16"})
    assert "Precision of the forward pass differs: bf16 (half); fp32 (clip, noise, supervised)." in page(toy)


def test_problems_and_emptiness_are_said(toy: Toy) -> None:
    assert "- a/b@v1.json: broken" in page(toy, problems=["a/b@v1.json: broken"])
    assert "No results yet" in render([], toy.outcomes_of)


def test_clustered_outcomes_are_tested_by_bootstrap() -> None:
    toy = Toy()
    toy.add("a", "retrieval/x", right=300, captions=5)
    toy.add("b", "retrieval/x", right=200, captions=5)
    text = page(toy)
    assert "95% intervals: cluster bootstrap B=2000; ranks: paired cluster bootstrap B=10000, Holm over 1 pair." in text
    assert row(text, "a", "retrieval")[1].startswith("**75.0**")
