"""Files of a run, a sweep, an evaluation and of pairs, mutated at random: each is read, or refused in bounded time."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mutated_files import (
    NUM_MUTATIONS,
    SEED,
    mutated_bytes,
    mutated_file,
    mutated_json,
    odd_places,
    removed,
    try_mutations,
    write_model,
)

from simpo_megatron.config import config_from
from simpo_megatron.errors import SimPOError
from simpo_megatron.generation.answering import Decoding
from simpo_megatron.generation.pairing import Pairing, make_pairs
from simpo_megatron.generation.prompts import read_prompts
from simpo_megatron.generation.scoring import ScoresOfFile
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.parallel import alone

cpu_patches.install()

from simpo_megatron.checkpoint import manifest, retention  # noqa: E402
from simpo_megatron.evaluation.evaluated import EvaluatedModel, read_evaluated  # noqa: E402
from simpo_megatron.evaluation.leaderboard import write_leaderboard  # noqa: E402
from simpo_megatron.offline.convert import _card, to_mcore  # noqa: E402
from simpo_megatron.offline.weights import MegatronWeights, open_weights  # noqa: E402
from simpo_megatron.reporting import run_report  # noqa: E402
from simpo_megatron.reporting.continuations import read_samples  # noqa: E402
from simpo_megatron.reporting.loggers import JsonLines  # noqa: E402
from simpo_megatron.reporting.validation_pairs import VALIDATION_PAIRS_FILE, read_validation_pairs  # noqa: E402
from simpo_megatron.sweep.journal import JOURNAL_FILE, Journal, Outcome, read_outcome  # noqa: E402
from simpo_megatron.sweep.points import grid, parse_axes  # noqa: E402
from simpo_megatron.training.monitors import Monitors  # noqa: E402
from simpo_megatron.training.saving import Start  # noqa: E402
from simpo_megatron.training.saving.monitor_memory import check_remembered  # noqa: E402
from simpo_megatron.training.saving.resume import _refuse_changes, _with_present_fingerprints  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """A checkpoint of a run, as far as its COMMIT.json says so."""
    root = tmp_path_factory.mktemp("checkpoint") / "converted"
    with alone() as groups:
        to_mcore(open_weights(model, groups), root, groups)
        yield root / "release", groups


FACTS = {
    "model": {"family": "llama", "base_model": "sha256:ab"},
    "consumed_pairs": 8, "epoch": 0.5, "layout": {"tensor": 1, "world": 1},
    "inputs": {"data": "ab", "num_pairs": 8, "reference_model": "sha256:ab"},
    "precision": {"bf16": True}, "training": {"lr": 1e-6}, "versions": {"torch": "2"},
    "metrics": {"loss": 0.5, "eval/rewards/accuracies": 0.5},
    "config": {"lr": 1e-6, "beta": 2.0, "train_iters": 5, "data": ["a"], "model": "m", "bf16": True},
    "monitors": {"loss": [0.5, 0.6], "told": ["loss_spike"], "num_skipped_steps": 0,
                 "start": {"chosen": -1.0, "pairs": "ab", "repetition": 0.5}},
}  # fmt: skip


def test_the_record_of_a_checkpoint(checkpoint, model, tmp_path):
    folder, groups = checkpoint
    valid = SimpleNamespace(fingerprint="ab")
    job = SimpleNamespace(plan=SimpleNamespace(sources=SimpleNamespace(model=model)), valid_data={"": valid})
    config = config_from(model="m", max_displacement=0.5)
    path = folder / manifest.RECORD_FILE
    record = json.loads(path.read_bytes()) | {"facts": FACTS}
    del record["sha256"]
    content = json.dumps(record).encode()

    def write(mutated):
        try:
            found = json.loads(mutated)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            # Sealed anew, for otherwise its own hash would refuse all.
            mutated = json.dumps({**found, "sha256": manifest._hash_of(found)}).encode()
        path.write_bytes(mutated)

    def resume():
        found = manifest.read(folder)
        saved = replace(found, facts=_with_present_fingerprints(found.facts, FACTS, job))
        _refuse_changes(saved, FACTS, override=False)

    def go_on_watching():
        remembered = manifest.read(folder).facts.get("monitors", {})
        check_remembered(remembered, folder)
        watching = Monitors(config, job, Start(monitors=remembered))
        watching.step(1, {"loss": 0.5, "rewards/saturated": 0.5}, 8)
        watching.evaluation(1, {"eval/logps/chosen": -1.0})

    def read():
        retention.last_and_best(folder.parent)
        refused = None
        for reader in (resume, go_on_watching, lambda: _card(MegatronWeights(folder, groups), tmp_path, None)):
            try:
                reader()
            except SimPOError as error:
                refused = error
        if refused is not None:
            raise refused

    write(content)
    read()
    try_mutations("COMMIT.json", lambda n: mutated_file(content, n), write, read)


def test_the_metrics_of_a_run(tmp_path, monkeypatch):
    lines = [
        {"iteration": step, "loss": 1.0 / (1 + step), "rewards/margins": 0.1 * step, "rewards/accuracies": 0.5,
         "learning_rate": 1e-6, "pairs_per_second": 3.0, "pair_ids": [1, 2]}
        for step in range(1, 6)
    ]  # fmt: skip
    lines += [
        {"iteration": step, "eval/rewards/accuracies": 0.5, "eval/rewards/margins": 0.5, "eval/num_pairs": 4,
         "eval/b/loss": 1.0}
        for step in (0, 5)
    ]  # fmt: skip
    (tmp_path / "config.yaml").write_text("model: m\ndata: [a]\nlr: 1e-6\n")
    path = tmp_path / "metrics.jsonl"
    if NUM_MUTATIONS > 100:  # a picture takes half a second
        draw = run_report.draw_curves
        drawn = random.Random(SEED)
        (tmp_path / "loss.png").write_bytes(b"")
        monkeypatch.setattr(
            run_report, "draw_curves", lambda c, o, path: draw(c, o, path) if not drawn.randrange(20) else path.touch()
        )

    def mutate(numbers):
        if numbers.randrange(3) == 0:
            return mutated_bytes("".join(json.dumps(line) + "\n" for line in lines).encode(), numbers)
        mutated = mutated_json(lines, numbers)
        mutated = mutated if isinstance(mutated, list) else [mutated]
        return "".join(json.dumps(line) + "\n" for line in mutated).encode()

    try_mutations("metrics.jsonl", mutate, path.write_bytes, lambda: run_report.write_report(tmp_path))


def test_what_a_run_and_an_evaluation_keep(tmp_path):
    """Pages and tables are made of these files."""
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    facts = {"mean_characters": 10.0, "mean_tokens": 3.0, "cut": 0.0, "repetition": 0.0}
    score = {
        "benchmark": "mt-bench", "judge": "j", "model": "m", "metrics": {"score": metric}, "answers": facts,
        "baseline_characters": 5.0, "num_questions": 80, "num_missing": 0, "not_comparable": ["few"], "package": "p",
    }  # fmt: skip
    kept = {"settings": {"benchmark": "mt-bench", "name": "m", "questions": "q", "judge": "j", "max_new_tokens": 9}}
    evaluated = EvaluatedModel(tmp_path, "mt-bench", "m", tmp_path / "q")
    files = {
        "samples.json": ({"prompts": ["a"], "before": ["b"], "after": ["c"], "iteration": 3}, read_samples),
        "trial.json": ({"status": "done", "why": "", "accuracy": 0.5}, read_outcome),
        "evaluation.json": (kept, lambda folder: read_evaluated(folder, "mt-bench")),
        "judge-j.json": (kept, lambda folder: evaluated.judges()),
        "generation.json": (kept, lambda folder: evaluated.decoding()),
        "score-j.json": (score, lambda folder: list(write_leaderboard([folder], tmp_path / "page.html"))),
    }
    for name, (content, read) in files.items():
        path, whole = tmp_path / name, json.dumps(content).encode()
        path.write_bytes(whole)
        assert read(tmp_path)
        try_mutations(
            name, lambda n, whole=whole: mutated_file(whole, n), path.write_bytes, lambda read=read: read(tmp_path)
        )
        path.unlink()


def test_the_validation_pairs_of_a_run(tmp_path):
    path = tmp_path / VALIDATION_PAIRS_FILE
    arrays = {"fingerprint": np.array("ab"), "lengths": np.ones((3, 2), np.int32), "iteration": np.array(4),
              "before": np.zeros((3, 2), np.float32), "after": np.zeros((3, 2), np.float32)}  # fmt: skip
    np.savez(path, **arrays)
    whole = path.read_bytes()
    odd = [np.array("x"), np.ones((3, 2)), np.ones(3), np.ones((9, 2), np.float32), np.array([1, 2]), np.array(3j)]

    def mutate(numbers):
        if numbers.randrange(2):
            return mutated_bytes(whole, numbers)
        np.savez(path, **{**arrays, numbers.choice(sorted(arrays)): numbers.choice(odd)})
        return path.read_bytes()

    assert len(read_validation_pairs(tmp_path).after) == 3
    try_mutations(path.name, mutate, path.write_bytes, lambda: read_validation_pairs(tmp_path))


def test_the_journal_of_a_sweep(tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed: pip install simpo-megatron[sweep]")
    points = grid(parse_axes(["lr=1e-3,2e-3"]))
    journal = Journal(tmp_path, {"beta": 2.0})
    journal.tell(journal.take(points), Outcome("done", accuracy=0.75))
    path = tmp_path / JOURNAL_FILE
    lines = path.read_bytes().splitlines(keepends=True)

    def mutate(numbers):
        changed = list(lines)
        odd = numbers.randrange(len(lines))
        changed[odd] = mutated_file(lines[odd], numbers) + b"\n"
        return b"".join(changed)

    try_mutations(path.name, mutate, path.write_bytes, lambda: Journal(tmp_path, {"beta": 2.0}).outcomes())


def of_lines(rows, numbers):
    """JSON Lines of `rows`, one of them mutated."""
    lines = [json.dumps(row).encode() for row in rows]
    odd = numbers.randrange(len(rows))
    lines[odd] = mutated_file(lines[odd], numbers)
    return b"\n".join(lines) + b"\n"


def test_prompts_answers_and_scores(tmp_path):
    """Whoever makes pairs of another's answers reads these."""
    turn = {"role": "user", "content": "Which way?"}
    prompts = [{"id": f"p{n}", "messages": [turn], "category": "math"} for n in range(4)]
    prompts.append({"question_id": 9, "turns": ["Which way?", "Why?"], "category": "math"})
    answers = [
        {"id": f"p{n // 2}", "sample": n % 2, "messages": [turn, {"role": "assistant", "content": f"North {n}."}],
         "answers": [f"North {n}."], "is_cut": False, "num_tokens": 3}
        for n in range(6)
    ]  # fmt: skip
    scores = [{"id": row["id"], "sample": row["sample"], "score": 0.5 * row["sample"]} for row in answers]
    decoding = Decoding(temperatures={"math": 0.5})

    def read_both():
        for item in read_prompts(tmp_path / "prompts.jsonl"):
            decoding.temperature_of(item)

    def pair():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        list(make_pairs(ScoresOfFile(tmp_path / "given.jsonl"), tmp_path, tmp_path / "out", Pairing()))

    whole = {"prompts.jsonl": prompts, "answers.jsonl": answers, "given.jsonl": scores}
    for name, rows in whole.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_both()
    pair()
    for name, rows in whole.items():
        path, read = tmp_path / name, read_both if name == "prompts.jsonl" else pair
        content = path.read_bytes()
        try_mutations(name, lambda n, rows=rows: of_lines(rows, n), path.write_bytes, read)
        path.write_bytes(content)
    record = {"settings": {"engine": "transformers"}, "answers": {}}
    path = tmp_path / "generation.json"
    try_mutations(path.name, lambda n: mutated_file(json.dumps(record).encode(), n), path.write_bytes, pair)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "loss.png", "report.html"])
def test_what_is_no_file_in_a_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, "draw_curves", lambda curves, config, path: path.write_bytes(b""))
    whole = {
        "metrics.jsonl": json.dumps({"iteration": 1, "loss": 1.0, "rewards/margins": 0.1, "rewards/accuracies": 0.5}),
        "config.yaml": "model: m\ndata: [a]\n",
    }
    for kind, put in odd_places(tmp_path / name).items():
        for other, text in whole.items():
            removed(tmp_path / other)
            (tmp_path / other).write_text(text)
        removed(tmp_path / name)
        put()
        if name not in whole and kind != "a folder":
            run_report.write_report(tmp_path)  # written in its place
            continue
        if name == "config.yaml" and kind == "nothing in it":
            continue
        with pytest.raises(SimPOError, match=f"{name}|report cannot be written"):
            run_report.write_report(tmp_path)
        if name == "metrics.jsonl" and kind not in ("a terabyte", "nothing in it", "a link to nothing"):
            lines = JsonLines(tmp_path / name)
            with pytest.raises(OSError):
                lines.write({"iteration": 2})
