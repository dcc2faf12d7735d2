from __future__ import annotations

import pytest
from pydantic import Field

from vlbench.core.config import Config, difference, override, parse
from vlbench.core.errors import UserError


class Optim(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)


class Run(Config):
    optim: Optim = Optim()
    steps: int = 10
    compile: bool = False
    kwargs: dict[str, object] = Field(default_factory=dict)


def test_parse_names_file_key_and_nearest_key() -> None:
    with pytest.raises(UserError, match=r"a\.yaml: unknown key 'optim\.rl'; did you mean 'optim\.lr'\?"):
        parse(Run, {"optim": {"rl": 1}}, where="a.yaml")


def test_parse_names_the_wrong_type() -> None:
    with pytest.raises(UserError, match=r"a\.yaml: steps: .*integer.*'ten'"):
        parse(Run, {"steps": "ten"}, where="a.yaml")


def test_override_checks_against_the_types() -> None:
    config = override(Run(), ["optim.lr=3e-4", "compile=true", "optim.betas=[0.8, 0.9]", "kwargs.depth=3"])
    assert (config.optim.lr, config.compile, config.optim.betas) == (3e-4, True, (0.8, 0.9))
    assert config.kwargs == {"depth": 3}
    with pytest.raises(UserError, match="steps"):
        override(Run(), ["steps=many"])


@pytest.mark.parametrize("text", ["optim.rl=1", "optm.lr=1", "steps", "=3", "steps.x=1"])
def test_override_refuses_what_is_not_a_setting(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        override(Run(), [text])


def test_difference_lists_only_what_changed() -> None:
    assert difference(override(Run(), ["optim.lr=0.1"]), Run()) == {"optim.lr": (1e-3, 0.1)}
    assert difference(Run(), Run()) == {}


def test_config_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Run().steps = 3  # type: ignore[misc]
