"""SimPO in a training loop of your own: plain torch, your model, one call for the loss.

    python examples/your_own_loop.py

A toy model learns to prefer answers that count upwards to answers that count downwards.
"""

import torch

from simpo_megatron.loss import SimPOObjective, fused_linear_simpo

VOCAB, HIDDEN, PROMPT, ANSWER, PAIRS = 512, 64, 3, 8, 16


class TinyModel(torch.nn.Module):
    """A causal model; what matters here is that it returns hidden states and has an output weight."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.mixer = torch.nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids):
        return self.mixer(self.embedding(ids))[0]


def make_batch(generator):
    """Rows chosen, rejected, chosen, ...; the label at t is the token at t + 1, -100 where it is prompt."""
    prompt = torch.randint(100, 400, (PAIRS, PROMPT), generator=generator)
    steps = torch.arange(1, ANSWER + 1)
    chosen = torch.cat((prompt, prompt[:, -1:] + steps), 1)
    rejected = torch.cat((prompt, prompt[:, -1:] - steps), 1)
    ids = torch.stack((chosen, rejected), 1).flatten(0, 1)
    labels = ids[:, 1:].clone()
    labels[:, : PROMPT - 1] = -100
    return ids[:, :-1], labels


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, objective = TinyModel(), SimPOObjective(beta=2.0, gamma_beta_ratio=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, 61):
        ids, labels = make_batch(generator)
        result = fused_linear_simpo(model(ids), model.head.weight, labels, objective=objective)
        (result.loss / result.num_pairs).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 20 == 0:
            loss, accuracy = (result.sums[k] / result.num_pairs for k in ("loss", "rewards/accuracies"))
            print(f"step {step:2d}  loss {loss:.4f}  accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
