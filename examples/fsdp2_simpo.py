"""SimPO under FSDP2: a transformers model whose weights are sharded over ranks, one call for the loss.

    torchrun --nproc-per-node 2 examples/fsdp2_simpo.py

The loss is computed inside the wrapped module's forward. There FSDP2 has gathered the output layer's weight, and its
gradient goes back to the shards like every other; the loss asks for nothing but the tensor. FSDP2 averages gradients
over ranks, so every rank divides by its own pairs, and all ranks take equally many.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from simpo_megatron.data import BatchOptions, PairOptions, build_preference_dataset, iterate_steps, load_tokenizer
from simpo_megatron.demo import prepare_demo
from simpo_megatron.loss import (
    ResponseTokens,
    SimPOObjective,
    VocabShard,
    average_log_probs,
    fused_linear_log_probs,
    preference_loss,
)


class WithLoss(torch.nn.Module):
    """A causal model that returns its loss over a batch, and the sums of the loss's metrics."""

    def __init__(self, model, objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch):
        hidden_BSH = self.model.model(batch.tokens_BS, use_cache=False).last_hidden_state
        weight_VH = self.model.lm_head.weight
        tokens = ResponseTokens(batch.rows_N, batch.targets_N, batch.sequence_N, batch.num_pairs)
        logp_N = fused_linear_log_probs(
            hidden_BSH.transpose(0, 1).contiguous(),  # rows_N counts s * B + b, as Megatron does
            weight_VH,
            tokens,
            vocab=VocabShard(start=0, size=len(weight_VH)),
            tp_group=None,
        )
        avg_R, counts_R = average_log_probs(logp_N, tokens.sequence_N, 2 * tokens.num_pairs)
        result = preference_loss(avg_R, counts_R, objective=self.objective)
        return result.loss / result.num_pairs, result.sums


def open_pairs(demo, build):
    tokenizer, options = load_tokenizer(str(demo.model_dir)), PairOptions(max_length=512, max_prompt_length=400)
    return build_preference_dataset([str(demo.train_file)], tokenizer, options, "runs/fsdp2/cache", build=build)


def main(num_steps=20, global_batch_size=16):
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    demo = prepare_demo("runs/fsdp2")
    model = WithLoss(AutoModelForCausalLM.from_pretrained(demo.model_dir).to(device), SimPOObjective(beta=2.0))
    for layer in model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if dist.get_rank() == 0:
        dataset = open_pairs(demo, build=True)
    dist.barrier()
    if dist.get_rank() > 0:
        dataset = open_pairs(demo, build=False)
    # Padded rows, one microbatch of equally many pairs a rank.
    options = BatchOptions(
        global_batch_size=global_batch_size,
        micro_batch_size=global_batch_size // dist.get_world_size(),
        packing=False,
        prefix_sharing=False,
    )
    steps = iterate_steps(dataset, options, dp_rank=dist.get_rank(), dp_size=dist.get_world_size())
    for step in range(1, num_steps + 1):
        (batch,) = next(steps)
        loss, sums = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals = torch.stack((sums["loss"], sums["rewards/accuracies"]))
        dist.all_reduce(totals)
        if dist.get_rank() == 0 and (step == 1 or step % 5 == 0):
            loss, accuracy = (totals / global_batch_size).tolist()
            print(f"step {step:2d}  loss {loss:.6f}  accuracy {accuracy:.2f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
