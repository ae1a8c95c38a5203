"""`jaxrec launch`: what it writes can be read by those it is for, and starts what was asked."""

import json
import os
import subprocess

import pytest
import yaml

from jaxrec.cli.main import main

TRAIN = ["train", "jaxrec.models.huginn:TINY", "--runs", "/shared/my runs"]


def written(capsys, *options, mesh="data=16"):
    assert main(["launch", *options, "--", *TRAIN, "--mesh", mesh]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    assert main(["launch", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def check_bash(text):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_slurm_asks_for_a_process_per_device(capsys):
    text = written(capsys, "slurm", "--hosts", "2", "--devices", "8", "--folder", "my code")
    check_bash(text)
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue"} <= set(asked)
    assert "cd 'my code'" in text
    command = "jaxrec train jaxrec.models.huginn:TINY --runs '/shared/my runs' --mesh data=16"
    assert f"srun --kill-on-bad-exit=1 {command}" in text


@pytest.mark.parametrize("tpu", [None, "tpu-v5p-slice/2x2x4"])
def test_gke_gives_each_pod_its_number_and_the_address_of_the_first(capsys, tpu):
    options = ["--tpu", tpu] if tpu else []
    text = written(capsys, "gke", "--hosts", "4", "--devices", "4", "--name", "run-a", *options)
    service, job = yaml.safe_load_all(text)
    assert service["spec"]["clusterIP"] == "None"
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (4, 4, "Indexed")
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == "run-a"
    (container,) = pod["containers"]
    values = {each["name"]: each["value"] for each in container["env"]}
    assert values["JAX_COORDINATOR_ADDRESS"].startswith("run-a-0.run-a:")
    assert values["JAX_NUM_PROCESSES"] == "4"
    limits = container["resources"]["limits"]
    assert limits == {"google.com/tpu" if tpu else "nvidia.com/gpu": 4}
    assert ("nodeSelector" in pod) == bool(tpu)
    (script,) = container["args"]
    check_bash(script)
    assert script.startswith("export JAX_PROCESS_ID=$JOB_COMPLETION_INDEX;")


def test_ssh_starts_one_process_on_each_host(capsys, tmp_path):
    """With an ssh that runs here what it is given, and a jaxrec that notes how it was called."""
    programs, work = tmp_path / "programs", tmp_path / "my code"
    programs.mkdir()
    work.mkdir()
    note = "import json, os, sys; names = ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID')\n"
    note += "found = [os.environ['JAX_' + name] for name in names]\n"
    note += "open(f'{found[-1]}.json', 'w').write(json.dumps([found, sys.argv[1:]]))\n"
    note += "sys.exit(3 * int(found[-1]))\n"
    (programs / "jaxrec").write_text(f"#!/usr/bin/env python3\n{note}")
    (programs / "ssh").write_text('#!/usr/bin/env bash\nbash -c "$2"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    script = tmp_path / "start.sh"
    options = ["--devices", "8", "--addresses", "alpha", "beta", "--folder", str(work)]
    assert "Wrote" in written(capsys, "ssh", *options, "--out", str(script))
    check_bash(script.read_text())
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(script)], env=environment, check=False)
    assert done.returncode == 3  # that of the process that failed
    for i in range(2):
        found, words = json.loads((work / f"{i}.json").read_text())
        assert found == ["alpha:12345", "2", str(i)]
        assert words == [*TRAIN, "--mesh", "data=16"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["slurm"], "behind --: jaxrec launch slurm -- train"),
        (["slurm", "--", "eval", "x"], "Behind -- stands a jaxrec train command, got 'eval x'"),
        (["pbs", "--", *TRAIN], "pbs"),
        (["slurm", "--hosts", "0", "--", *TRAIN], "--hosts must be at least 1, got 0"),
        (["slurm", "--", *TRAIN], "2 hosts with 8 devices each have 16, the mesh data=1 does not"),
        (["ssh", "--", *TRAIN], "ssh needs the names of the hosts"),
        (["gke", "--name", "My run", "--", *TRAIN], "use lower-case letters, digits and dashes"),
        (["gke", "--tpu", "v5p", "--", *TRAIN], "expected TYPE/TOPOLOGY"),
        (["slurm", "--", "train", "jaxrec.models.hugin:TINY"], "Did you mean"),
    ],
)
def test_what_cannot_be_started_is_refused(capsys, argv, says):
    assert says in refused(capsys, *argv)
