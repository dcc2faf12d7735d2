from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.finetune.toys import ToyConfig
from vlbench.core.config import override, parse
from vlbench.core.errors import UserError
from vlbench.finetune.config import FinetuneConfig
from vlbench.train.run_config import OptimConfig


def test_given_values_lie_over_the_presets() -> None:
    config = ToyConfig.model_validate({"preset": "paper", "steps": 7, "optim": {"weight_decay": 0.5}})
    assert (config.steps, config.optim.lr, config.optim.weight_decay) == (7, 1e-3, 0.5)
    assert ToyConfig().optim.lr == 0.05, "tiny is the default"
    assert ToyConfig().optim.momentum == OptimConfig().momentum, "what neither says is the field's own default"
    assert ToyConfig(optim=OptimConfig(lr=2.0)).optim == OptimConfig(lr=2.0), "a whole group replaces the preset's"


def test_a_mapping_that_is_given_replaces_the_presets_whole() -> None:
    config = ToyConfig.model_validate({"preset": "paper", "optim": {"lr_factors": {"^body": 0.5}}})
    assert config.optim.lr_factors == {"^body": 0.5}


@pytest.mark.parametrize(
    "given", [{}, {"preset": "paper"}, {"preset": "paper", "optim": {"lr": 0.1}, "search": [1, 3]}]
)
def test_the_dump_is_resolved_and_reads_back_as_itself(
    given: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToyConfig.model_validate(given)
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert stored["optim"]["lr"] == config.optim.lr
    assert ToyConfig.model_validate(stored) == config
    monkeypatch.setattr(ToyConfig, "PRESETS", {"tiny": {"steps": 1}, "paper": {"steps": 2, "optim": {"lr": 9.0}}})
    assert ToyConfig.model_validate(stored) == config, "a preset that has changed since changes nothing that is stored"


def test_set_changes_one_value_and_keeps_the_preset() -> None:
    config = override(ToyConfig(preset="paper"), ["optim.lr=0.5"])
    assert (config.optim.lr, config.steps) == (0.5, 1000)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"preset": "papre"}, "unknown preset 'papre'; did you mean 'paper'?"),
        ({"preset": ["paper"]}, "unknown preset"),
        ({"optim": {"lrr": 1}}, "optim.lrr"),
        ({"search": [1, 0]}, "expected different factors above 0"),
        ({"search": [1, 1]}, "expected different factors above 0"),
        ({"shard": True}, "shard: the first rank judges the whole model"),
        ({"loss_block": 8}, "loss_block: for losses that compare a batch's images with its texts; leave it out"),
        ({"grad_cache": True, "batch_size": 8, "accumulate": 2}, "grad_cache: for losses that compare"),
        ({"schedule": {"kind": "milestones"}}, "kind=milestones wants milestones"),
        ({"held_out": 1}, "held_out"),
    ],
)
def test_a_wrong_value_is_one_line(given: dict[str, object], line: str) -> None:
    with pytest.raises(UserError) as error:
        parse(ToyConfig, given, where="task vqa/x, protocol")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_written_at_every_judgement() -> None:
    config = ToyConfig.model_validate({"steps": 10, "checkpoint_every": 4, "judge_every": 3})
    assert [step for step in range(1, 11) if config.judges_at(step)] == [3, 6, 9, 10]
    assert [step for step in range(1, 11) if config.saves_at(step)] == [3, 4, 6, 8, 9, 10]


def test_at_rate_scales_the_rate_and_the_backbones_factor() -> None:
    config = ToyConfig.model_validate({"backbone": "trained", "backbone_lr": 0.1, "search": [0.3, 3]})
    settings = config.at_rate(3)
    assert settings.optim.lr == pytest.approx(0.15)
    assert settings.optim.lr_factors == {"^visual": 0.1}
    assert settings.search == ()
    assert ToyConfig(backbone="frozen", backbone_lr=0.1).at_rate(1).optim.lr_factors == {}
    named = ToyConfig.model_validate(
        {"backbone": "trained", "backbone_lr": 0.1, "optim": {"lr_factors": {"^visual": 0.7, "head": 2}}}
    )
    assert named.at_rate(1).optim.lr_factors == {"^visual": 0.7, "head": 2.0}
    assert ToyConfig.model_validate(settings.model_dump(mode="json")) == settings


def test_every_field_says_what_it_is() -> None:
    own = set(FinetuneConfig.model_fields) - set(FinetuneConfig.__mro__[1].model_fields)  # type: ignore[attr-defined]
    assert own == {"preset", "backbone", "backbone_lr", "select", "judge_every", "held_out", "search"}
    assert all(FinetuneConfig.model_fields[name].description for name in own)


def test_settings_load_without_torch() -> None:
    code = "import vlbench.finetune.config, vlbench.train.run_config, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
