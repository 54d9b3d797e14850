"""A Slurm of two nodes on this machine, for the time of a test: munge, controller and node daemons of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
CommunicationParameters=NoAddrCache
ReturnToService=2
SchedulerParameters=requeue_delay=1,sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=4 RealMemory=4000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


class Cluster:
    """The daemons, and the commands that talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool-n1", "spool-n2", "munge"):
            (folder / name).mkdir()
        ports = {name: free_port() for name in ("controller_port", "first_port", "second_port")}
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=socket.gethostname(), **ports))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        munge = self.folder / "munge"
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", "--force", "--num-threads=2", *(f"--{key}={munge / name}" for key, name in files.items()))
        self.run("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.run("slurmd", "-N", node)
        self.wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D").strip() == "2", 60)
        return self

    def __exit__(self, *_: object) -> None:
        # A daemon that ends leaves the steps of its jobs running.
        with suppress(AssertionError, subprocess.SubprocessError):
            self.run("scancel", "--full", "--signal", "KILL", "--user", str(os.geteuid()))
            self.run("scancel", "--user", str(os.geteuid()))
            self.wait(lambda: not self.run("squeue", "-h").strip(), 20)
        for file in (*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munge" / "pid"):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)

    def run(self, *command: str, folder: Path | None = None, **variables: str) -> str:
        done = subprocess.run(
            command, env=self.environment | variables, cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The job as `scontrol show job` has it."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, holds, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.2)


def missing() -> str | None:
    """The reason why this machine cannot be such a cluster; None when it can."""
    if os.geteuid() != 0:
        return "root alone may start Slurm's daemons"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge" if absent else None
