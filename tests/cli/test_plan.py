"""`jaxrec plan`: numbers that can be known beforehand, and what it refuses."""

import dataclasses
import json

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


def test_one_device_sends_nothing_and_is_told_so(capsys):
    printed = planned(capsys, "--mesh data=1 --card v5e")
    assert "sent by each device in a step, MB:\n  nothing" in printed
    assert "Nothing was measured on v5e" in printed and "DOES NOT FIT" not in printed


def test_what_does_not_fit_is_told(capsys, monkeypatch):
    monkeypatch.setitem(plan.CARDS, "v5e", plan.Card("TPU v5e", 1e-5, 200))
    assert "DOES NOT FIT" in planned(capsys, "--mesh data=1 --card v5e")


@pytest.mark.slow  # a process of its own, for more devices than this one has
def test_more_devices_than_there_are(capfd):
    options = ["--mesh", "data=8,fsdp=8", "--batch", "64", "--json"]
    assert main.main(["plan", *SMALL.split(), *options]) == 0
    assert json.loads(capfd.readouterr().out)["devices"] == 64


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (f"{SMALL} --card H10", "--card: 'H10' is unknown. Did you mean H100?"),
        (f"{SMALL} --mesh data=3", "8 sequences per batch"),
        (
            "jaxrec.models.hrm:SUDOKU_4X4",
            "is no language model; plans are made",
        ),
        ("--mesh data=2", "MODEL comes first: jaxrec plan"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, words):
    assert main.main(["plan", *argv.split()]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""
