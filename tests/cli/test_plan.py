"""`jaxrec plan`: numbers that can be known beforehand, and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from flax import nnx

from jaxrec.cli import main, plan
from jaxrec.models import linear_rnn

SMALL = "jaxrec.models.linear_rnn:TINY --model.width 16 --model.recurrent-width 16"
SMALL += " --model.mlp-width 16 --model.layers 1 --model.heads 2 --batch 8 --time 16"


def planned(capsys, options):
    assert main.main(["plan", *SMALL.split(), *options.split()]) == 0
    return capsys.readouterr().out


def test_what_each_device_holds(capsys):
    found = json.loads(planned(capsys, "--mesh fsdp=4,data=2 --json"))
    sizes = {"width": 16, "recurrent_width": 16, "mlp_width": 16, "layers": 1, "heads": 2}
    config = dataclasses.replace(linear_rnn.TINY, **sizes)
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(model))
    assert found["parameters"] == count and found["devices"] == 8
    on_each = found["bytes_per_device"]
    # Four bytes of a number; the matrices are split in four, and Adam keeps two numbers for each.
    assert count < on_each["parameters"] < 1.5 * count
    assert 2 * on_each["parameters"] <= on_each["optimizer"] < 2 * on_each["parameters"] + 100
    assert on_each["average"] == 0 < on_each["temporary"]
    tokens = 8 * 16
    assert found["flops_per_step"] == config.flops_per_token(16, None, training=True) * tokens
    # At least the gradient of every parameter is summed over the devices of "data".
    sent = sum(sum(kinds.values()) for kinds in found["sent_per_device"].values())
    assert sent > count
    times = found["exchanges_per_step"]
    assert {axes: set(kinds) for axes, kinds in times.items()} == {
        axes: set(kinds) for axes, kinds in found["sent_per_device"].items()
    }
    assert all(count >= 1 for kinds in times.values() for count in kinds.values())


@pytest.mark.slow  # two stacks to compile
def test_a_solver_of_puzzles_has_a_carry(capsys):
    argv = "jaxrec.models.hrm:SUDOKU_4X4 --model.width 16 --model.heads 2 --mesh data=2 --batch 4"
    argv += " --model.high-layers 1 --model.low-layers 1 --json"
    assert main.main(["plan", *argv.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_step"] == 4 * 16
    # Of each of two rows: two states, three numbers of a token, steps, puzzle, and what halted.
    assert found["bytes_per_device"]["carry"] == 2 * (2 * 16 * 16 * 4 + 2 * 16 * 4 + 4 + 4 + 1)
    assert found["bytes_per_device"]["optimizer"] > found["bytes_per_device"]["parameters"]
    assert found["flops_per_step"] > 6 * found["parameters"]
    assert set(found["sent_per_device"]) == {"data"}


def test_one_device_sends_nothing_and_is_told_so(capsys):
    printed = planned(capsys, "--mesh data=1 --card v5e")
    assert "sent by each device in a step, MB, in so many exchanges:\n  nothing" in printed
    assert "Nothing was measured on v5e" in printed and "DOES NOT FIT" not in printed


def test_what_does_not_fit_is_told(capsys, monkeypatch):
    monkeypatch.setitem(plan.CARDS, "v5e", plan.Card("TPU v5e", 1e-5, 200))
    assert "DOES NOT FIT" in planned(capsys, "--mesh data=1 --card v5e")


@pytest.mark.slow  # a process of its own, for more devices than this one has
def test_more_devices_than_there_are(capfd):
    options = ["--mesh", "data=8,fsdp=8", "--batch", "64", "--json"]
    assert main.main(["plan", *SMALL.split(), *options]) == 0
    assert json.loads(capfd.readouterr().out)["devices"] == 64


@pytest.mark.slow  # a program of 7 billion parameters
def test_seven_billion_parameters_on_512_devices_are_planned_on_a_laptop():
    """In 10 s of the processor and 0.9 GB, measured; the parameters alone would take 27 GB."""
    argv = "jaxrec.models.xlstm:XLSTM_7B --mesh data=16,fsdp=32 --precision bfloat16 --time 4096"
    # Not by `ru_maxrss`, which a process inherits from the one that starts it.
    command = """
import sys, time
from jaxrec.cli import main
status = main.main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time(), peak.split()[1], file=sys.stderr)
sys.exit(status)
"""
    # As a user runs it: none of the flags of the tests, and nothing compiled before.
    flags = ("XLA_FLAGS", "GLIBC_TUNABLES")  # of which huge pages take more than is asked for
    environment = {name: value for name, value in os.environ.items() if name not in flags}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    options = ["--batch", "512", "--json"]
    ended = subprocess.run(
        [sys.executable, "-c", command, "plan", *argv.split(), *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    seconds, kibibytes = map(float, ended.stderr.splitlines()[-1].split())
    assert found["devices"] == 512
    assert found["parameters"] == 6_865_424_896
    assert kibibytes * 1024 < 2e9 < 4 * found["parameters"]
    assert seconds < 60


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (f"{SMALL} --card H10", "--card: 'H10' is unknown. Did you mean H100?"),
        (f"{SMALL} --mesh data=3", "8 sequences per batch"),
        (
            "jaxrec.models.sequence_classifier:DIGITS --data digits",
            "is a classifier; plans are made for language models",
        ),
        ("--mesh data=2", "MODEL comes first: jaxrec plan"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, words):
    assert main.main(["plan", *argv.split()]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""
