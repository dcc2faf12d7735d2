from __future__ import annotations

import pytest

from vlbench.core.types import Estimate
from vlbench.report.tables import cell, count, escape, markdown_table, p_value, percent


def test_percent_has_one_decimal_and_no_negative_zero() -> None:
    assert [percent(x) for x in (0.6214, 1.0, 0.0, -0.0001)] == ["62.1", "100.0", "0.0", "0.0"]
    assert [percent(x, signed=True) for x in (0.012, -0.012, -0.0001)] == ["+1.2", "-1.2", "+0.0"]


def test_cell_shows_value_interval_and_rank() -> None:
    estimate = Estimate(value=0.621, lo=0.603, hi=0.638, se=0.01, n=10, n_clusters=10, method="wilson")
    assert cell(estimate) == "62.1 [60.3, 63.8]"
    assert cell(estimate, rank=12, bold=True) == "**62.1** [60.3, 63.8] ¹²"


@pytest.mark.parametrize(
    "number, text", [(None, "–"), (12, "12"), (2_000, "2k"), (412_345, "412.3k"), (25_557_032, "25.6M"), (2e9, "2B")]
)
def test_count_is_short(number: int | None, text: str) -> None:
    assert count(number) == text


def test_p_value_is_never_zero() -> None:
    assert [p_value(p) for p in (0.0, 1e-12, 0.0123, 1.0)] == ["<0.001", "<0.001", "0.012", "1.000"]


def test_names_cannot_break_a_table() -> None:
    assert escape("a|b\n<script>") == "a\\|b &lt;script>"
    assert escape("<0.001") == "<0.001"
    text = markdown_table(["M", "1.10"], [["x | y", "1.50"]])
    assert text.splitlines() == ["| M      |   1.10 |", "|:-------|-------:|", "| x \\| y |   1.50 |"]
