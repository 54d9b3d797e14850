"""HybridModel, which megatron-core 0.19 announces as GPTModel's successor, yields what our head takes.

Built without CUDA as far as that goes: attention and MLP layers of our local specification; Mamba layers need
mamba-ssm. Its block names Transformer Engine's norm outright, so that one name is replaced here.
"""

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from simpo_megatron.loss import ResponseTokens, VocabShard, fused_linear_log_probs
from simpo_megatron.mcore import cpu_patches

cpu_patches.install()
hybrid_block = pytest.importorskip("megatron.core.models.hybrid.hybrid_block", reason="megatron-core before 0.19")

VOCAB_SIZE, LENGTH = 512, 32


def configuration(num_layers: int):
    from simpo_megatron.mcore.architecture import ArchitectureConfig

    return ArchitectureConfig(
        num_layers=num_layers,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )


@pytest.fixture
def model(tp_group, monkeypatch):
    from megatron.core.models.hybrid.hybrid_layer_specs import MLPLayer, hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from simpo_megatron.mcore.specs import RMSNorm, local_layer_spec

    monkeypatch.setattr(hybrid_block, "TENorm", RMSNorm)
    config = configuration(num_layers=4)
    # HybridModel counts attention and MLP as layers of their own.
    whole = local_layer_spec(config).submodules
    attention, mlp = (
        TransformerLayerSubmodules(**{name: getattr(whole, name) for name in names})
        for names in (
            ("input_layernorm", "self_attention", "self_attn_bda"),
            ("pre_mlp_layernorm", "mlp", "mlp_bda"),
        )
    )
    layers = replace(
        hybrid_stack_spec.submodules,
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    return HybridModel(
        config,
        ModuleSpec(module=hybrid_block.HybridStack, submodules=layers),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=LENGTH,
        hybrid_layer_pattern="*-*-",
        position_embedding_type="rope",
    )


def test_hidden_states_and_output_weight_of_a_hybrid_model_fit_our_head(model, tp_group):
    """Log-probs and gradients are those of the model's own logits."""
    given = {}
    model.output_layer.register_forward_pre_hook(lambda layer, inputs: given.update(hidden_SBH=inputs[0]))
    ids_BS = torch.randint(VOCAB_SIZE, (1, LENGTH))
    rows_N, targets_N = torch.arange(10, 30), ids_BS[0, 11:31]
    logits = model(ids_BS, torch.arange(LENGTH)[None], None)
    expected = logits[0].double().log_softmax(-1)[rows_N, targets_N]
    weights = [model.embedding.word_embeddings.weight, model.output_layer.weight]
    expected_gradients = torch.autograd.grad(expected.sum(), weights, retain_graph=True)
    tokens = ResponseTokens(rows_N, targets_N, torch.zeros(len(rows_N), dtype=torch.long), num_pairs=1)
    log_probs = fused_linear_log_probs(
        given["hidden_SBH"],
        model.output_layer.weight,
        tokens,
        vocab=VocabShard(start=0, size=VOCAB_SIZE),
        tp_group=tp_group,
    )
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(log_probs.sum(), weights)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_a_hybrid_model_computes_what_a_gpt_model_of_its_weights_does(model):
    """Bit for bit; but a layer is two of its layers, and a checkpoint has each under a name of its own."""
    from simpo_megatron.mcore.model import PreferenceGPTModel
    from simpo_megatron.mcore.specs import block_spec

    config = configuration(num_layers=2)
    options = {"position_embedding_type": "rope", "true_vocab_size": VOCAB_SIZE}
    gpt = PreferenceGPTModel(config, block_spec(config, None, transformer_engine=False), VOCAB_SIZE, LENGTH, **options)
    halves = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parts = name.replace("final_layernorm", "final_norm").split(".")
            if "layers" in parts:
                parts[2] = str(2 * int(parts[2]) + any(part in ("pre_mlp_layernorm", "mlp") for part in parts))
            parameter.copy_(halves.pop(".".join(parts)))
    assert not halves
    tokens, positions = torch.randint(VOCAB_SIZE, (2, LENGTH)), torch.arange(LENGTH).expand(2, -1)
    assert torch.equal(model(tokens, positions, None), gpt(tokens, positions, None))
    groups = {"dp_cp_group": torch.distributed.group.WORLD}
    stored, of_gpt = (
        {entry.key for entry in each.sharded_state_dict(metadata=groups).values() if hasattr(entry, "key")}
        for each in (model, gpt)
    )
    assert "decoder.layers.self_attention.linear_proj.weight" in of_gpt - stored
    assert "decoder.layers.2.self_attention.linear_proj.weight" in stored - of_gpt


def test_a_hybrid_model_has_no_place_yet_for_what_the_trainer_needs():
    """The reasons to stay on GPTModel; where this fails, megatron-core has made room and the trainer can move."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    # The positions of a pack and the response tokens enter by these.
    hooks = ("_preprocess", "_postprocess")
    assert all(hasattr(GPTModel, hook) and not hasattr(HybridModel, hook) for hook in hooks)
    # Its last norm is Transformer Engine's by name, and its rotary embedding turns no neighbouring pairs.
    assert "TENorm(" in inspect.getsource(hybrid_block.HybridStack.__init__)
    assert "rotary_interleaved" not in inspect.getsource(HybridModel.__init__)
