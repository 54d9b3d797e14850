"""The model card says what a run was told and what it reached, from the run itself and from its checkpoint alike."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from simpo_megatron.config import config_from, load_config
from simpo_megatron.errors import ConfigError
from simpo_megatron.reporting.model_card import card_of_checkpoint, merged_model_card, model_card
from simpo_megatron.reporting.run_report import read_curves

OPTIONS = {"model": "models/llama", "data": ("a.jsonl", "b.jsonl"), "beta": 2.5, "valid_data": ("held.jsonl",)}
LINES = [
    {"iteration": 0, "eval/rewards/accuracies": 0.45, "eval/rewards/margins": -0.02, "eval/loss": 1.5},
    {"iteration": 7, "loss": 1.25, "rewards/accuracies": 0.5},
    {"iteration": 7, "eval/rewards/accuracies": 0.875, "eval/rewards/margins": 1.25, "eval/loss": 0.5},
]


def checkpoint(folder, lines=LINES):
    """(options, metrics) as a checkpoint keeps them of its run."""
    options = json.loads(json.dumps(config_from(**OPTIONS).flat()))
    if not lines:
        return options, None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return options, folder / "metrics.jsonl"


def test_a_checkpoint_gives_the_card_that_its_run_gives(tmp_path):
    options, metrics_file = checkpoint(tmp_path)
    card = card_of_checkpoint(options, metrics_file, tmp_path / "out" / "better", torch.bfloat16)
    curves = read_curves(metrics_file)
    assert card == model_card(config_from(**OPTIONS), "better", curves, torch.bfloat16)
    assert "Weights: bfloat16, trained in bfloat16." in card
    assert "# better\n\nTrained from `llama` with SimPO (arXiv 2405.14734)" in card
    assert "accuracy went from 45.0% to 87.5%" in card
    assert "| accuracy | 45.0% | 87.5% | share of pairs" in card and "| loss | 1.5000 | 0.5000 |" in card
    assert "| training batch | step 7 |" in card and "| loss | 1.2500 |" in card
    (tmp_path / "config.yaml").write_text(card.partition("```yaml\n")[2].partition("```")[0])
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config_from(**OPTIONS)


def test_a_run_without_metrics_still_has_its_configuration(tmp_path):
    card = card_of_checkpoint(*checkpoint(tmp_path, lines=[]), "out", torch.float32)
    assert card == model_card(config_from(**OPTIONS), "out", None, torch.float32)
    assert "Weights: float32, trained in bfloat16." in card
    assert "beta: 2.5" in card and "## Metrics" not in card


def test_hugging_face_reads_what_the_card_says(tmp_path):
    curves = read_curves(checkpoint(tmp_path)[1])
    text = model_card(config_from(**OPTIONS), "out/better", curves, torch.bfloat16)
    data = ModelCard(text).data
    assert (data.library_name, data.tags, data.model_name) == ("transformers", ["simpo", "simpo_megatron"], "better")
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert results == {
        ("validation", "accuracy"): 0.875,
        ("validation", "rewards/margins"): 1.25,
        ("validation", "loss"): 0.5,
    }
    assert data.pipeline_tag == "text-generation" and data.to_dict().get("base_model_relation") is None
    assert data.base_model is None and data.datasets is None, "a folder's name means nothing to others"
    assert "models/llama" not in text.partition("## Configuration")[0]


def test_models_and_data_of_the_hub_are_named_as_the_hub_names_them():
    model = "/cache/hub/models--some-org--Llama-3-8B/snapshots/0a1b2c"
    options = OPTIONS | {"model": model, "data": ("0.5", "hub:org/pairs:train", "0.5", "b.jsonl")}
    text = model_card(config_from(**options), "better", None, torch.bfloat16)
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == ("some-org/Llama-3-8B", ["org/pairs"])
    assert data.base_model_relation == "finetune"
    assert data.eval_results is None
    assert "Trained from `some-org/Llama-3-8B` with SimPO" in text


def test_each_named_set_has_results_and_what_is_no_number_has_none(tmp_path):
    lines = [*LINES, {"iteration": 7, "eval/a/rewards/accuracies": 0.5, "eval/b/rewards/accuracies": 1.0}]
    lines.append({"iteration": 7, "eval/a/loss": "nan"})
    data = ModelCard(card_of_checkpoint(*checkpoint(tmp_path, lines), "better", None)).data
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in data.eval_results]
    assert results == [("validation a", "accuracy", 0.5), ("validation b", "accuracy", 1.0)]


def test_the_card_of_adapters_says_what_they_are_for():
    options = OPTIONS | {"model": "/cache/hub/models--some-org--Llama-3-8B/snapshots/0a1b2c", "lora_rank": 8}
    text = model_card(config_from(**options), "adapter", None, torch.float32, is_adapter=True)
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("some-org/Llama-3-8B", "adapter", "peft")
    assert data.tags == ["simpo", "lora", "simpo_megatron"]
    assert "Adapters (LoRA) for `some-org/Llama-3-8B`, trained with SimPO (arXiv 2405.14734) by simpo_megatron." in text


@pytest.mark.parametrize(
    ("front_matter", "license_name", "language"),
    [
        ("license: apache-2.0\nlanguage: en\n", "apache-2.0", ["en"]),
        ("language:\n- en\n  - de\ntags: [x]\nlicense: 'mit'\n", "mit", ["en", "de"]),
        ("language: [en, de]\nlicense: !!python/object:os.system\n", "!!python/object:os.system", ["en", "de"]),
        ("licenses: none\n  license: nested\nlanguage: \x1b[31m\n", None, None),
    ],
)
def test_license_and_language_are_those_of_the_models_card(tmp_path, front_matter, license_name, language):
    (tmp_path / "README.md").write_text(f"---\n{front_matter}---\n# A model\nlicense: in the text\n")
    text = model_card(config_from(**OPTIONS | {"model": str(tmp_path)}), "better", None, torch.bfloat16)
    data = ModelCard(text).data
    assert (data.license, data.language) == (license_name, language)


def test_the_card_names_the_template_that_was_asked_for():
    options = OPTIONS | {"chat_template": "simpo-gemma2", "chat_template_args": ("day=1",)}
    text = model_card(config_from(**options), "better", None, torch.bfloat16)
    assert "rendered with the chat template `simpo-gemma2`, which is this folder's." in text and "- `day=1`" in text


def test_the_card_of_an_average_names_its_parts():
    text = merged_model_card("mean", [(0.25, "a"), (0.75, "b")])
    assert "# mean\n" in text and "- 0.25 x `a`\n- 0.75 x `b`\n" in text
    assert ModelCard(text).data.tags == ["merge", "simpo_megatron"]


def test_an_option_of_another_version_is_named(tmp_path):
    options, metrics_file = checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="no_such_option"):
        card_of_checkpoint({**options, "no_such_option": 1}, metrics_file, "out", None)
