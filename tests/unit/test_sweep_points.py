"""Axes, points, rounds and the journal of a sweep."""

from __future__ import annotations

import json

import pytest

from simpo_megatron.errors import ConfigError
from simpo_megatron.sweep.journal import Journal, Outcome, read_outcome
from simpo_megatron.sweep.points import Point, grid, parse_axes, written
from simpo_megatron.sweep.request import read_sweep
from simpo_megatron.sweep.rounds import halving, next_round, num_rungs, rung_steps, staged

BASE = ["--model", "m", "--data", "d", "--valid-data", "v", "--save", "runs/sweep"]


def names(points):
    return [point.name for point in points]


def test_a_grid_is_every_combination_and_its_names_read_back():
    axes = parse_axes(["lr=5e-7,1e-6", "beta=2,2.5,10"])
    points = grid(axes)
    assert names(points)[:3] == ["lr=5e-07,beta=2", "lr=5e-07,beta=2.5", "lr=5e-07,beta=10"]
    assert len(points) == len(set(names(points))) == 6
    assert [float(written(value)) for value in (1e-6, 0.1 + 0.2, 1 / 3)] == [1e-6, 0.1 + 0.2, 1 / 3]


def test_an_objective_takes_the_axes_that_are_its_own():
    points = grid(parse_axes(["objective=simpo,dpo,orpo", "beta=0.1,2", "gamma_beta_ratio=0.3,0.5", "lr=1e-6"]))
    assert len(points) == 4 + 2 + 1
    assert "objective=dpo,beta=0.1,lr=1e-06" in names(points) and "objective=orpo,lr=1e-06" in names(points)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["lr"], "expected an option and its values"),
        (["lr=1e-6,x"], "found 'x', expected a number"),
        (["learning_rate=1e-6"], "did you mean 'lr'"),
        (["lr=1e-6", "lr=1e-7"], "found lr twice"),
        (["lr=1e-6,0.000001"], "found a value of lr twice"),
        (["tp=1,2"], "found tensor_model_parallel_size, expected an option of the objective"),
        (["max_length=512,1024"], "start a run of its own for each value"),
        (["gamma=1", "gamma_beta_ratio=0.5"], "found both"),
        (["lr=1e-6,-1"], "expected a number above 0"),
        ([], "expected values to try"),
    ],
)
def test_axes_that_cannot_be_swept_are_refused_before_anything_runs(axes, said):
    with pytest.raises(ConfigError, match=said):
        read_sweep(BASE, axes)


@pytest.mark.parametrize(
    ("argv", "options", "said"),
    [
        (BASE[:-2], {}, "save: found None"),
        ([*BASE[:4], "--save", "runs/sweep"], {}, "valid_data: found None"),
        ([*BASE[:4], "--valid-fraction", "0.1", "--save", "s"], {}, "beside several seeds"),
        (BASE, {"halving": 1}, "a factor above 1"),
        (BASE, {"halving": 2, "order": "staged"}, "order: found 'staged'"),
        (BASE, {"keep": 0}, "keep: found 0"),
    ],
)
def test_what_a_sweep_needs_is_asked_for(argv, options, said):
    with pytest.raises(ConfigError, match=said):
        read_sweep(argv, ["lr=1e-6,1e-7", "seed=1,2"], **options)


def test_values_to_try_may_stand_in_the_file_and_the_trainer_refuses_them(tmp_path):
    from simpo_megatron.config import load_config

    file = tmp_path / "sweep.yaml"
    file.write_text("lr: 1e-6\nbeta: 2\nsweep:\n  beta: [2, 2.5]\n  lr: [5e-7, 1e-6]\n")
    sweep = read_sweep(["--config", str(file), *BASE], ["lr=1e-7,2e-7,3e-7"])
    assert sweep.axes == {"beta": (2.0, 2.5), "lr": (1e-7, 2e-7, 3e-7)}
    config = sweep.config_of(grid(sweep.axes)[4])
    assert (config.objective.beta, config.optimizer.lr, config.run.save) == (2.5, 2e-7, "runs/sweep/beta=2.5,lr=2e-07")
    assert config.data.data_cache == "runs/sweep/cache" and config.run.resume == "latest"
    with pytest.raises(ConfigError, match=r"sweep.yaml:3: sweep: found values to try, expected the options of one"):
        load_config(["--config", str(file)])
    for text, said in (
        ("sweep: 3\n", "expected lines such as"),
        ("sweep:\n  lr: [x]\n", "sweep.yaml:2: lr: found 'x'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_sweep(["--config", str(file), *BASE], [])


def best_is_largest(points):
    """A choice that takes the settings with the largest values first."""
    return sorted({point.setting for point in points}, key=lambda one: [value for _, value in one.values], reverse=True)


def test_stages_tune_one_option_after_the_other():
    axes = parse_axes(["lr=1e-7,1e-6", "beta=2,10", "seed=1,2"])
    rounds = list(staged(axes, {"lr": 3e-7, "beta": 10.0}, best_is_largest))
    assert [names(one.points) for one in rounds] == [
        ["lr=1e-07,beta=10,seed=1", "lr=1e-07,beta=10,seed=2", "lr=1e-06,beta=10,seed=1", "lr=1e-06,beta=10,seed=2"],
        ["lr=1e-06,beta=2,seed=1", "lr=1e-06,beta=2,seed=2", "lr=1e-06,beta=10,seed=1", "lr=1e-06,beta=10,seed=2"],
    ]
    assert [one.is_last for one in rounds] == [False, True]
    known = set(rounds[0].points)
    assert (
        next_round(iter(rounds), known) is rounds[1] and next_round(iter(rounds), known | set(rounds[1].points)) is None
    )


def test_halving_keeps_a_part_and_trains_it_longer():
    axes = parse_axes(["lr=1e-7,2e-7,3e-7,4e-7", "beta=2,5,10", "seed=7,8"])
    rounds = list(halving(axes, 3, best_is_largest))
    assert [len(one.points) for one in rounds] == [12, 4, 2 * 2]
    assert {dict(point.values)["seed"] for one in rounds[:2] for point in one.points} == {7}
    assert rounds[1].points[0].folder == "rung-1/lr=4e-07,beta=10,seed=7"
    assert [num_rungs(n, 3) for n in (1, 2, 3, 8, 9, 12)] == [1, 1, 2, 2, 3, 3]
    assert [rung_steps(90, rung, 2, 3) for rung in range(3)] == [10, 30, 90]
    sweep = read_sweep([*BASE, "--train-iters", "90"], ["lr=1e-7,2e-7,3e-7"], halving=3)
    rung = sweep.steps_of(Point((("lr", 1e-7),), rung=0), 90)
    assert sweep.config_of(Point((("lr", 1e-7),), rung=0), rung).optimizer.train_iters == 30
    assert sweep.steps_of(Point((("lr", 1e-7),), rung=1), 90) is None


def test_a_journal_hands_out_each_trial_once_and_takes_up_what_was_left(tmp_path):
    pytest.importorskip("optuna", reason="the extra [sweep] is not installed")
    points = grid(parse_axes(["lr=5e-7,1e-6", "loss_type=sigmoid,hinge", "seed=1,2"]))
    first, second = Journal(tmp_path, {"beta": 2.0}), Journal(tmp_path, {"beta": 2.0})
    one, other = first.take(points), second.take(points)
    assert (one.point, other.point) == (points[0], points[1]), "two processes share"
    first.tell(one, Outcome("done", accuracy=0.75))
    second.tell(other, Outcome("diverged", "loss: found nan"))
    third = first.take(points)
    assert third.point == points[2]
    third.held.release()  # As when its process is killed.
    again = Journal(tmp_path, {})
    taken = again.take(points)
    assert (taken.point, taken.number) == (points[2], third.number)
    assert again.outcomes() == {
        points[0]: Outcome("done", accuracy=0.75),
        points[1]: Outcome("diverged", "loss: found nan"),
    }
    assert read_outcome(tmp_path / points[1].folder) == Outcome("diverged", "loss: found nan")
    # A wider grid of the same sweep, also where an axis gets values beyond the old ones.
    wider = grid(parse_axes(["lr=1e-7,5e-7,1e-6,1e-5", "loss_type=sigmoid,hinge", "seed=1,2,9"]))
    left = []
    while (claim := Journal(tmp_path, {}).take(wider)) is not None:
        again.tell(claim, Outcome("done", accuracy=0.5))
        left.append(claim.point)
    assert set(left) == set(wider) - {points[0], points[1], points[2]}

    import optuna

    study = again._study
    assert study.best_value == 0.75 and study.best_params == {"lr": 5e-7, "loss_type": "sigmoid", "seed": 1}
    states = [trial.state for trial in study.trials]
    assert states.count(optuna.trial.TrialState.COMPLETE) == len(wider) - 2
    assert states.count(optuna.trial.TrialState.RUNNING) == 1


def test_trials_of_other_settings_are_not_mixed(tmp_path):
    pytest.importorskip("optuna", reason="the extra [sweep] is not installed")
    first = read_sweep([*BASE, "--train-iters", "9"], ["lr=1e-6,1e-7"])
    assert {"beta", "train_iters", "model", "max_length"} <= first.settings.keys() and "lr" not in first.settings
    Journal(tmp_path, first.settings)
    # The layout is not among them, and a new axis takes its option out.
    Journal(tmp_path, read_sweep([*BASE, "--train-iters", "9", "--tp", "2"], ["lr=1e-8", "beta=1,2"]).settings)
    with pytest.raises(ConfigError, match="other settings .train_iters 9 before, 8 now., expected the same"):
        Journal(tmp_path, read_sweep([*BASE, "--train-iters", "8"], ["lr=1e-6,1e-7"]).settings)


def test_a_trial_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "trial.json").write_text(json.dumps({"status": "done", "odd": 1}))
    with pytest.raises(ConfigError, match=r"trial.json: cannot be read .*start the sweep in another folder"):
        read_outcome(tmp_path)
