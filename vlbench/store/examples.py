"""Per-example rows as Parquet bytes, and back.

The rows are what a result rests on: with them every metric, interval and paired test can be made again without the
model. They come back as what adapters compute with: numbers as numpy arrays of the same type and shape, strings as
``list[str]``, anything ragged as nested lists.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import canonical_json
from vlbench.core.types import Rows

_META = b"vlbench"


def rows_to_parquet(rows: Rows) -> bytes:
    """``rows`` as a Parquet file.

    Raises:
        UserError: where the columns differ in length, there is no row, or ``meta`` is not JSON (NaN included).
    """
    lengths = {name: len(rows[name]) for name in rows}
    if not lengths or not len(rows):
        raise UserError("there is no row to store: the reported split is empty")
    if len(set(lengths.values())) > 1:
        raise UserError(f"the columns of the rows differ in length: {lengths}")
    try:
        meta = canonical_json(dict(rows.meta))
    except (TypeError, ValueError) as error:
        raise UserError(f"the meta of the rows is not JSON: {error}") from None
    table = pa.table({name: _to_arrow(rows[name]) for name in rows})
    table = table.replace_schema_metadata({_META: meta.encode("utf-8")})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def rows_from_parquet(data: bytes) -> Rows:
    """The rows in a Parquet file written by ``rows_to_parquet``. Raises ValueError where it is not one."""
    try:
        # read_table goes by way of pyarrow.dataset, which imports pandas.
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            table = file.read()
        meta = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a Parquet file of rows: {error}") from None
    return Rows({name: _from_arrow(table.column(name)) for name in table.column_names}, meta)


def _to_arrow(values: Any) -> Any:
    array = np.asarray(values) if isinstance(values, np.ndarray) else None
    if array is None or array.dtype.kind in "OUS":
        items = values.tolist() if isinstance(values, np.ndarray) else list(values)
        return _strings(items) if all(type(item) is str for item in items) else pa.array(items)
    for width in array.shape[1:]:
        if width == 0:
            raise UserError(f"a column of the rows has the shape {array.shape}: there is nothing in it")
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)  # Arrow would read another machine's order as its own
    arrow = _plain(flat) if flat.dtype.kind in "biuf" else pa.array(flat)  # a day has 64 bits here and 32 in Arrow
    for width in reversed(array.shape[1:]):
        arrow = pa.FixedSizeListArray.from_arrays(arrow, width)
    return arrow


# pa.array and to_numpy import pandas where it is installed, a third of a second, to see whether they are given some of
# its objects. So the usual columns are made of their buffers.


def _plain(values: np.ndarray) -> Any:
    """Numbers, one-dimensional and contiguous."""
    bits = np.packbits(values, bitorder="little") if values.dtype == bool else values
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(bits)])


def _strings(items: list[str]) -> Any:
    encoded = [item.encode("utf-8") for item in items]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        return pa.array(items)  # in chunks
    buffers = pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(encoded))
    return pa.StringArray.from_buffers(len(items), *buffers)


def _from_arrow(column: Any) -> Any:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # what combine_chunks gives back for a column without chunks
        array = pa.concat_arrays(array.chunks)
    shape = [len(array)]
    inner = array
    while pa.types.is_fixed_size_list(inner.type):
        shape.append(inner.type.list_size)
        inner = inner.flatten()
    is_number = pa.types.is_integer(inner.type) or pa.types.is_floating(inner.type) or pa.types.is_boolean(inner.type)
    if is_number and not inner.null_count and len(inner) == int(np.prod(shape)):
        return _numbers(inner).reshape(shape)
    return array.to_pylist()


def _numbers(array: Any) -> np.ndarray:
    """The values of an array of numbers without nulls."""
    start, end, values = array.offset, array.offset + len(array), array.buffers()[1]
    if pa.types.is_boolean(array.type):
        bits = np.unpackbits(np.frombuffer(values, dtype=np.uint8), count=end, bitorder="little")
        return bits[start:].astype(bool)
    return np.frombuffer(values, dtype=array.type.to_pandas_dtype())[start:end]
