"""`jaxrec check`: that it finds what is wrong, and leaves no op out."""

import json

import jax.numpy as jnp
import pytest
from jax import lax

from jaxrec.cli import check, check_cases, main
from jaxrec.ops import newton, time


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


def test_no_scan_is_left_out():
    known = {case.op for case in check_cases.cases()}
    scans = {name for name in (*time.__all__, *newton.__all__) if name.endswith("_scan")}
    # Parts of others: of layers whose state is dense, of devices, and of Newton's method.
    parts = {"dense_scan", "slstm_scan", "slstm_newton_scan"}
    assert scans - parts - {name for name in scans if name.startswith("sharded")} <= known
    assert {"linear_scan", "matrix_scan", "selective_scan"} <= {
        case.op for case in check_cases.cases() if case.spread
    }


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
