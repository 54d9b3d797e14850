"""Whole runs as a user starts them: the demo and its export, a resume, and what ends a run early."""

from __future__ import annotations

import torch

from simpo_megatron.data import PairOptions, build_preference_dataset, load_tokenizer
from simpo_megatron.gpu_check.large_model import model_options
from simpo_megatron.gpu_check.user_runs import last_line, records, train
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict

EXPORT_BUDGET = 2e-3
"""Nats per token between the trainer's fp32 and transformers' fp32, both by kernels of the device."""
RESUME_BUDGET = 1e-3
_LOGPS = "eval/logps/chosen"


def check_demo(setting: CheckSetting) -> Verdict:
    """The demo learns, and transformers finds in its export the log-probs that the trainer found."""
    folder, export = setting.folder / "demo", setting.folder / "demo_hf"
    steps = str(setting.size(40, 3))
    done = train(setting, folder, "--train-iters", steps, "--export-hf", str(export), "--export-dtype", "stored")
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

    from simpo_megatron.demo import prepare_demo

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


def check_resume(setting: CheckSetting) -> Verdict:
    """A run resumed from step 3 is at step 6 where the run without a stop is, bit for bit with --deterministic."""
    common = ["--train-iters", "6", "--log-interval", "1", "--global-batch-size", "16", "--deterministic"]
    common += ["--resume", "latest"]
    straight = train(setting, setting.folder / "straight", *common, "--export-hf", str(setting.folder / "straight_hf"))
    stopped = train(
        setting,
        setting.folder / "resumed",
        *common,
        *("--save-interval", "3", "--export-hf", str(setting.folder / "resumed_hf")),
        fault="step@4:0:sigterm",
    )
    resumed = train(setting, setting.folder / "resumed", *common, "--export-hf", str(setting.folder / "resumed_hf"))
    codes = [straight.returncode, stopped.returncode, resumed.returncode]
    if codes != [0, 75, 0]:
        said = next((last_line(d) for d, c in zip((straight, stopped, resumed), (0, 75, 0)) if d.returncode != c), "")
        return Verdict.of(False, f"exit codes {codes}: {said}", "0, 75, 0")
    ends = [[r for r in records(setting.folder / name) if "grad_norm" in r][-1] for name in ("straight", "resumed")]
    difference = max(abs(ends[0][key] - ends[1][key]) for key in ("loss", "grad_norm", "rewards/margins"))
    value = f"step {ends[1]['iteration']}: loss, gradient norm and margin off by {difference:g}"
    return Verdict.of(difference == 0 and ends[1]["iteration"] == 6, value, "0 with --deterministic")


def check_ends(setting: CheckSetting) -> Verdict:
    """Too little memory, a NaN and a signal end a run with the code and the sentence that are documented."""
    steps = ["--train-iters", "3", "--global-batch-size", "16"]
    found = {
        "NaN": train(setting, setting.folder / "nan", *steps, fault="backward@2:0:nan").returncode,
        "SIGTERM": train(setting, setting.folder / "sigterm", *steps, fault="step@2:0:sigterm").returncode,
    }
    expected = {"NaN": 5, "SIGTERM": 75}
    if not setting.rehearse:
        # All pairs in one pack: a terabyte of activations, which the probe before step 1 tries in vain.
        huge = [*model_options(setting), "--global-batch-size", "768", "--tokens-per-microbatch", "10000000"]
        found["memory"] = train(setting, setting.folder / "memory", *huge).returncode
        expected["memory"] = 2
    value = ", ".join(f"{name} {code}" for name, code in found.items())
    return Verdict.of(found == expected, value, ", ".join(f"{name} {code}" for name, code in expected.items()))
