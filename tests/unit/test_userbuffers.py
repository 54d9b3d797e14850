"""Transformer Engine's userbuffers are asked for by its own signatures, and refused where they cannot serve."""

from __future__ import annotations

import enum
import inspect
import sys
from types import SimpleNamespace

import pytest

from simpo_megatron.config import Machine, config_from, resolve
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.userbuffers import userbuffers

OPTIONS = {
    "model": "m",
    "data": ("d",),
    "tp": 4,
    "cp": 2,
    "sequence_parallel": True,
    "tp_comm_overlap": True,
    "fixed_pack_length": True,
    "tokens_per_microbatch": 8192,
}
SHAPE = {"num_layers": 2, "num_attention_heads": 8, "hidden_size": 256, "ffn_hidden_size": 1024}
HOPPER = Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(9, 0))
BLACKWELL = Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(10, 0))


class Modes(enum.Enum):
    NONE = "none"
    FP8 = "fp8"


# Source: transformer_engine/pytorch/module/base.py of the tags v2.7 and v2.9, and of 2.20.0.dev0.
def of_2_7(shape, tp_size, use_fp8=False, dtype=None, ub_cfgs=None, bootstrap_backend=None): ...


def of_2_9(
    shape, tp_size, use_fp8=False, quantization_modes=None, dtype=None, ub_cfgs=None, bootstrap_backend=None
): ...


def of_2_20(
    shape,
    tp_size,
    use_fp8=False,
    quantization_modes=None,
    dtype=None,
    ub_cfgs=None,
    bootstrap_backend=None,
    with_cublasmp=False,
): ...


@pytest.fixture
def engine(monkeypatch):
    """Puts a stand-in in the place of Transformer Engine's module, which lists what is called."""

    def arrange(initialize_ub):
        calls = []

        def recorded(*args, **kwargs):
            calls.append(inspect.signature(initialize_ub).bind(*args, **kwargs).arguments)

        recorded.__signature__ = inspect.signature(initialize_ub)
        stand_in = SimpleNamespace(
            initialize_ub=recorded, destroy_ub=lambda: calls.append("destroyed"), UserBufferQuantizationMode=Modes
        )
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", stand_in)
        return calls

    return arrange


@pytest.mark.parametrize("signature", [of_2_9, of_2_20])
@pytest.mark.parametrize(
    ("fp8", "modes"),
    [
        (None, [Modes.NONE]),
        ("delayed", [Modes.FP8]),
        ("mxfp8", [Modes.FP8]),
        # Its first and last layer are in bf16, and look for buffers of their own.
        ("tensorwise", [Modes.FP8, Modes.NONE]),
    ],
)
def test_buffers_have_the_shape_of_a_microbatch_and_a_kind_for_each_precision(engine, signature, fp8, modes):
    calls = engine(signature)
    with userbuffers(config_from(**OPTIONS, **({"fp8": fp8} if fp8 else {})), 256):
        assert calls == [{"shape": [4096, 256], "tp_size": 4, "quantization_modes": modes, "bootstrap_backend": "nccl"}]
    assert calls[1:] == ["destroyed"]


def test_without_the_option_transformer_engine_is_not_asked(engine):
    calls = engine(of_2_9)
    with userbuffers(config_from(**OPTIONS | {"tp_comm_overlap": False}), 256):
        pass
    assert calls == []


def test_buffers_are_freed_when_the_run_fails(engine):
    calls = engine(of_2_9)
    with pytest.raises(ZeroDivisionError), userbuffers(config_from(**OPTIONS), 256):
        1 / 0  # noqa: B018
    assert calls[-1] == "destroyed"


def test_an_older_transformer_engine_is_refused(engine):
    calls = engine(of_2_7)
    with pytest.raises(ConfigError, match="^tp_comm_overlap: .*expected 2.9 or later"):
        userbuffers(config_from(**OPTIONS), 256).__enter__()
    assert calls == []


def test_megatrons_configuration_has_the_names_that_its_layers_read():
    """Their defaults overlap all-gathers and reduce-scatters by the methods that Transformer Engine picks."""
    config = ArchitectureConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    read = ["bulk_wgrad", "bulk_dgrad", "overlap_ag", "overlap_rs"]
    assert [getattr(config, f"tp_comm_{name}") for name in read] == [True] * 4
    assert config.tp_comm_overlap is False and config.tp_comm_overlap_rs_dgrad is False


@pytest.mark.parametrize(
    ("options", "machine", "message"),
    [
        ({}, Machine(), "Transformer Engine on a GPU"),
        ({}, Machine(has_cuda=True), "Transformer Engine on a GPU"),
        ({"fixed_pack_length": False}, HOPPER, "fixed_pack_length with it"),
        ({"sequence_parallel": False}, HOPPER, "sequence_parallel with it"),
        ({"bf16": False}, HOPPER, "bf16; its buffers"),
        ({"lora_rank": 4}, HOPPER, "no lora_rank beside it"),
        ({"fp8": "blockwise"}, HOPPER, "another fp8_recipe than blockwise"),
        ({"fp8": "mxfp8", "tokens_per_microbatch": 8192 + 1024 - 512}, BLACKWELL, "a multiple of 128 tokens"),
    ],
)
def test_where_it_cannot_be_it_is_refused_by_name(options, machine, message):
    with pytest.raises(ConfigError) as refused:
        resolve(config_from(**OPTIONS | options), world_size=8, model=SHAPE, machine=machine)
    assert "tp_comm_overlap: found True, expected " in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize("moe", [{}, {"num_moe_experts": 4, "moe_ffn_hidden_size": 64}])
@pytest.mark.parametrize(("options", "machine"), [({}, HOPPER), ({"fp8": "mxfp8"}, BLACKWELL)])
def test_where_it_can_be_it_is_taken(options, machine, moe):
    resolve(config_from(**OPTIONS | options), world_size=8, model=SHAPE | moe, machine=machine)


def test_latent_attention_refuses_it_but_not_its_pack_length():
    latent = SHAPE | {"latent": object()}
    with pytest.raises(ConfigError, match="^tp_comm_overlap: .*expected plain attention"):
        resolve(config_from(**OPTIONS), world_size=8, model=latent, machine=HOPPER)
    resolve(config_from(**OPTIONS | {"tp_comm_overlap": False}), world_size=8, model=latent, machine=HOPPER)
