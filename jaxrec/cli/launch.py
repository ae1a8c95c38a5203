"""`jaxrec launch KIND -- train ...`: writes what starts one run on several hosts; starts nothing.

All three kinds start the same command once per process and say where process 0 is; see
docs/operations.md for what happens when one of them stops.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from jaxrec.errors import UserError
from jaxrec.training.sharding import parse_mesh

HELP = """usage: jaxrec launch KIND [options] -- train MODEL ...

KIND is slurm (a script for sbatch), gke (a manifest for kubectl apply, for GPUs or TPUs) or ssh (a
shell script that starts one process on each of --addresses). What follows -- is the command of
every process; its --mesh must use all devices, and its --runs a folder that all hosts see."""
PORT = 12345


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write what starts a training run on several hosts; nothing is started."""

    kind: tyro.conf.Positional[Literal["slurm", "gke", "ssh"]]
    """slurm, gke or ssh."""
    hosts: int = 2
    """Machines, >= 1; with ssh the number of --addresses."""
    devices: int = 8
    """Accelerators of each machine, >= 1."""
    name: str = "jaxrec"
    """Of the job: lower-case letters, digits and dashes."""
    folder: str = "."
    """Where the command runs on every host."""
    program: str = "jaxrec"
    """How jaxrec is called there, such as .venv/bin/jaxrec."""
    time: str = "24:00:00"
    """slurm: the limit, after which the job is queued again."""
    image: str = "IMAGE"
    """gke: the container image."""
    tpu: str | None = None
    """gke: TPU type and topology, such as tpu-v5p-slice/2x2x4; GPUs if left out."""
    addresses: tuple[str, ...] = ()
    """ssh: the hosts, as ssh and each other know them; the first is process 0."""
    out: Path | None = None
    """File to write; standard output if left out."""


class Launch(NamedTuple):
    """What is to be started, and where."""

    arguments: Arguments
    words: tuple[str, ...]  # of the command, from "train" on


def parse(argv: Sequence[str]) -> Launch:
    """Reads the options, and the command behind `--`.

    Raises:
      UserError: an option is bad, or the command is not one that several hosts can run.
    """
    from jaxrec.cli.main import read_arguments
    from jaxrec.cli.train import parse as parse_train

    own, words = list(argv), tuple[str, ...]()
    if "--" in own:
        cut = own.index("--")
        own, words = own[:cut], tuple(own[cut + 1 :])
    elif not own or {"-h", "--help"} & set(own):
        print(HELP, end="\n\n")
        own = ["--help"]
    else:
        raise UserError("Say what each host runs, behind --: jaxrec launch slurm -- train ...")
    arguments: Arguments = read_arguments(Arguments, own, "jaxrec launch")
    if arguments.kind == "ssh" and len(arguments.addresses) < 1:
        raise UserError("--addresses: ssh needs the names of the hosts.")
    for option in ("hosts", "devices"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option} must be at least 1, got {getattr(arguments, option)}.")
    letters = arguments.name.replace("-", "")
    if not (letters.isascii() and letters.isalnum() and arguments.name == arguments.name.lower()):
        raise UserError(
            f"--name {arguments.name!r}: use lower-case letters, digits and dashes, which all three"
            " kinds accept."
        )
    if arguments.tpu is not None and arguments.tpu.count("/") != 1:
        raise UserError(f"--tpu {arguments.tpu}: expected TYPE/TOPOLOGY, as tpu-v5p-slice/2x2x4.")
    if words[:1] != ("train",):
        raise UserError(f"Behind -- stands a jaxrec train command, got {' '.join(words)!r}.")
    _, parsed = parse_train(words[1:])
    there = len(arguments.addresses) if arguments.kind == "ssh" else arguments.hosts
    mesh, devices = parsed.train.mesh, there * arguments.devices
    if math.prod(parse_mesh(mesh).values()) != devices:
        raise UserError(
            f"{there} hosts with {arguments.devices} devices each have {devices}, the mesh {mesh}"
            f" does not. Use --mesh data={devices}, or another product."
        )
    return Launch(arguments, words)


def run(launch: Launch) -> int:
    """Writes the script or manifest."""
    text = {"slurm": _slurm, "gke": _gke, "ssh": _ssh}[launch.arguments.kind](launch)
    if launch.arguments.out is None:
        print(text, end="")
    else:
        launch.arguments.out.write_text(text)
        print(f"Wrote {launch.arguments.out}.")
    return 0


def _command(launch: Launch) -> str:
    return shlex.join([*shlex.split(launch.arguments.program), *launch.words])


def _slurm(launch: Launch) -> str:
    options = launch.arguments
    return f"""#!/usr/bin/env bash
# sbatch this file. It starts one process per device on {options.hosts} nodes, as jax expects it
# under SLURM: each takes the GPU of its local rank, and SLURM's variables say where process 0 is.
#SBATCH --job-name={options.name}
#SBATCH --nodes={options.hosts}
#SBATCH --ntasks-per-node={options.devices}
#SBATCH --gpus-per-node={options.devices}
#SBATCH --time={options.time}
# SIGTERM two minutes before the limit or a preemption: the run saves and ends with status 0.
#SBATCH --signal=TERM@120
# A job that was preempted, or lost a node, is queued again; the same command goes on from its last
# checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={options.name}-%j.log
set -euo pipefail
cd {shlex.quote(options.folder)}
# Compiled programs, so that a job that is queued again does not compile again.
export JAX_COMPILATION_CACHE_DIR="$PWD/.cache/jax"
# One process that fails ends the others at once instead of after their heartbeat.
srun --kill-on-bad-exit=1 {_command(launch)}
# A job that met its limit saved and ended with status 0: sbatch this file again to go on.
"""


def _gke(launch: Launch) -> str:
    options = launch.arguments
    resource, selector = "nvidia.com/gpu", ""
    if options.tpu is not None:
        kind, topology = options.tpu.split("/")
        resource = "google.com/tpu"
        selector = f"""      nodeSelector:
        cloud.google.com/gke-tpu-accelerator: {kind}
        cloud.google.com/gke-tpu-topology: {topology}
"""
    return f"""# kubectl apply -f this file. The indexed job numbers its {options.hosts} pods, and
# the service gives them names, by which they find process 0.
apiVersion: v1
kind: Service
metadata:
  name: {options.name}
spec:
  clusterIP: None
  # Names must resolve before the pods are ready: that is when process 0 is looked for.
  publishNotReadyAddresses: true
  selector:
    job-name: {options.name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {options.name}
spec:
  completionMode: Indexed
  completions: {options.hosts}
  parallelism: {options.hosts}
  # A pod that ends with an error is started again, and so are the others, which then miss it; the
  # same command goes on from the last checkpoint.
  backoffLimit: 1000
  template:
    spec:
      subdomain: {options.name}
      restartPolicy: OnFailure
      # Room to save after SIGTERM, before a node is taken away.
      terminationGracePeriodSeconds: 120
{selector}      containers:
      - name: train
        image: {options.image}
        workingDir: {options.folder if options.folder != "." else "/work"}
        command: ["bash", "-c"]
        args:
        - >-
          export JAX_PROCESS_ID=$JOB_COMPLETION_INDEX;
          exec {_command(launch)}
        env:
        - {{name: JAX_COORDINATOR_ADDRESS, value: "{options.name}-0.{options.name}:{PORT}"}}
        - {{name: JAX_NUM_PROCESSES, value: "{options.hosts}"}}
        resources:
          limits: {{{resource}: {options.devices}}}
        # Put a volume that all pods share where --runs points to, or give --runs gs://... .
"""


def _ssh(launch: Launch) -> str:
    options = launch.arguments
    hosts, folder = options.addresses, shlex.quote(options.folder)
    return f"""#!/usr/bin/env bash
# Run this file where ssh reaches all hosts without a password. It starts one process on each host,
# waits for all, and passes SIGTERM and Ctrl-C on, so that the run saves. Start it again to go on.
set -uo pipefail
hosts=({" ".join(map(shlex.quote, hosts))})
# Process 0 is on the first host; the others must reach this port.
coordinator="${{hosts[0]}}:{PORT}"
command={shlex.quote(_command(launch))}

stop() {{
    for i in "${{!hosts[@]}}"; do
        ssh "${{hosts[$i]}}" "kill -TERM \\$(cat /tmp/{options.name}-$i.pid)" || true
    done
}}
trap stop TERM INT

pids=()
for i in "${{!hosts[@]}}"; do
    # Each host keeps the number of its process, by which `stop` finds it. stdin is closed, or the
    # first ssh would take that of this script.
    ssh "${{hosts[$i]}}" "cd {folder} && echo \\$\\$ > /tmp/{options.name}-$i.pid &&
        export JAX_COORDINATOR_ADDRESS=$coordinator JAX_NUM_PROCESSES=${{#hosts[@]}} &&
        export JAX_PROCESS_ID=$i &&
        exec $command" < /dev/null &
    pids+=($!)
done
status=0
for pid in "${{pids[@]}}"; do
    # A signal interrupts `wait`; the process is then still saving.
    until wait "$pid"; do
        code=$?
        kill -0 "$pid" 2>/dev/null && continue
        status=$code
        break
    done
done
exit "$status"
"""
