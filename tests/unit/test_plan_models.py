"""The models and GPUs that the planner knows: their sizes, and how a name finds them."""

import json

import numpy as np
import pytest
import torch
from planning_cases import HF_CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

from simpo_megatron.config import DEMO, PRESETS, config_from
from simpo_megatron.errors import ConfigError
from simpo_megatron.planning.gpus import peak_bf16_flops
from simpo_megatron.planning.models import PUBLISHED, find_model, source_of
from simpo_megatron.planning.parameters import stage_parameters
from simpo_megatron.planning.shapes import ModelShape
from simpo_megatron.planning.speed import pairs_flops


@pytest.mark.parametrize(
    ("model", "billions", "active"),
    [
        ("Llama-3.1-70B-Instruct", 70.55, 70.55),
        ("Qwen2.5-72B-Instruct", 72.71, 72.71),
        ("Meta-Llama-3-8B-Instruct", 8.03, 8.03),
        ("gemma-2-9b-it", 9.24, 9.24),
        ("Mixtral-8x7B-Instruct-v0.1", 46.70, 12.88),
        ("Mixtral-8x22B-Instruct-v0.1", 140.63, 39.16),
        ("Qwen3-30B-A3B", 30.53, 3.35),
        ("Qwen3-235B-A22B", 235.09, 22.19),
    ],
)
def test_a_published_model_has_the_parameters_its_name_promises(model, billions, active):
    """The figures of the model cards, on one rank and summed over many."""
    shape, one = ModelShape.of(find_model(model)), config_from().parallel.sizes
    assert stage_parameters(shape, one, 0) / 1e9 == pytest.approx(billions, abs=0.01)
    assert shape.num_active_parameters / 1e9 == pytest.approx(active, abs=0.01)
    # Experts are divided by number over as many ranks as everything else is by width.
    many = config_from(tp=4, pp=2, ep=4 if shape.num_moe_experts else 1).parallel.sizes
    second_table = shape.vocab_size * shape.hidden_size / 1e9 if shape.tied else 0
    summed = 4 * sum(stage_parameters(shape, many, stage) for stage in range(2)) / 1e9
    assert summed == pytest.approx(billions + second_table, rel=2e-3)


@pytest.mark.parametrize(
    ("model", "matrices", "heads", "vocab"),
    [
        # By config.json: [layers, weights of the matrices that a token meets there].
        ("Meta-Llama-3-8B-Instruct", [(32, 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)], (32, 256), 128256),
        ("Llama-3.1-70B-Instruct", [(80, 8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672)], (64, 256), 128256),
        # Two of eight experts, and the router.
        (
            "Mixtral-8x7B-Instruct-v0.1",
            [(32, 4096 * (2 * 4096 + 2 * 1024) + 2 * 3 * 4096 * 14336 + 8 * 4096)],
            (32, 256),
            32000,
        ),
        # Latent attention: queries of 192, values of 128, a latent of 512 + 64. The first layer has a dense MLP, the
        # others two shared experts and six of 64.
        (
            "DeepSeek-V2-Lite-Chat",
            [
                (27, 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048),
                (1, 3 * 2048 * 10944),
                (26, 8 * 3 * 2048 * 1408 + 64 * 2048),
            ],
            (16, 320),
            102400,
        ),
    ],
)
def test_the_operations_of_a_pair_are_those_counted_from_config_json(model, matrices, heads, vocab):
    """Six a weight and token, three times those of scores and sums for a query and a key that it sees, and the head's.

    `heads`: their number, and the width of a query and a value together.
    """
    prompt, chosen, rejected = 30, 40, 50
    seen = sum(range(1, prompt + chosen + 1)) + sum(range(prompt + 1, prompt + rejected + 1))
    layers = sum(number for number, _ in matrices[:1])
    expected = 6 * 120 * sum(number * weights for number, weights in matrices)
    expected += 3 * 2 * layers * seen * heads[0] * heads[1]
    expected += 6 * 90 * vocab * find_model(model).transformer["hidden_size"]
    lengths = np.array([[prompt, chosen, rejected]])
    shape = ModelShape.of(find_model(model))
    found = pairs_flops(shape, lengths, lengths[:, 1:], prefix_sharing=True, freezes_weights=False)
    # Causally half a key a query is missed.
    assert found == pytest.approx(expected, rel=1e-4)


# The weights of the files on the hub, as their metadata or the models' own reports count them; where a report rounds,
# as it says.
PUBLISHED_PARAMETERS = {
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "princeton-nlp/Llama-3-Base-8B-SFT": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "alignment-handbook/zephyr-7b-sft-full": 7_241_732_096,
    "google/gemma-2-9b-it": 9_241_705_984,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "google/gemma-7b-it": 8_537_680_896,
    "google/gemma-3-1b-it": 999_885_952,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "ByteDance-Seed/Seed-OSS-36B-Instruct": 36_151_104_512,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "deepseek-ai/DeepSeek-V2-Lite-Chat": 15_706_484_224,
    "baidu/ERNIE-4.5-0.3B-PT": 0.36e9,
    "baidu/ERNIE-4.5-21B-A3B-PT": 21.8e9,
    "zai-org/GLM-4.5-Air": 106.9e9,
    "moonshotai/Moonlight-16B-A3B-Instruct": 16.0e9,
    "deepseek-ai/DeepSeek-V3": 671.0e9,
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_is_as_large_as_its_card_and_transformers_say(model):
    """Without layers that predict further tokens. The planner leaves out norms and biases."""
    description, published = find_model(model), PUBLISHED_PARAMETERS[model]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**description.hf_config))
    size = sum(parameter.numel() for parameter in built.parameters())
    assert size == published if isinstance(published, int) else size == pytest.approx(published, rel=3e-3)
    assert ModelShape.of(description).num_parameters == pytest.approx(size, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name_or_not_at_all(name, tflops):
    assert peak_bf16_flops(name) == (None if tflops is None else 1e12 * tflops)


@pytest.mark.parametrize("name", [*PUBLISHED, "Mixtral-8x7B", "gemma-2-9b", *sorted(set(PRESETS) - {DEMO})])
def test_a_model_is_found_by_name_or_preset(name):
    sizes = {config["hidden_size"] for key, config in PUBLISHED.items() if name not in PUBLISHED or key == name}
    assert find_model(name).transformer["hidden_size"] in sizes


def test_a_model_nobody_knows_is_refused_and_a_file_is_as_good_as_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="found 'nobody/knows', expected a Hugging Face folder, .* such as .*LocalEntryNotFoundError"
    ):
        find_model("nobody/knows")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HF_CONFIG))
    assert find_model(str(file)).transformer == find_model(str(tmp_path)).transformer
    assert source_of(str(tmp_path)) == source_of(str(file)) == str(file)
    assert source_of("nobody/knows") == "config.json of nobody/knows on the hub"
    assert source_of("gemma-2-9b").startswith("this program's own table, of google/gemma-2-9b-it; --model DIR")
