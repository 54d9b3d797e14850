"""SimPO as a NeMo experiment: NeMo's hydra_runner reads it, exp_manager keeps it, megatron-core trains it.

    torchrun --nproc-per-node 2 examples/nemo_hydra.py trainer.devices=2 model.tensor_model_parallel_size=2

Needs `pip install 'simpo-megatron[nemo]'`. Settings are those of conf/nemo_simpo.yaml; change them as with any NeMo
script: `model.simpo.beta=2.5`, `exp_manager.create_wandb_logger=true`, `--config-name another`.
"""

import os
import sys

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager

from simpo_megatron.errors import SimPOError, report_error
from simpo_megatron.nemo import load_nemo_config
from simpo_megatron.training.run import train


class ExperimentLoggers:
    """The loggers that exp_manager made (TensorBoard, Weights & Biases, MLflow, ...) as a place for our records."""

    def __init__(self, trainer):
        self._loggers = trainer.loggers

    def write(self, record):
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        for logger in self._loggers:
            logger.log_metrics(numbers, step=record["iteration"])

    def close(self):
        for logger in self._loggers:
            logger.finalize("success")


@hydra_runner(config_path="conf", config_name="nemo_simpo")
def main(cfg):
    trainer = Trainer(**cfg.trainer)
    folder = exp_manager(trainer, cfg.exp_manager)
    try:
        # exp_manager moves the files of an earlier run aside, so ours lie in a folder of their own; it logs as well.
        ours = [f"model.simpo.save={folder / 'megatron'}"]
        theirs = [f"exp_manager.create_{kind}_logger=false" for kind in ("tensorboard", "wandb")]
        config, report = load_nemo_config(cfg, [*ours, *theirs])
        if os.environ.get("RANK", "0") == "0":
            print(*report.lines(), sep="\n", flush=True)
        train(config, [ExperimentLoggers(trainer)])
    except SimPOError as error:
        sys.exit(report_error(error))


# Processes that tokenise are spawned and import this file again: only the real start may train.
if __name__ == "__main__":
    main()
