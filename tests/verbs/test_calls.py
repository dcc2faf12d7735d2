"""A verb that calls another means what is typed, and exactly that."""

from __future__ import annotations

from typing import Any

import pytest

from vlbench.cli import build_parser
from vlbench.core.errors import UserError
from vlbench.verbs.calls import EVAL_DEFAULTS, PRETRAIN_DEFAULTS, check_pretrain, pretrain


@pytest.mark.parametrize(
    ("words", "defaults", "required"),
    [
        (["pretrain", "clip"], PRETRAIN_DEFAULTS, {"recipe"}),
        (["eval", "--model", "m", "--tasks", "t"], EVAL_DEFAULTS, {"model", "tasks"}),
    ],
    ids=["pretrain", "eval"],
)
def test_calls_defaults_are_those_of_the_command_line(
    words: list[str], defaults: dict[str, Any], required: set[str]
) -> None:
    parser, by_name = build_parser()
    typed = vars(parser.parse_args(words))
    assert typed.keys() - {"verb", "run"} == defaults.keys()
    for key in defaults.keys() - required:
        expected = typed[key] if key != "set" else tuple(typed[key])
        assert defaults[key] == expected, key
        if key != "debug":  # kept from the words before the verb
            assert by_name[words[0]].get_default(key) == typed[key], key


def test_calls_name_an_unknown_setting() -> None:
    with pytest.raises(UserError, match="unknown setting 'step'; did you mean 'steps'"):
        pretrain(recipe="clip", step=3)


def test_check_pretrain_refuses_before_anything_is_made() -> None:
    check_pretrain(recipe="clip", set=["optim.lr=1e-4"])
    for changes in (
        {"recipe": "clap"},
        {"recipe": "clip", "preset": "tinny"},
        {"recipe": "clip", "set": ["optim.rl=1"]},
    ):
        with pytest.raises(UserError, match="did you mean"):
            check_pretrain(**changes)
