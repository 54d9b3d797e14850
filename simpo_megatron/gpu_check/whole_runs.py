"""Whole runs as a user starts them: the demo and its export, a resume, and runs that end early."""

from __future__ import annotations

from dataclasses import replace

import torch

from simpo_megatron.data import PairOptions, build_preference_dataset, load_tokenizer
from simpo_megatron.demo import prepare_demo
from simpo_megatron.gpu_check.large_model import model_options
from simpo_megatron.gpu_check.user_runs import SmallRun, last_line, records, train, train_side_by_side
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict

EXPORT_BUDGET = 2e-3
"""Nats per token between the trainer and transformers, both in fp32 on the device."""
_LOGPS = "eval/logps/chosen"


def check_demo(setting: CheckSetting) -> Verdict:
    """Checks that the demo learns, and that transformers computes the trainer's log-probs from its export."""
    folder, export = setting.folder / "demo", setting.folder / "demo_hf"
    options = ("--train-iters", str(setting.size(40, 3)), "--export-hf", str(export), "--export-dtype", "stored")
    done = train(setting, SmallRun(folder, options))
    if done.returncode:
        return Verdict.of(False, f"exit code {done.returncode}: {last_line(done)}", "0")
    evaluations = [record for record in records(folder) if _LOGPS in record]
    before, after = (evaluation["eval/rewards/accuracies"] for evaluation in (evaluations[0], evaluations[-1]))
    found = _exported_log_probs(setting, str(export))
    error = abs(found - evaluations[-1][_LOGPS])
    holds = (setting.rehearse or after > before + 0.2) and error <= EXPORT_BUDGET
    value = f"accuracy {before:.1%} to {after:.1%}, the export's log-probs off by {error:.1g}"
    return Verdict.of(
        holds, value, f"20 points more, {EXPORT_BUDGET:g} nats", files=sorted(p.name for p in export.iterdir())
    )


def _exported_log_probs(setting: CheckSetting, export: str) -> float:
    """Mean over the bundled validation pairs of the chosen response's average log-prob, by transformers."""
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    model.to(setting.device)
    pairs = build_preference_dataset(
        [str(prepare_demo(setting.folder / "cache" / "demo").valid_file)],
        load_tokenizer(export),
        PairOptions(max_length=512, max_prompt_length=384),
        setting.folder / "cache" / "check",
    )
    averages = []
    with torch.no_grad():
        for index in range(len(pairs)):
            pair = pairs[index]
            ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]], device=setting.device)
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            averages.append(float(logps[len(pair.prompt_ids) - 1 :].mean()))
    return sum(averages) / len(averages)


def _small(setting: CheckSetting) -> tuple[str, ...]:
    """Options of a run on the demo's model and pairs, without validation."""
    demo = prepare_demo(setting.folder / "cache" / "demo")
    pairs = ("--data", str(demo.train_file), "--max-length", "512", "--max-prompt-length", "384")
    return ("--model", str(demo.model_dir), *pairs, "--global-batch-size", "8")


def check_resume(setting: CheckSetting) -> Verdict:
    """Checks that a run that was stopped and resumed ends bit for bit like one without a stop."""
    straight, stopped = setting.folder / "straight", setting.folder / "stopped"
    common = (*_small(setting), "--train-iters", "4", "--save-interval", "4", "--log-interval", "1")
    common += ("--deterministic", "--resume", "latest", "--export-hf")
    without_a_stop = SmallRun(straight, (*common, str(setting.folder / "straight_hf")), compiles=False)
    resumed = SmallRun(stopped, (*common, str(setting.folder / "stopped_hf")), compiles=False)
    ends = train_side_by_side(setting, without_a_stop, replace(resumed, fault="step@3:0:sigterm"))
    ends.append(train(setting, resumed))
    codes = [end.returncode for end in ends]
    if codes != [0, 75, 0]:
        said = next(last_line(end) for end, code in zip(ends, (0, 75, 0), strict=True) if end.returncode != code)
        return Verdict.of(False, f"exit codes {codes}: {said}", "0, 75, 0")
    one, other = ([r for r in records(folder) if "grad_norm" in r][-1] for folder in (straight, stopped))
    difference = max(abs(one[key] - other[key]) for key in ("loss", "grad_norm", "rewards/margins"))
    value = f"step {other['iteration']}: loss, gradient norm and margin off by {difference:g}"
    return Verdict.of(difference == 0 and other["iteration"] == 4, value, "0 with --deterministic")


def check_ends(setting: CheckSetting) -> Verdict:
    """Checks the exit codes of a NaN and of too little memory; `check_resume` has that of a signal."""
    steps = (*_small(setting), "--train-iters", "2")
    nan = train(setting, SmallRun(setting.folder / "nan", steps, fault="backward@2:0:nan", compiles=False))
    found, expected = {"NaN": nan.returncode}, {"NaN": 5}
    if not setting.rehearse:
        # All pairs in one pack: a terabyte of activations, which the probe before step 1 cannot allocate.
        huge = (*model_options(setting), "--global-batch-size", "768", "--tokens-per-microbatch", "10000000")
        found["memory"] = train(setting, SmallRun(setting.folder / "memory", huge, compiles=False)).returncode
        expected["memory"] = 2
    value = ", ".join(f"{name} {code}" for name, code in found.items())
    return Verdict.of(found == expected, value, ", ".join(f"{name} {code}" for name, code in expected.items()))
