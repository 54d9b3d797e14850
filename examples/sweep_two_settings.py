"""Two settings, trained one after the other in one process, and what each achieved.

    python examples/sweep_two_settings.py

Without a model of your own it is the tiny bundled one. Each run is the one that `simpo train` would start.
"""

from simpo_megatron import load_config, train


def main(**options):
    for beta in (2.0, 10.0):
        folder = f"runs/sweep/beta_{beta:g}"
        result = train(load_config(beta=beta, save=folder, export_hf=f"{folder}/hf", **options))
        before, after = (metrics["eval/rewards/accuracies"] for metrics in (result.before, result.after))
        print(f"beta {beta:g}: accuracy from {before:.1%} to {after:.1%}, best in {result.best_checkpoint}")


# Processes that tokenise are spawned and import this file again: only the real start may train.
if __name__ == "__main__":
    main()
