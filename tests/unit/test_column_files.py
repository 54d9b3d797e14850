"""Parquet and arrow files of which a column or a cell is odd: unread ones stop nothing, read ones are counted."""

import datetime
import decimal

import pyarrow
import pyarrow.parquet
import pytest
from data_tokenizers import llama_like

from simpo_megatron.data import PairOptions, build_preference_dataset
from simpo_megatron.errors import DataError

NOT_TEXT = b"\xff\xfe odd \x80"
NUM_ROWS = 300  # more than are read at a time


def text_column(odd=(), words="words"):
    """Strings, of which those at `odd` are not UTF-8."""
    cells = [NOT_TEXT if number in odd else f"{words} of {number}".encode() for number in range(NUM_ROWS)]
    return pyarrow.array(cells, pyarrow.binary()).view(pyarrow.string())


def pairs(**columns):
    rows = {name: text_column() for name in ("prompt", "chosen", "rejected")}
    rows["rejected"] = pyarrow.array([f"other words of {number}" for number in range(NUM_ROWS)])
    return pyarrow.table({**rows, **columns})


def write(path, table):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table, max_chunksize=70)
    return path


def build(path, tmp_path, **options):
    settings = PairOptions(max_length=256, max_prompt_length=128, **options)
    return build_preference_dataset([str(path)], llama_like(), settings, tmp_path / "cache")


ODD = {
    "text that is none": text_column(odd=range(0, NUM_ROWS, 3)),
    "days beyond the calendar": pyarrow.array([2**62] * NUM_ROWS, pyarrow.timestamp("ns")).cast(
        pyarrow.timestamp("s"), safe=False
    ),
    "decimals": pyarrow.array([decimal.Decimal("1.5")] * NUM_ROWS),
    "dates": pyarrow.array([datetime.date(2024, 1, 1)] * NUM_ROWS),
    "bytes": pyarrow.array([NOT_TEXT] * NUM_ROWS),
    "lists of text that is none": pyarrow.ListArray.from_arrays(list(range(NUM_ROWS + 1)), text_column(odd=[5])),
    "objects": pyarrow.array([{"a": {"b": [1.0]}}] * NUM_ROWS),
    "nothing": pyarrow.nulls(NUM_ROWS),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ODD.values(), ids=ODD)
def test_an_odd_column_that_is_not_read_stops_nothing(kind, column, tmp_path):
    dataset = build(write(tmp_path / f"a.{kind}", pairs(extra=column)), tmp_path)
    plain = build(write(tmp_path / f"b.{kind}", pairs()), tmp_path)
    assert len(dataset) == NUM_ROWS and dataset.fingerprint == plain.fingerprint
    assert ("extra" in dataset.report.extra_keys) == (column.null_count == 0)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_an_odd_cell_that_is_read_is_named_or_counted(kind, tmp_path):
    path = write(tmp_path / f"a.{kind}", pairs(chosen=text_column(odd=[3, 290])))
    with pytest.raises(DataError, match=f"{path}:4: bad_type:chosen: chosen is an unreadable value .*utf-8.*0xff"):
        build(path, tmp_path)
    dataset = build(path, tmp_path, bad_record="skip")
    assert dataset.report.dropped == {"bad_type:chosen": 2} and len(dataset) == NUM_ROWS - 2
    assert dataset.where(NUM_ROWS - 3) == ("a", NUM_ROWS)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_words_in_columns_that_are_not_read_are_still_told(kind, tmp_path):
    table = pairs(note=text_column(odd=[0], words="a note"), number=pyarrow.array(range(NUM_ROWS)))
    report = build(write(tmp_path / f"a.{kind}", table), tmp_path).report
    assert report.extra_texts == {"note": NUM_ROWS - 1} and report.place("note").endswith(":2")
    assert report.extra_keys == {"note": NUM_ROWS, "number": NUM_ROWS}


def test_large_columns_that_cannot_hold_words_are_not_read(tmp_path, monkeypatch):
    read = []
    iterate = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, *arguments, columns, **options: (
            read.append(columns) or iterate(self, *arguments, columns=columns, **options)
        ),
    )
    table = pairs(embedding=pyarrow.array([[1.0] * 8] * NUM_ROWS), picture=pyarrow.array([b"x"] * NUM_ROWS))
    assert build(write(tmp_path / "a.parquet", table), tmp_path).report.extra_keys.keys() == {"embedding", "picture"}
    assert read == [["prompt", "chosen", "rejected"]]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(kind, tmp_path):
    table = pairs(extra=text_column()).rename_columns(["prompt", "chosen", "rejected", "chosen"])
    with pytest.raises(DataError, match="found 2 columns 'chosen'"):
        build(write(tmp_path / f"a.{kind}", table), tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_without_any_column_of_ours_names_those_it_has(kind, tmp_path):
    table = pairs().rename_columns(["a", "b", "c"])
    with pytest.raises(DataError, match="found the columns a, b, c; chosen_column says which one is meant"):
        build(write(tmp_path / f"a.{kind}", table), tmp_path)


def test_columns_that_options_name_are_read(tmp_path):
    table = pairs().rename_columns(["q", "good", "bad"])
    options = {"prompt_column": "q", "chosen_column": "good", "rejected_column": "bad"}
    assert len(build(write(tmp_path / "a.parquet", table), tmp_path, **options)) == NUM_ROWS


def test_a_mapped_file_whose_offsets_leave_it_is_refused_and_does_not_end_the_process(tmp_path):
    path = write(tmp_path / "a.arrow", pairs())
    content = bytearray(path.read_bytes())
    place = content.index(b"words of 0words of 1") - 64
    for at in range(place - 200, place, 4):
        damaged = content.copy()
        damaged[at : at + 4] = (2**30).to_bytes(4, "little")
        path.write_bytes(damaged)
        try:
            build(path, tmp_path, bad_record="skip", max_bad_fraction=1.0)
        except DataError as error:
            assert str(path) in str(error)
