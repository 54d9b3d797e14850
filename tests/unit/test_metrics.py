"""Sums first, one division at the end: the mean is over pairs, however they were cut."""

import psutil
import pytest
import torch
import torch.distributed as dist

from simpo_megatron.data import METRIC_GROUPS
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.parallel_sizes import ParallelSizes
from simpo_megatron.training.step import memory_use, peak_memory_bytes, reduce_sums, throughput, utilization
from simpo_megatron.training.step.metrics import SUMMED


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    world = dist.group.WORLD
    names = ("tp", "pp", "cp", "dp", "dp_cp", "ep", "expert_dp")
    yield ParallelGroups(**dict.fromkeys(names, world), sizes=ParallelSizes())
    dist.destroy_process_group()


def microbatch(*values_per_pair, names=SUMMED[:-1]):
    return {name: torch.tensor(sum(values_per_pair) * (i + 1.0)) for i, name in enumerate(names)}


def test_microbatches_of_one_and_three_pairs_weigh_every_pair_alike(groups):
    means = reduce_sums([microbatch(8.0), microbatch(1.0, 2.0, 1.0)], 4, groups)
    assert means["loss"] == pytest.approx(3.0), "not the mean of microbatch means, 4.67"
    assert means["logps/chosen"] == pytest.approx(3.0 * 6)


def test_how_pairs_were_cut_into_microbatches_changes_nothing(groups):
    whole = reduce_sums([microbatch(1.0, 2.0, 3.0, 4.0)], 4, groups)
    cut = reduce_sums([microbatch(1.0), microbatch(2.0, 3.0), microbatch(4.0)], 4, groups)
    assert cut == pytest.approx(whole, rel=1e-12)


def test_the_sft_loss_is_there_only_when_it_was_summed(groups):
    assert "sft_loss" not in reduce_sums([microbatch(1.0)], 1, groups)
    with_sft = reduce_sums([microbatch(1.0), microbatch(2.0, names=SUMMED)], 2, groups)
    assert with_sft["sft_loss"] == pytest.approx(2.0 * len(SUMMED) / 2)


def test_token_counts_past_what_float32_holds_are_exact(groups):
    length = {"response_length/chosen": torch.tensor(2.0**24), "loss": torch.tensor(0.0)}
    one = {"response_length/chosen": torch.tensor(1.0)}
    assert reduce_sums([length, one], 1, groups)["response_length/chosen"] == 2**24 + 1


def test_a_loss_that_is_not_finite_stays_visible(groups):
    assert reduce_sums([{"loss": torch.tensor(float("nan"))}], 1, groups)["loss"] != 0.0


def test_throughput_counts_pairs_and_real_tokens_per_second():
    speed = throughput(num_pairs=16, num_tokens=4000, seconds=2.0)
    assert (speed["pairs_per_second"], speed["tokens_per_second"]) == (8.0, 2000.0)
    assert memory_use() == {"peak_memory_gib": pytest.approx(peak_memory_bytes() / 2**30, rel=0.1)}


def test_the_share_of_a_gpus_peak_is_there_only_where_the_peak_is_known():
    assert utilization(4e14, None) == {"tflops_per_gpu": 400.0}
    assert utilization(4e14, 1e15) == {"tflops_per_gpu": 400.0, "mfu": 0.4}


def test_the_peak_of_memory_is_in_bytes_and_not_below_what_is_held_now():
    held_now = psutil.Process().memory_info().rss
    assert held_now <= peak_memory_bytes() + (1 << 20) < 64 * held_now


def test_no_validation_set_can_be_called_as_a_group_of_metrics_is():
    assert {name.partition("/")[0] for name in SUMMED if "/" in name} <= METRIC_GROUPS
