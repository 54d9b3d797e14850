"""Speed and memory of TRL's CPOTrainer with SimPO's loss, on the model and pairs of the large run."""

from __future__ import annotations

import importlib
import time
from statistics import median
from typing import Any

import torch

from simpo_megatron.gpu_check.large_model import model_and_pairs
from simpo_megatron.gpu_check.user_runs import records
from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict

_PACKAGES = ("trl", "datasets", "accelerate")
_NUM_STEPS, _NUM_COUNTED = 5, 3


def compare_with_trl(setting: CheckSetting) -> Verdict:
    """Checks that ours trains more pairs a second, in no more memory.

    TRL's has fp32 weights under bf16 autocast, torch's fused AdamW and scaled_dot_product_attention, four pairs a
    microbatch, no gradient checkpointing. Ours is the run of `measure_steps`.
    """
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return Verdict.skip(f"{package} cannot be imported ({error})")
    ours = [record for record in records(setting.folder / "large") if "grad_norm" in record]
    if not ours:
        return Verdict.skip("the run of a model of 1B parameters has left no steps here")
    pairs_per_second, memory = _train(setting)
    ratio = median(step["pairs_per_second"] for step in ours[len(ours) // 2 :]) / pairs_per_second
    value = f"TRL's {pairs_per_second:.3g} pairs/s, ours {ratio:.2f} times as many"
    if setting.rehearse:
        return Verdict.of(True, value, "not judged")
    share = ours[-1]["peak_memory_gib"] * 2**30 / memory
    value += f", in {share:.2f} of its {memory / 2**30:.1f} GiB"
    return Verdict.of(ratio > 1 and share <= 1, value, "more pairs, no more memory", ratio=ratio, memory=share)


def _train(setting: CheckSetting) -> tuple[float, int]:
    """(pairs a second after the first steps, bytes on the device at the peak; 0 in a rehearsal)."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, pairs = model_and_pairs(setting)
    per_device, accumulation = setting.size(4, 1), setting.size(4, 2)
    times = []

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not setting.rehearse:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer = CPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=load_dataset(
            "json", data_files=str(pairs), split="train", cache_dir=str(setting.folder / "cache" / "trl")
        ),
        args=CPOConfig(
            output_dir=str(setting.folder / "trl"),
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=2.0,
            simpo_gamma=1.0,
            max_length=setting.size(2048, 512),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            max_steps=_NUM_STEPS,
            learning_rate=1e-6,
            optim="adamw_torch_fused",
            use_cpu=setting.rehearse,
            bf16=not setting.rehearse,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        callbacks=[Times()],
    )
    if not setting.rehearse:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = (times[-1] - times[-1 - _NUM_COUNTED]) / _NUM_COUNTED
    return per_device * accumulation / seconds, 0 if setting.rehearse else torch.cuda.max_memory_allocated()
