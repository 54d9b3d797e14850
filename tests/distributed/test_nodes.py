"""Nodes that share no disk tokenise for themselves, those that do tokenise once, and every rank has the same pairs."""

import json
import os
from pathlib import Path

from data_tokenizers import llama_like
from ranks import run_ranks

WORKER = Path(__file__).with_name("nodes_worker.py")


def test_each_node_builds_its_own_store_or_sees_the_one_of_rank_0(tmp_path):
    llama_like().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"q {i}", "chosen": "yes " * i, "rejected": "no"} for i in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for number, path in enumerate(("node0/pairs.jsonl", "node1/pairs.jsonl", "shared.jsonl")):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        os.utime(file, (1e9 + number, 1e9 + number))  # copies have times of their own
    run_ranks(WORKER, 3, str(tmp_path), timeout=120)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    apart = [rank["apart"] for rank in found]
    assert {(fingerprint, count) for fingerprint, count, *_ in apart} == {(apart[0][0], 5)}
    assert len(apart[0][2]) == len(apart[1][2]) == 1 and apart[1][2] == apart[2][2] != apart[0][2]
    assert [rank["apart"][3] for rank in found] == [True, True, False], "ranks that have read the tokenizer"
    shared = [rank["shared"][:3] for rank in found]
    assert shared[0] == shared[1] == shared[2] and len(shared[0][2]) == 1
    # A rank whose folder its node's first rank did not write in: told what to share, not that a file changed.
    for rank in found:
        assert "give the ranks of a node one data_cache, and one copy of the file" in rank["split"]
        assert "change" not in rank["split"]
