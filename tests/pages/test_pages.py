"""Every page of ours in headless Chromium, at two widths: no error, nothing cut or overlapping, tables that sort.

Needs Chromium on the PATH, which `make test-pages` installs where it may.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from simpo_megatron.commands import evaluate, inspect
from simpo_megatron.config import config_from, to_yaml
from simpo_megatron.reporting.continuations import keep_samples
from simpo_megatron.reporting.run_report import write_report
from simpo_megatron.reporting.validation_pairs import ValidationPairs
from simpo_megatron.sweep.comparison import compare
from simpo_megatron.sweep.evidence import Evidence
from simpo_megatron.sweep.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1200, 800)
LONG = "a_name_that_somebody_really_gave_to_a_folder_on_a_shared_file_system/" * 3
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; make test-pages installs it"),
]


def found_in(pages: dict[str, str], folder: Path) -> list[str]:
    """The lines that check_pages.js has to say of `pages`."""
    script = Path(__file__).with_name("check_pages.js").read_text()
    data = json.dumps(pages).replace("</", "<\\/")
    # Said before it begins, so that silence is not taken for success.
    run = f"checkPages({data}, {list(WIDTHS)}).then(found => out.textContent = JSON.stringify(found))"
    run += ".catch(error => out.textContent = JSON.stringify([String(error.stack)]))"
    harness = folder / "harness.html"
    body = f'<pre id="out">nothing</pre><script>{script}; const out = document.getElementById("out"); {run};</script>'
    harness.write_text(f'<!doctype html><meta charset="utf-8"><body>{body}', encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"]
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=60000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, harness.as_uri()], capture_output=True, text=True, timeout=120)
    said = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert said and said[1] != "nothing", done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(said[1]))


def run_page(folder: Path) -> str:
    folder.mkdir()
    options = {"model": LONG, "data": (LONG,), "export_hf": LONG, "beta": 2.5}
    lines = [
        {"iteration": number, "loss": 1 / (number + 1), "rewards/margins": 0.1 * number, "rewards/accuracies": 0.5}
        for number in range(1, 40)
    ]
    for iteration in (0, 39):
        numbers = {
            "loss": 0.7,
            "rewards/accuracies": 0.4,
            "rewards/margins": 0.1,
            "logps/chosen": -1.5,
            "num_pairs": 96,
        }
        named = {
            f"eval/{name}/{metric}": value for name in ("helpful", "harmless") for metric, value in numbers.items()
        }
        lines.append({"iteration": iteration, **{f"eval/{name}": value for name, value in numbers.items()}, **named})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(to_yaml(config_from(**options)))
    prompts = [f"<|user|>{LONG}<|end|>\n<|assistant|>", "Name a bird."]
    for iteration, samples in ((0, [LONG * 4, "word " * 60]), (39, ["A wren.\n" * 5, "x" * 300])):
        keep_samples(folder, iteration, prompts, samples)
    return write_report(folder).page.read_text()


def sweep_page() -> str:
    draw = np.random.default_rng(0)
    runs, options = {}, {}
    for number, (rate, beta) in enumerate([(1e-7, 2.0), (1e-7, 10.0), (1e-6, 2.0), (1e-6, 10.0), (5e-6, 2.0)]):
        before, after = (draw.normal(-1 - 0.4 * late * number, 0.3, (200, 2)).astype(np.float32) for late in (0, 1))
        lengths = draw.integers(1, 50, (200, 2)).astype(np.int32)
        name = f"lr={rate:g},beta={beta:g},gamma_beta_ratio=0.5,length_normalization=none"
        config = config_from(model="m", data=("d",), lr=rate, beta=beta)
        pairs = ValidationPairs("a", lengths, before, after, 8)
        options[name] = {"lr": rate, "beta": beta, "objective": "simpo"}
        runs[name] = (Evidence(Path("runs") / name, config, pairs, (0.1, 0.12 + number / 20)),) * 2
    found = compare(
        runs, options=options, failed={"lr=1e-5,beta=2": "seed=1 diverged: the loss is not finite at step 12, " + LONG}
    )
    axes = {
        "lr": (1e-7, 1e-6, 5e-6),
        "beta": (2.0, 10.0),
        "gamma_beta_ratio": (0.1, 0.5),
        "objective": ("simpo", "dpo"),
    }
    return page(found, title=f"Sweep {LONG}", axes=axes, earlier={"Round 1 of 2: 30 steps each": found})


def data_page(folder: Path) -> str:
    path = folder / "data.html"
    assert inspect.main(["--model", "demo", "--data", "demo", "--show", "3", "--html", str(path)]) == 0
    return path.read_text()


def leaderboard_page(folder: Path) -> str:
    folders = []
    for number in range(14):
        folders.append(folder / f"m{number}")
        folders[-1].mkdir(parents=True)
        is_arena = number % 3 == 0
        metrics = {
            "length-controlled win rate": {"value": 44.7 - number, "error": 0.88},
            "win rate": {"value": 9.5 * number % 60, "low": 1.0, "high": 60.0},
        }
        score = {
            "benchmark": "arena-hard" if is_arena else "alpaca-eval",
            "model": f"{number}-{LONG[: 10 * number]}",
            "judge": LONG[:60],
            "package": "made up",
            "metrics": dict(list(metrics.items())[is_arena:]),
            "num_questions": 805,
            "num_missing": number,
            "answers": {"mean_characters": 997.0 * number, "mean_tokens": 400.0, "cut": 0.01, "repetition": 0.02},
            "baseline_characters": 2049.0,
            "not_comparable": [f"the judge is {LONG}, theirs is gpt-4"] if number % 5 == 0 else [],
            "notes": [],
        }
        (folders[-1] / "score-x.json").write_text(json.dumps(score))
    path = folder / "leaderboard.html"
    assert evaluate.main(["leaderboard", *map(str, folders), "--page", str(path)]) == 0
    return path.read_text()


def test_nothing_is_wrong_with_any_page(tmp_path):
    pages = {
        "report": run_page(tmp_path / "run"),
        "sweep": sweep_page(),
        "inspect": data_page(tmp_path),
        "leaderboard": leaderboard_page(tmp_path / "board"),
    }
    found = found_in(pages, tmp_path)
    assert not found, "\n".join(found)


def test_an_axis_that_no_setting_has_gets_no_map():
    """Such an axis is gamma_beta_ratio when all finished trials have another objective."""
    assert sweep_page().count('alt="accuracy by') == 2 * 3, "of two rounds"


def test_what_is_wrong_is_seen(tmp_path):
    """The check finds each fault that was put into a page."""
    page = """<!doctype html><html><meta charset="utf-8"><body>
<p style="width: 3000px">wide</p><p style="width: 30px; overflow: hidden">a_long_word_that_is_cut</p>
<h2 style="position: absolute; left: 0; top: 0">one</h2><h3 style="position: absolute; left: 0; top: 0">other</h3>
<img src="data:image/png;base64,AAAA" alt="curves"><table class="sortable"><thead>
<tr><th class="number" style="display: block; width: 20px; overflow-wrap: anywhere">a_long_column</th></tr></thead>
<tbody><tr><td>2</td></tr><tr><td>1</td></tr></tbody></table>
<script>console.error("oh"); undefinedName();</script>"""
    found = "\n".join(found_in({"bad": page}, tmp_path))
    for said in (
        "wide",
        "is cut",
        "overlap",
        "not there",
        'no more than "curves"',
        "not ascending",
        "oh",
        "undefinedName",
        "is squeezed",
    ):
        assert said in found, said
    assert "by the keyboard" in found and "reaches beyond the page" in found
