"""Options of the objective: the margin in two ways, and refusals of other objectives."""

import re

import pytest
from yaml_configs import load_yaml, refusal

from simpo_megatron.config import config_from, load_config, to_text
from simpo_megatron.errors import ConfigError
from simpo_megatron.loss import CPOObjective, ORPOObjective, SimPOObjective


def test_gamma_is_translated_with_the_beta_of_the_whole_configuration(tmp_path):
    config = load_yaml(tmp_path, "gamma: 1.0\n", "--beta", "2.5")
    assert config.objective.gamma_beta_ratio == pytest.approx(0.4)
    assert config.objective.gamma == pytest.approx(1.0)


def test_gamma_takes_the_place_of_a_presets_ratio_and_the_other_way_round(tmp_path):
    assert load_config(["--preset", "gemma2-9b-it", "--gamma", "2"]).objective.gamma_beta_ratio == pytest.approx(0.2)
    assert load_yaml(tmp_path, "gamma: 2\nbeta: 10\n", "--gamma-beta-ratio", "0.5").objective.gamma == 5.0


def test_both_margins_are_printed():
    printed = to_text(load_config(["--beta", "2.5", "--gamma", "1.0", "--save", "runs/[red]x"])).plain
    assert re.search(r"gamma_beta_ratio +0\.4\b", printed) and re.search(r"gamma +1\b", printed)
    assert "runs/[red]x" in printed


def test_both_ways_to_say_the_margin_are_explained(tmp_path):
    assert "gamma / beta" in refusal(tmp_path, "gamma: 1.0\ngamma_beta_ratio: 0.5\n")


def test_the_objective_is_simpo_unless_another_is_named():
    assert load_config([]).objective == SimPOObjective()
    assert load_config(["--objective", "simpo", "--beta", "3"]).objective == SimPOObjective(beta=3.0)
    assert load_config(["--objective", "cpo", "--beta", "3"]).objective == CPOObjective(beta=3.0)
    assert config_from(objective="orpo").objective == ORPOObjective()
    assert config_from(objective="orpo").flat()["objective"] == "orpo"


def test_an_option_of_another_objective_is_refused_by_name_and_place(tmp_path):
    found = refusal(tmp_path, "gamma_beta_ratio: 0.3\n", "--objective", "cpo")
    assert found == (
        "run.yaml:1: gamma_beta_ratio: found with objective cpo, expected an option that cpo has: beta, sft_weight"
    )
    for option in ("gamma", "alpha", "beta", "sft_weight", "label_smoothing"):
        found = refusal(tmp_path, "objective: orpo\n", f"--{option.replace('_', '-')}", "0.3")
        assert found.startswith(f"command line: {option}: ") and "odds_ratio_weight" in found
    assert "found with objective simpo" in refusal(tmp_path, "lr: 1e-6\n", "--odds-ratio-weight", "0.1")


def test_the_constants_a_preset_has_for_simpo_are_not_taken_for_another_objective():
    config = load_config(["--preset", "llama3-instruct-v0.2", "--objective", "cpo"])
    assert config.objective == CPOObjective()
    assert config.optimizer.lr == 1e-6, "the rest of the preset stays"
    assert load_config(["--preset", "llama3-instruct-v0.2", "--objective", "simpo"]).objective.beta == 10.0


def test_objectives_with_equal_constants_have_fingerprints_of_their_own():
    assert config_from(objective="cpo").fingerprint("objective") != config_from(beta=0.1).fingerprint("objective")


def test_an_objective_for_unpaired_data_is_refused_with_the_reason(tmp_path):
    assert "single responses labelled good or bad" in refusal(tmp_path, "objective: kto\n")
    with pytest.raises(ConfigError, match="single responses"):
        config_from(objective="kto")
