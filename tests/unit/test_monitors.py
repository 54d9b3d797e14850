"""The monitors: each against a slow obvious twin, silent on what is well, and the same after a resume."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from simpo_megatron.config import Config, config_from
from simpo_megatron.data import BatchOptions
from simpo_megatron.data.batching import step_pairs
from simpo_megatron.data.ngrams import repetition
from simpo_megatron.errors import ConfigError, listed
from simpo_megatron.loss import MONITORED, SimPOObjective, length_correlation, monitored_sums, preference_loss
from simpo_megatron.reporting.loggers import RunLog
from simpo_megatron.reporting.terminal import Terminal
from simpo_megatron.training.monitors import DISPLACEMENT, Monitors, spike_limit
from simpo_megatron.training.repetition import first_prompts
from simpo_megatron.training.saving import Start

OPTIONS = BatchOptions(global_batch_size=4, seed=5)
STEADY = [1.30, 1.31, 1.29, 1.30, 1.32, 1.28, 1.30, 1.31]


class Pairs:
    """Ten of them, in one file."""

    def __len__(self) -> int:
        return 10

    def places(self, indices, most):
        return listed((f"file:{index + 1}" for index in indices), most)


def job(pairs: str | None = "validation") -> SimpleNamespace:
    valid = {} if pairs is None else {"": SimpleNamespace(fingerprint=pairs)}
    return SimpleNamespace(train_data=Pairs(), valid_data=valid, trainer=SimpleNamespace(batch_options=OPTIONS))


def monitors(remembered=None, pairs: str | None = "validation", **options) -> Monitors:
    config = config_from(model="m", monitor_window=16, **options)
    return Monitors(config, job(pairs), Start(monitors=remembered or {}))


def said(watching: Monitors, tmp_path) -> list[str]:
    """The lines that the monitors print."""
    with (tmp_path / "said").open("w") as file:
        terminal = Terminal(9, Console(file=file, width=400))
        assert watching.judge(7, RunLog([], terminal)) is None
        terminal.close()
    return (tmp_path / "said").read_text().splitlines()


def feed(watching: Monitors, losses, start: int = 1, **metrics) -> None:
    for number, loss in enumerate(losses, start=start):
        watching.step(number, {"loss": loss, **metrics}, 4 * number)


def test_the_limit_of_a_spike_is_that_of_a_straight_reading():
    losses = np.random.default_rng(0).normal(1.3, 0.1, 32)
    middle = np.median(losses)
    expected = middle + 7 * 1.4826 * np.median(np.abs(losses - middle))
    assert spike_limit(losses.tolist(), 7) == pytest.approx(expected, rel=1e-12)
    assert spike_limit(losses.tolist(), 7) == pytest.approx(1.3 + 7 * 0.1, abs=0.2), "a deviation is the normal one's"


def test_losses_that_hardly_vary_and_a_spike_among_them_move_no_limit():
    assert spike_limit([50.0] * 8, 10) == pytest.approx(55)
    assert spike_limit([0.5] * 8, 10) == pytest.approx(0.6)
    assert spike_limit([0.0012, 0.0002, 0.0031] * 8, 10) > 0.0404, "a pair that is not saturated among those that are"
    assert spike_limit([*STEADY, 130.0], 10) == pytest.approx(spike_limit(STEADY, 10), rel=0.05)


@pytest.mark.parametrize("loss", [130.0, 1.6, float("nan"), float("inf")])
def test_a_spike_is_told_with_the_pairs_of_the_steps_since_the_last_line(loss, tmp_path):
    watching = monitors()
    feed(watching, STEADY[:4])
    record = watching.step(6, {"loss": loss, "grad_norm": 1.0}, 24)  # a line of two steps
    expected = sorted([*step_pairs(10, 16, OPTIONS), *step_pairs(10, 20, OPTIONS)])
    assert record == {"loss": pytest.approx(loss, nan_ok=True), "grad_norm": 1.0, "pair_ids": expected}
    (line,) = said(watching, tmp_path)
    assert line.startswith("WARNING loss_spike after step 6: the loss is")
    assert f"pairs {', '.join(f'file:{index + 1}' for index in expected)};" in line
    assert said(watching, tmp_path) == []


def test_steady_losses_and_a_young_run_are_no_spikes(tmp_path):
    watching = monitors()
    feed(watching, [*STEADY, 1.2, 0.4, 1.36])
    assert said(watching, tmp_path) == []
    young = monitors()
    feed(young, [1.3, 1.3, 1.3, 130.0])
    assert said(young, tmp_path) == [], "a quarter of the window, 4 lines, came before the fifth only"


def test_a_monitor_that_is_switched_off_is_silent(tmp_path):
    off = dict.fromkeys(("max_loss_spike", "max_saturated", "max_length_correlation", "max_displacement"))
    watching = monitors(**off)
    feed(watching, [*STEADY, 130.0], **{"rewards/saturated": 1.0, "rewards/length_correlation": 1.0})
    watching.evaluation(0, {"eval/logps/chosen": -1.0})
    watching.evaluation(5, {"eval/logps/chosen": -9.0})
    assert said(watching, tmp_path) == []


@pytest.mark.parametrize(
    ("metric", "well", "beyond"),
    [
        ("saturated", 0.5, 0.95),
        ("length_correlation", 0.5, 0.9),
        ("length_correlation", -0.5, -0.9),
    ],
)
def test_a_level_is_told_when_it_is_crossed_and_again_only_after_a_way_back(metric, well, beyond, tmp_path):
    watching = monitors()

    def lines(value: float, count: int) -> list[str]:
        feed(watching, [1.3] * count, **{f"rewards/{metric}": value})
        return said(watching, tmp_path)

    assert lines(well, 16) == []
    assert lines(beyond, 8) == [], "the median of half a window is not beyond yet"
    (line,) = lines(beyond, 8)
    assert line.startswith(f"WARNING {metric} after step ") and f"max_{metric}" in line
    assert lines(beyond, 8) == []
    assert lines(well, 16) == []
    assert len(lines(beyond, 16)) == 1


def test_displacement_is_from_step_0_and_told_when_it_falls_too_far(tmp_path):
    watching = monitors(max_displacement=0.5)
    metrics = {"eval/logps/chosen": -1.25, "eval/loss": 1.0}
    assert watching.evaluation(0, metrics) == {**metrics, DISPLACEMENT: 0.0}
    assert watching.evaluation(4, {"eval/logps/chosen": -0.5})[DISPLACEMENT] == 0.75
    assert watching.evaluation(8, {"eval/logps/chosen": -1.75})[DISPLACEMENT] == -0.5
    assert said(watching, tmp_path) == []
    assert watching.evaluation(12, {"eval/logps/chosen": -1.875})[DISPLACEMENT] == -0.625
    (line,) = said(watching, tmp_path)
    assert "-0.625 nats per token since step 0 (max_displacement 0.5)" in line
    watching = monitors(json.loads(json.dumps(watching.remembered())), max_displacement=0.5)
    assert watching.evaluation(16, {"eval/logps/chosen": -2.25})[DISPLACEMENT] == -1.0
    assert said(watching, tmp_path) == [], "it was told before the resume"
    watching = monitors(watching.remembered(), pairs="others")
    assert DISPLACEMENT not in watching.evaluation(20, {"eval/logps/chosen": -9.0}), "other pairs than at step 0"
    assert monitors().evaluation(4, {}) == {}


def test_a_resumed_run_warns_as_the_uninterrupted_one(tmp_path):
    losses = [*STEADY, 1.9, *STEADY, 1.45]
    whole = monitors()
    feed(whole, losses)
    for cut in range(len(losses)):
        first = monitors()
        feed(first, losses[:cut])
        second = monitors(json.loads(json.dumps(first.remembered())))
        feed(second, losses[cut:], start=cut + 1)
        told = [line.split("; pairs")[0] for line in said(first, tmp_path) + said(second, tmp_path)]
        if cut == 0:
            expected = told
            assert len(expected) == 2
        assert told == expected


def test_repetition_is_the_share_of_4_grams_that_were_there_before():
    assert repetition([7] * 64) == pytest.approx(60 / 61)
    assert repetition(list(range(64))) == repetition([1, 2, 3]) == repetition([]) == 0
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6), "1 2 3 4 comes back, 2 3 4 5 does not"


def test_repetition_is_told_only_where_there_is_more_than_before_training(monkeypatch, tmp_path):
    samples = []
    module = "simpo_megatron.training.monitors"
    monkeypatch.setattr(f"{module}.first_prompts", lambda *_: SimpleNamespace(ids=[[1]], end_ids=frozenset()))
    monkeypatch.setattr(f"{module}.greedy_samples", lambda *_, **__: [samples.pop(0)])
    working = job()
    working.trainer.groups = None
    working.tokenizer = SimpleNamespace(loaded=SimpleNamespace(decode=str))
    working.plan = SimpleNamespace(description=SimpleNamespace(vocab_size=9))
    config = config_from(model="m", repetition_prompts=1, max_repetition=0.5)
    watching = Monitors(config, working, Start())
    some, many, all_ = [7] * 8 + list(range(8)), [7] * 16 + list(range(4)), [7] * 64
    assert repetition(some) < 0.5 < repetition(many) < repetition(all_)

    def told(iteration, ids):
        samples.append(ids)
        watching.evaluation(iteration, {"eval/logps/chosen": -1.0})
        return said(watching, tmp_path)

    assert told(0, many) == told(4, some) == told(8, many) == []
    (line,) = told(12, all_)
    assert line.startswith("WARNING repetition after step ")
    watching = Monitors(config, working, Start(monitors=json.loads(json.dumps(watching.remembered()))))
    assert told(16, many) == []
    assert len(told(20, all_)) == 1, "on the way back in between"


def test_prompts_differ_and_are_short(monkeypatch, world_of_one):
    lengths = np.array([[300, 2, 2], [5, 2, 1], [5, 1, 1], [256, 1, 1], [9, 1, 1]])
    dataset = SimpleNamespace(prompt_keys=np.array([1, 2, 2, 3, 4]), lengths=lengths)
    asked = []

    def read(dataset, indices, **_):
        asked.extend(indices)
        return [SimpleNamespace(prompt_ids=np.arange(i), chosen_ids=np.array([8, 90 + i % 2])) for i in indices]

    monkeypatch.setattr("simpo_megatron.training.repetition.read_pairs", read)
    prompts = first_prompts(dataset, 2, SimpleNamespace(tp=None))
    assert asked == [1, 3] and prompts.ids == [[0], [0, 1, 2]] and prompts.end_ids == {91}
    assert len(first_prompts(dataset, 9, SimpleNamespace(tp=None)).ids) == 3


def responses(counts, averages) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(averages, dtype=torch.float32), torch.tensor(counts)


@pytest.mark.parametrize("num_pairs", [2, 40])
def test_correlation_and_saturation_are_those_of_numpy_however_pairs_were_cut(num_pairs):
    random = np.random.default_rng(num_pairs)
    counts = random.integers(1, 2000, 2 * num_pairs)
    averages = (-20 + 0.01 * random.normal(size=2 * num_pairs) - counts * 1e-5).astype(np.float32)
    averages[::4] += 9  # chosen responses of half of the pairs
    total = dict.fromkeys(MONITORED, 0.0)
    for part in (slice(0, 2), slice(2, None)):
        avg_R, counts_R = responses(counts[part], averages[part])
        result = preference_loss(avg_R, counts_R, objective=SimPOObjective())
        for name, value in monitored_sums(result, counts_R).items():
            assert value.dtype == torch.float64 and value.dim() == 0
            total[name] += float(value)
    expected = np.corrcoef(averages.astype(np.float64), counts)[0, 1]
    assert length_correlation(total, 2 * num_pairs) == pytest.approx(expected, rel=1e-7)
    z = 2 * (averages[::2] - averages[1::2]).astype(np.float64) - 1
    assert total["rewards/saturated"] == int((np.log1p(np.exp(-z)) < 0.01).sum()) == num_pairs / 2


@pytest.mark.parametrize("counts", [[7, 7, 7, 7], [3, 9, 4, 5]])
def test_what_does_not_vary_has_no_correlation(counts):
    averages = [-1.1, -0.3, -2.7, -0.4] if len(set(counts)) == 1 else [-1.1] * 4
    avg_R, counts_R = responses(counts, averages)
    sums = monitored_sums(preference_loss(avg_R, counts_R, objective=SimPOObjective()), counts_R)
    assert length_correlation({name: float(value) for name, value in sums.items()}, 4) is None
    assert length_correlation(dict.fromkeys(MONITORED, float("nan")), 4) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stop_on": ("spike",)}, "stop_on: found 'spike', expected loss_spike or saturated"),
        ({"stop_on": ("saturated",), "max_saturated": None}, "max_saturated not null"),
        ({"max_saturated": 1.5}, "max_saturated: found 1.5"),
        ({"stop_on": ("repetition",)}, "repetition_prompts above 0"),
        ({"monitor_window": 0}, "monitor_window"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ConfigError, match=expected):
        config_from(model="m", **options)


def test_a_stop_by_validation_pairs_needs_some():
    with pytest.raises(ConfigError, match="stop_on: found displacement, .*--valid-data"):
        monitors(pairs=None, stop_on=("displacement",))
    assert monitors(stop_on=("displacement",)).evaluate_before_saving
    assert not monitors(pairs=None, stop_on=("loss_spike",)).evaluate_before_saving
    assert Config().monitors.stop_on == ()
