"""The planner's arithmetic against counts made another way, and the output of `simpo plan`."""

import re
from dataclasses import replace

import numpy as np
import pytest
from planning_cases import shape_of
from ranks import REPOSITORY

from simpo_megatron.commands import plan as plan_command
from simpo_megatron.config import config_from, load_config
from simpo_megatron.data import PairOptions, build_preference_dataset, load_tokenizer
from simpo_megatron.demo import prepare_demo
from simpo_megatron.errors import ConfigError
from simpo_megatron.planning.gpus import ASSUMED, GPUS
from simpo_megatron.planning.layouts import PlanRequest, layout_name, plan_one, survey
from simpo_megatron.planning.memory import chunks_in_flight, head_bytes, stage_memory
from simpo_megatron.planning.models import find_model
from simpo_megatron.planning.shapes import ModelShape, Pack
from simpo_megatron.planning.speed import pairs_flops, step_time, useful_flops
from simpo_megatron.planning.tables import run_line, run_yaml
from simpo_megatron.planning.workload import Workload

PACK = Pack(tokens=8192, prompt=300, response=400)


def job(model="Llama-3.1-70B", num_gpus=64, gpu="h100-80gb", pack=PACK, **options):
    config = config_from(model="m", data=("d",), tokens_per_microbatch=pack.tokens, **options)
    return PlanRequest(description=find_model(model), config=config, num_gpus=num_gpus, gpu=GPUS[gpu], pack=pack)


def test_the_tokens_of_a_pack_add_up_pair_by_pair():
    shared, apart = (
        Pack(tokens=440, prompt=20, response=100),
        Pack(tokens=480, prompt=20, response=100, prefix_sharing=False),
    )
    assert (shared.num_pairs, shared.response_rows, shared.repeated_keys) == (2, 400, 40)
    assert (apart.num_pairs, apart.response_rows, apart.repeated_keys) == (2, 400, 0)
    # Keys that each query sees, counted one by one; a continuous count misses half a key a query.
    causal = sum(range(1, 121))
    assert shared.attended == pytest.approx(2 * (causal + sum(range(21, 121))), rel=0.01)
    assert apart.attended == pytest.approx(2 * 2 * causal, rel=0.01)


@pytest.mark.parametrize("lora_rank", [None, 8])
@pytest.mark.parametrize("sharing", [True, False])
def test_pairs_take_the_operations_of_a_pack_of_their_mean(sharing, lora_rank):
    config = config_from(prefix_sharing=sharing, lora_rank=lora_rank)
    pack = Pack.of(config.batch, prompt=300, response=400)
    load = Workload(shape=shape_of({}), config=config, pack=pack, data_parallel_size=1, num_microbatches=1)
    lengths = np.array([[300, 400, 400]] * 7, dtype=np.int32)
    how = {"prefix_sharing": sharing, "freezes_weights": lora_rank is not None}
    flops = pairs_flops(load.shape, lengths, lengths[:, 1:], **how)
    assert flops == pytest.approx(useful_flops(load, 7 * pack.pair_tokens), rel=1e-9)
    # Six operations a weight and token that meet, and twelve a query and key: by the loops.
    if sharing and lora_rank is None:
        shape, (prompt, chosen, rejected) = load.shape, (5, 3, 4)
        seen = sum(range(1, 9)) + sum(range(6, 10))
        layers = shape.num_layers * (6 * 12 * shape.layer_matrices + 12 * seen * shape.query_size)
        counted = pairs_flops(shape, np.array([[prompt, chosen, rejected]]), np.array([[chosen, rejected]]), **how)
        assert counted == pytest.approx(layers + 6 * 7 * shape.vocab_size * shape.hidden_size, rel=2e-3)


@pytest.mark.parametrize("logit_dtype", [None, "float32"])
def test_the_head_on_a_gpu_holds_the_logits_of_all_response_rows_and_their_gradient(logit_dtype):
    """A 70B model's slice at tp 8: one block of 16,128 columns, the padding of the vocabulary among them."""
    pack, rows, hidden = Pack(tokens=8192, prompt=0, response=512), 8192, 8192
    load = Workload(
        shape=ModelShape.of(find_model("Llama-3.1-70B")),
        config=config_from(tp=8, sequence_parallel=True, logit_dtype=logit_dtype),
        pack=pack,
        data_parallel_size=1,
        num_microbatches=1,
    )
    kept, beyond = head_bytes(load)
    norm = rows * hidden * 2 / 8
    assert kept == norm + rows * hidden * 2 + rows * 16128 * (4 if logit_dtype else 2)
    # The slopes; rows that come back from all ranks, the gradient of this rank's, and the stand-in of the weight's.
    assert beyond == rows * 16128 * 2 + 2 * rows * hidden * 2 + rows * hidden * 2 / 8 + 16128 * hidden * 2


def in_flight_by_schedule(pp, vpp, stage, num_microbatches):
    """The most chunks between forward and backward, by running a stage's schedule: warm-up, then one of each."""
    total = num_microbatches * vpp
    warm_up = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    order = ["F"] * min(warm_up, total)
    order += ["F", "B"] * (total - len(order))
    level = highest = 0
    for step in order:
        level += 1 if step == "F" else -1
        highest = max(highest, level)
    return highest


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (4, 1), (4, 2), (2, 5)])
def test_chunks_in_flight_are_those_of_the_schedule(pp, vpp):
    for num_microbatches in (pp, 2 * pp, 8 * pp):
        for stage in range(pp):
            load = Workload(
                shape=shape_of({}),
                config=config_from(pp=pp, vpp=vpp if vpp > 1 else None),
                pack=PACK,
                data_parallel_size=1,
                num_microbatches=num_microbatches,
            )
            assert chunks_in_flight(load, stage) == in_flight_by_schedule(pp, vpp, stage, num_microbatches)


def test_the_distributed_optimizer_divides_the_optimizer_and_nothing_else():
    load = Workload(shape=shape_of({}), config=config_from(), pack=PACK, data_parallel_size=8, num_microbatches=1)
    divided = replace(load, config=config_from(use_distributed_optimizer=True))
    before, after = stage_memory(load, 0), stage_memory(divided, 0)
    assert after.optimizer == before.optimizer / 8
    assert replace(after, optimizer=before.optimizer) == before


def test_what_fits_is_sorted_by_speed_and_what_does_not_says_why():
    found = survey(job())
    times = [candidate.time.total for candidate in found.candidates]
    assert times == sorted(times) and len(times) > 10
    assert all(candidate.fullest.total < 79.6 * 2**30 for candidate in found.candidates)
    names = {layout_name(candidate.config) for candidate in found.candidates}
    assert "tp 8 pp 4 vpp 5" in names and "tp 1" not in names
    reasons = {refusal.name: refusal.reason for refusal in found.refusals}
    assert "GiB with whole layers recomputed" in reasons["tp 1"] and "are usable" in reasons["tp 1"]
    assert not any("cp" in name for name in names | reasons.keys()), "only where it is asked for"
    assert "a divisor of the model's 80 layers" in reasons["tp 2 pp 32"]
    assert names.isdisjoint(reasons)


def test_sizes_that_are_given_are_kept_and_the_others_searched():
    found = survey(job(tp=8, pp=4))
    assert {c.config.parallel.pipeline_model_parallel_size for c in found.candidates} == {4}
    assert {c.config.parallel.tensor_model_parallel_size for c in found.candidates} == {8}
    assert len(found.candidates) > 3
    found = survey(job(tp=8, cp=2))
    assert {c.config.parallel.context_parallel_size for c in found.candidates} == {2}
    assert all(c.time.context_parallel > 0 for c in found.candidates)


def test_userbuffers_hide_the_assumed_share_of_tensor_parallel_collectives():
    options = dict(tp=8, pp=4, vpp=5, sequence_parallel=True, fixed_pack_length=True)
    plain, overlapped = (survey(job(**options, tp_comm_overlap=overlaps)).candidates[0] for overlaps in (False, True))
    assert overlapped.time.tensor_parallel == pytest.approx((1 - ASSUMED.tensor_overlap) * plain.time.tensor_parallel)
    assert overlapped.time.matrices == plain.time.matrices and overlapped.time.total < plain.time.total
    hours = [run_line(candidate, 1000) for candidate in (plain, overlapped)]
    assert hours[0] != hours[1]
    # Not more than the products that they hide behind.
    load = overlapped.load
    slow = replace(GPUS["h100-80gb"], nvlink_bytes_rate=1e9)
    before, after = (step_time(replace(load, config=c.config), PACK.tokens, slow) for c in (plain, overlapped))
    assert before.tensor_parallel - after.tensor_parallel == pytest.approx(after.matrices)


def test_packs_of_one_length_cost_as_much_as_full_ones():
    options = dict(tp=8, pp=4, vpp=5)
    fixed, of_steps = (
        survey(job(**options, fixed_pack_length=is_fixed)).candidates[0].time for is_fixed in (True, False)
    )
    assert fixed.matrices > of_steps.matrices
    full = step_time(survey(job(**options)).candidates[0].load, PACK.tokens, GPUS["h100-80gb"])
    assert fixed.matrices == pytest.approx(full.matrices / (1 + ASSUMED.padding))


def test_of_layouts_as_fast_as_the_fastest_the_one_with_the_most_memory_left_is_recommended():
    found = survey(job(fp8="tensorwise"))
    best, fastest = found.recommended, found.candidates[0]
    assert best.fullest.total < fastest.fullest.total
    assert fastest.time.total < best.time.total <= 1.03 * fastest.time.total
    assert survey(job(tp=8, pp=4, vpp=5)).recommended.config.parallel.tensor_model_parallel_size == 8


def test_experts_are_spread_as_widely_as_the_ranks_of_a_stage_allow_and_memory_asks():
    found = survey(job("Mixtral-8x7B-Instruct-v0.1", num_gpus=16))
    assert found.recommended.config.parallel.expert_model_parallel_size == 8
    names = {layout_name(candidate.config) for candidate in found.candidates}
    assert "tp 4 pp 2 ep 8 vpp 4" in names and "tp 4 pp 4 ep 8" not in names
    for name in ("expert_parallel", "tensor_parallel"):
        assert getattr(found.candidates[0].time, name) > 0
    (kept,) = {c.config.parallel.expert_model_parallel_size for c in survey(job("Qwen3-30B-A3B", ep=16)).candidates}
    assert kept == 16
    large = survey(job("Qwen3-30B-A3B", pack=replace(PACK, tokens=65536), num_gpus=16, ep=16)).candidates[0]
    assert large.config.recompute.recompute_modules in (("core_attn",), ("core_attn", "moe")), "megatron's names"


def test_without_packing_memory_holds_the_longest_pairs_and_time_the_mean_ones():
    options = {"packing": False, "prefix_sharing": False, "micro_batch_size": 2, "tp": 2}
    config = config_from(model="m", data=("d",), **options)
    mean, longest = (Pack.of(config.batch, prompt=300 * n, response=400 * n) for n in (1, 2))
    assert (mean.tokens, mean.num_pairs, longest.tokens) == (2 * 2 * 700, 2, 2 * 2 * 1400)
    one = PlanRequest(
        description=find_model("Meta-Llama-3-8B-Instruct"), config=config, num_gpus=8, gpu=GPUS["h100-80gb"], pack=mean
    )
    small, large = survey(one).candidates[0], survey(replace(one, largest=longest)).candidates[0]
    assert small.load.num_microbatches == large.load.num_microbatches == 16
    assert small.time == large.time
    assert large.fullest.activations == pytest.approx(2 * small.fullest.activations, rel=0.1)


def test_recomputation_is_bought_only_where_memory_asks_for_it():
    options = {"tp": 8, "pp": 4, "vpp": 5}
    small = survey(job(**options)).candidates[0]
    large = survey(job(pack=replace(PACK, tokens=65536), **options)).candidates[0]
    assert small.config.recompute.recompute_granularity is None
    assert large.config.recompute.recompute_granularity is not None
    assert large.time.recompute > 0 == small.time.recompute


def test_fp8_is_faster_keeps_less_and_is_refused_where_the_trainer_would():
    options = {"tp": 8, "pp": 4, "vpp": 5}
    plain, fp8 = (plan_one(job(**options, sequence_parallel=True, **more)) for more in ({}, {"fp8": "tensorwise"}))
    assert fp8.time.matrices < plain.time.matrices
    assert fp8.fullest.activations < plain.fullest.activations and fp8.fullest.weights > plain.fullest.weights
    with pytest.raises(ConfigError, match="MLP width per rank, 3696, to be a multiple of 128"):
        plan_one(job("Qwen2.5-72B", **options, fp8="blockwise"))
    with pytest.raises(ConfigError, match=r"compute capability 8\.9, found 8\.0"):
        plan_one(job(**options, gpu="a100-80gb", fp8="tensorwise"))


def test_weights_in_fp8_take_the_place_of_bf16_ones_in_the_layers_that_compute_in_fp8():
    options = {"tp": 8, "pp": 4, "fp8": "tensorwise", "sequence_parallel": True, "use_distributed_optimizer": True}
    beside, alone = (plan_one(job(**options, **more)) for more in ({}, {"fp8_param_gather": True}))
    hidden, ffn, key_size = 8192, 28672, 1024
    matrices = (2 * hidden * hidden + 2 * hidden * key_size + 3 * hidden * ffn) // 8
    for stage, num_layers in enumerate((19, 20, 20, 19)):
        before, after = beside.memory[stage], alone.memory[stage]
        assert before.weights - after.weights == 2 * num_layers * matrices
        assert (before.gradients, before.optimizer) == (after.gradients, after.optimizer)


def test_the_yaml_loads_as_the_configuration_that_was_planned(tmp_path):
    best = survey(job(preset="llama3-instruct-v0.2", fp8="tensorwise")).candidates[0]
    file = tmp_path / "plan.yaml"
    file.write_text(run_yaml(best, "a heading\nof two lines"))
    assert load_config(["--config", str(file), "--model", "m", "--data", "d"]) == best.config


def test_the_tool_prints_a_plan_and_writes_its_yaml(tmp_path, capsys):
    main, file = plan_command.main, tmp_path / "plan.yaml"
    question = ["--model", "llama3-instruct-v0.2", "--preset", "llama3-instruct-v0.2"]
    assert main([*question, "--gpus", "8", "--write", str(file)]) == 0
    printed = capsys.readouterr().out
    for expected in ("layouts that fit", "recommended: tp", "optimizer", "on a GPU"):
        assert expected in printed
    for more, explains in (([], False), (["--why-not"], True)):
        assert main([*question, "--gpus", "2", *more]) == 0
        printed_of_two = capsys.readouterr().out
        assert "do not (--why-not tells why)" in printed_of_two
        assert ("cannot be run" in printed_of_two and "are usable" in printed_of_two) == explains
    command = f"torchrun --standalone --nproc-per-node 8 -m simpo_megatron train --config {file} --model MODEL_DIR"
    assert printed.strip().splitlines()[-1].strip().startswith(command)
    assert load_config(["--config", str(file), "--model", "m", "--data", "d"]).objective.beta == 10
    for asked, expected in ((["--gpus", "1"], "no layout fits"), (["--gpus", "8", "--tp", "3"], "a multiple of tp 3")):
        assert main([*question, *asked]) == 2
        refusal = capsys.readouterr().err.strip()
        assert expected in refusal and "\n" not in refusal


def test_the_pairs_at_hand_give_lengths_steps_and_the_cost_of_a_run(tmp_path, capsys):
    demo, main = prepare_demo(tmp_path / "demo"), plan_command.main
    question = ["--model", str(demo.model_dir), "--gpus", "2", "--global-batch-size", "16", "--max-length", "256"]
    question += ["--max-prompt-length", "128", "--tokens-per-microbatch", "512", "--data", str(demo.train_file)]
    assert main([*question, "--epochs", "3", "--trials", "4", "--data-cache", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    pairs = build_preference_dataset(
        [str(demo.train_file)],
        load_tokenizer(demo.model_dir),
        PairOptions(max_length=256, max_prompt_length=128),
        tmp_path / "cache",
        build=False,
    )
    prompt, *responses = pairs.lengths.mean(axis=0)
    assert f"16 pairs of {prompt:.4g} prompt and 2 x {sum(responses) / 2:.4g} response tokens" in printed
    num_steps = 3 * len(pairs) // 16
    tokens = num_steps * 16 * pairs.lengths.sum() / len(pairs)
    (line,) = [line for line in printed.splitlines() if line.startswith("a run of ")]
    assert line.startswith(f"a run of {num_steps:,} steps: ")
    assert f"GPU-hours, {tokens:,.0f} tokens; 4 trials in turn: " in line
    seconds = float(re.search(r"a step of ([0-9.]+) s", printed)[1])
    minutes = float(re.search(r"steps: ([0-9.]+) minutes", line)[1])
    assert minutes * 60 == pytest.approx(num_steps * seconds, abs=num_steps * 0.005 + 3)
    for more, said in (
        (["--prompt-tokens", "3"], "prompt_tokens: found 3 beside --data"),
        (["--trials", "0"], "trials: found 0, expected a number above 0"),
    ):
        assert main([*question, *more]) == 2
        assert said in capsys.readouterr().err
    by_name = ["--model", "llama3-instruct", "--gpus", "8"]
    assert main([*by_name, "--data", str(demo.train_file)]) == 2
    assert "expected a folder with the tokenizer" in capsys.readouterr().err
    assert main([*by_name, "--trials", "2"]) == 2
    assert "expected --data FILE or --train-iters N" in capsys.readouterr().err


def test_where_nothing_fits_the_smallest_number_of_gpus_that_does_is_named(capsys):
    assert plan_command.main(["--model", "Llama-3.1-70B", "--gpus", "8"]) == 2
    said = capsys.readouterr().err
    needed = int(re.search(r"expected at least (\d+) \(tp", said)[1])
    # Weights, gradients and moments alone, 18 bytes a parameter, fill 16.
    assert needed == 32
    assert survey(job(num_gpus=needed)).candidates and not survey(job(num_gpus=16)).candidates


def test_a_gpus_loss_is_its_products_and_two_passes_over_the_logits_it_keeps():
    gpu, assumed = GPUS["h100-80gb"], ASSUMED
    for tensor, is_kept in ((8, True), (1, False)):
        load = Workload(
            shape=ModelShape.of(find_model("Llama-3.1-70B")),
            config=config_from(tp=tensor),
            pack=replace(PACK, tokens=16384),
            data_parallel_size=1,
            num_microbatches=1,
        )
        logits = load.pack.response_rows * load.vocab_slice
        products = 3 if is_kept else 4
        fewest = 2 * 3 * logits * 8192 / (gpu.bf16_flops * assumed.bf16)
        passes = 6 * logits / (gpu.memory_bytes_rate * assumed.elementwise)
        head = step_time(load, load.pack.tokens, gpu).head
        assert head == pytest.approx(fewest + passes, rel=1e-6) if is_kept else head > fewest + passes
        assert head <= products / 3 * fewest + passes
        # What is kept and worked on stays within the budget, the gradient of rows apart.
        kept, _ = head_bytes(load)
        rows = 2 * load.pack.response_rows * 8192
        assert kept - rows - load.hidden_bytes <= 2**31
        assert (kept - rows - load.hidden_bytes >= 1.999 * logits) == is_kept


@pytest.mark.parametrize("model", ["Meta-Llama-3-8B-Instruct", "Qwen3-30B-A3B"])
def test_pipelines_pay_for_the_padding_that_gives_packs_one_shape(model):
    found = plan_one(job(model, num_gpus=64, tp=2, pp=4, use_distributed_optimizer=True, sequence_parallel=True))
    free = step_time(found.load, found.tokens_per_microbatch, found.gpu, replace(ASSUMED, padding=0.0))
    for part in ("matrices", "pipeline_messages"):
        assert getattr(found.time, part) == pytest.approx(1.01 * getattr(free, part))


def test_a_config_planned_as_it_is_is_not_written_anew(capsys):
    main = plan_command.main
    file = str(REPOSITORY / "configs/llama3_8b_instruct_8xh100.yaml")
    for more, is_new in (([], False), (["--lr", "7e-7"], True)):
        assert main(["--model", "llama3-instruct", "--gpus", "8", "--as-is", "--config", file, *more]) == 0
        printed = capsys.readouterr().out
        assert ("lr: 7.0e-07" in printed) == is_new and (f"--config {file} " in printed) == (not is_new)
