"""The length of a run, its warm-up and decay, and the steps of its evaluations."""

from __future__ import annotations

import pytest

from simpo_megatron.config import (
    config_from,
    load_config,
    num_train_iters,
    schedule_steps,
    steps_between_evaluations,
    to_yaml,
)
from simpo_megatron.errors import ConfigError
from simpo_megatron.training.saving.resume import _with_later_options


def config(**options):
    return config_from(model="m", data="d", global_batch_size=8, **options)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 12),
        ({"epochs": 2}, 25),
        ({"train_iters": 30}, 30),
        ({"epochs": 1, "train_iters": 30}, 12),
        ({"epochs": 3, "train_iters": 30}, 30),
    ],
)
def test_a_run_ends_at_the_earlier_of_epochs_and_steps(options, steps):
    assert num_train_iters(config(**options), 100) == steps


def test_steps_of_the_command_line_put_a_files_epochs_away(tmp_path):
    (tmp_path / "run.yaml").write_text("epochs: 1\nmodel: m\n")
    settings = load_config(["--config", str(tmp_path / "run.yaml"), "--train-iters", "30"]).optimizer
    assert (settings.epochs, settings.train_iters) == (None, 30)
    (tmp_path / "both.yaml").write_text("epochs: 1\ntrain_iters: 30\nmodel: m\n")
    settings = load_config(["--config", str(tmp_path / "both.yaml")]).optimizer
    assert (settings.epochs, settings.train_iters) == (1, 30)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (3, 30)),
        ({"lr_warmup_fraction": 0.0}, (0, 30)),
        ({"lr_decay_iters": 100}, (10, 100)),
        ({"lr_warmup_iters": 7}, (7, 30)),
        ({"lr_warmup_iters": 0}, (0, 30)),
        ({"lr_warmup_iters": 40, "lr_decay_iters": 100}, (40, 100)),
    ],
)
def test_warm_up_and_decay(options, expected):
    assert schedule_steps(config(**options), 30) == expected


def test_a_warm_up_that_leaves_no_decay_is_refused_before_training():
    with pytest.raises(ConfigError, match="lr_warmup_iters: found 12, expected fewer than the 12 steps"):
        num_train_iters(config(lr_warmup_iters=12), 100)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, None), ({"eval_interval": 5}, 5), ({"eval_epochs": 0.25}, 3), ({"eval_epochs": 0.01}, 1)],
)
def test_evaluations_by_steps_or_by_parts_of_an_epoch(options, expected):
    assert steps_between_evaluations(config(**options), 100) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2, "train_iters": 3, "lr_warmup_iters": 2, "eval_epochs": 0.5},
        {"train_iters": 3, "lr_decay_iters": 9, "lr_warmup_init": 1e-9},
        {"keep_checkpoints": -1},
        {},
    ],
)
def test_what_is_written_is_read_again(options, tmp_path):
    written = config(save="s", **options)
    (tmp_path / "config.yaml").write_text(to_yaml(written))
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == written


def test_checkpoints_from_before_these_options_are_continued_at_their_defaults():
    saved = {"training": {"objective": "dpo", "beta": 0.2, "lr": 1e-6}, "model": {"a": 1}}
    facts = _with_later_options(saved)
    assert facts["model"] == {"a": 1}
    assert facts["training"]["beta"] == 0.2
    assert (facts["training"]["sft_weight"], facts["training"]["lr_warmup_init"]) == (0.0, 0.0)
