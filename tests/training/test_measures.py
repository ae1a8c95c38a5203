"""What a model says of itself while it is trained: in metrics.jsonl, in the plot, and true."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.scan import Solver
from jaxrec.models import pararnn
from jaxrec.training import report
from jaxrec.training.data import Batches
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from jaxrec.training.report import plot_curves
from jaxrec.training.runs import load_model
from tests.training.small import LINEAR_RNN, run_config, write_text

PARARNN = dataclasses.replace(
    pararnn.TINY_GRU,
    width=16,
    layers=2,
    heads=2,
    mlp_width=24,
    context=64,
    recurrent_limit=None,
    solver=Solver(window=8),
)
NAMES = {
    "newton_iterations",
    "newton_residual",
    "newton_residual_median",
    "newton_residual_p90",
    "newton_unsettled_share",
    "newton_fallback_share",
    "max_recurrent",
    "max_jacobian",
    "lyapunov",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    runs = tmp_path_factory.mktemp("runs")
    config = run_config(text, steps=4, eval_every=2)
    return train("jaxrec.models.pararnn:TINY_GRU", PARARNN, config, runs=runs)


def logged(folder):
    return [line for line in read(folder / "metrics.jsonl") if line["kind"] == "model"]


def test_every_evaluation_leaves_a_line(trained):
    lines = logged(trained.run.folder)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert set(line) - {"step", "kind", "time"} == NAMES
        assert 2 <= line["newton_iterations"] <= 16
        assert 0 <= line["newton_residual"] <= 4 * np.finfo(np.float32).eps
        assert line["newton_residual_median"] <= line["newton_residual_p90"] <= 1e-6
        assert line["newton_fallback_share"] == line["newton_unsettled_share"] == 0
        assert line["lyapunov"] < np.log(line["max_jacobian"])
    assert lines[0]["max_recurrent"] != lines[1]["max_recurrent"]


def states_before(cell, u):
    """h_{t-1} of a ParaGRU, and its parameters, by a loop."""
    a = np.asarray(cell.recurrent[...])
    h, before = np.zeros((u.shape[0], u.shape[-1])), []
    for t in range(u.shape[1]):
        before.append(h)
        z, r = (1 / (1 + np.exp(-(a[i] * h + u[:, t, i]))) for i in range(2))
        h = (1 - z) * h + z * np.tanh(a[2] * h * r + u[:, t, 2])
    return np.stack(before, axis=1), a


def jacobian(u, h, a):
    """(1-z) + (n-h) a_z z' + z n' a_n (r + h a_r r')."""
    z, r = (1 / (1 + np.exp(-(a[i] * h + u[:, :, i]))) for i in range(2))
    n = np.tanh(a[2] * h * r + u[:, :, 2])
    inner = r + h * a[1] * r * (1 - r)
    return (1 - z) + (n - h) * a[0] * z * (1 - z) + z * (1 - n**2) * a[2] * inner


def test_the_numbers_are_those_of_a_numpy_jacobian(trained):
    model, *_ = load_model(trained.run.folder)
    data = trained.data
    batches = Batches(data.valid, batch=8, time=16, shuffle=False, max_windows=8)
    batch = batches(0)
    segments = batch["segment_ids"]
    changes = np.diff(segments, axis=1) != 0
    assert not np.any(changes), "the loop below knows of no documents"
    tokens = batch["inputs"]
    largest, exponents, entries = [], [], []
    x = model.embed(tokens)
    for layer in range(2):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)
        state = block.init_state(8)
        inner, _, _ = block._cell_input(x, state, None)
        u = np.asarray(block.cell.inputs(inner), np.float64)
        before, a = states_before(block.cell, u)
        found = np.abs(jacobian(u, before, a))
        largest.append(np.max(found))
        exponents.append(np.max(np.mean(np.log(found), axis=(0, 1))))
        entries.append(np.max(np.abs(a)))
        x, _ = block(x, state)
    last = logged(trained.run.folder)[-1]
    np.testing.assert_allclose(last["max_jacobian"], max(largest), rtol=1e-4)
    np.testing.assert_allclose(last["lyapunov"], max(exponents), rtol=1e-4)
    np.testing.assert_allclose(last["max_recurrent"], max(entries), rtol=1e-6)


def test_a_cell_that_does_not_settle_shows(trained):
    """Of 16 steps in windows of 8, one iteration settles none."""
    stubborn = dataclasses.replace(PARARNN, solver=Solver(window=8, max_iters=1))
    model = stubborn.build(rngs=nnx.Rngs(0))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    found = jax.jit(lambda model, tokens: model.measure(tokens))(model, tokens)
    assert found["newton_fallback_share"] == 1
    assert found["newton_residual"] > 1e-6
    assert found["newton_unsettled_share"] == 1
    assert found["newton_residual_median"] > 1e-6
    assert found["newton_iterations"] == 1


def test_the_plot_has_a_panel_for_each(trained, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "_draw", lambda _, points: drawn.append(points))
    plot_curves(trained.run.folder)
    lines = logged(trained.run.folder)
    names = set(lines[0]) - {"step", "kind", "time"}
    want = [[(line["step"], line[name]) for line in lines] for name in names]
    assert sorted(drawn) == sorted(want) and drawn


def test_a_model_that_says_nothing_leaves_no_line(trained, tmp_path):
    config = dataclasses.replace(trained.run.config, steps=1, eval_every=0)
    outcome = train("jaxrec.models.linear_rnn:TINY", LINEAR_RNN, config, runs=tmp_path)
    assert not logged(outcome.run.folder)
