"""Log-probabilities from hidden states against dense float64 autograd on one rank, values and gradients."""

from __future__ import annotations

import pytest
import torch
from seven_tokens import PADDED, ROWS, SEQUENCE, TARGETS, TOKENS, VOCAB, B, H, S, V

from simpo_megatron.errors import ConfigError
from simpo_megatron.loss import (
    ResponseTokens,
    SimPOObjective,
    VocabShard,
    average_log_probs,
    fused_linear_log_probs,
    fused_linear_simpo,
    preference_loss,
)

# float64 bytes of all logits of the seven tokens, and budgets that keep all, some and none of them; blocks
# are of 64 columns at the least, so that the vocabulary is cut into five at most.
ALL_BYTES = 7 * V * 8
BUDGETS = {"all kept": 2**20, "some kept": ALL_BYTES // 2, "none kept": 0}
# Logits here have a standard deviation of 3.5: a cap that bends most of them, and flattens some.
CAPS = [None, 3.0]


def make(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, H, generator=generator, dtype=torch.float64).to(dtype)
    slope = torch.randn(7, generator=generator, dtype=torch.float64)
    return hidden, weight, slope


def capped(logits, cap):
    return logits if cap is None else cap * torch.tanh(logits / cap)


def dense(hidden, weight, slope, cap=None):
    """Values and gradients by float64 autograd through whole logits of every position."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    logp = capped(hidden.flatten(0, 1) @ weight[:V].t(), cap).log_softmax(-1)[ROWS, TARGETS]
    return logp.detach(), *torch.autograd.grad((logp * slope).sum(), (hidden, weight))


def fused(hidden, weight, slope, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logp = fused_linear_log_probs(hidden, weight, TOKENS, vocab=VOCAB, tp_group=None, **options)
    return logp.detach(), *torch.autograd.grad((logp * slope.to(logp.dtype)).sum(), (hidden, weight))


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize(
    # A dot product of 12, a sum of 300 exponentials, and the way back: some ten roundings of the dtype's eps.
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 2e-6)],
    ids=["fp64", "fp32"],
)
def test_values_and_gradients_equal_dense_autograd(dtype, tolerance, budget, cap):
    inputs = make(dtype)
    found = fused(*inputs, logits_budget_bytes=budget, logit_softcap=cap)
    for got, want in zip(found, dense(*inputs, cap)):
        assert got.dtype == dtype
        assert relative(got, want) <= tolerance


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_gradcheck_in_float64(budget, cap):
    hidden, weight, _ = make()

    def function(hidden, weight):
        options = {"logits_budget_bytes": budget, "logit_softcap": cap}
        return fused_linear_log_probs(hidden, weight, TOKENS, vocab=VOCAB, tp_group=None, **options)

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_inputs_are_bit_equal_afterwards():
    hidden, weight, slope = make()
    copies = hidden.clone(), weight.clone(), ROWS.clone(), TARGETS.clone()
    fused(hidden, weight, slope, logits_budget_bytes=BUDGETS["some kept"])
    for now, before in zip((hidden, weight, ROWS, TARGETS), copies):
        assert torch.equal(now, before)


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, slope = make()
    hidden.requires_grad_(), weight.requires_grad_()
    options = {"vocab": VOCAB, "tp_group": None, "logits_budget_bytes": BUDGETS["some kept"]}
    loss = (fused_linear_log_probs(hidden, weight, TOKENS, **options) * slope).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(one, two) for one, two in zip(first, second))


def test_rows_that_predict_nothing_never_enter():
    hidden, weight, slope = make()
    expected = dense(hidden, weight, slope)
    unread = torch.ones(S * B, dtype=torch.bool)
    unread[ROWS] = False
    hidden.flatten(0, 1)[unread] = torch.nan
    logp, hidden_grad, weight_grad = fused(hidden, weight, slope)
    assert relative(logp, expected[0]) <= 1e-14 and relative(weight_grad, expected[2]) <= 1e-14
    assert (hidden_grad.flatten(0, 1)[unread] == 0).all()


def test_padding_columns_take_no_part_and_get_zero_gradient():
    hidden, weight, slope = make()
    weight[V:] = torch.nan
    logp, hidden_grad, weight_grad = fused(hidden, weight, slope)
    assert logp.isfinite().all() and hidden_grad.isfinite().all()
    assert (weight_grad[V:] == 0).all() and weight_grad[:V].isfinite().all()


@pytest.mark.parametrize("budget", [0, 64 * 7 * 8 * 2, ALL_BYTES // 2, ALL_BYTES, 2**20])
def test_logits_kept_for_the_backward_stay_within_the_budget(budget):
    hidden, weight, _ = make()
    sizes = {}

    def pack(tensor):
        if tensor.dim() == 2 and tensor.shape[0] == len(ROWS) and tensor.shape[1] != H:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden.requires_grad_()
        fused_linear_log_probs(hidden, weight, TOKENS, vocab=VOCAB, tp_group=None, logits_budget_bytes=budget)
    assert sum(sizes.values()) <= budget
    # All of it is used where everything fits, and most of it where not.
    assert sum(sizes.values()) == ALL_BYTES or budget < ALL_BYTES
    assert len(sizes) >= budget // (64 * 7 * 8) - 1 or sum(sizes.values()) == ALL_BYTES


def test_nothing_is_kept_without_gradients():
    hidden, weight, slope = make()
    expected = dense(hidden, weight, slope)[0]
    with torch.no_grad():
        logp = fused_linear_log_probs(hidden.requires_grad_(), weight, TOKENS, vocab=VOCAB, tp_group=None)
    assert logp.grad_fn is None and relative(logp, expected) <= 1e-14


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_none_either():
    hidden, weight, slope = make()
    expected = dense(hidden, weight, slope)
    for index, (leaf, frozen) in enumerate([(hidden, weight), (weight, hidden)]):
        leaf.requires_grad_()
        logp = fused_linear_log_probs(hidden, weight, TOKENS, vocab=VOCAB, tp_group=None)
        (logp * slope).sum().backward()
        assert relative(leaf.grad, expected[1 + index]) <= 1e-14
        assert frozen.grad is None
        leaf.requires_grad_(False).grad = None


@pytest.mark.parametrize("zero_out", [False, True], ids=["own weight", "tied weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_main_grad_accumulates_by_megatrons_protocol(dtype, zero_out):
    hidden, weight, slope = make(dtype)
    expected = dense(hidden, weight, slope)[2]
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.ones(PADDED, H)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = zero_out
    for repeat in (1, 2):
        options = {"vocab": VOCAB, "tp_group": None, "accumulate_into_main_grad": True}
        logp = fused_linear_log_probs(hidden.requires_grad_(), weight, TOKENS, **options)
        (logp * slope.float()).sum().backward()
        # bf16 rounds at 4e-3: once the exponentials, once the scaled rows, once a block's product.
        assert relative(weight.main_grad - 1, repeat * expected) <= (1e-5 if dtype == torch.float32 else 2e-2)
        assert (weight.main_grad[V:] == 1).all()
    assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
    assert not zero_out or (weight.grad == 0).all()


def test_main_grad_is_left_alone_unless_asked():
    hidden, weight, slope = make()
    weight = torch.nn.Parameter(weight)
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(PADDED, H), False
    (fused_linear_log_probs(hidden, weight, TOKENS, vocab=VOCAB, tp_group=None) * slope).sum().backward()
    assert (weight.main_grad == 1).all() and not weight.grad_added_to_main_grad
    assert relative(weight.grad, dense(hidden, weight.detach(), slope)[2]) <= 1e-14


@pytest.mark.parametrize("cap", CAPS)
def test_bf16_errs_no_more_than_plain_bf16_autograd(cap):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 16, 64, generator=generator).bfloat16()
    weight = (torch.randn(500, 64, generator=generator) / 4).bfloat16()
    rows = torch.arange(5, 60)
    # A frequent token, as real text has: its weight row sums many gradients.
    targets = torch.randint(500, (55,), generator=generator)
    targets[::3] = 17
    tokens = ResponseTokens(rows, targets, (torch.arange(55) // 14), 2)
    slope = torch.rand(55, generator=generator) + 0.5

    def gradients(dtype, function):
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        logp = function(*leaves)
        return [logp.detach(), *torch.autograd.grad((logp * slope.to(logp.dtype)).sum(), leaves)]

    def plain(hidden, weight):
        logits = hidden.flatten(0, 1)[rows] @ weight.t()
        logits = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    vocab = VocabShard(start=0, size=500)
    exact = gradients(torch.float64, plain)
    reference = gradients(torch.bfloat16, plain)
    for budget in (2**20, 20000, 0):
        ours = gradients(
            torch.bfloat16,
            lambda *leaves: fused_linear_log_probs(
                *leaves,
                tokens,
                vocab=vocab,
                tp_group=None,
                logits_budget_bytes=budget,  # noqa: B023
                logit_softcap=cap,
            ),
        )
        for got, plainly, want in zip(ours, reference, exact):
            # Half a bf16 step (2e-3) on top: the rows of the weight gradient are rounded once more than in
            # the reference, the gradient at the target, the larger part of it, once less.
            assert relative(got, want) <= relative(plainly, want) + 2e-3


def test_a_frequent_token_sums_its_bf16_gradients_in_fp32():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.rand(1, 600, 8, generator=generator).bfloat16()
    weight = torch.nn.Parameter(torch.zeros(64, 8).bfloat16())
    at = torch.arange(600)
    tokens = ResponseTokens(at, torch.full((600,), 17), at // 300, 1)
    vocab = VocabShard(start=0, size=64)
    fused_linear_log_probs(hidden, weight, tokens, vocab=vocab, tp_group=None).sum().backward()
    want = (1 - 1 / 64) * hidden[0].double().sum(0)
    # One rounding to bf16 (4e-3) at the end; 600 additions in bf16 stop growing at 256 times a term.
    assert relative(weight.grad[17], want) <= 4e-3


def test_logits_of_huge_spread_stay_exact():
    """Running maxima that rise by more than exp can hold: earlier blocks vanish, and do so without NaN."""
    hidden, weight, slope = make()
    weight[:150] *= 1e3
    weight[250:] *= 1e4
    expected = dense(hidden, weight, slope)
    for budget in BUDGETS.values():
        for got, want in zip(fused(hidden, weight, slope, logits_budget_bytes=budget), expected):
            assert got.isfinite().all() and relative(got, want) <= 1e-13


def test_a_cap_flattens_logits_of_huge_spread_without_nan():
    hidden, weight, slope = make()
    weight[:150] *= 1e5
    expected = dense(hidden, weight, slope, 30.0)
    for budget in BUDGETS.values():
        found = fused(hidden, weight, slope, logits_budget_bytes=budget, logit_softcap=30.0)
        for got, want in zip(found, expected):
            # Near the cap its slope is the small difference of two numbers near one.
            assert got.isfinite().all() and relative(got, want) <= 1e-10
    for nonsense in (0, -30.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="logit_softcap: found"):
            fused(hidden, weight, slope, logit_softcap=nonsense)


def test_a_block_of_minus_infinity_is_probability_zero():
    hidden, weight, _ = make()
    hidden, weight[:128] = hidden.abs(), -torch.inf
    targets = TARGETS.clamp(min=128)
    tokens = ResponseTokens(ROWS, targets, SEQUENCE, 2)
    # No budget: blocks of 60 columns, so that the first two have nothing but -inf.
    options = {"vocab": VOCAB, "tp_group": None, "logits_budget_bytes": 0}
    logp = fused_linear_log_probs(hidden, weight, tokens, **options)
    want = (hidden.flatten(0, 1) @ weight[:V].t()).log_softmax(-1)[ROWS, targets]
    assert relative(logp, want) <= 1e-14


def test_a_microbatch_without_response_tokens_gives_zero_gradients():
    hidden, weight, _ = make()
    empty = torch.zeros(0, dtype=torch.long)
    tokens = ResponseTokens(empty, empty, empty, 1)
    hidden.requires_grad_(), weight.requires_grad_()
    logp = fused_linear_log_probs(hidden, weight, tokens, vocab=VOCAB, tp_group=None)
    logp.sum().backward()
    assert logp.shape == (0,) and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_it_runs_under_activation_recompute():
    hidden, weight, slope = make()
    expected = dense(hidden, weight, slope)
    hidden.requires_grad_(), weight.requires_grad_()
    logp = torch.utils.checkpoint.checkpoint(
        lambda *leaves: fused_linear_log_probs(*leaves, TOKENS, vocab=VOCAB, tp_group=None),
        hidden,
        weight,
        use_reentrant=True,
    )
    (logp * slope).sum().backward()
    assert relative(hidden.grad, expected[1]) <= 1e-14 and relative(weight.grad, expected[2]) <= 1e-14


def test_one_call_on_padded_rows_equals_the_parts():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(4, 6, H, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.full((4, 6), -100)
    for row, (start, stop) in enumerate([(1, 5), (1, 2), (0, 6), (3, 5)]):
        labels[row, start:stop] = torch.randint(V, (stop - start,), generator=generator)
    objective = SimPOObjective(beta=2.5, sft_weight=0.1)
    result = fused_linear_simpo(hidden, weight, labels, objective=objective)

    mask = labels != -100
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask
    expected = preference_loss(logp.sum(1) / mask.sum(1), mask.sum(1), objective=objective)
    assert result.num_pairs == 2
    got = torch.autograd.grad(result.loss, (hidden, weight))
    want = torch.autograd.grad(expected.loss, (hidden, weight))
    assert relative(result.loss.detach(), expected.loss.detach()) <= 1e-14
    assert all(relative(g, w) <= 1e-13 for g, w in zip(got, want))


def test_averages_of_a_microbatch_feed_the_objective():
    hidden, weight, _ = make()
    logp = fused_linear_log_probs(hidden, weight, TOKENS, vocab=VOCAB, tp_group=None)
    averages, counts = average_log_probs(logp, SEQUENCE, 4)
    assert counts.tolist() == [2, 2, 2, 1]
    assert averages[3].item() == logp[6].item()
