"""SimPO as a NeMo-Run experiment: a recipe, changed like any other, on the executor of your choice.

    python examples/nemo_run_simpo.py

Needs `pip install 'simpo-megatron[nemo-run]'`. As it stands it trains the tiny bundled model on two local ranks. On a
cluster the recipe names a model, data and a layout, and run.SlurmExecutor (or another) takes the place of
run.LocalExecutor.

A job's signals come to torchrun there, which hands SIGTERM on to its ranks and gives them 30 s to finish and save; any
other ends it at once. So ask Slurm for that one ahead of the end, by additional_parameters={"signal": "TERM@120"}, and
leave save_interval at half an hour or less for saves that take longer. torchrun's exit code is 1 whatever its ranks
say: with retries=N Slurm starts the job again up to N times, after a mistake too, and each start continues the run.
"""

import nemo_run as run

from simpo_megatron.recipes import simpo_recipe


def main():
    recipe = simpo_recipe(preset="demo", tp=2)
    recipe.config.objective.beta = 2.5
    recipe.config.optimizer.train_iters = 24
    recipe.config.run.save = "runs/nemo_run"
    recipe.config.model.export_hf = "runs/nemo_run/hf"
    executor = run.LocalExecutor(ntasks_per_node=2, launcher="torchrun", env_vars={"OMP_NUM_THREADS": "1"})
    with run.Experiment("simpo") as experiment:
        experiment.add(recipe, executor=executor, name="train", tail_logs=True)
        experiment.run()


if __name__ == "__main__":
    main()
