"""Rows of parquet and arrow files, from the columns that may be needed; unreadable cells are marked.

A value that Python cannot represent, such as text that is not UTF-8, affects only its cell. Columns that no form of
rows reads are only checked for whether they hold words.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import READ_COLUMNS, Unreadable
from simpo_megatron.errors import DataError, StoppedBySignal

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 256
# Stands for a value that was not read: it exists, and holds no words.
_NOT_READ = ()


def parquet_rows(path: str, options: PairOptions) -> Iterator[dict[str, Any]]:
    """Yields the rows of a parquet file in order, a few in memory at a time.

    Raises: DataError when the file is damaged, or a column that is to be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = _names(file.schema_arrow, path)
        # If no form of rows has any of the columns, every record is refused with the names of the columns.
        read = [name for name in names if name in columns_to_read(options)] or names
        texts = {name: _of_one_column(file, name) for name in names if name not in read}
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=read):
            columns = {name: _values(batch.column(batch.schema.get_field_index(name))) for name in read}
            columns |= {name: list(itertools.islice(values, batch.num_rows)) for name, values in texts.items()}
            yield from _rows({name: columns[name] for name in names}, batch.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, "parquet", error) from None


def arrow_rows(path: str, options: PairOptions) -> Iterator[dict[str, Any]]:
    """Yields the rows of an arrow file or stream in order; the file is mapped.

    Raises: DataError as `parquet_rows`.
    """
    import pyarrow

    try:
        with open(path, "rb") as file:
            is_file = file.read(6) == b"ARROW1"
        with pyarrow.memory_map(path) as mapped:
            reader: Any = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
            names = _names(reader.schema, path)
            read = columns_to_read(options)
            numbers = range(reader.num_record_batches) if is_file else None
            for batch in map(reader.get_batch, numbers) if numbers is not None else reader:
                columns = {
                    name: _values(_sound(column)) if name in read else _mapped_words(column)
                    for name, column in zip(names, batch.columns, strict=True)
                }
                yield from _rows(columns, batch.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, "arrow", error) from None


def columns_to_read(options: PairOptions) -> frozenset[str]:
    """Returns the names of columns that some form of rows reads, or an option names."""
    named = {options.prompt_column, options.chosen_column, options.rejected_column}
    return READ_COLUMNS | (named - {""})


def _unreadable(path: str, kind: str, error: Exception) -> DataError:
    return DataError(f"{path}: found {str(error).splitlines()[0]!r}, expected a readable {kind} file")


def _names(schema: pyarrow.Schema, path: str) -> list[str]:
    for name, count in Counter(schema.names).items():
        if count > 1:
            raise DataError(f"{path}: found {count} columns {name!r}, expected a name for each")
    return schema.names


def _rows(columns: dict[str, list[Any]], num_rows: int) -> Iterator[dict[str, Any]]:
    for number in range(num_rows):
        yield {name: values[number] for name, values in columns.items()}


def _values(column: pyarrow.Array) -> list[Any]:
    """Returns the values of a column, `Unreadable` for each that has no form in Python."""
    try:
        return column.to_pylist()
    except StoppedBySignal:
        raise
    except Exception:  # Of a column's kind, or of one cell: text that is no text, a day beyond the calendar.
        return [_value(cell) for cell in column]


def _sound(column: pyarrow.Array) -> pyarrow.Array:
    """Returns a mapped column after checking its offsets: unchanged, or as bytes if it is not valid text.

    Raises: pyarrow.ArrowInvalid where reading it would leave the file.
    """
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        as_bytes = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
        if column.type not in as_bytes:
            raise
        column.view(as_bytes[column.type]).validate(full=True)
    return column


def _value(cell: pyarrow.Scalar) -> Any:
    try:
        return cell.as_py()
    except StoppedBySignal:
        raise
    except Exception as error:
        return Unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__)


def _words(column: pyarrow.Array) -> list[Any]:
    """Returns the values of an unread column if they may hold words, else placeholders."""
    if not _may_hold_text(column.type):
        return [None if is_null else _NOT_READ for is_null in column.is_null().to_pylist()]
    return [_NOT_READ if isinstance(value, Unreadable) else value for value in _values(column)]


def _mapped_words(column: pyarrow.Array) -> list[Any]:
    try:
        return _words(_sound(column))
    except StoppedBySignal:
        raise
    except Exception:
        return [_NOT_READ] * len(column)


def _of_one_column(file: pyarrow.parquet.ParquetFile, name: str) -> Iterator[Any]:
    """Yields the values of an unread column; placeholders where it is damaged."""
    import pyarrow.types as types

    kind = file.schema_arrow.field(name).type
    if not _may_hold_text(kind):
        yield from itertools.repeat(None if types.is_null(kind) else _NOT_READ)
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[name]):
            yield from _words(batch.column(0))
    except StoppedBySignal:
        raise
    except Exception:
        yield from itertools.repeat(_NOT_READ)


def _may_hold_text(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_string(kind) or types.is_large_string(kind) or "string_view" in str(kind):
        return True
    inner = [kind.field(number).type for number in range(kind.num_fields)] if types.is_nested(kind) else []
    if types.is_dictionary(kind):
        inner = [kind.value_type]
    return any(map(_may_hold_text, inner))


def without_nulls(value: Any) -> Any:
    """Returns `value` without the keys of objects, at any depth, that hold null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
