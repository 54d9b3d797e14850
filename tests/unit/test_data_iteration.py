"""Steps from files of pairs: the package's own example, ranks that share a step, and the padding of real pairs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data_tokenizers import llama_like, qwen_like

import simpo_megatron.data
from simpo_megatron.data import (
    BatchOptions,
    PairOptions,
    build_preference_dataset,
    iterate_steps,
)
from simpo_megatron.data.batching import padding_share


def write_pairs(path, count):
    answers = ["the answer " * (1 + i % 7) for i in range(count)]
    rows = [{"prompt": f"q {i}", "chosen": text, "rejected": f"no {i}"} for i, text in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.processes
def test_the_example_of_the_package_iterates_over_batches_without_megatron(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    llama_like().save_pretrained(tmp_path / "model")
    example = simpo_megatron.data.__doc__.split("```")[1].removeprefix("python\n")
    example = re.sub(r"\.\.\. .*", "seen += batch.pair_ids_P.tolist()", example)
    script = (
        f"seen = []\n{example}"
        "    if len(seen) >= 40: break\n"
        "assert sorted(seen) == sorted(2 * list(range(20))), seen\n"
        "import sys\n"
        "assert not any(name.split('.')[0] == 'megatron' for name in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_two_ranks_iterate_over_halves_of_the_same_steps(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 30)
    dataset = build_preference_dataset([str(path)], llama_like(), PairOptions(), tmp_path / "cache")
    options = BatchOptions(global_batch_size=10, tokens_per_microbatch=200)
    whole = iterate_steps(dataset, options, consumed_pairs=10)
    halves = [iterate_steps(dataset, options, dp_rank=rank, dp_size=2, consumed_pairs=10) for rank in (0, 1)]
    for _ in range(3):
        expected = sorted(i for batch in next(whole) for i in batch.pair_ids_P.tolist())
        steps = [next(half) for half in halves]
        assert len(steps[0]) == len(steps[1])
        assert sorted(i for step in steps for batch in step for i in batch.pair_ids_P.tolist()) == expected


def test_less_than_three_percent_of_a_packed_step_of_real_pairs_is_padding(tmp_path):
    place = os.environ.get("SIMPO_REAL_PAIRS")
    if not place:
        pytest.skip("SIMPO_REAL_PAIRS names no file or folder of real preference pairs")
    files = sorted(map(str, Path(place).glob("*.jsonl"))) if Path(place).is_dir() else [place]
    dataset = build_preference_dataset(files, qwen_like(), PairOptions(bad_record="skip"), tmp_path / "cache")
    options = BatchOptions(global_batch_size=128, tokens_per_microbatch=8192, sequence_multiple=16)
    steps = iterate_steps(dataset, options)
    batches = [batch for _ in range(2) for batch in next(steps)]
    padded = sum(batch.tokens_BS.numel() for batch in batches)
    waste = 1 - sum(batch.num_tokens for batch in batches) / padded
    assert 0 <= waste < 0.03, waste


@pytest.fixture(scope="module")
def cache_of_real_pairs(tmp_path_factory):
    """The folder in which pairs are tokenised once for all layouts."""
    return tmp_path_factory.mktemp("real") / "cache"


@pytest.mark.parametrize("layout", [dict(dp_size=1), dict(dp_size=4), dict(dp_size=2, microbatch_multiple=4)])
def test_one_length_a_step_costs_less_than_four_percent_of_real_pairs(cache_of_real_pairs, layout):
    place = os.environ.get("SIMPO_REAL_PAIRS")
    if not place:
        pytest.skip("SIMPO_REAL_PAIRS names no file or folder of real preference pairs")
    files = sorted(Path(place).glob("*.jsonl")) if Path(place).is_dir() else [Path(place)]
    for file in files:
        pairs = PairOptions(bad_record="skip")
        dataset = build_preference_dataset([str(file)], qwen_like(), pairs, cache_of_real_pairs)
        # In packs of 4,096 two of these pairs stand at most, and no order of them would fill such packs.
        for tokens in (8192, 16384):
            options = BatchOptions(
                global_batch_size=128, tokens_per_microbatch=tokens, sequence_multiple=16, one_shape_per_step=True
            )
            share = padding_share(dataset.lengths, options, **layout)
            print(f"{file.name}, {tokens} tokens, {layout}: {share:.2%} padding, {len(dataset)} pairs")
            assert 0 <= share < 0.04, (file.name, tokens, share)
