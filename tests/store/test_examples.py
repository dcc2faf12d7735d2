from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.store.examples import rows_from_parquet, rows_to_parquet

COLUMNS = {
    "id": ["a", "b/ü", "c"],
    "label": np.array([2, 0, 1]),
    "correct": np.array([True, False, True]),
    "score": np.array([0.1, 1 / 3, -2.5], dtype=np.float32),
    "precise": np.array([0.1, 1 / 3, 1e300]),
    "top": np.arange(15, dtype=np.int32).reshape(3, 5),
    "box": np.linspace(0, 1, 12).reshape(3, 2, 2),
    "captions": [["x"], [], ["y", "z"]],
}


def test_rows_come_back_as_they_went() -> None:
    rows = rows_from_parquet(rows_to_parquet(Rows(COLUMNS, {"C": 0.5, "names": ["cat", "dög"]})))
    assert list(rows) == list(COLUMNS)
    assert rows.meta == {"C": 0.5, "names": ["cat", "dög"]}
    for name, values in COLUMNS.items():
        if isinstance(values, np.ndarray):
            assert rows[name].dtype == values.dtype
            assert rows[name].shape == values.shape
            assert np.array_equal(rows[name], values)
        else:
            assert rows[name] == values


def test_string_arrays_come_back_as_lists() -> None:
    rows = rows_from_parquet(
        rows_to_parquet(Rows({"id": np.array(["x", "yy"]), "o": np.array(["p", "q"], dtype=object)}))
    )
    assert rows["id"] == ["x", "yy"]
    assert rows["o"] == ["p", "q"]


def test_nan_in_a_column_is_kept() -> None:
    rows = rows_from_parquet(rows_to_parquet(Rows({"score": np.array([1.0, np.nan])})))
    assert np.isnan(rows["score"][1])


def test_rows_are_the_same_bytes_each_time() -> None:
    assert rows_to_parquet(Rows(COLUMNS, {"b": 1, "a": 2})) == rows_to_parquet(Rows(COLUMNS, {"a": 2, "b": 1}))


@pytest.mark.parametrize(
    "rows, words",
    [
        (Rows({"id": ["a"], "x": np.zeros(2)}), "differ in length"),
        (Rows({}), "no row"),
        (Rows({"id": []}), "no row"),
        (Rows({"id": ["a"]}, {"C": float("nan")}), "not JSON"),
        (Rows({"id": ["a"]}, {"C": object()}), "not JSON"),
    ],
    ids=["ragged", "no columns", "no rows", "nan meta", "object meta"],
)
def test_impossible_rows_are_refused(rows: Rows, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows_to_parquet(rows)


@pytest.mark.parametrize("data", [b"", b"not parquet at all", rows_to_parquet(Rows(COLUMNS))[:-20]])
def test_damaged_parquet_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a Parquet file"):
        rows_from_parquet(data)


def test_pandas_is_not_imported_for_the_usual_columns() -> None:
    code = """
        import sys
        import numpy as np
        from vlbench.core.types import Rows
        from vlbench.store.examples import rows_from_parquet, rows_to_parquet
        columns = {"id": ["a", "ü"], "right": np.array([True, False]), "top": np.arange(6.0).reshape(2, 3)}
        back = rows_from_parquet(rows_to_parquet(Rows(columns)))
        assert back["id"] == columns["id"] and all((back[name] == columns[name]).all() for name in ("right", "top"))
        assert "pandas" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_columns_are_written_as_arrow_writes_them() -> None:
    file = pq.ParquetFile(pa.BufferReader(rows_to_parquet(Rows(COLUMNS))))
    for name in ("id", "label", "correct", "score", "precise"):
        assert file.read().column(name).combine_chunks() == pa.array(COLUMNS[name])


@pytest.mark.parametrize("kind", [">i4", ">f8", ">u2"])
def test_numbers_of_another_machines_byte_order_are_the_same_numbers(kind: str) -> None:
    values = np.arange(6).reshape(2, 3).astype(kind)
    assert np.array_equal(rows_from_parquet(rows_to_parquet(Rows({"x": values})))["x"], values)


def test_dates_are_the_same_dates() -> None:
    days = np.array(["2020-01-01", "2021-02-03", "1990-01-01"], dtype="datetime64[D]")
    assert rows_from_parquet(rows_to_parquet(Rows({"day": days})))["day"] == days.tolist()
