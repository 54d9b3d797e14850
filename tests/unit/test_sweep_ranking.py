"""Settings are ranked by what is comparable, and what chance explains is called level."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from simpo_megatron.commands import report
from simpo_megatron.config import config_from, to_yaml
from simpo_megatron.errors import ConfigError
from simpo_megatron.reporting.validation_pairs import (
    VALIDATION_PAIRS_FILE,
    ValidationPairs,
    keep_validation_pairs,
    read_validation_pairs,
)
from simpo_megatron.sweep.comparison import compare
from simpo_megatron.sweep.evidence import Evidence
from simpo_megatron.sweep.page import as_json, lines, page
from simpo_megatron.sweep.ranking import CONFIDENCE, standings

NUM_PAIRS = 300


def slow_standings(gaps_KSP, num_resamples, seed):
    """(accuracy, what chance explains) of each setting, in plain loops."""
    draw = np.random.default_rng(seed)
    num_settings, num_seeds, num_pairs = gaps_KSP.shape
    right = [[[float(gap > 0) for gap in row] for row in setting] for setting in gaps_KSP]
    means = [sum(map(sum, setting)) / (num_seeds * num_pairs) for setting in right]
    shifts = []
    of_pairs = draw.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=num_resamples)
    of_seeds = draw.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples)
    for pairs, seeds in zip(of_pairs, of_seeds, strict=True):
        resampled = [
            sum(
                seed_count * pair_count * setting[s][p]
                for s, seed_count in enumerate(seeds)
                for p, pair_count in enumerate(pairs)
            )
            / (num_seeds * num_pairs)
            for setting in right
        ]
        shifts.append([one - mean for one, mean in zip(resampled, means, strict=True)])
    chance = [
        np.quantile([max(row) - row[k] for row in shifts], CONFIDENCE, method="linear") for k in range(num_settings)
    ]
    return means, chance


def test_standings_are_those_of_plain_loops():
    gaps = np.random.default_rng(5).normal(0.1, 1.0, (3, 2, 17)).astype(np.float32)
    found = standings(gaps, seed=3, num_resamples=60)
    means, chance = slow_standings(gaps, 60, 3)
    assert [one.accuracy.mean for one in found] == pytest.approx(means, rel=1e-12)
    assert [one.behind for one in found] == pytest.approx([max(means) - mean for mean in means], abs=1e-12)
    assert [one.chance for one in found] == pytest.approx(chance, abs=1e-12)
    assert [one.gap.mean for one in found] == pytest.approx(gaps.astype(np.float64).mean((1, 2)), rel=1e-12)


@pytest.mark.parametrize("shared", [0.0, 0.95])
def test_settings_that_are_alike_are_called_level(shared):
    """200 sweeps of six settings with one true accuracy, their pairs independent or nearly the same."""
    draw, missed, num_level = np.random.default_rng(11), 0, []
    for _ in range(200):
        common = draw.normal(0.25, 1.0, (1, 1, NUM_PAIRS))
        own = draw.normal(0.25, 1.0, (6, 1, NUM_PAIRS))
        gaps = np.where(draw.random((6, 1, NUM_PAIRS)) < shared, common, own)
        found = standings(gaps, num_resamples=300)
        missed += not found[0].is_level
        num_level.append(sum(one.is_level for one in found))
    # The first is as good as any: it may be missed 5 times of 100, 10 of 200; above 19 has a chance of 0.3 %.
    assert missed <= 19
    assert np.mean(num_level) > 5.3


def test_a_setting_that_is_worse_is_told_apart():
    draw = np.random.default_rng(2)
    gaps = draw.normal(0.5, 1.0, (1, 1, NUM_PAIRS)) + np.array([0.0, 0.0, -0.6])[:, None, None]
    first, equal, worse = standings(gaps)
    assert first.is_level and equal.is_level and equal.behind == 0
    assert not worse.is_level and worse.behind > worse.chance > 0


def test_pairs_are_resampled_together():
    """Two settings that differ on 12 pairs of 1,000, always the same way: paired they are apart, unpaired never."""
    gaps = np.where(np.random.default_rng(1).random((1, 1, 1000)) < 0.6, 1.0, -1.0).repeat(2, axis=0)
    gaps[1, 0, np.flatnonzero(gaps[1, 0] > 0)[:12]] = -1.0
    first, second = standings(gaps)
    assert second.behind == pytest.approx(0.012) and not second.is_level
    assert first.accuracy.high - first.accuracy.low > 0.05, "by itself each is known five times less well"


def test_seeds_that_disagree_widen_what_chance_explains():
    draw = np.random.default_rng(4)
    shift = np.array([[0.6, -0.2], [0.0, 0.0]])[:, :, None]
    apart = standings(draw.normal(0.0, 1.0, (1, 1, 4000)) + shift)
    assert apart[1].behind > 0.05 and apart[1].is_level, "one seed is far better, the other worse"


def evidence(name, after, before=None, lengths=None, repetition=None, fingerprint="a", **options):
    count = len(after)
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 50, (count, 2)).astype(np.int32) if lengths is None else lengths
    pairs = ValidationPairs(fingerprint, lengths, before, after.astype(np.float32), 8)
    config = config_from(model="m", data=("d",), **options)
    return Evidence(Path("runs") / name, config, pairs, repetition)


def log_probs(accuracy, chosen=-1.0, count=200):
    """[count, 2] averages of which the share `accuracy` is right."""
    right = np.arange(count) < round(accuracy * count)
    noise = np.random.default_rng(9).normal(0, 0.1, count)
    first = chosen + noise
    return np.stack([first, np.where(right, first - 0.5, first + 0.5)], axis=1)


def test_what_displaces_the_chosen_repeats_or_goes_by_length_is_ruled_out():
    before = log_probs(0.5).astype(np.float32)
    lengths = np.stack([np.arange(200) + 1, np.arange(200) + 1], axis=1).astype(np.int32)
    by_length = log_probs(0.97) - 0.02 * (np.arange(200)[:, None] - 100)
    runs = {
        "good": evidence("good", log_probs(0.8), before, beta=2.0),
        "far": evidence("far", log_probs(0.99, chosen=-2.5), before),
        "repeats": evidence("repeats", log_probs(0.98), before, repetition=(0.1, 0.7)),
        "base_model": evidence("base_model", log_probs(0.7), before, repetition=(0.8, 0.75)),
        "by_length": evidence("by_length", by_length, before, lengths),
        "worse": evidence("worse", log_probs(0.5), before, beta=10.0, gamma_beta_ratio=0.1),
    }
    ranking = compare({name: (run,) for name, run in runs.items()}, failed={"gone": "seed=1 diverged: loss"})
    by_name = {row.name: row for row in ranking.rows}
    assert [row.name for row in ranking.rows][:3] == ["good", "base_model", "worse"]
    assert {name for name, row in by_name.items() if row.ruled_out} == {"far", "repeats", "by_length"}
    assert "-1.50 nats" in by_name["far"].ruled_out[0] and "70%" in by_name["repeats"].ruled_out[0]
    assert "correlation -0.9" in by_name["by_length"].ruled_out[0]
    assert by_name["good"].verdict == "best" and by_name["worse"].verdict == "behind"
    assert ranking.headline.startswith("good is the best of 7: 80.0% of 200 validation pairs are right")
    assert "Better than" not in ranking.headline and "better than the model it started from (50.0%)" in ranking.headline
    text = "\n".join(lines(ranking))
    assert "gamma_beta_ratio 0.1 was reached by 50% of the pairs before training" in text
    assert "failed    gone: seed=1 diverged: loss" in text
    assert as_json(ranking)["better_than_start"] is True
    html = page(ranking, title="t", axes={})
    assert "the model they started from 50.0%" in html
    assert "chosen responses moved by -1.50" in html and "seed=1 diverged" in html and 'alt="accuracy against' in html


def test_no_better_than_the_start_is_said():
    before = log_probs(0.55).astype(np.float32)
    ranking = compare({"run": (evidence("run", log_probs(0.56), before),)})
    assert "no better than the model it started from" in ranking.headline


def test_nothing_is_left_when_everything_is_ruled_out():
    before = log_probs(0.5).astype(np.float32)
    ranking = compare({"far": (evidence("far", log_probs(0.9, chosen=-3.0), before),)})
    assert ranking.best is None and ranking.headline.startswith("No setting is left")
    assert as_json(ranking)["best"] is None


def test_numbers_that_are_none_are_never_the_best():
    bad = np.full((200, 2), np.nan)
    runs = {"nan": (evidence("nan", bad, log_probs(0.5)),), "good": (evidence("good", log_probs(0.6), log_probs(0.5)),)}
    ranking = compare(runs)
    assert ranking.best.name == "good" and ranking.rows[1].ruled_out


def test_other_pairs_are_refused():
    runs = {name: (evidence(name, log_probs(0.6), fingerprint=name),) for name in "ab"}
    with pytest.raises(ConfigError, match="found other validation pairs than in runs/a"):
        compare(runs)


def write_run(folder, after, **options):
    """The folder of a run that was evaluated at step 0 and at step 8."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config_from(model="m", data=("d",), **options)))
    (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 8, "eval/loss": 1.0}) + "\n")
    pairs = SimpleNamespace(fingerprint="a", counted=np.tile(np.int32([[9, 7]]), (200, 1)))
    for iteration, averages in ((0, log_probs(0.5)), (4, log_probs(0.6)), (8, after)):
        keep_validation_pairs(folder, iteration, averages.astype(np.float32), pairs)
    return folder


def test_runs_are_compared_on_the_command_line(tmp_path, capsys):
    good = write_run(tmp_path / "x" / "good", log_probs(0.9), beta=2.0)
    bad = write_run(tmp_path / "y" / "bad", log_probs(0.6), objective="dpo")
    assert report.main([str(bad), str(good)]) == 0
    *_, headline, page_path = capsys.readouterr().out.splitlines()
    assert headline.startswith("x/good is the best of 2: 90.0% of 200") and "No other is level with it" in headline
    assert page_path == str(tmp_path / "comparison.html") and "x/good" in Path(page_path).read_text()
    kept = read_validation_pairs(good)
    assert kept.iteration == 8 and np.array_equal(kept.before, log_probs(0.5).astype(np.float32))

    (bad / VALIDATION_PAIRS_FILE).write_bytes(b"no")
    assert report.main([str(bad), str(good)]) == 2
    (bad / VALIDATION_PAIRS_FILE).unlink()
    assert report.main([str(bad), str(good)]) == 2
    damaged, missing = capsys.readouterr().err.splitlines()
    assert "validation_pairs.npz: cannot be read" in damaged and "run it again with --valid-data" in missing
