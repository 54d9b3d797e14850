"""The embedding's gradient reaches `main_grad` row by row, and is the one that autograd takes through megatron's own.

tests/distributed/test_layouts.py compares ranks that share the vocabulary or the sequence with a float64 reference.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding, layers
from torch.utils._python_dispatch import TorchDispatchMode

from simpo_megatron.mcore import cpu_patches
from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.layers import MainGradEmbedding

cpu_patches.install()

V, H = 50, 16


@pytest.fixture
def make(tp_group):
    def make(kind: type, dtype: torch.dtype) -> VocabParallelEmbedding:
        config = ArchitectureConfig(
            num_layers=1,
            hidden_size=H,
            num_attention_heads=1,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=dtype,
        )
        embedding = kind(V, H, init_method=lambda weight: None, config=config, tp_group=tp_group)
        torch.nn.init.normal_(embedding.weight, generator=torch.Generator().manual_seed(0))
        return embedding

    return make


def ids_and_slopes(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with many repetitions, the first and the last of the vocabulary among them, and a gradient for each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (2, 37), generator=generator)
    ids[0, 0], ids[1, 36] = V - 1, 0
    return ids, torch.randn(2, 37, H, generator=generator)


def expected_gradient(seeds: range) -> torch.Tensor:
    total = torch.zeros(V, H, dtype=torch.float64)
    for seed in seeds:
        ids, slopes = ids_and_slopes(seed)
        for row, slope in zip(ids.flatten(), slopes.reshape(-1, H), strict=True):
            total[row] += slope.double()
    return total


def backward(embedding: VocabParallelEmbedding, seeds: range) -> None:
    for seed in seeds:
        ids, slopes = ids_and_slopes(seed)
        (embedding(ids).float() * slopes).sum().backward()


@pytest.mark.parametrize("tied", [False, True], ids=["one use", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_microbatches_add_up_in_main_grad(make, dtype, tied):
    embedding = make(MainGradEmbedding, dtype)
    weight = embedding.weight
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.ones(V, H), False, tied
    backward(embedding, range(2))
    # bf16 rounds each token's gradient, at 2**-9, and the sum not at all.
    budget = 1e-6 if dtype == torch.float32 else 4e-3
    expected = expected_gradient(range(2))
    assert (weight.main_grad.double() - 1 - expected).norm() <= budget * expected.norm()
    assert (weight.main_grad[9 : V - 1] == 1).all()
    assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
    assert not tied or (weight.grad == 0).all()


def test_values_and_gradients_are_megatrons_without_main_grad(make):
    embedding, plain = make(MainGradEmbedding, torch.float32), make(VocabParallelEmbedding, torch.float32)
    ids, _ = ids_and_slopes(0)
    assert torch.equal(embedding(ids), plain(ids))
    for layer in (embedding, plain):
        backward(layer, range(1))
    assert torch.equal(embedding.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("has_main_grad", [True, False])
def test_the_row_of_padding_gets_no_gradient_as_in_torch(make, has_main_grad):
    embedding = make(MainGradEmbedding, torch.float32)
    embedding.padding_idx = 5
    if has_main_grad:
        embedding.weight.main_grad, embedding.weight.grad_added_to_main_grad = torch.zeros(V, H), False
    plain = torch.nn.Embedding(V, H, padding_idx=5, _weight=embedding.weight.detach().clone())
    for layer in (embedding, plain):
        backward(layer, range(1))
    found = embedding.weight.main_grad if has_main_grad else embedding.weight.grad
    assert not found[5].any() and found[4].any()
    torch.testing.assert_close(found, plain.weight.grad, rtol=1e-6, atol=1e-6)


def test_a_frozen_embedding_passes_no_gradient(make):
    embedding = make(MainGradEmbedding, torch.float32)
    embedding.weight.requires_grad_(False).main_grad = torch.ones(V, H)
    assert not embedding(ids_and_slopes(0)[0]).requires_grad


class IndexAdd(TorchDispatchMode):
    """Records the rows to which gradients are added."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_add_.default:
            self.rows = args[2]
        return func(*args, **(kwargs or {}))


def test_tokens_of_other_ranks_add_zero_and_queue_for_no_row(make, monkeypatch):
    """The fourth of eight ranks, alone: it holds ids 150 to 199, and sees every id of the vocabulary twice."""
    monkeypatch.setattr(layers, "reduce_from_tensor_model_parallel_region", lambda rows, group: rows)
    embedding = make(MainGradEmbedding, torch.float32)
    embedding.tp_group = SimpleNamespace(size=lambda: 8, rank=lambda: 3)
    embedding.vocab_start_index, embedding.vocab_end_index = 3 * V, 4 * V
    embedding.weight.main_grad = torch.ones(V, H)
    ids = torch.arange(8 * V).repeat(2)[None]
    slopes = torch.randn(1, ids.numel(), H, generator=torch.Generator().manual_seed(3))
    with IndexAdd() as added:
        (embedding(ids) * slopes).sum().backward()
    own = slopes.view(2, 8, V, H)[:, 3]
    assert torch.equal(embedding.weight.main_grad, 1 + own[0] + own[1])
    # Twice its own id, and twice one of each other rank.
    assert added.rows.bincount(minlength=V).tolist() == [16] * V
