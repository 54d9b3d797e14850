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
from kubernetes_schemas import problems, schemas
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
    # After torchrun's own pages.
    assert nodes_last_line(nodes, "STOPPED simpo_megatron rank 0: SIGUSR1: stopped after step"), printed
    saved = [folder.name for folder in (tmp_path / "run").glob("iter_*")]
    assert f"iter_{steps(tmp_path)[-1]:07d}" in saved, printed


def test_a_node_that_waits_for_another_says_so_and_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("MEETING", "8")
    node, log = start_node(tmp_path, 0, free_port())
    try:
        assert node.wait(timeout=120) == 6, log.read_text()
    finally:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
    last = log.read_text().splitlines()[-1]
    assert last.startswith("ERROR simpo_megatron: NODES: found fewer than 2 after 8 s, expected torchrun.sh on each"), (
        last
    )


def nodes_last_line(nodes, text):
    """True when the log of rank 0's node soon ends with a line of ours."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(log.read_text().splitlines()[-1].startswith(text) for _, log in nodes):
            return True
        time.sleep(0.2)
    return False


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
        assert script.wait(timeout=60) == 1
    finally:
        os.killpg(script.pid, signal.SIGKILL)


def test_the_kubernetes_jobs_ask_for_the_ranks_their_configuration_needs_and_end_when_they_cannot_run():
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    check_schemas(job)
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    container = worker["template"]["spec"]["containers"][0]
    per_node = int(spec["nprocPerNode"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == per_node
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}
    assert spec["elasticPolicy"]["minReplicas"] == spec["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert spec["runPolicy"]["backoffLimit"] % worker["replicas"] == 0 and spec["runPolicy"]["activeDeadlineSeconds"]
    check_command(container, worker["replicas"] * per_node)

    job = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())
    check_schemas(job)
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"] == per_node
    check_command(trainer, trainer["numNodes"] * trainer["numProcPerNode"])


def check_schemas(job):
    of_versions = schemas(job["kind"])
    assert len(of_versions) == 2
    assert [problem for schema in of_versions.values() for problem in problems(job, schema)] == []


def check_command(container, num_ranks):
    assert (REPOSITORY / container["command"][0]).stat().st_mode & stat.S_IXUSR
    config = load_config(container["args"])
    assert config.parallel.overlap_grad_reduce and config.run.resume == "latest"
    assert f"_{num_ranks}xh100.yaml" in container["args"][1]


def test_what_a_server_would_drop_or_refuse_is_seen():
    trainer = {"numNodes": "8", "nodes": 8, "resourcesPerNode": {"limits": {"memory": "much"}}}
    job = {"apiVersion": "v1", "kind": "TrainJob", "spec": {"trainer": trainer}}
    assert problems(job, schemas("TrainJob")["2.0.0"]) == [
        ".apiVersion: 'v1' is none of ['trainer.kubeflow.org/v1alpha1']",
        ".spec.runtimeRef: missing",
        ".spec.trainer.numNodes: '8' is no integer",
        ".spec.trainer.nodes: unknown",
        ".spec.trainer.resourcesPerNode.limits.memory: 'much' is no quantity",
    ]
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    worker["template"]["spec"]["containers"][0]["resource"] = worker["template"]["spec"]["containers"][0].pop("name")
    worker["replicas"] = True
    where = ".spec.pytorchReplicaSpecs.Worker"
    assert problems(job, schemas("PyTorchJob")["1.9.0"]) == [
        f"{where}.replicas: True is no integer",
        f"{where}.template.spec.containers[0].name: missing",
        f"{where}.template.spec.containers[0].resource: unknown",
    ]
