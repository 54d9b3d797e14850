"""The load-balancing loss of an MoE, against its definition over transformers' router logits."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig

from simpo_megatron import parallel
from simpo_megatron.config import Machine, config_from, resolve
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import cpu_patches

EXPERTS, CHOSEN, COEFFICIENT, LAYERS = 6, 2, 0.05, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(megatron's model, transformers' model with the same weights), float64."""
    cpu_patches.install()
    from simpo_megatron.convert import load_hf_weights
    from simpo_megatron.mcore.families import describe_hf_model
    from simpo_megatron.mcore.model import build_model

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(4)
    config = MixtralConfig(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
    )
    twin = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    twin.save_pretrained(folder)
    with parallel.alone() as groups:
        parallel.seed_everything(0)
        description = describe_hf_model(folder)
        options = config_from(model=str(folder), data=("none",), bf16=False, moe_aux_loss_coeff=COEFFICIENT)
        (model,) = build_model(description, options, groups)
        load_hf_weights([model], folder, description, tp_rank=0, tp_size=1)
        yield model.double(), twin.double()


def balance(router_logits: torch.Tensor) -> torch.Tensor:
    """experts * sum over experts of (share of the choices * mean probability), a token at a time (arXiv 2101.03961)."""
    share = torch.zeros(EXPERTS, dtype=torch.float64)
    for row in router_logits:
        share[row.topk(CHOSEN).indices] += 1 / (len(router_logits) * CHOSEN)
    return EXPERTS * (share * router_logits.softmax(dim=-1).mean(dim=0)).sum()


def test_routers_are_pulled_to_balance_by_the_mean_over_microbatches(models):
    from simpo_megatron.mcore.layers import take_load_balancing_loss, weigh_load_balancing

    model, twin = models
    num_pairs, microbatches = 7, torch.randint(131, (2, 3, 11), generator=torch.Generator().manual_seed(5))
    weigh_load_balancing(model.config, num_pairs=num_pairs, num_microbatches=2)
    for tokens in microbatches:
        logits = model(tokens, torch.arange(11).expand(3, -1), None)
        # Nothing but the load-balancing loss has a gradient.
        (logits * 0).sum().backward()
    found = take_load_balancing_loss([model], num_microbatches=2)

    of_layers = [
        balance(layer.view(-1, EXPERTS))
        for tokens in microbatches
        for layer in twin(tokens, output_router_logits=True).router_logits
    ]
    assert len(of_layers) == 2 * LAYERS
    expected = torch.stack(of_layers).mean()
    assert 1.05 < expected.item() < EXPERTS
    assert found == pytest.approx(expected.item(), rel=1e-6)
    assert take_load_balancing_loss([model], num_microbatches=2) is None
    # finalize_model_grads divides by the pairs; every layer has its loss, every microbatch an equal say.
    (COEFFICIENT * LAYERS * expected).backward()
    for megatrons, transformers in (
        (model.decoder.layers[2].mlp.router.weight, twin.model.layers[2].mlp.gate.weight),
        (model.decoder.layers[0].mlp.router.weight, twin.model.layers[0].mlp.gate.weight),
        (model.embedding.word_embeddings.weight, twin.model.embed_tokens.weight),
    ):
        gradient = megatrons.grad[: len(transformers)] / num_pairs
        assert float((gradient - transformers.grad).norm() / transformers.grad.norm()) <= 1e-5


@pytest.mark.parametrize("asks", [True, False])
def test_when_nothing_is_said_the_loss_weighs_what_it_weighs_in_transformers(models, asks):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from simpo_megatron.mcore.families import describe_hf_config
    from simpo_megatron.mcore.layers import load_balancing_coefficient, times_transformers

    _, twin = models
    description = describe_hf_config({**twin.config.to_dict(), "output_router_logits": asks}, "config.json")
    # Theirs is of the tokens of all layers together, so that layers which differ may even each other out.
    (first, *_) = twin(torch.randint(131, (3, 11)), output_router_logits=True).router_logits
    logits = (first,) * LAYERS
    theirs = load_balancing_loss_func(logits, EXPERTS, CHOSEN) * twin.config.router_aux_loss_coef
    ours = load_balancing_coefficient(description, None) * sum(map(balance, logits))
    assert float(ours) == pytest.approx(float(theirs) if asks else 0.0, rel=1e-6)
    assert load_balancing_coefficient(description, 0.3) == 0.3
    assert times_transformers(description) == LAYERS / CHOSEN


ROUTERS = {
    "softmax": {},
    "sigmoid, a bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "a rule of ours": {
        "expert_choice": {"scores": "sigmoid", "has_bias": True, "num_groups": 3, "num_chosen_groups": 2}
    },
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_padding_counts_in_no_loss_and_no_statistic_and_loads_all_experts_alike(models, kind):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from simpo_megatron.mcore.architecture import ArchitectureConfig
    from simpo_megatron.mcore.expert_choice import ExpertChoice
    from simpo_megatron.mcore.layers import LoadBalancedRouter

    options = dict(ROUTERS[kind])
    if "expert_choice" in options:
        options["expert_choice"] = ExpertChoice(num_chosen=CHOSEN, **options["expert_choice"])
    config = ArchitectureConfig(
        num_layers=1, num_attention_heads=2, hidden_size=8, ffn_hidden_size=8, num_moe_experts=EXPERTS,
        moe_router_topk=CHOSEN, moe_aux_loss_coeff=COEFFICIENT, moe_router_load_balancing_type="aux_loss",
        add_bias_linear=False, perform_initialization=False, use_cpu_initialization=True, **options,
    )  # fmt: skip
    torch.manual_seed(6)
    hidden = torch.randn(12, 3, 8, dtype=torch.float64)
    is_padding = torch.arange(12)[:, None] >= torch.tensor([12, 7, 4])
    hidden[is_padding] = 5.0
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp"])
    router = LoadBalancedRouter(config, pg_collection=groups).double().train()
    torch.nn.init.normal_(router.weight)
    found = []
    for tokens, mask in ((hidden, is_padding), (hidden[~is_padding][:, None], None)):
        router.weight.grad, router.logged_loss = None, None
        if router.local_tokens_per_expert is not None:
            router.local_tokens_per_expert.zero_()
        weights, chosen = router(tokens, mask)
        (weights * 0).sum().backward()
        counts = None if router.local_tokens_per_expert is None else router.local_tokens_per_expert.clone()
        found.append((weights, chosen, router.logged_loss, router.weight.grad, counts))
    (weights, chosen, *of_padded), (*of_tokens, loss, gradient, counts) = found
    real = ~is_padding.reshape(-1)
    torch.testing.assert_close([weights[real], chosen[real]], of_tokens)
    assert not weights[~real].any() and (chosen.sum(1) == CHOSEN).all()
    # Two rows have some, of 5 and 8 tokens.
    loads = chosen[~real].sum(0)
    assert loads.sum() == CHOSEN * 13 and loads.max() - loads.min() <= 2
    torch.testing.assert_close(of_padded[:2], [loss, gradient])
    if counts is not None:
        assert counts.sum() == 23 * CHOSEN and torch.equal(of_padded[2], counts), "by these a bias is moved"
    # The definition, a token at a time; a bias takes no part in it.
    logits = hidden[~is_padding] @ router.weight.detach().T
    scores = logits.softmax(-1) if kind == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    share = sum(torch.zeros(EXPERTS).index_fill(0, row.topk(CHOSEN).indices, 1 / (23 * CHOSEN)) for row in scores)
    expected = EXPERTS * (share * scores.mean(0)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


class Names(TorchDispatchMode):
    """Keeps the names of torch's operations while the context lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def torchs_list(which: int) -> set[str]:
    """Operations that torch makes deterministic when asked (1), or raises at on a GPU (2), by its documentation."""
    parts = (torch.use_deterministic_algorithms.__doc__ or "").split("normally-nondeterministic operations will")
    return set(re.findall(r":func:`torch\.(?:Tensor\.)?(\w+)`", parts[which]))


# Adding or writing in an order that a GPU's threads choose; the backward pass of `index` and `index_select` among them.
UNORDERED = {"embedding_dense_backward", "index_add", "index_put", "put", "scatter", "scatter_add", "scatter_reduce"}


@pytest.mark.parametrize("deterministic", [False, True])
def test_asked_for_determinism_an_moe_layer_computes_by_torchs_deterministic_operations_alone(models, deterministic):
    """The names are those of a GPU, whose dispatcher and router are the same lines of megatron's."""
    layer = models[0].decoder.layers[0].mlp
    hidden = torch.randn(7, 3, 32, dtype=torch.float64, requires_grad=True)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Names() as names:
            layer(hidden)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    found = {name.rstrip("_") for name in names.found}
    becomes_deterministic = {name.rstrip("_") for name in torchs_list(1)}
    assert found & UNORDERED <= becomes_deterministic and "index_add" in found & UNORDERED
    # cumsum raises for floating point alone.
    raises = {name.rstrip("_") for name in torchs_list(2)} - becomes_deterministic
    assert {"histc", "bincount", "cumsum"} <= raises and not found & raises
    # megatron adds its tokens up by the operation that its deterministic form replaces.
    assert ("scatter_add" in found) is not deterministic
    assert not (layer.config.moe_permute_fusion or layer.config.moe_router_fusion), "kernels that torch knows not of"


def test_a_run_is_started_on_as_few_ranks_as_its_sizes_divide():
    assert parallel.ParallelSizes(expert=4).min_world_size == 4
    assert parallel.ParallelSizes(tensor=4, pipeline=2, expert=2).min_world_size == 8
    assert parallel.ParallelSizes(tensor=2, pipeline=3, expert=6).min_world_size == 18


def test_fp8_looks_at_the_width_of_an_expert_which_no_rank_divides():
    shape = {"num_layers": 2, "num_attention_heads": 4, "hidden_size": 256, "ffn_hidden_size": 512}
    shape |= {"num_moe_experts": 6, "moe_ffn_hidden_size": 192}
    options = dict(model="m", data=("d",), tp=2, sequence_parallel=True)
    machine = Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(9, 0))
    resolve(config_from(**options, fp8="tensorwise"), world_size=2, model=shape, machine=machine)
    with pytest.raises(ConfigError, match="width of an expert, 192, to be a multiple of 128"):
        resolve(config_from(**options, fp8="blockwise"), world_size=2, model=shape, machine=machine)


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    [
        ({"expert_model_parallel_size": 4}, 4, "a divisor of the model's experts, of which it has 6"),
        ({"expert_model_parallel_size": 3}, 4, "a divisor of the 4 ranks of a pipeline stage"),
        ({"tensor_model_parallel_size": 2}, 2, "found False, expected true with tensor parallelism"),
        ({"lora_rank": 4}, 1, "lora_targets: found 'linear_fc1, linear_fc2', expected linear_qkv and linear_proj only"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
            1,
            "recompute_modules: found 'core_attn mlp', expected moe in the place of mlp",
        ),
        ({"moe_aux_loss_coeff": -1.0}, 1, "moe_aux_loss_coeff: found -1.0"),
    ],
)
def test_what_a_mixture_cannot_do_is_refused_in_one_line(options, world_size, message):
    shape = {"num_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_moe_experts": 6}
    with pytest.raises(ConfigError) as refused:
        config = config_from(model="m", data=("d",), **options)
        resolve(config, world_size=world_size, model=shape, machine=Machine())
    assert message in str(refused.value)
