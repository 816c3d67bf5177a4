"""The recipes in launch/: tried for real on loopback where the launchers are installed."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from experiment_file import write_experiment

from configs import flex1
from data_pipelines.errors import UserError
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.stopping import PREEMPTED
from flexavatar_jax.train import place_in_open_mpi

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"


def environment() -> dict[str, str]:
    """Two virtual CPU devices a process, and this Python as `python3`."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        # On CPUs a cached program is the one of the process that wrote it, and waits for itself.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
    }


@pytest.fixture
def arguments(tiny_config, tmp_path) -> list[str]:
    """Training arguments for two processes of two devices."""
    tiny_config.batch = 4
    program = write_experiment(tiny_config, tmp_path)
    return ["--config", str(program), "--workdir", str(tmp_path / "run"), "--config.mesh.fsdp=4"]


def assert_trained(workdir: Path) -> None:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert (workdir / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_open_mpi_trains_with_two_ranks(arguments, tmp_path):
    if not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed (Debian: openmpi-bin)")
    command = [LAUNCH / "openmpi.sh", "-np", "2", "--oversubscribe", "--allow-run-as-root", "--"]
    done = subprocess.run(
        [*command, *arguments], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "4 x cpu" in done.stdout
    assert "2 processes" in done.stdout
    assert_trained(tmp_path / "run")


@pytest.mark.slow
def test_sigterm_to_the_open_mpi_recipe_saves_and_tells_the_scheduler(arguments, tmp_path):
    if not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed (Debian: openmpi-bin)")
    command = [LAUNCH / "openmpi.sh", "-np", "2", "--oversubscribe", "--allow-run-as-root", "--"]
    job = subprocess.Popen(
        [*command, *arguments, "--config.steps=2000", "--config.checkpoint.every=1000"],
        env=environment(),
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while job.poll() is None and not log.exists():
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=300) == PREEMPTED
    assert 0 < Checkpoints(tmp_path / "run", owned=False).latest_step < 1000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def slurm(tmp_path):
    """The environment for the commands of a cluster of this one machine, started for the test."""
    needed = ("slurmctld", "slurmd", "sbatch", "munged")
    if not all(shutil.which(program, path=f"/usr/sbin:{os.environ['PATH']}") for program in needed):
        pytest.skip("Slurm is not installed (Debian: slurm-wlm and munge)")
    if os.getuid():
        pytest.skip("starting Slurm's daemons takes root")
    path = f"/usr/sbin:{os.environ['PATH']}"
    key, munge_socket = tmp_path / "munge.key", tmp_path / "munge.socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for folder in ("state", "spool"):
        (tmp_path / folder).mkdir()
    host = socket.gethostname().split(".")[0]
    (tmp_path / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CredType=cred/munge
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool
SlurmctldPidFile={tmp_path}/slurmctld.pid
SlurmdPidFile={tmp_path}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES OverSubscribe=FORCE:4
"""
    )
    env = environment() | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    env["PATH"] = f"/usr/sbin:{env['PATH']}"
    log = (tmp_path / "daemons.log").open("w")
    daemons = [
        [
            *("munged", "--foreground", "--force", "--key-file", key, "--socket", munge_socket),
            *("--pid-file", tmp_path / "munged.pid", "--log-file", tmp_path / "munged.log"),
            *("--seed-file", tmp_path / "munged.seed"),
        ],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    running = []
    for command in daemons:
        program = shutil.which(command[0], path=path)
        running.append(subprocess.Popen([program, *command[1:]], env=env, stdout=log, stderr=log))
        time.sleep(1)
    yield env
    for daemon in reversed(running):
        daemon.terminate()
        daemon.wait(timeout=30)


@pytest.mark.slow
def test_slurm_trains_with_two_ranks(slurm, arguments, tmp_path):
    output = tmp_path / "job.log"
    command = ["sbatch", "--wait", "--ntasks=2", "--overcommit", f"--output={output}"]
    done = subprocess.run(
        [*command, f"--chdir={ROOT}", LAUNCH / "slurm.sh", *arguments],
        env=slurm,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = output.read_text() if output.exists() else (tmp_path / "daemons.log").read_text()
    assert done.returncode == 0, done.stderr + said
    assert "2 processes" in said
    assert_trained(tmp_path / "run")


OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


def test_open_mpi_5_finds_the_first_process_by_the_recipe_or_says_what_is_missing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    assert place_in_open_mpi() == {}
    for name, value in OPEN_MPI_5.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"launch/openmpi\.sh, or set JAX_COORDINATOR_ADDRESS"):
        place_in_open_mpi()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node1:61000")
    assert place_in_open_mpi() == dict(num_processes=4, process_id=3, local_device_ids=[1])
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "0.0;tcp://127.0.0.1:1")  # JAX knows version 4
    assert place_in_open_mpi() == {}


def test_the_open_mpi_recipe_asks_the_hosts_where_the_first_process_is(tmp_path):
    """With an `mpirun` like version 5's, that starts two processes."""
    (tmp_path / "mpirun").write_text(
        """#!/bin/bash
while [[ $1 == -* ]]; do [ $1 != -n ] || shift; [ $1 != -x ] || shift; shift; done
for rank in 0 1; do OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_SIZE=2 "$@"; done
"""
    )
    (tmp_path / "python3").write_text(
        '#!/bin/bash\necho "$OMPI_COMM_WORLD_RANK of 2 at $JAX_COORDINATOR_ADDRESS: $*"\n'
    )
    for name in ("mpirun", "python3"):
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LAUNCH / "openmpi.sh", "-n", "2", "--", "--workdir=run"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert re.fullmatch(
        r"0 of 2 at [\w.:-]+:6\d{4}: -m flexavatar_jax.train .*--workdir=run", first
    )
    assert second == first.replace("0 of 2", "1 of 2")


def test_cloud_tpu_runs_the_same_command_on_all_hosts(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\n')
    gcloud.chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "REPOSITORY": "https://example.org/flexavatar-jax.git",
    }
    command = [LAUNCH / "cloud_tpu.sh", "flex1", "us-west4-a", "--workdir=gs://b/a run"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:6] == ["compute", "tpus", "tpu-vm", "ssh", "flex1", "--zone=us-west4-a"]
    assert lines[6] == "--worker=all"
    remote = "\n".join(lines[7:]).removeprefix("--command=")
    subprocess.run(["bash", "-n", "-c", remote], check=True)
    assert r"flexavatar_jax.train --distributed --workdir=gs://b/a\ run" in remote


def test_cloud_tpu_finishes_an_installation_that_was_cut_short(tmp_path):
    """On a host whose `git`, `python3` and `pip` only leave traces."""
    commands, host = tmp_path / "commands", tmp_path / "host"
    programs = {
        "gcloud": 'for a; do case "$a" in --command=*) exec bash -c "${a#--command=}"; esac; done',
        "git": 'mkdir "$3"; echo clone "$2" >> log',
        "python3": "[ $1 = -c ] || { mkdir -p venv/bin; cp ../commands/p{ip,ython} venv/bin; }",
        "python3.10": "exit 1",
        "pip": "echo install >> log; [ ! -e broken ]",
        "python": "echo train >> ../log",
    }
    commands.mkdir()
    host.mkdir()
    for name, body in programs.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)

    def launch(repository: str | None, python: str = "python3") -> tuple[int, list[str]]:
        env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": python}
        env = env | {"REPOSITORY": repository} if repository else env
        command = [LAUNCH / "cloud_tpu.sh", "flex1", "us-west4-a", "--workdir=run"]
        (host / "log").write_text("")
        done = subprocess.run(command, env=env, cwd=host, stderr=subprocess.DEVNULL)
        return done.returncode, (host / "log").read_text().splitlines()

    assert launch(repository=None) == (2, [])
    assert launch("https://example.org/a b.git", python="python3.10") == (2, [])
    (host / "broken").touch()
    assert launch("https://example.org/a b.git") == (
        1,
        ["clone https://example.org/a b.git", "install"],
    )
    (host / "broken").unlink()
    assert launch(repository=None) == (0, ["install", "train"])
    assert launch(repository=None) == (0, ["train"])


def gke_action(exit_code: int, *, disrupted: bool = False) -> str:
    """What the JobSet recipe does where a pod ends so, by Kubernetes' and JobSet's rules."""
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes takes a podFailurePolicy with no other
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == pod["containers"][0]["name"]
            matches = codes["operator"] == "In" and exit_code in codes["values"]
        else:
            matches = disrupted and rule["onPodConditions"][0]["type"] == "DisruptionTarget"
        if matches:
            reason = "PodFailurePolicy"
            message = f"Pod default/train failed, matching FailJob rule at index {index}"
            break
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_gke_gives_up_on_mistakes_alone_and_counts_no_preemption_as_a_failure():
    assert gke_action(2) == "FailJobSet"
    assert gke_action(PREEMPTED) == "RestartJobSetAndIgnoreMaxRestarts"
    assert gke_action(137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert gke_action(1) == gke_action(134) == "RestartJobSet"


def test_the_image_is_made_of_what_is_there_and_its_context_lets_it_through():
    commands = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [name for line in commands if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"setup.py", "flexavatar_jax", "kernels", "data_pipelines", "configs"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(ignored)
    setup = (ROOT / "setup.py").read_text()
    assert "ARG EXTRA=tpu" in commands
    assert '"tpu": [' in setup
    assert '"cuda": [' in setup


def test_gke_starts_a_process_on_each_host_of_the_topology():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == rows * columns // chips
    assert container["command"][1:] == ["-m", "flexavatar_jax.train", "--distributed"]
    (batch,) = [a for a in container["args"] if a.startswith("--config.batch=")]
    assert int(batch.split("=")[1]) % (rows * columns) == 0
    config = flex1.get_config()
    for argument in container["args"]:
        field, _, value = argument.removeprefix("--").partition("=")
        if field.startswith("config."):
            config.update_from_flattened_dict({field.removeprefix("config."): int(value)})
