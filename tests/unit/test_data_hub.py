"""Data sets of the hub, by either kind of name: downloaded once, and read from the cache without a network."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import REPOSITORY, REVISION, hub_of

# Each name is read in one process, for the hub's libraries take their settings when they are imported.
READ = """
import json, sys
from simpo_megatron.data import PairOptions
from simpo_megatron.data.sources import read_raw
from simpo_megatron.errors import DataError
for name in sys.argv[1:]:
    try:
        rows = [raw.row for raw in read_raw(name, PairOptions())]
        print(json.dumps([json.loads(row) if isinstance(row, bytes) else row for row in rows]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def lines(*prompts):
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in prompts]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(names, home, **variables):
    environment = os.environ | {"HF_HOME": str(home), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"} | variables
    command = [sys.executable, "-c", READ, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [
        found if isinstance(found, str) else [row["prompt"] for row in found]
        for found in map(json.loads, done.stdout.splitlines())
    ]


@pytest.mark.processes
def test_data_sets_of_the_hub_are_read_by_name_and_then_from_the_cache(tmp_path):
    files = {"data/train.jsonl": lines("a", "b"), "data/test.jsonl": lines("c"), "README.md": b"# Pairs\n"}
    hub, hf = f"hub:{REPOSITORY}", f"hf://datasets/{REPOSITORY}"
    found = [["a", "b"], ["c"], ["c"], ["a", "b"]]
    names = [hub, f"{hub}:test", f"{hf}/data/test.jsonl", f"hf://{REPOSITORY}"]
    several = f"{hf}@{REVISION}/data/t*.jsonl"
    with hub_of(files) as address:
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        *rows, of_several, no_split, no_file, no_owner = read(
            [*names, several, f"{hub}:dev", f"{hf}/none.jsonl", "hub:owner/other"], tmp_path, **online
        )
    assert rows == found and sorted(of_several) == ["a", "b", "c"]
    assert no_split.startswith(f"{hub}:dev: found ") and "['train', 'test']" in no_split
    assert no_file.startswith(f"{hf}/none.jsonl: found ") and no_owner.startswith("hub:owner/other: found ")
    *rows, missing = read([*names, "hub:owner/other"], tmp_path, HF_HUB_OFFLINE="1")
    assert rows == found and missing.startswith("hub:owner/other: found ")
