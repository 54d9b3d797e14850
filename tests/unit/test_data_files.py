"""Files of every kind, under every name and from every folder, hold the same rows; what cannot be read says why."""

import csv
import json

import pytest

from simpo_megatron.config import load_config
from simpo_megatron.data import PairOptions
from simpo_megatron.data.records import BadRecord
from simpo_megatron.data.sources import read_raw
from simpo_megatron.errors import DataError

OPTIONS = PairOptions()
ROWS = [{"prompt": f"Which way, {number}?", "chosen": 'North, "so"\nsay we.', "rejected": "007"} for number in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows_of(path):
    found = [raw.row for raw in read_raw(str(path), OPTIONS)]
    return [json.loads(row) if isinstance(row, bytes) else row for row in found]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a", "a.ndjson", "a.parquet", "a.csv"])
def test_lines_of_json_are_told_by_what_they_hold(name, tmp_path):
    assert rows_of(write(tmp_path / name, LINES)) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("indent", [None, 1])
def test_so_is_a_list_in_json(name, indent, tmp_path):
    assert rows_of(write(tmp_path / name, json.dumps(ROWS, indent=indent))) == ROWS


def test_tables_of_text_stay_text_and_have_the_lines_of_the_file(tmp_path):
    assert rows_of(write_csv(tmp_path / "a.csv")) == ROWS
    assert rows_of(write_csv(tmp_path / "a.tsv", "\t")) == ROWS
    path = write(tmp_path / "b.csv", 'prompt,chosen,rejected\na,"b\nc",d\na,b\n\na,b,c\n')
    raw = list(read_raw(str(path), OPTIONS))
    assert [record.line for record in raw] == [2, 4, 5, 6]
    assert [record.row.reason for record in raw if isinstance(record.row, BadRecord)] == ["bad_csv", "blank_line"]
    with pytest.raises(DataError, match=r"latin\.csv: invalid_utf8"):
        (tmp_path / "latin.csv").write_bytes(b"prompt,chosen,rejected\n\xff,b,c\n")
        rows_of(tmp_path / "latin.csv")


def test_tables_of_columns_are_told_by_their_first_bytes_and_filling_nulls_are_left_out(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"chosen": [{"role": "assistant", "content": "a"}]}, {"chosen": [{"from": "gpt", "value": "b"}]}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.json")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write(table)
    assert rows_of(tmp_path / "a.json") == rows
    assert rows_of(tmp_path / "a.arrow") == rows


def test_a_folder_or_a_pattern_stands_for_its_files(tmp_path):
    for number in range(3):
        write(tmp_path / f"shards/data/train-0000{number}-of-00003.jsonl", LINES)
        write(tmp_path / f"parts/{number}.jsonl", LINES)
        write(tmp_path / f"splits/train-0000{number}-of-00003.jsonl", LINES)
    write(tmp_path / "shards/README.md", "# Pairs")
    write(tmp_path / "shards/.cache/huggingface/train.jsonl", LINES)
    write(tmp_path / "splits/test-00000-of-00001.jsonl", LINES)
    assert rows_of(tmp_path / "shards") == rows_of(tmp_path / "parts") == ROWS * 3
    with pytest.raises(DataError, match=r"the splits test, train, expected one; name its files, such as '.*train\*"):
        rows_of(tmp_path / "splits")
    assert rows_of(tmp_path / "splits/train*") == ROWS * 3
    with pytest.raises(DataError, match="found no file that matches"):
        rows_of(tmp_path / "splits/valid*")


def test_a_saved_dictionary_of_splits_is_refused_with_the_folder_of_one_that_is_there(tmp_path):
    import datasets

    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"test_prefs": split, "train_prefs": split}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"found the splits train_prefs, test_prefs, .*saved/train_prefs"):
        rows_of(tmp_path / "saved")
    assert rows_of(tmp_path / "saved/train_prefs") == ROWS


def test_a_pointer_of_git_lfs_is_called_so(tmp_path):
    path = write(tmp_path / "a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="a pointer of Git LFS"):
        rows_of(path)


def test_data_given_twice_is_both_and_paths_are_resolved_everywhere(tmp_path, monkeypatch):
    assert load_config(["--model", "m", "--data", "a.jsonl", "--data", "b.jsonl"]).data.data == ("a.jsonl", "b.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    text = "model: ~/m\ndata: [0.5, ../a.jsonl, 0.5, ~/b.jsonl]\nvalid_data: [help=~/v.jsonl, x=../w.jsonl]\n"
    config = load_config(["--config", str(write(tmp_path / "c.yaml", text))])
    assert config.model.model == f"{tmp_path}/m"
    assert config.data.data == ("0.5", f"{tmp_path}/a.jsonl", "0.5", f"{tmp_path}/b.jsonl")
    assert config.data.valid_data == (f"help={tmp_path}/v.jsonl", f"x={tmp_path}/w.jsonl")
