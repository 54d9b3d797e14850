"""Preference files in, SimPO out: the data and the loss around a transformers model, in plain torch, without Megatron.

    python examples/transformers_loop.py
    python examples/transformers_loop.py --model DIR --data pairs.jsonl

The pairs are tokenised once and kept. Each step is a list of microbatches of padded rows: chosen, rejected, chosen, ...
"""

import argparse

import torch
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


def loss_of(model, batch, objective):
    """The loss, summed over the batch's pairs, and the sums of its metrics."""
    device = model.device
    # Padding stands on the right, where no causal model sees it.
    hidden_BSH = model.get_decoder()(batch.tokens_BS.to(device), use_cache=False).last_hidden_state
    weight_VH = model.get_output_embeddings().weight
    tokens = ResponseTokens(batch.rows_N, batch.targets_N, batch.sequence_N, batch.num_pairs)
    logp_N = fused_linear_log_probs(
        hidden_BSH.transpose(0, 1).contiguous(),  # rows_N counts s * B + b, as Megatron does
        weight_VH,
        tokens,
        vocab=VocabShard(start=0, size=len(weight_VH)),
        tp_group=None,
    )
    avg_R, counts_R = average_log_probs(logp_N, tokens.sequence_N.to(device), 2 * tokens.num_pairs)
    return preference_loss(avg_R, counts_R, objective=objective)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder; the bundled tiny model when not given")
    parser.add_argument("--data", help="a preference file; the bundled pairs when not given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args(argv)
    demo = prepare_demo("runs/loop")
    folder, file = arguments.model or str(demo.model_dir), arguments.data or str(demo.train_file)

    model = AutoModelForCausalLM.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    objective = SimPOObjective(beta=2.0, gamma_beta_ratio=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    pair_options = PairOptions(max_length=512, max_prompt_length=400)
    dataset = build_preference_dataset([file], load_tokenizer(folder), pair_options, "runs/loop/cache")
    options = BatchOptions(global_batch_size=16, micro_batch_size=8, packing=False, prefix_sharing=False)
    for step, batches in zip(range(1, arguments.steps + 1), iterate_steps(dataset, options)):
        loss = accuracy = 0.0
        for batch in batches:
            result = loss_of(model, batch, objective)
            (result.loss / options.global_batch_size).backward()
            loss += result.sums["loss"].item() / options.global_batch_size
            accuracy += result.sums["rewards/accuracies"].item() / options.global_batch_size
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 5 == 0:
            print(f"step {step:2d}  loss {loss:.6f}  accuracy {accuracy:.2f}", flush=True)


if __name__ == "__main__":
    main()
