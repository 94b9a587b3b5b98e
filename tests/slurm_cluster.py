"""A real Slurm cluster of two nodes on this one machine: a munged, a slurmctld and two slurmd of our own.

Everything lives in one folder: keys, configuration, state and logs. Nothing of a Slurm or MUNGE that
the machine may already run is touched, and nothing is left running.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n1", "n2")
_START_SECONDS = 60
_UNFINISHED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED"}


def why_not() -> str | None:
    """The reason why no cluster can be started here, or None."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "srun", "munged") if _find(name) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd starts jobs as other users, so it needs root"
    return None


@dataclass
class SlurmCluster:
    """A running cluster; see `slurm_cluster`."""

    folder: Path
    environment: dict[str, str]
    """The environment in which Slurm's commands reach this cluster."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def command(
        self,
        *words: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> str:
        """Run one of Slurm's commands and return what it printed; a failure raises with its words."""
        command = [str(word) for word in words]
        environment = {**self.environment, **(environment or {})}
        done = subprocess.run(
            command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = f"{done.stdout}{done.stderr}"
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{said}")
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path, environment: Mapping[str, str] | None = None) -> int:
        """`sbatch ARGUMENTS` in `cwd`; returns the job's number."""
        printed = self.command("sbatch", "--parsable", *arguments, cwd=cwd, environment=environment)
        return int(printed.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says of a job, by key."""
        words = self.command("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: int, timeout: float = 240) -> tuple[str, int]:
        """Wait for a job's end: its state (`COMPLETED`, …) and its exit code (128 + signal if killed)."""
        end = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] in _UNFINISHED:
            if time.monotonic() > end:
                self.command("scancel", str(number))
                state = f"{job['JobState']} ({job['Reason']})"
                raise TimeoutError(f"job {number} is still {state} after {timeout:.0f} s")
            time.sleep(0.5)
        code, killed_by = (int(part) for part in job["ExitCode"].split(":"))
        return job["JobState"], 128 + killed_by if killed_by else code

    def states(self) -> dict[str, str]:
        """The state of each node, as `sinfo` names it."""
        lines = self.command("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split()[:2] for line in lines)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            for log in sorted(self.folder.glob("*.log"))
        )


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start the cluster in an empty folder, wait until both nodes are idle; take it all down at the end."""
    folder.chmod(0o755)
    for name in ("state", *NODES):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)

    # cred_expire and SlurmdTimeout are short, so that a requeued job starts and a lost node is noticed soon.
    controller_port, *node_ports = _free_ports(1 + len(NODES))
    cpus = 4 * (os.cpu_count() or 1)  # as many as tests want: slots for tasks, not a claim about the machine
    (folder / "slurm.conf").write_text(
        f"""\
ClusterName=shardtune
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SwitchType=switch/none
ReturnToService=2
MailProg=/bin/true
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=10
"""
        + "".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus}\n"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        + f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
    )
    # Jobs are tracked by process tree, so no cgroup is made; but a slurmd before 23.02 cannot say so.
    plugin = "disabled" if _version() >= (23, 2) else "cgroup/v1"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    # A job of an outer Slurm may run these tests: its SLURM_ variables are not ours.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    cluster = SlurmCluster(folder, environment)
    try:
        _start(
            cluster, "munged", "munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log",
        )  # fmt: skip
        _wait_for(cluster, "munged", (folder / "munge.socket").exists)
        _start(cluster, "slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            _start(cluster, f"slurmd-{node}", "slurmd", "-D", "-N", node)
        _wait_for(cluster, "the nodes", lambda: _quiet(cluster.states) == dict.fromkeys(NODES, "idle"))
        yield cluster
    finally:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            cluster.command("scancel", "--user=root", timeout=10)
            _until(lambda: not cluster.command("squeue", "--noheader").strip(), seconds=30)
        for daemon in reversed(cluster.daemons.values()):
            daemon.terminate()
        for daemon in cluster.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _kill_what_is_left(cluster)


def _start(cluster: SlurmCluster, name: str, program: str, *arguments: str) -> None:
    path = _find(program)
    assert path is not None
    with (cluster.folder / f"{name}.out.log").open("wb") as output:
        cluster.daemons[name] = subprocess.Popen(
            [path, *arguments], env=cluster.environment,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip


def _wait_for(cluster: SlurmCluster, what: str, ready: Callable[[], bool]) -> None:
    def ready_or_dead() -> bool:
        dead = {name: d.returncode for name, d in cluster.daemons.items() if d.poll() is not None}
        if dead:
            raise RuntimeError(f"ended at the start (exit codes): {dead}\n{cluster.logs()}")
        return ready()

    if not _until(ready_or_dead, seconds=_START_SECONDS):
        raise RuntimeError(f"{what} did not come up within {_START_SECONDS} s\n{cluster.logs()}")


def _until(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _quiet(ask: Callable[[], dict[str, str]]) -> dict[str, str]:
    with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
        return ask()
    return {}


def _kill_what_is_left(cluster: SlurmCluster) -> None:
    """Step daemons and their jobs outlive a slurmd. Ours have our configuration in their environment."""
    mark = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def _version() -> tuple[int, ...]:
    path = _find("slurmd")
    assert path is not None
    words = subprocess.run([path, "-V"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(int(part) for part in words[-1].split(".")[:2])


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin")


def _free_ports(count: int) -> Sequence[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
