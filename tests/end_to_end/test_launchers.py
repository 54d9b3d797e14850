"""The scripts in examples/launch/: two nodes on one machine train, and stop together when one is taken away."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import yaml
from ranks import REPOSITORY, free_port

from simpo_megatron.config import load_config

LAUNCH = REPOSITORY / "examples" / "launch"


def environment(**more):
    bin_folder = str(Path(sys.executable).parent)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SLURM_"))}
    return own | {"PATH": f"{bin_folder}:{own['PATH']}", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | more


def start_node(folder, number, port):
    """torchrun.sh with one rank, as node `number` of two that meet at `port` of this machine."""
    arguments = ["--tp", "2", "--save", str(folder / "run"), "--data-cache", str(folder / "cache"), "--epochs", "100"]
    log = folder / f"node{number}.log"
    meeting = {"NODES": "2", "PER_NODE": "1", "HOST": f"localhost:{port}", "PET_LOCAL_ADDR": "127.0.0.1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(LAUNCH / "torchrun.sh"), *arguments],
            env=environment(**meeting),
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, log


def steps(folder):
    file = folder / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [record["iteration"] for record in records if "loss" in record]


def test_two_nodes_train_and_when_one_is_taken_away_both_save_and_stop(tmp_path):
    port = free_port()
    nodes = [start_node(tmp_path, number, port) for number in range(2)]
    try:
        deadline = time.monotonic() + 240
        while len(steps(tmp_path)) < 2 and time.monotonic() < deadline:
            assert all(process.poll() is None for process, _ in nodes), [log.read_text()[-2000:] for _, log in nodes]
            time.sleep(0.2)
        nodes[1][0].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=120) for process, _ in nodes]
    finally:
        for process, _ in nodes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    printed = "\n".join(log.read_text() for _, log in nodes)
    assert codes == [1, 1], printed  # torchrun's own, whatever its ranks say
    assert "SIGUSR1 received; stopping after this step" in nodes[1][1].read_text()
    assert "STOPPED simpo_megatron rank 0" in printed and "exitcode  : 75" in printed
    saved = [folder.name for folder in (tmp_path / "run").glob("iter_*")]
    assert f"iter_{steps(tmp_path)[-1]:07d}" in saved, printed


def test_an_agent_that_may_restart_its_ranks_does_not_once_they_were_told_to_stop(tmp_path):
    """With a stand-in for torchrun that starts its rank again whenever it ends."""
    rank = "trap 'echo saved; exit 75' USR1; echo started; while :; do sleep 0.1; done"
    agent = f'#!/usr/bin/env bash\necho "$*"\ntrap \'exit 1\' TERM\nwhile :; do bash -c "{rank}"& wait $!; done\n'
    (tmp_path / "torchrun").write_text(agent)
    (tmp_path / "torchrun").chmod(0o755)
    job = environment(PET_NNODES="2:2", PET_MAX_RESTARTS="10")
    job["PATH"] = f"{tmp_path}:{job['PATH']}"
    script = subprocess.Popen(
        [str(LAUNCH / "torchrun.sh"), "--tp", "2"], env=job, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert script.stdout.readline() == "--nproc-per-node 8 examples/pretrain_simpo.py --tp 2\n"
        assert script.stdout.readline() == "started\n"
        script.send_signal(signal.SIGTERM)
        assert script.stdout.readline() == "saved\n"
        assert script.wait(timeout=20) == 1
    finally:
        os.killpg(script.pid, signal.SIGKILL)


def run_under_a_pretended_slurm(folder, exit_code):
    """slurm.sbatch of two nodes with two tasks each; (its exit code, what its tasks and scontrol saw)."""
    folder.mkdir()
    stand_ins = {
        "srun": 'for task in 0 1 2 3; do SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" || code=$?; done; '
        "exit ${code:-0}",
        "python": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >> tasks; '
        f"exit {exit_code}",
        "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode9\\n"; else echo "$@" >> requeued; fi',
    }
    for name, body in stand_ins.items():
        file = folder / name
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
    variables = environment(**job)
    variables["PATH"] = f"{folder}:{variables['PATH']}"
    script = [str(LAUNCH / "slurm.sbatch"), "--data", "a file", "--tp", "4"]
    code = subprocess.run(script, env=variables, cwd=folder, timeout=60).returncode
    requeued = folder / "requeued"
    return code, (folder / "tasks").read_text().splitlines(), requeued.read_text() if requeued.exists() else ""


def test_slurm_gives_each_task_its_rank_and_requeues_only_what_stopped_for_a_signal(tmp_path):
    code, tasks, requeued = run_under_a_pretended_slurm(tmp_path / "stopped", 75)
    arguments = "examples/pretrain_simpo.py --data a file --tp 4"
    assert tasks == [f"{rank}/4 {rank % 2}/2 node7:23456 {arguments}" for rank in range(4)]
    assert (code, requeued) == (75, "requeue 123456\n")
    for exit_code in (0, 2):
        code, _, requeued = run_under_a_pretended_slurm(tmp_path / str(exit_code), exit_code)
        assert (code, requeued) == (exit_code, "")


def test_the_kubernetes_job_asks_for_the_ranks_its_configuration_needs():
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())["spec"]
    worker = job["pytorchReplicaSpecs"]["Worker"]
    container = worker["template"]["spec"]["containers"][0]
    per_node = int(job["nprocPerNode"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == per_node
    assert job["elasticPolicy"]["minReplicas"] == job["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert (REPOSITORY / container["command"][0]).stat().st_mode & stat.S_IXUSR
    config = load_config(container["args"])
    assert config.parallel.overlap_grad_reduce
    assert f"_{worker['replicas'] * per_node}xh100.yaml" in container["args"][1]
