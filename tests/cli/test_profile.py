"""`jaxrec profile`: a trace on disk and a table of what took the time."""

import json

import pytest

from jaxrec.cli.main import main
from jaxrec.models import huginn, linear_rnn
from tests.training.small import HUGINN, LINEAR_RNN, model_options

MODELS = {"huginn": (huginn.TINY, HUGINN), "linear_rnn": (linear_rnn.TINY, LINEAR_RNN)}
SIZES = ["--batch", "2", "--time", "16", "--repeats", "2"]


def words(model, part, out):
    usual, small = MODELS[model]
    path = f"jaxrec.models.{model}:TINY"
    options = [*SIZES, "--part", part, "--out", str(out), *model_options(small, usual)]
    return ["profile", path, *options]


@pytest.mark.parametrize(
    "model, part, scope",
    [
        ("linear_rnn", "forward", "rglru"),
        ("huginn", "decode", "core"),
        pytest.param("linear_rnn", "step", "rglru", marks=pytest.mark.slow),
        pytest.param("huginn", "step", "core", marks=pytest.mark.slow),
        pytest.param("linear_rnn", "decode", "rglru", marks=pytest.mark.slow),
    ],
)
def test_a_part_is_traced_and_its_operations_are_listed(model, part, scope, tmp_path, capsys):
    out = tmp_path / "profile"
    assert main([*words(model, part, out), "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert f"jaxrec.models.{model}:TINY: {part} on cpu" in shown
    assert list(out.rglob("*.xplane.pb"))
    record = json.loads((out / "operations.json").read_text())
    rows = record["operations"]
    assert len(rows) > 3 and f"{len(rows) - 3} others" in shown
    assert [row["seconds"] for row in rows] == sorted((r["seconds"] for r in rows), reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(r["seconds"] for r in rows) == pytest.approx(record["operation_seconds"])
    assert any(scope in row["scope"] for row in rows)
    assert sum(record["scopes"].values()) == pytest.approx(1)
    assert not any(row["kind"] in ("while", "call") for row in rows)
    if part == "step":
        assert any(row["scope"].endswith("'") for row in rows), "no gradient"


@pytest.mark.slow
def test_a_solver_is_traced_too(tmp_path, capsys):
    argv = ["profile", "jaxrec.models.hrm:SUDOKU_4X4", "--batch", "2", "--out", str(tmp_path)]
    argv += ["--model.width", "16", "--model.heads", "2", "--repeats", "1", "--json"]
    assert main(argv) == 0
    record = json.loads(capsys.readouterr().out)
    assert any("low" in row["scope"] for row in record["operations"])


def test_what_cannot_be_traced_is_said(capsys):
    for extra, said in (
        (["jaxrec.models.hrm:SUDOKU_4X4", "--part", "decode"], "decodes nothing"),
        (["jaxrec.models.huginn:TINY", "--repeats", "0"], "--repeats must be at least 1"),
    ):
        assert main(["profile", *extra]) == 2
        assert said in capsys.readouterr().err
