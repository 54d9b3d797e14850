"""The dataset: files follow one another, weights and splits hold, memory does not grow."""

import json
import tracemalloc

import numpy as np
import pytest
from data_stores import build, same, write_pairs
from data_tokenizers import gemma_like

from simpo_megatron.data import check_vocabulary, split
from simpo_megatron.data.store import chunks
from simpo_megatron.errors import ConfigError, DataError


def test_several_files_follow_one_another_and_know_their_lines(tmp_path):
    a, b = write_pairs(tmp_path / "a.jsonl", 4), write_pairs(tmp_path / "b.jsonl", 3, offset=100)
    both = build([str(a), str(b)], tmp_path)
    assert [both.where(i) for i in (0, 3, 4, 6)] == [("a", 1), ("a", 4), ("b", 1), ("b", 3)]
    assert both.report.num_used == 7
    single = build(b, tmp_path)
    assert all(np.array_equal(both[4 + i].rejected_ids, single[i].rejected_ids) for i in range(3))
    assert both.lengths.shape == (7, 3)
    with pytest.raises(IndexError):
        both[7]


def test_weights_are_shares_of_an_epoch_without_repetition(tmp_path):
    a, b = write_pairs(tmp_path / "a.jsonl", 100), write_pairs(tmp_path / "b.jsonl", 90, offset=1000)
    mixed = build(["0.25", str(a), "0.75", str(b)], tmp_path)
    names = [mixed.where(i)[0] for i in range(len(mixed))]
    assert (names.count("a"), names.count("b")) == (30, 90)
    assert len({mixed.where(i) for i in range(len(mixed))}) == 120
    again = build(["0.25", str(a), "0.75", str(b)], tmp_path)
    assert again.fingerprint == mixed.fingerprint


def test_a_split_is_deterministic_and_keeps_each_prompt_on_one_side(tmp_path):
    dataset = build(write_pairs(tmp_path / "pairs.jsonl", 600, num_prompts=200), tmp_path)
    train, valid = split(dataset, 0.2, seed=1)
    assert len(train) + len(valid) == 600
    assert 60 < len(valid) < 180  # 40 of 200 prompts expected, standard deviation 5.7 prompts of 3 pairs
    assert not set(train.prompt_keys.tolist()) & set(valid.prompt_keys.tolist())
    assert same(split(dataset, 0.2, seed=1)[1], valid)
    assert set(split(dataset, 0.2, seed=2)[1].prompt_keys.tolist()) != set(valid.prompt_keys.tolist())
    more = build(write_pairs(tmp_path / "more.jsonl", 900, num_prompts=300), tmp_path)
    assert set(valid.prompt_keys.tolist()) <= set(split(more, 0.2, seed=1)[1].prompt_keys.tolist())
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(ConfigError, match="valid_fraction"):
            split(dataset, fraction)
    with pytest.raises(DataError, match="it leaves 0 for validation"):
        split(dataset, 1e-9)


def test_ids_beyond_the_models_vocabulary_are_named(tmp_path):
    dataset = build(write_pairs(tmp_path / "pairs.jsonl", 3), tmp_path, tokenizer=gemma_like())
    largest = max(
        max(map(max, (p.prompt_ids, p.chosen_ids, p.rejected_ids))) for p in map(dataset.__getitem__, range(3))
    )
    assert dataset.max_token_id == largest
    check_vocabulary(dataset, largest + 1)
    with pytest.raises(DataError, match=f"the token id {largest} in the pairs, expected ids below {largest}"):
        check_vocabulary(dataset, int(largest))


def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path):
    def peak(num_chunks):
        path, row = (
            tmp_path / f"{num_chunks}.jsonl",
            {"prompt": "q", "chosen": "the answer " * 100, "rejected": "no"},
        )
        path.write_text((json.dumps(row) + "\n") * (chunks.CHUNK_RECORDS * num_chunks))
        tracemalloc.start()
        build(path, tmp_path, num_workers=1)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1)  # caches of the template and the tokenizer
    # The texts alone of the 18 chunks of difference are 1.3 MB; the index and the table of pairs are 0.05 MB, and from
    # one build to the next caches and threads take up to 0.3 MB more or less.
    assert peak(20) - peak(2) < 650_000
