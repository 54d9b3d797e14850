"""The NCCL calls of megatron's schedules under our settings never hang and never cross, on any rank of a layout.

The calls are those of the installed megatron-core, recorded over torch's fake backend and played by NCCL's rules; no
GPU has run them.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from nccl_rules import STRICTEST, Call, Program, Read, Rules, Synchronize, Wait, faults
from pipelines import record_chunks, record_model
from ranks import REPOSITORY

from simpo_megatron.config import load_config
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.planning.gpus import GPUS
from simpo_megatron.planning.layouts import PlanRequest, plan_one
from simpo_megatron.planning.models import find_model
from simpo_megatron.planning.shapes import Pack

cpu_patches.install()

# Stages, chunks of a stage, microbatches: beside what configs/ has, fewest and odd ones, both ends of what fits a node.
MORE = [
    (2, 1, 1),
    (2, 1, 5),
    (2, 2, 2),
    (2, 3, 6),
    (3, 1, 7),
    (3, 2, 6),
    (4, 1, 2),
    (4, 1, 12),
    (4, 2, 4),
    (4, 5, 12),
    (8, 1, 9),
    (8, 2, 16),
]


def shipped():
    """(stages, chunks, microbatches) of every configuration for several stages, microbatches as planned."""
    for path in sorted((REPOSITORY / "configs").glob("*xh100.yaml")):
        config = load_config(["--config", str(path), "--model", "m", "--data", "d"])
        sizes = config.parallel.sizes
        if sizes.pipeline == 1:
            continue
        model = "Qwen2.5-72B-Instruct" if "qwen" in path.stem else "Llama-3.1-70B-Instruct"
        num_gpus = int(path.stem.rpartition("_")[2].removesuffix("xh100"))
        for response in (150, 400):
            pack = Pack.of(config.batch, prompt=300, response=response)
            plan = plan_one(
                PlanRequest(
                    description=find_model(model),
                    config=config,
                    num_gpus=num_gpus,
                    gpu=GPUS["h100-80gb"],
                    pack=pack,
                )
            )
            yield sizes.pipeline, sizes.virtual_pipeline or 1, plan.load.num_microbatches


LAYOUTS = sorted({*shipped(), *MORE})


def programs_of(*layout, **settings):
    if (layout, str(settings)) not in _RECORDED:
        _RECORDED[layout, str(settings)] = record_chunks(*layout, **settings)
    return _RECORDED[layout, str(settings)]


_RECORDED: dict = {}


def calls(program: Program) -> list[Call]:
    return [call for call in program if isinstance(call, Call)]


def test_configurations_ship_pipelines():
    assert {(pp, vpp) for pp, vpp, _ in shipped()} >= {(4, 5)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_pipeline_neither_hangs_nor_crosses_and_its_host_waits_for_nothing(layout):
    pp, vpp, num_microbatches = layout
    programs = programs_of(*layout)
    for rules in STRICTEST:
        assert faults(programs, rules) == []
    for rank, program in programs.items():
        messages = [message for call in calls(program) for message in call.messages]
        # A chunk passes each microbatch on, but the last one, and gets a gradient back; two steps were recorded.
        ends = (rank == 0) + (rank == pp - 1)
        assert len(messages) == 2 * 2 * num_microbatches * (2 * vpp - ends)
        assert not questions(program), "no question for shapes"
        waited = {id(step.call) for step in program if isinstance(step, Wait)}
        received = [call for call in calls(program) if any(not message.is_send for message in call.messages)]
        assert all(id(call) in waited for call in received), "what is received is waited for"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_with_experts_a_pipeline_makes_the_same_calls(layout):
    dense, experts = programs_of(*layout), programs_of(*layout, num_experts=2)
    assert dense.keys() == experts.keys()
    for rank, program in dense.items():
        assert [shown(step) for step in program] == [shown(step) for step in experts[rank]]


def shown(step):
    """The kind of a step, and the messages of a call: what two records of the same calls have in common."""
    return type(step).__name__, *(kinds(step) if isinstance(step, Call) else ())


def test_questions_for_shapes_are_found():
    programs = programs_of(2, 1, 5, variable_seq_lengths=True)
    assert all(len(questions(program)) >= 2 * 5 for program in programs.values())


@pytest.mark.parametrize(
    "settings",
    [
        # Flushing the warm-up early sends messages before the exchange of their shapes.
        {"overlap_p2p_comm_warmup_flush": True, "variable_seq_lengths": True},
        {"overlap_p2p_comm": False, "batch_p2p_comm": True, "variable_seq_lengths": True},
    ],
    ids=["warm-up flush", "batched"],
)
def test_settings_that_hang_or_cross_are_found(settings):
    programs = programs_of(4, 2, 4, **settings)
    assert any(faults(programs, rules) for rules in STRICTEST)


def exchanged(programs, rank, is_wrong):
    """`programs` with the first two neighbouring calls of `rank`, past a third, for which `is_wrong`, exchanged."""
    planted = copy.deepcopy(programs)
    program = planted[rank]
    places = [place for place, step in enumerate(program) if isinstance(step, Call)]
    for first, second in pairwise(places[len(places) // 3 :]):
        if is_wrong(program[first], program[second]):
            program[first], program[second] = program[second], program[first]
            return planted
    raise AssertionError("there is no such place")


def kinds(call):
    return [(message.is_send, message.peer) for message in call.messages]


# Of two interleaved stages, sends and receives travel in two groups, and their order is free.
@pytest.mark.parametrize("layout", [(2, 1, 5), (4, 1, 12), (4, 2, 4), (4, 5, 12)], ids=str)
def test_two_messages_in_the_wrong_order_are_found(layout):
    programs = programs_of(*layout)
    wrong = exchanged(
        programs,
        1,
        lambda a, b: kinds(a) != kinds(b) and {peer for _, peer in kinds(a)} == {peer for _, peer in kinds(b)},
    )
    assert any(faults(wrong, rules) for rules in STRICTEST)


@pytest.fixture(scope="module", params=["tied", "untied", "experts"])
def of_model(request):
    """All ranks of two steps of our model, over tensor, pipeline, data and expert parallelism at once."""
    options = {"tp": 2, "pp": 2, "vpp": None if request.param == "tied" else 2, "sequence_parallel": True}
    if request.param == "experts":
        options |= {"expert_model_parallel_size": 4, "num_experts": 8, "moe_aux_loss_coeff": 0.1}
    options |= {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    options |= {"tokens_per_microbatch": 8, "global_batch_size": 8, "max_length": 8, "max_prompt_length": 4}
    return record_model(8, 4, tied=request.param == "tied", **options)


def test_the_members_of_a_group_ask_for_the_same_collectives_in_one_order(of_model):
    by_group = defaultdict(dict)
    for rank, program in of_model.items():
        for call in calls(program):
            if not call.messages:
                by_group[call.group, call.members].setdefault(rank, []).append((call.kind, call.num_bytes))
    assert {len(members) for _, members in by_group} >= {2}
    for (_, members), sequences in by_group.items():
        assert set(sequences) == set(members)
        assert len({tuple(sequence) for sequence in sequences.values()}) == 1, members
    named = Counter(call.kind for call in calls(of_model[0]))
    assert {"all-reduce", "all-gather", "reduce-scatter"} <= set(named)


def test_a_step_of_our_model_neither_hangs_nor_crosses(of_model):
    for eager in (False, True):
        assert faults(of_model, Rules(eager=eager, connects=True)) == []
    assert not any(map(questions, of_model.values()))


def questions(program: Program) -> list[Synchronize | Read]:
    """The places where a stage waits for an answer, such as that for the shape of a message."""
    return [step for step in program if isinstance(step, (Synchronize, Read)) and step.where.startswith("p2p_")]


def test_a_collective_in_the_wrong_order_is_found(of_model):
    wrong = exchanged(
        of_model,
        3,
        lambda a, b: (
            not a.messages and not b.messages and (a.members, a.kind, a.num_bytes) != (b.members, b.kind, b.num_bytes)
        ),
    )
    assert any(faults(wrong, rules) for rules in [Rules(), Rules(one_queue=True), *STRICTEST])
