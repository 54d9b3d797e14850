"""The report tells what the metrics say, whatever state a run was left in."""

import json
import re
import struct

import pytest

from simpo_megatron.commands.report import main
from simpo_megatron.config import config_from, to_yaml
from simpo_megatron.errors import ConfigError
from simpo_megatron.reporting.continuations import keep_samples, read_samples
from simpo_megatron.reporting.run_report import read_curves, write_report


def write_run(folder, lines, **options):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(to_yaml(config_from(**({"model": "m", "data": ("d",)} | options))))
    return folder


def step(iteration, **metrics):
    numbers = {"loss": 1 / iteration, "rewards/margins": iteration * 0.1, "rewards/accuracies": 0.5}
    return {"iteration": iteration, **numbers, "pairs_per_second": 10.0 * iteration} | metrics


def evaluation(iteration, accuracy, margin):
    numbers = {"loss": 0.7, "rewards/accuracies": accuracy, "rewards/margins": margin, "logps/chosen": -1.5}
    return {"iteration": iteration, **{f"eval/{name}": value for name, value in numbers.items()}}


def test_a_report_says_before_and_after_and_stands_alone(tmp_path):
    lines = [evaluation(0, 0.45, -0.02), *(step(i) for i in range(1, 31)), evaluation(30, 0.875, 1.25)]
    report = write_report(write_run(tmp_path / "run", lines, export_hf="out/hf", beta=2.5))
    page = report.page.read_text()
    assert report.headline.startswith("On validation pairs, accuracy went from 45.0% to 87.5%")
    assert report.headline in page.replace("&#x27;", "'")
    row = re.search(r"<tr><td>reward margin</td>.*", page).group()
    assert ">-0.020<" in row and ">+1.250<" in row
    assert "out/hf" in page and "beta: 2.5" in page and "gamma 1.25" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"


def test_the_headline_says_how_far_an_accuracy_of_so_few_pairs_can_be_trusted(tmp_path):
    lines = [evaluation(i, accuracy, 0.0) | {"eval/num_pairs": 100} for i, accuracy in ((0, 0.5), (3, 0.8))]
    report = write_report(write_run(tmp_path / "run", lines))
    assert report.headline.startswith(
        "On 100 validation pairs, accuracy went from 50.0% to 80.0% (standard error 4.0%)"
    )


@pytest.mark.parametrize(("accuracy", "said"), [(1.0, "100.0%"), (0.0, "0.0%")])
def test_none_and_all_of_the_pairs_have_a_standard_error_too(tmp_path, accuracy, said):
    lines = [evaluation(i, a, 0.0) | {"eval/num_pairs": 24} for i, a in ((0, 0.5), (3, accuracy))]
    headline = write_report(write_run(tmp_path / "run", lines)).headline
    assert f"to {said} (standard error 2.0%)" in headline, "half of Wilson's interval of one standard deviation: 1/50"


def test_a_policy_that_is_its_own_reference_has_no_accuracy(tmp_path):
    first = evaluation(0, 0.0, 0.0)
    del first["eval/rewards/accuracies"]
    report = write_report(write_run(tmp_path / "run", [first, step(1), evaluation(1, 1.0, 0.5)]))
    assert "accuracy is 100.0%; before training, when the policy is the reference, it is n/a" in report.headline
    assert "0.0% to" not in report.headline and "from +0.000 to +0.500" in report.headline
    page = report.page.read_text()
    assert re.search(r"<tr><td>accuracy</td><td[^>]*>n/a</td><td[^>]*>100.0%</td>", page)


def test_without_a_second_evaluation_the_headline_is_of_the_training_batches(tmp_path):
    steps = [step(i, **{"loss": 2.0 - i / 20, "rewards/accuracies": i / 20}) for i in range(1, 21)]
    told = "; on training batches, the loss went from 1.9250 to 1.0250 and accuracy from 7.5% to 97.5%."
    for lines, why in ((steps, "No validation pairs were evaluated"), ([evaluation(0, 0.5, 0.0), *steps], "only once")):
        headline = write_report(write_run(tmp_path / "run", lines)).headline
        assert headline.endswith(why + told)


def test_what_the_monitors_saw_of_validation_pairs_stands_beside_it(tmp_path):
    lines = [evaluation(i, 0.5, 0.0) | {"eval/repetition": i / 8, "eval/rewards/saturated": 0.0} for i in (0, 3)]
    page = write_report(write_run(tmp_path / "run", lines)).page.read_text()
    assert re.search(r"<tr><td>repetition</td><td[^>]*>0.0%</td><td[^>]*>37.5%</td>", page)
    assert "<td>saturated</td>" in page and "<td>length correlation</td>" not in page


def test_every_named_set_has_a_row_of_its_own(tmp_path):
    def named(iteration, accuracy):
        return {f"eval/{name}/rewards/accuracies": a for name, a in (("help", accuracy), ("harm<less", 1 - accuracy))}

    lines = [evaluation(0, 0.25, 0.0) | named(0, 0.25), step(1), evaluation(1, 0.5, 1.0) | named(1, 0.625)]
    report = write_report(write_run(tmp_path / "run", lines))
    page = report.page.read_text()
    assert "validation pairs help, accuracy went from 25.0% to 50.0%" in report.headline, "of the first set"
    assert re.search(r"<tr><td>help</td><td[^>]*>25.0% &rarr; 62.5%</td>", page)
    assert re.search(r"<tr><td>harm&lt;less</td><td[^>]*>75.0% &rarr; 37.5%</td><td[^>]*>-</td>", page)
    assert set(read_curves(tmp_path / "run/metrics.jsonl").training) == {*step(1)}


def test_metrics_of_an_earlier_version_and_of_this_one_are_the_same_curves(tmp_path):
    def named(prefix, accuracy):
        return {f"{prefix}/{name}/rewards/accuracies": accuracy for name in ("help", "rewards")}

    earlier = evaluation(0, 0.25, 0.0) | named("valid", 0.25)
    lines = [earlier, step(1), evaluation(1, 0.5, 1.0) | named("valid", 0.5) | {"eval/help/loss": 2.0}]
    resumed = evaluation(2, 0.75, 1.0) | {"eval/help/rewards/accuracies": 0.75}
    curves = read_curves(write_run(tmp_path / "run", [*lines, resumed]) / "metrics.jsonl")
    assert curves.named["help"]["rewards/accuracies"] == [(0, 0.25), (1, 0.5), (2, 0.75)]
    assert curves.named["help"]["loss"] == [(1, 2.0)]
    assert curves.named["rewards"]["rewards/accuracies"] == [(0, 0.25), (1, 0.5)], "a name it allowed"
    assert curves.validation["rewards/accuracies"] == [(0, 0.25), (1, 0.5), (2, 0.75)]
    assert set(curves.training) == {*step(1)}


def test_samples_stand_beside_each_other(tmp_path):
    lines = [evaluation(0, 0.5, 0.0), step(1), evaluation(1, 0.6, 0.1)]
    folder = write_run(tmp_path / "run", lines)
    assert "Samples" not in write_report(folder).page.read_text()
    keep_samples(folder, 0, ["<b>Ask</b>", "two"], ["first said", "x"])
    keep_samples(folder, 4, ["<b>Ask</b>", "two"], ["now said \ud800", "y"])
    page = write_report(folder).page.read_text()
    assert "before training and after step 4" in page and "&lt;b&gt;Ask&lt;/b&gt;" in page
    assert page.index("<td>first said</td>") < page.index("<td>now said")
    # A run that goes on with other prompts has nothing to set them beside.
    keep_samples(folder, 8, ["other"], ["z"])
    assert read_samples(folder).before is None and "before training and" not in write_report(folder).page.read_text()
    for damaged in ("{", "[]", '{"prompts": ["a"], "before": null, "after": [], "iteration": 1}'):
        (folder / "samples.json").write_text(damaged)
        assert read_samples(folder) is None and "Samples" not in write_report(folder).page.read_text()


def test_the_picture_is_a_png_of_the_promised_size(tmp_path):
    report = write_report(write_run(tmp_path / "run", [step(i) for i in range(1, 31)]))
    content = report.picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1800, 600)
    assert len(set(content)) > 200, "not a blank picture"


def test_two_runs_give_two_pictures(tmp_path):
    falling = write_report(write_run(tmp_path / "a", [step(i) for i in range(1, 31)])).picture
    rising = write_report(write_run(tmp_path / "b", [step(i, loss=i) for i in range(1, 31)])).picture
    again = write_report(tmp_path / "a").picture
    assert falling.read_bytes() == again.read_bytes() != rising.read_bytes()


@pytest.mark.parametrize(
    "lines",
    [
        [step(1)],
        [evaluation(0, 0.5, 0.0)],
        [step(i, loss="nan") for i in range(1, 31)],
        [step(i, loss="inf") for i in range(1, 31)],
    ],
)
def test_a_run_that_did_not_get_far_still_has_a_report(tmp_path, lines):
    report = write_report(write_run(tmp_path / "run", lines))
    assert report.headline.startswith(
        ("No validation pairs were evaluated", "Validation pairs were evaluated only once")
    )
    assert report.picture.stat().st_size > 1000 and "Curves" in report.page.read_text()


def test_names_from_the_configuration_are_text_and_not_markup(tmp_path):
    report = write_report(write_run(tmp_path / "run", [step(1)], model="<script>alert(1)</script>"))
    assert "<script>" not in report.page.read_text()
    assert "&lt;script&gt;" in report.page.read_text()


def test_a_step_done_again_after_a_resume_counts_once_and_last(tmp_path):
    lines = [step(1), step(2, loss=9.0), step(3, loss=9.0), step(2, loss=0.2), step(3, loss=0.1)]
    curves = read_curves(write_run(tmp_path / "run", lines) / "metrics.jsonl")
    assert curves.training["loss"] == [(1, 1.0), (2, 0.2), (3, 0.1)]
    assert curves.validation == {}


def test_half_a_line_left_by_a_kill_is_passed_over(tmp_path):
    path = write_run(tmp_path / "run", [step(1)]) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 2, "lo\n' + json.dumps(step(3)) + "\n[1]\n7\n{}\n")
    assert [iteration for iteration, _ in read_curves(path).training["loss"]] == [1, 3]


def test_text_and_switches_in_a_record_are_no_curves(tmp_path):
    path = write_run(tmp_path / "run", [step(1, pair_ids="abc", done=True)]) / "metrics.jsonl"
    assert {"pair_ids", "done"}.isdisjoint(read_curves(path).training)


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be read"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl: found no record"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1)))
    with pytest.raises(ConfigError, match=r"found no config.yaml"):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 2 and "found no config.yaml" in capsys.readouterr().err


def test_the_command_prints_the_result_and_where_it_lies(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [evaluation(0, 0.5, 0.0), step(1), evaluation(1, 0.75, 0.5)])
    assert main([str(folder)]) == 0
    headline, page, picture = capsys.readouterr().out.splitlines()
    assert "50.0% to 75.0%" in headline and page.endswith("run/report.html") and picture.endswith("run/loss.png")
