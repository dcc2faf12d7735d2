from __future__ import annotations

import json
from typing import Any

import pytest

from tests.report.toy import N, Toy
from vlbench.core.cards import ModelCard, TaskCard, model_cards
from vlbench.report.verify import as_json, printed_decimals, render_verdicts, verify, why_not_the_cards

OURS = 300 / N  # 75.0%, Wilson's interval [70.5, 79.0]
CLAIMS = {"recipe": "clip", "pretrain_data": ("WIT-400M",), "images_seen": None, "params": 87_849_216}


def card(*published: tuple[str, str, float], **changes: Any) -> ModelCard:
    words: dict[str, Any] = {
        "id": "ref",
        "loader": "open_clip",
        "arch": "ViT-B-32",
        "weights": "openai",
        "preprocess": {"image_size": 224},
        "published": [
            {"task": task, "metric": metric, "value": value, "source": f"table {place}"}
            for place, (task, metric, value) in enumerate(published)
        ],
    }
    return ModelCard.model_validate(words | CLAIMS | changes)


def task_card(name: str = "linear/cifar10", version: int = 1) -> TaskCard:
    return TaskCard(name=name, version=version, title="t", adapter="linear", data=("hf:x",), metric="acc1")


TASKS = {"linear/cifar10": task_card()}


def stored(toy: Toy, *, spec: str = "ref", name: str = "ref", right: int = 300, **changes: Any):
    model = {"spec": spec, **CLAIMS, **changes.pop("model", {})}
    changes.setdefault("task_fingerprint", TASKS["linear/cifar10"].fingerprint())
    return toy.add(name, right=right, model=model, **changes)


def one(published: float, **changes: Any):
    toy = Toy()
    stored(toy, **changes)
    (verdict,) = verify([card(("linear/cifar10", "acc1", published))], toy.results, TASKS)
    return verdict


@pytest.mark.parametrize(
    ("published", "status", "rule"),
    [
        (0.75, "reproduced", "tolerance"),
        (0.755, "reproduced", "tolerance"),  # the tolerance itself is within it
        (0.745, "reproduced", "tolerance"),
        (0.76, "reproduced", "interval"),
        (0.79, "reproduced", "interval"),
        (0.80, "off", ""),
        (0.704, "off", ""),
    ],
)
def test_a_number_is_reproduced_by_tolerance_or_interval(published: float, status: str, rule: str) -> None:
    verdict = one(published)
    assert (verdict.status, verdict.rule) == (status, rule)


def test_an_off_number_says_by_how_much_and_which_way() -> None:
    assert one(0.80).words() == "off by -5.0 points (interval [70.5, 79.0])"
    assert one(0.70).words() == "off by +5.0 points (interval [70.5, 79.0])"
    assert one(0.76).words() == "reproduced (inside our interval)"
    assert one(0.75).words() == "reproduced"


def test_ours_is_rounded_as_the_published_number_was_printed() -> None:
    # 301 of 400 is 75.25%: against "74.7" it is 75.2 (half to even), so off by 0.5; against "74.74" it is 0.51.
    toy = Toy()
    stored(toy, right=301)
    near, far = verify(
        [card(("linear/cifar10", "acc1", 0.747), ("linear/cifar10", "acc1", 0.7474))], toy.results, TASKS
    )
    assert (near.rule, near.off_by) == ("tolerance", 0.005)
    assert far.rule == "interval"
    assert far.off_by == pytest.approx(0.0051)


def test_closing_zeros_that_yaml_loses_are_digits() -> None:
    assert [printed_decimals(value) for value in (0.8, 0.75, 0.632, 0.5982, 1.0, 0.0)] == [3, 3, 3, 4, 3, 3]


def test_every_published_row_is_judged_with_its_own_source() -> None:
    toy = Toy()
    stored(toy)
    rows = [("linear/cifar10", "acc1", 0.75), ("linear/cifar10", "acc1", 0.9), ("zeroshot/none", "acc1", 0.5)]
    verdicts = verify([card(*rows)], toy.results, TASKS)
    assert [(v.status, v.source) for v in verdicts] == [
        ("reproduced", "table 0"),
        ("sources disagree", "table 1"),
        ("not attempted", "table 2"),
    ]
    assert verdicts[2].words() == "not attempted: there is no such task here"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"spec": "ref --weights random:0", "model": {"random": True}}, "random weights"),
        ({"spec": "runs/a/ckpt.pt"}, "made from runs/a/ckpt.pt, under the card's name"),
        ({"spec": "open_clip:ViT-B-32.laion400m"}, "made from open_clip:ViT-B-32.laion400m"),
        ({"spec": "runs/a/ckpt.pt --weights x.pt"}, "made from runs/a/ckpt.pt, under the card's name"),
        ({"spec": "./ref"}, "made from ./ref, under the card's name"),
        ({"spec": "other --weights x.pt"}, "made from other, under the card's name"),
        ({"name": "ref@x", "spec": "other --weights x.pt"}, "made from other, under the card's name"),
        ({"spec": "open_clip:ViT-B-32.openai --weights x.pt"}, "made from open_clip:ViT-B-32.openai"),
        ({"name": "ref@x", "spec": "ref --weights random:0", "model": {"random": True}}, "random weights"),
        ({"name": "ref@x"}, "ref@x is another file than the card's"),
    ],
)
def test_other_weights_are_never_an_attempt(changes: dict[str, Any], why: str) -> None:
    verdict = one(0.75, **changes)
    assert verdict.status == "refused"
    assert why in verdict.words()
    assert verdict.ours is None


def test_a_renamed_model_is_passed_over() -> None:
    assert one(0.75, name="mine").status == "not attempted"
    assert one(0.75, name="ref-random-s0", model={"random": True}).status == "not attempted"


@pytest.mark.parametrize("spec", ["ref", "open_clip:ViT-B-32.openai"])
def test_the_cards_own_weights_are_an_attempt(spec: str) -> None:
    assert one(0.75, spec=spec).status == "reproduced"


def test_a_weights_file_is_believed_where_its_sha256_was_checked() -> None:
    toy = Toy()
    checked = stored(toy, spec="ref --weights x.pt")
    # The loader takes these claims back for a file whose checksum is not the card's, --name ref or not.
    foreign = stored(Toy(), spec="ref --weights x.pt", model=dict.fromkeys(CLAIMS))
    summed = summed_card()
    assert why_not_the_cards(summed, checked) is None
    assert why_not_the_cards(summed, foreign) == "the weights file x.pt is not the file of the card's sha256"


def summed_card() -> ModelCard:
    return card(("linear/cifar10", "acc1", 0.75), sha256="0" * 64)


@pytest.mark.parametrize("name", ["ref", "ref@x"])
def test_a_file_given_to_a_card_without_checksum_is_judged_and_said_to_be_unchecked(name: str) -> None:
    # What the loader takes back of the card's claims for such a file is no evidence against it.
    file = {"name": name, "spec": "ref --weights dir/x.pt", "model": dict.fromkeys(CLAIMS)}
    open_point = "dir/x.pt could not be checked: the card knows no sha256"
    near, far = one(0.75, **file), one(0.80, **file)
    assert near.words() == f"reproduced; {open_point}"
    assert far.words() == f"off by -5.0 points (interval [70.5, 79.0]); {open_point}"
    text = " ".join(render_verdicts([near, far]).split())
    assert text.count(open_point) == 2
    assert text.endswith(
        "2 published numbers: 1 reproduced, 1 off; 2 of them with a weights file that could not be checked."
    )
    assert as_json([near], 0.005)["rows"][0]["unchecked"] == "dir/x.pt"
    assert one(0.75).unchecked == ""


@pytest.mark.parametrize("name", ["ref", "ref@x"])
def test_a_file_that_is_not_of_the_cards_checksum_is_refused_whatever_it_is_called(name: str) -> None:
    toy = Toy()
    stored(toy, name=name, spec="ref --weights x.pt", model=dict.fromkeys(CLAIMS))
    (verdict,) = verify([summed_card()], toy.results, TASKS)
    assert verdict.status == "refused"


def test_weights_of_an_address_are_no_librarys_default() -> None:
    toy = Toy()
    stored(toy, spec="timm:swin_tiny")
    for weights in (None, "https://example.org/x.pth"):
        known = card(("linear/cifar10", "acc1", 0.75), loader="timm", arch="swin_tiny", weights=weights)
        assert why_not_the_cards(known, toy.results[0]) == "made from timm:swin_tiny, under the card's name"
    known = card(("linear/cifar10", "acc1", 0.75), loader="timm", arch="swin_tiny.in1k", weights=None)
    (verdict,) = verify([known], [stored(Toy(), spec="timm:swin_tiny.in1k")], TASKS)
    assert verdict.status == "reproduced"


def test_of_several_unchecked_files_the_one_measured_last_is_judged_and_that_there_are_others_is_said() -> None:
    toy = Toy()
    for place, right in ((2, 300), (1, 100)):
        file = {"name": f"ref@{place}", "spec": f"ref --weights {place}.pt", "model": {"weights_hash": str(place)}}
        stored(toy, right=right, created=f"2026-01-0{place}T00:00:00Z", **file)
    (verdict,) = verify([card(("linear/cifar10", "acc1", 0.75))], toy.results, TASKS)
    assert (verdict.ours, verdict.unchecked) == (OURS, "2.pt")
    assert verdict.remarks == ("the results under this name come from several weights",)


def test_one_sound_result_is_enough_beside_an_unchecked_one() -> None:
    toy = Toy()
    stored(toy, name="ref@x", spec="ref --weights x.pt", right=100, created="2027-01-01T00:00:00Z")
    stored(toy)
    (verdict,) = verify([card(("linear/cifar10", "acc1", 0.75))], toy.results, TASKS)
    assert verdict.words() == "reproduced"
    assert verdict.remarks == ()


def beside(*values: float, **changes: Any):
    """The verdicts on several numbers of one measurement, ours 75.0."""
    toy = Toy()
    stored(toy, **changes)
    return verify([card(*(("linear/cifar10", "acc1", value) for value in values))], toy.results, TASKS)


def test_where_one_source_is_reproduced_the_other_is_a_disagreement_of_the_sources() -> None:
    verdicts = beside(0.4903, 0.752)
    assert [verdict.status for verdict in verdicts] == ["sources disagree", "reproduced"]
    assert verdicts[0].words() == ("sources disagree (+25.97 points): 49.03 here; 75.2, published too, is reproduced")
    assert (verdicts[0].ours, verdicts[0].off_by) == (OURS, pytest.approx(0.2597))
    text = render_verdicts(verdicts)
    assert text.endswith("2 published numbers: 1 reproduced, 1 sources disagree.\n")
    assert [row["status"] for row in as_json(verdicts, 0.005)["rows"]] == ["sources disagree", "reproduced"]
    # Inside our interval is reproduced too, whatever the order of the rows.
    assert [verdict.status for verdict in beside(0.79, 0.6)] == ["reproduced", "sources disagree"]


def test_where_no_source_is_reproduced_all_are_off_and_the_nearest_is_named() -> None:
    verdicts = beside(0.4903, 0.852)
    assert [verdict.status for verdict in verdicts] == ["off", "off"]
    assert verdicts[0].words() == (
        "off by +25.97 points (interval [70.5, 79.0]); of 2 published numbers 85.2 is the nearest"
    )
    assert verdicts[1].words().endswith("; of 2 published numbers 85.2 is the nearest")
    assert beside(0.9, 0.9)[0].words() == "off by -15.0 points (interval [70.5, 79.0])"


def test_only_judged_numbers_of_the_same_task_and_metric_make_a_disagreement() -> None:
    toy = Toy()
    stored(toy)
    stored(toy, task="linear/other")
    rows = [
        {"task": "linear/cifar10", "metric": "acc1", "value": 0.75, "source": "timm", "comparable": False},
        {"task": "linear/other", "metric": "acc1", "value": 0.75, "source": "the paper"},
        {"task": "linear/cifar10", "metric": "map11", "value": 0.75, "source": "the paper"},
        {"task": "linear/cifar10", "metric": "acc1", "value": 0.5, "source": "the paper"},
    ]
    verdicts = verify([card(published=rows)], toy.results, TASKS)
    assert [verdict.status for verdict in verdicts] == ["other protocol", "reproduced", "metric missing", "off"]
    assert "published numbers" not in verdicts[3].words()
    # A part of the data excuses nothing: what is not comparable stays so beside a reproduced number.
    assert [verdict.status for verdict in beside(0.75, 0.5, task_fingerprint="earlier")] == [
        "reproduced",
        "not comparable",
    ]


def test_openais_cards_hold_two_sources_that_no_result_can_both_reproduce() -> None:
    openai = [known for name, known in model_cards().items() if name.startswith("clip-") and name.endswith("-openai")]
    assert len(openai) == 9
    rows = {row.source: row for row in model_cards()["clip-rn50x4-openai"].published if row.task == "zeroshot/mnist"}
    assert [row.value for row in rows.values()] == [0.752, 0.4903]
    known = model_cards()["clip-rn50x4-openai"]
    model = {"spec": known.id, "recipe": known.recipe, "pretrain_data": known.pretrain_data}
    model |= {"images_seen": known.images_seen, "params": known.params}
    toy = Toy()
    toy.add(known.id, task="zeroshot/mnist", right=301, model=model)
    verdicts = [each for each in verify([known], toy.results, {}) if each.status != "not attempted"]
    assert [verdict.status for verdict in verdicts] == ["reproduced", "sources disagree"]


def test_what_was_not_as_it_should_be_is_said() -> None:
    toy = Toy()
    stored(toy, task_version=2, settings={"precision": "bf16"}, model={"params": 1000})
    stored(toy, task="linear/other", model={"weights_hash": "another"})
    tasks = {"linear/cifar10": task_card(version=3)}
    (verdict,) = verify([card(("linear/cifar10", "acc1", 0.75))], toy.results, tasks)
    assert verdict.remarks == (
        "measured on v2 of the task, which is v3 now",
        "measured in bf16",
        "the results under this name come from several weights",
        "1k parameters, the card says 87.8M",
    )
    assert "reproduced; measured on v2" in " ".join(render_verdicts([verdict]).split())


def test_another_number_of_examples_is_said_and_its_wide_interval_excuses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TaskCard, "expected_sizes", {"test": 10_000})
    why = "measured on 400 examples, the published split has 10,000"
    assert one(0.75).status == "reproduced"
    assert one(0.75).remarks == (why,)
    for published, points in ((0.76, "-1.0"), (0.80, "-5.0")):  # inside our interval, and outside
        assert one(published).words() == f"not comparable ({points} points): {why}"
        assert one(published).remarks == ()


def test_an_earlier_card_of_the_task_is_no_attempt_at_todays_number() -> None:
    assert one(0.76).rule == "interval"
    found = one(0.76, task_fingerprint="earlier")
    assert found.words() == "not comparable (-1.0 points): the task's card has changed since"
    found = one(0.76, task_version=2)
    assert found.words() == "not comparable (-1.0 points): measured on v2 of the task, which is v1 now"
    assert one(0.75, task_version=2).status == "reproduced"


def test_points_have_the_digits_that_were_published() -> None:
    assert one(0.8012).words() == "off by -5.12 points (interval [70.5, 79.0])"
    assert one(0.8).words() == "off by -5.0 points (interval [70.5, 79.0])"
    toy = Toy()
    stored(toy, right=301)  # 75.25%
    text = render_verdicts(verify([card(("linear/cifar10", "acc1", 0.8012))], toy.results, TASKS))
    assert "80.12" in text
    assert "75.25 [70.8, 79.2]" in text
    assert "off by -4.87 points" in text


def test_the_result_of_todays_version_is_taken() -> None:
    toy = Toy()
    for version, right in ((1, 300), (2, 100)):
        stored(toy, task_version=version, right=right)
    (verdict,) = verify([card(("linear/cifar10", "acc1", 0.75))], toy.results, TASKS)
    assert verdict.ours == OURS
    changed = {"linear/cifar10": task_card().model_copy(update={"metric": "acc5"})}
    (verdict,) = verify([card(("linear/cifar10", "acc1", 0.75))], toy.results, changed)
    assert verdict.remarks == ("the task's card has changed since",)


def test_a_number_of_another_protocol_is_shown_and_not_judged() -> None:
    toy = Toy()
    stored(toy)
    row = {"task": "linear/cifar10", "metric": "acc1", "value": 0.9, "source": "timm", "comparable": False}
    (verdict,) = verify([card(published=[row])], toy.results, TASKS)
    assert verdict.words() == "other protocol, not judged (-15.0 points)"
    assert verdict.ours == OURS


def test_a_metric_that_the_result_lacks_is_said() -> None:
    toy = Toy()
    stored(toy)
    (verdict,) = verify([card(("linear/cifar10", "map11", 0.75))], toy.results, TASKS)
    assert verdict.words() == "metric missing: the stored result has acc1"


def test_table_counts_what_was_not_attempted_by_model() -> None:
    toy = Toy()
    stored(toy)
    rows = [("linear/cifar10", "acc1", 0.75), *((f"zeroshot/{k}", "acc1", 0.5) for k in range(8))]
    verdicts = verify([card(*rows)], toy.results, TASKS)
    text = render_verdicts(verdicts)
    assert "ref: 8 not attempted: zeroshot/0, zeroshot/1, " in text
    assert text.count("zeroshot/") == 6
    assert text.endswith("9 published numbers: 1 reproduced, 8 not attempted.\n")
    assert render_verdicts(verdicts, every=True).count("not attempted: there is no such task") == 8
    (line,) = [line for line in text.splitlines() if line.startswith("ref ")]
    assert line.split()[1:7] == ["linear/cifar10", "acc1", "75.0", "[1]", "75.0", "[70.5,"]
    assert "\n[1] table 0\n" in text


def test_json_holds_every_row_in_fractions() -> None:
    toy = Toy()
    stored(toy)
    verdicts = verify([card(("linear/cifar10", "acc1", 0.8), ("x/y", "acc1", 0.1))], toy.results, TASKS)
    values = json.loads(json.dumps(as_json(verdicts, 0.005)))
    assert values["tolerance"] == 0.005
    assert values["rows"][0]["off_by"] == -0.05
    assert values["rows"][0]["ours"] == OURS
    assert values["rows"][1]["ours"] is None


def test_nothing_published_is_nothing_to_verify() -> None:
    assert verify([card()], [], TASKS) == []
    assert render_verdicts([]) == "0 published numbers: none.\n"
