"""The hooks for Megatron-LM without it: arguments, microbatches, loss, and the three forms of its pretrain()."""

from __future__ import annotations

import argparse
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from simpo_megatron.data import TokenizedPair, build_preference_dataset
from simpo_megatron.demo import prepare_demo
from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.loss import ResponseTokens
from simpo_megatron.megatron_lm import add_simpo_args, forward_step, loss_func, pretrain_arguments
from simpo_megatron.megatron_lm.arguments import (
    batch_options,
    check_experts,
    check_pipeline,
    check_precision,
    num_microbatches,
    objective_of,
    pair_options,
)
from simpo_megatron.megatron_lm.datasets import Division, _dataset, _samples

MEGATRON = dict(seq_length=512, micro_batch_size=2, global_batch_size=8, data_parallel_size=2, rampup_batch_size=None)
MEGATRON |= dict(fp8=None, fp8_recipe="delayed", tensor_model_parallel_size=2, sequence_parallel=True, seed=7)
MEGATRON |= dict(context_parallel_size=1, expert_model_parallel_size=1, pipeline_model_parallel_size=1)
MEGATRON |= dict(tp_comm_overlap=False)


def parsed(*flags: str, **megatron) -> argparse.Namespace:
    """Our arguments as Megatron-LM parses them, between some of its own."""
    args = add_simpo_args(argparse.ArgumentParser()).parse_args(flags)
    return argparse.Namespace(**{**vars(args), **MEGATRON, **megatron})


def division_of(args: argparse.Namespace) -> Division:
    return Division(batch_options(args), dp_size=args.data_parallel_size, num_microbatches=num_microbatches(args))


@pytest.fixture
def megatron_args(monkeypatch):
    """A stand-in for megatron.training, which megatron-core has from 0.17 on: get_args() gives what the test sets."""
    stand_in = ModuleType("megatron.training")
    stand_in.get_args = lambda: stand_in.args
    monkeypatch.setitem(sys.modules, "megatron.training", stand_in)
    return stand_in


def test_flags_are_our_options_and_megatrons_words_stay_megatrons():
    args = parsed("--simpo-beta", "10", "--simpo-gamma-beta-ratio", "0.3", "--simpo-template-mode", "princeton")
    objective, pairs, batch = objective_of(args), pair_options(args), batch_options(args)
    assert (objective.beta, objective.gamma, objective.loss_type) == (10, 3, "sigmoid")
    assert (pairs.max_length, pairs.max_prompt_length, pairs.template_mode) == (512, 450, "princeton")
    assert (batch.global_batch_size, batch.micro_batch_size, batch.sequence_multiple) == (8, 2, 2)
    assert (args.dataloader_type, args.calculate_per_token_loss, args.eval_iters) == ("external", True, 0)
    assert batch_options(parsed(fp8="hybrid", fp8_recipe="blockwise")).sequence_multiple == 256


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="--global-batch-size: found 10, expected a multiple of 4"):
        batch_options(parsed(global_batch_size=10))
    with pytest.raises(ConfigError, match="--context-parallel-size: found 2, expected 1"):
        batch_options(parsed(context_parallel_size=2))
    with pytest.raises(ConfigError, match="beta: found -1"):
        objective_of(parsed("--simpo-beta", "-1"))
    with pytest.raises(ConfigError, match="--eval-micro-batch-size: found 4, expected 2"):
        batch_options(parsed(eval_micro_batch_size=4))
    with pytest.raises(ConfigError, match="--seq-length: found 511, expected a multiple of 2"):
        batch_options(parsed(seq_length=511, pipeline_model_parallel_size=2))


def test_the_length_of_a_pair_is_an_argument_beside_that_of_a_row():
    pairs = pair_options(parsed("--simpo-max-length", "1024", pipeline_model_parallel_size=2))
    assert (pairs.max_length, pairs.max_prompt_length) == (1024, 900)


LENGTHS = np.array([[5, 1 + index % 7, 3 + index % 4] for index in range(24)])


@pytest.mark.parametrize("known_by", [{"pipeline_model_parallel_size": 2}, {"tp_comm_overlap": True}])
def test_rows_have_the_length_that_megatron_lm_announces(known_by):
    args = parsed(seq_length=20, **known_by)
    division = division_of(args)
    division.check(LENGTHS, 0, num_steps=6)
    pairs = [
        TokenizedPair.from_marked(*(np.ones(length, np.int32) for length in lengths)) for lengths in LENGTHS.tolist()
    ]
    dataset = type("Pairs", (), {"lengths": LENGTHS, "counted": LENGTHS[:, 1:], "__getitem__": lambda _, i: pairs[i]})()
    ranks = [_samples(dataset, division, dp_rank=rank, consumed_pairs=0) for rank in range(2)]
    for _ in range(3):
        step = [next(rank).batch for rank in ranks for _ in range(num_microbatches(args))]
        assert {tuple(batch.tokens_BS.shape) for batch in step} == {(1, 20 * args.micro_batch_size)}
        assert sum(batch.num_pairs for batch in step) == args.global_batch_size


def test_a_row_too_long_for_its_stages_is_refused_before_the_first_step():
    shortest = next(
        length for length in range(2, 100, 2) if not refused(parsed(seq_length=length, pipeline_model_parallel_size=2))
    )
    # Two pairs a row, so rows hold twice as many tokens; a row of the longest pairs has them all.
    tokens = LENGTHS.sum(axis=1)
    assert tokens.mean() < shortest <= tokens.max() + 1
    message = refused(parsed(seq_length=shortest - 2, pipeline_model_parallel_size=2))
    assert f"--seq-length: found {shortest - 2} x --micro-batch-size 2 = {2 * shortest - 4} tokens" in message
    assert f"raise it to {shortest}, or lower --simpo-max-length" in message


def refused(args: argparse.Namespace) -> str:
    try:
        division_of(args).check(LENGTHS, 0, num_steps=6)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, None),
        ({"moe_router_load_balancing_type": "none"}, None),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, "--moe-router-load-balancing-type: found seq_aux_loss"),
        ({"moe_z_loss_coeff": 1e-3}, "--moe-z-loss-coeff: found 0.001"),
        ({"tensor_model_parallel_size": 2}, "--expert-tensor-parallel-size: found 2"),
    ],
)
def test_experts_and_losses_of_routers_that_would_go_wrong_are_refused(options, refused):
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    check_experts(TransformerConfig(**shape, **options))
    config = TransformerConfig(**shape, num_moe_experts=4, moe_ffn_hidden_size=8, add_bias_linear=False, **options)
    if refused is None:
        check_experts(config)
    else:
        with pytest.raises(ConfigError, match=refused):
            check_experts(config)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, None),
        ({"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}, None),
        ({"virtual_pipeline_model_parallel_size": 2}, "--no-overlap-p2p-communication"),
        (
            {
                "virtual_pipeline_model_parallel_size": 2,
                "overlap_p2p_comm": True,
                "batch_p2p_comm": False,
                "overlap_p2p_comm_warmup_flush": True,
            },
            "--overlap-p2p-communication-warmup-flush",
        ),
    ],
)
def test_pipelines_that_would_hang_are_refused(options, refused):
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 8, "hidden_size": 8, "num_attention_heads": 1, "pipeline_dtype": torch.float32}
    config = TransformerConfig(**shape, pipeline_model_parallel_size=4, **options)
    if refused is None:
        check_pipeline(config)
    else:
        with pytest.raises(ConfigError, match=f"^{refused}: found with pipeline stages, expected without"):
            check_pipeline(config)


def test_transformer_engine_is_refused_where_it_has_no_attention_for_rows():
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 1}
    check_precision(TransformerConfig(**shape, bf16=True), transformer_engine=True)
    check_precision(TransformerConfig(**shape), transformer_engine=False)
    with pytest.raises(ConfigError, match="--transformer-impl: found transformer_engine in fp32"):
        check_precision(TransformerConfig(**shape), transformer_engine=True)


def test_an_id_inside_the_padding_of_the_vocabulary_is_refused(megatron_args, world_of_one, tmp_path):
    demo = prepare_demo(tmp_path / "demo")
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir)
    own = {"tokenizer_model": str(demo.model_dir), "simpo_data_cache": str(tmp_path / "cache")}
    args = parsed(**own, vocab_size=None, padded_vocab_size=len(tokenizer) + 128)
    megatron_args.get_tokenizer = lambda: SimpleNamespace(vocab_size=len(tokenizer))
    highest = _dataset([str(demo.train_file)], args).max_token_id
    assert highest < len(tokenizer)
    for args.vocab_size, refused in ((highest, True), (highest + 1, False)):
        if refused:
            with pytest.raises(DataError, match=f"tokenizer: found the token id {highest} .* below {highest}"):
                _dataset([str(demo.train_file)], args)
        else:
            _dataset([str(demo.train_file)], args)
    args.vocab_size = None
    megatron_args.get_tokenizer = lambda: SimpleNamespace(vocab_size=highest)
    with pytest.raises(DataError, match="tokenizer: found the token id"):
        _dataset([str(demo.train_file)], args)


def test_microbatches_of_all_ranks_are_the_pairs_of_each_step_and_a_resumed_run_goes_on(tmp_path):
    demo = prepare_demo(tmp_path / "demo")
    args = parsed()
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir)
    dataset = build_preference_dataset([str(demo.train_file)], tokenizer, pair_options(args), tmp_path / "cache")

    def steps(consumed_pairs: int, count: int) -> list[list]:
        ranks = [_samples(dataset, division_of(args), dp_rank=rank, consumed_pairs=consumed_pairs) for rank in range(2)]
        return [[next(rank) for rank in ranks for _ in range(2)] for _ in range(count)]

    first, second = steps(0, 2)
    ids = [sorted(int(i) for sample in step for i in sample.batch.pair_ids_P) for step in (first, second)]
    assert all(len(set(step)) == 8 for step in ids) and not set(ids[0]) & set(ids[1])
    assert all(sample.batch.num_pairs == 2 for sample in first + second)
    (again,) = steps(8, 1)
    assert [s.batch.tokens_BS.tolist() for s in again] == [s.batch.tokens_BS.tolist() for s in second]
    expected = 8 / int(dataset.lengths[ids[0], 1].sum())
    assert {sample.pairs_per_chosen_token for sample in first} == {expected}


def test_the_loss_is_a_sum_over_pairs_and_every_metric_carries_its_count(megatron_args):
    megatron_args.args = parsed("--simpo-sft-weight", "0.5")
    torch.manual_seed(0)
    log_probs_N = (-3 * torch.rand(9)).requires_grad_()
    sequence_N = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3])
    tokens = ResponseTokens(torch.arange(9), torch.zeros(9, dtype=torch.int64), sequence_N, num_pairs=2)
    loss, num_pairs, metrics = loss_func(tokens, 2 / 4, log_probs_N)
    averages = [log_probs_N[sequence_N == response].double().mean() for response in range(4)]
    margins = [2.0 * float(averages[2 * pair] - averages[2 * pair + 1]) for pair in range(2)]
    preference = sum(math.log1p(math.exp(-(margin - 1.0))) for margin in margins)
    sft = -float(log_probs_N[(sequence_N == 0) | (sequence_N == 2)].double().mean()) * 2
    assert float(loss) == pytest.approx(preference + 0.5 * sft, rel=1e-6)
    assert (int(num_pairs), num_pairs.dtype) == (2, torch.int)
    assert metrics["loss"].tolist() == pytest.approx([float(loss), 2])
    assert metrics["rewards/margins"].tolist() == pytest.approx([sum(margins), 2])
    assert all(metric.shape == (2,) and not metric.requires_grad for metric in metrics.values())
    loss.backward()
    assert log_probs_N.grad.abs().min() > 0


def test_forward_step_hands_the_model_a_pack_and_the_loss_its_tokens(megatron_args, tmp_path):
    megatron_args.args = args = parsed()
    demo = prepare_demo(tmp_path / "demo")
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir)
    dataset = build_preference_dataset([str(demo.train_file)], tokenizer, pair_options(args), tmp_path / "cache")
    samples = _samples(dataset, division_of(args), dp_rank=0, consumed_pairs=0)

    def model(tokens_BS, position_ids_BS, attention_mask, labels, packed_seq_params):
        assert tokens_BS.shape == position_ids_BS.shape and attention_mask is None and packed_seq_params.is_pack
        return torch.full((len(labels.targets_N),), -1.0)

    log_probs_N, loss = forward_step(samples, model)
    total, num_pairs, metrics = loss(log_probs_N)
    assert int(num_pairs) == 2 and metrics["logps/chosen"].tolist() == [-2, 2]
    assert float(total) == pytest.approx(2 * math.log1p(math.exp(1.0)), rel=1e-6)


def pretrain_of_0_17(
    train_valid_test_dataset_provider,
    model_provider,
    model_type,
    forward_step_func,
    process_non_loss_data_func=None,
    extra_args_provider=None,
    args_defaults=None,
): ...


def pretrain_of_0_18(
    cfg_container, train_valid_test_dataset_provider, model_provider, model_type, forward_step_func
): ...


def pretrain_of_0_19(
    cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func, model_provider=None
): ...


@pytest.mark.parametrize("function", [pretrain_of_0_17, pretrain_of_0_18, pretrain_of_0_19])
def test_every_form_of_pretrain_gets_what_it_takes(function, monkeypatch):
    seen = {}

    def parse_and_validate_args(extra_args_provider, args_defaults):
        seen.update(provider=extra_args_provider, defaults=args_defaults)
        return "args"

    stand_ins = {
        "megatron.training": {},
        "megatron.training.arguments": {"parse_and_validate_args": parse_and_validate_args},
        "megatron.training.argument_utils": {"pretrain_cfg_container_from_args": lambda args: f"container of {args}"},
    }
    for name, contents in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[], **contents))
    arguments = pretrain_arguments(function)
    function(**arguments)
    assert arguments["forward_step_func"] is forward_step
    assert getattr(arguments["train_valid_test_dataset_provider"], "is_distributed", False)
    if function is pretrain_of_0_17:
        assert arguments["extra_args_provider"] is add_simpo_args and "cfg_container" not in arguments
    else:
        assert arguments["cfg_container"] == "container of args" and seen["provider"] is add_simpo_args
