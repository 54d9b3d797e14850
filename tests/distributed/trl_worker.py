"""Train pairs with TRL's CPOTrainer on SimPO's loss: `trl_worker.py FOLDER`.

FOLDER/trl.json holds the model folder, the preference records in their order and the options; it leaves
FOLDER/trl_steps.json (the metrics of each step) and FOLDER/trl_ids.json (TRL's token ids of each record).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer


class RecordingTrainer(CPOTrainer):
    """Keeps the metrics of every microbatch, which the log would round."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.recorded: dict[str, list[float]] = defaultdict(list)

    def get_batch_loss_metrics(self, *arguments, **options):
        loss, metrics = super().get_batch_loss_metrics(*arguments, **options)
        for name, value in {"loss": float(loss), **metrics}.items():
            self.recorded[name].append(value)
        return loss, metrics


def main(folder: Path) -> None:
    job = json.loads((folder / "trl.json").read_text())
    accumulation = job["arguments"]["gradient_accumulation_steps"]
    trainer = RecordingTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"]),
        args=CPOConfig(
            output_dir=str(folder / "trl"),
            loss_type="simpo",
            cpo_alpha=0.0,
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **job["arguments"],
        ),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=Dataset.from_list(job["records"]),
    )
    ids = []
    for row in trainer.train_dataset:
        num_prompt = len(row["prompt_input_ids"])
        responses = (row[f"{name}_input_ids"][num_prompt:] for name in ("chosen", "rejected"))
        ids.append([row["prompt_input_ids"], *responses])
    (folder / "trl_ids.json").write_text(json.dumps(ids))
    trainer.train()
    num_steps = trainer.state.global_step
    steps = [
        {
            name: sum(values[step * accumulation : (step + 1) * accumulation]) / accumulation
            for name, values in trainer.recorded.items()
        }
        for step in range(num_steps)
    ]
    (folder / "trl_steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
