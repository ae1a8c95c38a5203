"""`jaxrec check`: that it finds what is wrong, and leaves no op out."""

import inspect
import json
import re
import typing

import jax.numpy as jnp
import pytest
from jax import lax

from jaxrec.cli import check, check_cases, main
from jaxrec.ops import depth, newton, time
from jaxrec.ops.newton.checks import Method


def records(text):
    head, *lines = (json.loads(line) for line in text.splitlines())
    assert head["machine"]["devices"] == 8
    return lines


def test_what_is_right_passes(capsys):
    assert main.main(["check", "--ops", "iterate", "causal_conv", "--json"]) == 0
    found = records(capsys.readouterr().out)
    assert {(x["op"], x["method"]) for x in found} >= {("iterate", "traced"), ("causal_conv", "op")}
    assert all(x["right"] and 0 < x["forward"] < 1e-5 and 0 < x["gradient"] < 1e-5 for x in found)


@pytest.mark.slow  # some hundred programs
def test_every_method_of_every_op_is_right_on_eight_devices(capsys):
    assert main.main(["check"]) == 0
    printed = capsys.readouterr().out
    assert "over devices" in printed and "WRONG" not in printed


def test_no_scan_no_method_and_no_way_over_devices_is_left_out():
    found = check_cases.cases()
    run = {case.op: set() for case in found}
    spread = {case.op: set() for case in found if case.spread}
    for case in found:
        (spread if case.spread else run)[case.op] |= set(case.methods)
    assert all(len(case.methods) > 1 for case in found)  # the first is the definition
    elsewhere = {"slstm_scan": "slstm", "slstm_newton_scan": "slstm"}
    # What WKV and the memory of xLSTM are made of over devices.
    elsewhere |= {"sharded_running_max": "wkv"}
    for module in (time, newton, depth, depth.halting):
        for name, function in vars(module).items():
            if not inspect.isfunction(function) or not re.search("(scan|running_max)$", name):
                continue
            hints = typing.get_type_hints(function)
            op = elsewhere.get(name, name.removeprefix("sharded_"))
            if name.startswith("sharded_"):
                assert op in spread, name
            else:
                assert set(typing.get_args(hints.get("method"))) <= run[op], name
            if "axis" in hints:
                assert op in spread, name
            if "exchange" in hints:
                assert set(typing.get_args(hints["exchange"])) <= spread[op], name
    assert {"wkv", "iterate", "adaptive_loop", "fft_conv"} <= run.keys()
    # Over devices there is no filter and no kernel, see `newton_scan`.
    assert set(typing.get_args(Method)) - {"elk", "quasi_elk", "pallas"} <= spread["newton_scan"]


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (lambda x: 1.001 * x, "forward"),
        (lambda x: x + lax.stop_gradient(x) - x / 2 - lax.stop_gradient(x / 2), "gradient"),
        (lambda x: x * jnp.nan, "forward"),
    ],
    ids=["value", "gradient", "not a number"],
)
def test_what_is_wrong_is_told(monkeypatch, capsys, wrong, part):
    def twice(method, x):
        return 2 * x if method == "right" else wrong(2 * x)

    inputs = {"x": jnp.ones((2, 3))}
    case = check_cases.Case("double", "", ("right", "wrong"), inputs, twice)
    monkeypatch.setattr(check, "cases", lambda: [case])
    assert main.main(["check", "--json"]) == 1
    right, other = records(capsys.readouterr().out)
    assert right["right"] and not other["right"]
    assert not other[part] <= check.TOLERANCE
    # The same as a person reads it.
    assert main.main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "1 of 2 within" in printed


def test_an_unknown_op_names_the_nearest(capsys):
    assert main.main(["check", "--ops", "linear_scam"]) == 2
    assert "There is no op 'linear_scam'. Did you mean linear_scan?" in capsys.readouterr().err
