"""Several processes make the run that one makes, lose nothing when one dies, and stop together."""

import shutil
import signal

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training import hosts
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from tests.training.commands import PATIENCE, started_together, train_words, wait_for_lines
from tests.training.small import LINEAR_RNN, run_config, write_text

PATH = "jaxrec.models.linear_rnn:TINY"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    return run_config(text, steps=12, mesh="data=4,fsdp=2")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The losses of one process with eight devices."""
    runs = tmp_path_factory.mktemp("whole")
    train(PATH, LINEAR_RNN, config, runs=runs)
    return losses(runs)


def losses(runs) -> list[float]:
    lines = read(runs / "run" / "metrics.jsonl")
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in training] == list(range(1, len(training) + 1))
    return [line["loss"] for line in training]


def assert_ended_well(children, logs):
    ends = [child.wait(PATIENCE) for child in children]
    assert ends == [0] * len(children), [log.read_text() for log in sorted(logs.iterdir())]


@pytest.mark.slow
def test_a_run_goes_on_from_a_killed_process_on_other_hosts(config, whole, tmp_path):
    """Losses near 5 agree to 1e-6 of themselves, which is ten units in their last place."""
    killed = tmp_path / "killed"
    words = train_words(PATH, LINEAR_RNN, config, killed)
    with started_together(words, tmp_path / "logs", processes=2, devices=4) as children:
        wait_for_lines(killed / "run" / "metrics.jsonl", 7, children[0])
        children[1].send_signal(signal.SIGKILL)
        assert children[0].wait(PATIENCE) != 0  # it does not wait for the dead for ever
    assert len(losses(killed)) < 12
    alone = tmp_path / "alone"
    shutil.copytree(killed, alone)
    train(PATH, LINEAR_RNN, config, runs=alone, resume=True)
    np.testing.assert_allclose(losses(alone), whole, rtol=1e-6)
    logs = tmp_path / "more"
    with started_together([*words, "--resume"], logs, processes=4, devices=2) as children:
        assert_ended_well(children, logs)
    assert "Going on from step" in (logs / "0.log").read_text()
    np.testing.assert_allclose(losses(killed), whole, rtol=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(config, whole, tmp_path):
    """As many steps as there is time for: the stop takes a few of them to go round."""
    words = [*train_words(PATH, LINEAR_RNN, config, tmp_path), "--steps", "5000"]
    logs = tmp_path / "logs"
    with started_together(words, logs, processes=2, devices=4) as children:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3, children[0])
        children[1].send_signal(signal.SIGTERM)
        assert_ended_well(children, logs)
    made = losses(tmp_path)
    assert 3 <= len(made) < 5000
    assert f"SIGTERM: saved step {len(made)} in " in (logs / "0.log").read_text()
    assert (tmp_path / "run" / "checkpoints" / str(len(made))).is_dir()
    count = min(len(made), 12)
    np.testing.assert_allclose(made[:count], whole[:count], rtol=1e-6)


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(config, tmp_path):
    """The run folder cannot be made: only process 0 tries, and all end with its line."""
    (tmp_path / "file").write_text("")
    words = train_words(PATH, LINEAR_RNN, config, tmp_path / "file")
    logs = tmp_path / "logs"
    with started_together(words, logs, processes=2, devices=4) as children:
        assert [child.wait(PATIENCE) for child in children] == [2, 2]
    for log in logs.iterdir():
        assert log.read_text().count("jaxrec: Cannot write in") == 1


@pytest.mark.parametrize(
    "environment, announced",
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # the script of sbatch, which is one process
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a[1-4]"}, True),
    ],
)
def test_several_processes_are_noticed(environment, announced):
    assert hosts.are_announced(environment) is announced


def test_variables_that_make_no_sense_are_named():
    wrong = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES must be a number from 0; got 'two'"):
        hosts.start(wrong)


def test_one_process_agrees_with_itself():
    hosts.check_same("data", {"a": 1})
    assert (hosts.several(), hosts.is_first()) == (False, True)
    assert hosts.any_true(True) and not hosts.any_true(False)
    with pytest.raises(UserError, match="no"):
        hosts.first_does(lambda: (_ for _ in ()).throw(UserError("no")))
