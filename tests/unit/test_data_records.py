"""Records: every known format becomes the same pair, and every bad record has its reason and its place."""

import bz2
import gzip
import json
import os
import time
from pathlib import Path

import pytest
from data_tokenizers import llama_like

from simpo_megatron.data import PairOptions, build_preference_dataset
from simpo_megatron.data.records import BadRecord, parse_json, to_record
from simpo_megatron.data.sources import parse_named_sources, parse_sources, read_raw
from simpo_megatron.errors import ConfigError, DataError

OPTIONS = PairOptions(max_length=256, max_prompt_length=128)
USER = {"role": "user", "content": "Why?"}
GOOD = {"prompt": "Why?", "chosen": "Because it is so.", "rejected": "No."}


def assistant(text):
    return {"role": "assistant", "content": text}


def build(path, tmp_path, **options):
    return build_preference_dataset(
        [str(path)],
        llama_like(),
        PairOptions(max_length=256, max_prompt_length=128, **options),
        tmp_path / "cache",
    )


def write(tmp_path, content: bytes | list, name="pairs.jsonl"):
    path = tmp_path / name
    if isinstance(content, list):
        content = b"".join(json.dumps(row).encode() + b"\n" for row in content)
    path.write_bytes(content)
    return path


FORMATS = {
    "message lists": {"prompt": [USER], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
    "message lists that repeat the prompt": {
        "prompt": [USER],
        "chosen": [USER, assistant("Yes.")],
        "rejected": [USER, assistant("No.")],
    },
    "whole conversations": {"chosen": [USER, assistant("Yes.")], "rejected": [USER, assistant("No.")]},
    "UltraFeedback": {
        "prompt": "Why?",
        "prompt_id": "7",
        "chosen": [USER, assistant("Yes.")],
        "rejected": [USER, assistant("No.")],
        "messages": [USER, assistant("Yes.")],
        "score_chosen": 8.0,
    },
    "dialogues": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
    },
    "a dialogue as the prompt": {
        "prompt": "\n\nHuman: Why?\n\nAssistant:",
        "chosen": "Yes.",
        "rejected": "No.",
    },
    "a table's columns of nulls": {
        "prompt": None,
        "conversations": [{"from": "human", "value": "Why?", "role": None, "content": None}],
        "chosen": [{"from": "gpt", "value": "Yes.", "role": None, "content": None}],
        "rejected": [{"from": "gpt", "value": "No.", "role": None, "content": None}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_every_conversation_format_becomes_the_same_record(row):
    record = to_record(row, OPTIONS)
    assert record.prompt == (USER,)
    assert (record.chosen, record.rejected) == ("Yes.", "No.")


def test_strings_stay_strings_and_columns_can_be_renamed():
    options = PairOptions(prompt_column="question", chosen_column="a", rejected_column="b")
    record = to_record({"question": "Why?", "a": "Yes.", "b": "No."}, options)
    assert (record.prompt, record.chosen, record.rejected) == ("Why?", "Yes.", "No.")
    with pytest.raises(BadRecord, match="missing_key:question"):
        to_record(GOOD | {"a": "Yes.", "b": "No."}, options)


BAD_ROWS = {
    "missing_key:chosen": {"prompt": "Why?", "rejected": "No."},
    "unpaired": {"prompt": "Why?", "completion": "Because.", "label": True},
    "missing_key:rejected": {"prompt": "Why?", "chosen": "Yes."},
    "missing_key:prompt": {"chosen": "Yes.", "rejected": "No."},
    "bad_type:chosen": GOOD | {"chosen": None},
    "bad_type:rejected": GOOD | {"rejected": 3},
    "bad_type:prompt": GOOD | {"prompt": 3.5},
    "not_an_object": 42,
    "bad_role:chosen": {"chosen": [USER], "rejected": [USER, assistant("No.")]},
    "bad_role:prompt": GOOD | {"prompt": [USER, assistant("Well,")]},
    "bad_dialogue:rejected": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "No."},
    "prompt_mismatch": {
        "chosen": [USER, assistant("Yes.")],
        "rejected": [USER | {"content": "How?"}, assistant("No.")],
    },
    "empty_chosen": GOOD | {"chosen": " \n"},
    "empty_rejected": GOOD | {"rejected": ""},
    "empty_prompt": GOOD | {"prompt": " "},
    "bad_character": GOOD | {"chosen": "a\x00b"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_record_stops_the_build_with_its_place_and_reason_or_is_counted(reason, tmp_path):
    rows = [GOOD] * 20 + [BAD_ROWS[reason]] + [GOOD] * 20
    path = write(tmp_path, rows)
    with pytest.raises(DataError) as error:
        build(path, tmp_path)
    assert str(error.value).startswith(f"{path}:21: {reason}: ")
    assert "\n" not in str(error.value)
    report = build(path, tmp_path, bad_record="skip").report
    assert report.dropped == {reason: 1}
    assert report.num_used + sum(report.dropped.values()) == report.num_lines == 41


def bad_lines():
    good = json.dumps(GOOD).encode()
    yield "duplicate_key", b'{"prompt": "Why?", "chosen": "a", "chosen": "b", "rejected": "c"}\n'
    yield "duplicate_key", b'{"prompt": [{"role": "user", "role": "user", "content": "x"}], "chosen": "a"}\n'
    yield "invalid_utf8", good.replace(b"Why", b"Wh\xff") + b"\n"
    yield "byte_order_mark", b"\xef\xbb\xbf" + good + b"\n"
    yield "bad_json", good.replace(b"Why", b"W\x00y") + b"\n"
    yield "bad_character", good.replace(b"Why", b"W\\u0000y") + b"\n"
    yield "bad_character", good.replace(b"Why", b"W\\ud800y") + b"\n"
    yield "bad_json", b'{"prompt": NaN, "chosen": "a", "rejected": "b"}\n'
    yield "bad_json", b'{"prompt": -Infinity, "chosen": "a", "rejected": "b"}\n'
    yield "bad_json", b'{"prompt": ' + b"1" * 5000 + b', "chosen": "a", "rejected": "b"}\n'
    yield "bad_json", b"[" * 200_000 + b"\n"
    yield "not_an_object", b"[]\n"
    yield "truncated_json", good[: len(good) // 2]
    yield "blank_line", b"  \n"


@pytest.mark.parametrize(("reason", "line"), list(bad_lines()))
def test_a_bad_line_has_its_reason_and_its_good_neighbours_survive(reason, line, tmp_path):
    good = json.dumps(GOOD).encode() + b"\n"
    path = write(tmp_path, good * 30 + line)
    report = build(path, tmp_path, bad_record="skip").report
    assert (report.num_used, report.dropped) == (30, {reason: 1})
    assert report.first[reason].startswith(f"{path}:31: {reason}: ")


def test_the_first_bad_record_of_several_is_the_one_that_is_named(tmp_path):
    late = GOOD | {"chosen": "<|eot_id|>"}  # found when tokenised, after all rows of its chunk were parsed
    path = write(tmp_path, [GOOD, late, GOOD, GOOD | {"chosen": ""}])
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: empty_chosen"):
        build(path, tmp_path)


def test_harmless_oddities_of_a_file_are_accepted(tmp_path):
    good = json.dumps(GOOD | {"chosen": "line\u2028separator \x85"}, ensure_ascii=False).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + good + b"\r\n\r\n" + good)  # BOM, CRLF, no newline at the end
    report = build(path, tmp_path).report
    assert (report.num_lines, report.num_used, report.dropped) == (3, 2, {"blank_line": 1})


def test_columns_that_are_not_read_are_named_once_in_the_report(tmp_path):
    report = build(write(tmp_path, [GOOD | {"score": 1}] * 3), tmp_path).report
    assert report.extra_keys == {"score": 3}
    assert "columns not read: score" in "\n".join(report.lines())


def test_too_many_bad_records_are_an_error_even_when_they_are_skipped(tmp_path):
    path = write(tmp_path, [GOOD] * 5 + [42] * 5)
    with pytest.raises(DataError, match="found 5 of 10 records malformed.*max_bad_fraction"):
        build(path, tmp_path, bad_record="skip")


@pytest.mark.parametrize("content", [b"", b"\n\n", json.dumps(GOOD | {"rejected": GOOD["chosen"]}).encode()])
def test_a_file_without_a_pair_is_an_error(content, tmp_path):
    with pytest.raises(DataError, match="found no usable pair"):
        build(write(tmp_path, content), tmp_path)


def test_a_record_that_is_too_long_is_refused_before_it_is_parsed(tmp_path):
    path = write(tmp_path, json.dumps(GOOD).encode() + b"\n")
    with open(path, "r+b") as file:
        file.truncate(2 << 30)  # sparse: one line of 2 GiB of zero bytes
    before = bytes_read()
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: too_long_record"):
        build_preference_dataset([str(path)], llama_like(), OPTIONS, tmp_path / "cache", num_workers=1)
    assert bytes_read() - before < 8 * OPTIONS.max_record_bytes


def bytes_read() -> int:
    """The bytes that this process has read from files, of zeros in a sparse one, too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_record_that_is_too_long_is_skipped_to_its_end(tmp_path):
    long = GOOD | {"chosen": "x" * 5000}
    path = write(tmp_path, [GOOD] * 10 + [long] + [GOOD] * 10)
    report = build(path, tmp_path, bad_record="skip", max_record_bytes=1000).report
    assert (report.num_used, report.dropped) == (20, {"too_long_record": 1})


def test_compressed_and_columnar_files_hold_the_same_pairs(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{**FORMATS["whole conversations"], "number": i} for i in range(5)]
    plain = build(write(tmp_path, rows), tmp_path)
    text = write(tmp_path, rows).read_bytes()
    paths = [
        write(tmp_path, gzip.compress(text), "a.jsonl.gz"),
        write(tmp_path, json.dumps(rows).encode(), "b.json"),
        tmp_path / "c.parquet",
        tmp_path / "d",
        tmp_path / "e.jsonl.zst",
        write(tmp_path, bz2.compress(text), "f.jsonl.bz2"),
    ]
    with pyarrow.output_stream(str(paths[4]), compression="zstd") as file:
        file.write(text)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[2])
    datasets.Dataset.from_list(rows).save_to_disk(str(paths[3]))
    for path in paths:
        assert build(path, tmp_path).fingerprint == plain.fingerprint, path
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(text)
    assert [raw.row["number"] for raw in read_raw(f"hub:{folder}:train", OPTIONS)] == list(range(5))


def bad_files(tmp_path):
    gz = gzip.compress(json.dumps(GOOD).encode() * 50)
    yield write(tmp_path, gz, "hidden.jsonl"), "found gzip content"
    yield write(tmp_path, b"{}", "fake.jsonl.gz"), "found uncompressed content"
    yield write(tmp_path, gz, "gzip.jsonl.bz2"), "found gzip content"
    yield write(tmp_path, bz2.compress(gz)[:-8], "cut.jsonl.bz2"), "damaged"
    yield write(tmp_path, gz[:-10], "cut.jsonl.gz"), "damaged"
    yield write(tmp_path, gz[:40] + b"0000" + gz[44:], "flipped.jsonl.gz"), "damaged"
    yield write(tmp_path, "{}".encode("utf-16"), "utf16.jsonl"), "UTF-16"
    yield write(tmp_path, b"{}", "pairs.csv"), "found another kind of file"
    yield write(tmp_path, b"{}", "object.json"), "not_a_list"
    yield write(tmp_path, b"PAR1", "broken.parquet"), "expected a readable parquet file"
    yield tmp_path / "missing.jsonl", "no such file"
    yield tmp_path, "found a folder"
    fifo, loop = tmp_path / "fifo.jsonl", tmp_path / "loop.jsonl"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    yield fifo, "expected a regular file"
    yield loop, "too many levels of symbolic links"


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path):
    for path, message in bad_files(tmp_path):
        with pytest.raises(DataError) as error:
            build(path, tmp_path)
        assert message in str(error.value), path
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)


def test_files_may_have_weights_in_three_notations():
    blend = parse_sources(["0.3", "a.jsonl", 0.7, "b.jsonl"])
    assert blend == parse_sources([{"path": "a.jsonl", "weight": 0.3}, {"path": "b.jsonl", "weight": 0.7}])
    assert [source.weight for source in parse_sources(["a.jsonl", "b.jsonl"])] == [None, None]
    for wrong in (
        ["0.3", "a.jsonl", "b.jsonl"],
        ["a.jsonl", "0.5"],
        ["0", "a"],
        [],
        [{"file": "a"}],
        ["nan", "a"],
    ):
        with pytest.raises(ConfigError):
            parse_sources(wrong)


def test_validation_sets_have_names():
    named = parse_named_sources(["help=a.jsonl", "harmless.jsonl.gz", "help=b.jsonl"])
    assert named == {"help": ["a.jsonl", "b.jsonl"], "harmless": ["harmless.jsonl.gz"]}
    with pytest.raises(ConfigError, match="found two sets called 'test'"):
        parse_named_sources(["help=a.jsonl", "a/test.jsonl", "b/test.jsonl"])


@pytest.mark.parametrize("files", [["logps=a.jsonl"], ["help=a.jsonl", "some/rewards.jsonl"]])
def test_a_validation_set_cannot_be_called_as_a_group_of_metrics_is(files):
    with pytest.raises(ConfigError, match=r"valid_data: found a set called (logps|rewards), the name of a group"):
        parse_named_sources(files)
    assert parse_named_sources(["rewards.jsonl"]) == {"": ["rewards.jsonl"]}, "its metrics are eval/..."


def test_validation_files_without_a_name_are_one_set():
    assert parse_named_sources(["a/test.jsonl", "./lr=1/b.jsonl"]) == {"": ["a/test.jsonl", "./lr=1/b.jsonl"]}
    assert parse_named_sources(["0.3", "a.jsonl", "0.7", "b.jsonl"]) == {"": ["0.3", "a.jsonl", "0.7", "b.jsonl"]}
    assert parse_named_sources([]) == {}


def test_an_error_of_json_on_the_last_line_with_a_newline_is_not_called_truncated():
    with pytest.raises(BadRecord, match="bad_json"):
        parse_json(b"{\n", last_line=False)


def test_a_key_that_stands_twice_among_many_is_found_in_one_pass():
    keys = [f"k{number}" for number in range(100_000)]
    row = "{" + ", ".join(f'"{key}": 1' for key in [*keys, keys[-1]]) + "}"
    started = time.process_time()
    with pytest.raises(BadRecord, match="k99999"):
        parse_json(row.encode())
    assert time.process_time() - started < 5
