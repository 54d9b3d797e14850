"""SimPO's loss without logits inside TRL's CPOTrainer; everything but the loss is TRL's.

    pip install trl
    python examples/trl_simpo.py

CPOTrainer puts every position through the head and keeps two copies of the logits. Here only response tokens meet it,
block by block. The loss and its gradient are the same.
"""

import torch
from trl.experimental.cpo import CPOConfig, CPOTrainer

from simpo_megatron import SimPOObjective, fused_linear_simpo


class FusedSimPOTrainer(CPOTrainer):
    """CPOTrainer with `loss_type="simpo"` and `cpo_alpha=0`, whose logits never exist as a whole."""

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        rows = self.concatenated_inputs(batch, padding_value=self.pad_token_id, device=self.accelerator.device)
        ids, mask, labels = (in_turn(rows[f"concatenated_{key}"]) for key in ("input_ids", "attention_mask", "labels"))
        # The model is called whole, so that DDP sees it, but for the logits of one position alone.
        outputs = model(ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        result = fused_linear_simpo(
            outputs.hidden_states[-1][:, :-1].contiguous(),
            head.weight,
            labels[:, 1:],  # aligned: the label at t is the token predicted at t
            objective=SimPOObjective(beta=self.beta, gamma_beta_ratio=self.simpo_gamma / self.beta),
        )
        prefix = "eval_" if train_eval == "eval" else ""
        sums = {name: self.accelerator.reduce(value, "mean") for name, value in result.sums.items()}
        metrics = {f"{prefix}{name}": value.item() / result.num_pairs for name, value in sums.items()}
        return result.loss / result.num_pairs, metrics


def in_turn(rows):
    """TRL's rows, all chosen before all rejected, as chosen, rejected, chosen, ..."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def main(trainer_class=FusedSimPOTrainer, **options):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from simpo_megatron.demo import prepare_demo

    demo = prepare_demo("runs/trl")
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(demo.model_dir),
        processing_class=AutoTokenizer.from_pretrained(demo.model_dir),
        train_dataset=load_dataset("json", data_files=str(demo.train_file), split="train"),
        args=CPOConfig(
            **{
                "output_dir": "runs/trl/out",
                "loss_type": "simpo",
                "cpo_alpha": 0.0,
                "beta": 2.0,
                "simpo_gamma": 1.0,
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 16,
                "max_steps": 20,
                "logging_steps": 5,
                "report_to": [],
                "bf16": torch.cuda.is_available(),
                **options,
            }
        ),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
