"""Monitors of a run: what is logged, that it is true, and that the step knows nothing of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from jaxrec.analysis.depth_use import latent_changes
from jaxrec.cli.train import command_line, parse
from jaxrec.errors import UserError
from jaxrec.layers.scan import Solver
from jaxrec.models import (
    hrm,
    linear_attention,
    mamba,
    mamba2,
    pararnn,
    plstm,
    prefix_linear,
    recurrentgemma,
    rnn,
    rwkv,
    xlstm,
)
from jaxrec.training import monitors, sharding
from jaxrec.training.config import MONITORS, PuzzleConfig, PuzzleDataConfig
from jaxrec.training.data import Batches
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from jaxrec.training.puzzles import train_puzzles
from jaxrec.training.report import plot_curves
from jaxrec.training.step import build_steps
from tests.models.toy import initialised
from tests.training.small import HUGINN, LINEAR_RNN, UNIVERSAL, run_config, write_text

PARARNN = dataclasses.replace(
    pararnn.TINY_GRU, width=16, layers=1, heads=2, mlp_width=24, context=64
)
GIVES = {
    "huginn": (HUGINN, {"depth", "state"}),
    "universal": (UNIVERSAL, {"depth", "state"}),
    "linear_rnn": (LINEAR_RNN, {"state", "gates"}),
    "linear_attention": (linear_attention.GATED_DELTANET_TINY, {"state", "gates"}),
    "mamba": (mamba.TINY, {"state", "gates"}),
    "mamba2": (mamba2.TINY, {"state", "gates"}),
    "plstm": (plstm.TINY, {"state", "gates"}),
    "prefix_linear": (prefix_linear.TINY, {"state"}),
    "recurrentgemma": (recurrentgemma.TINY, {"state", "gates"}),
    "rwkv": (rwkv.TINY, {"state", "gates"}),
    "xlstm": (xlstm.TINY, {"state", "gates"}),
    "elman": (dataclasses.replace(rnn.TINY_GRU, cell="elman"), {"state", "newton"}),
    "gru": (rnn.TINY_GRU, {"state", "gates", "newton"}),
    "lstm": (dataclasses.replace(rnn.TINY_GRU, cell="lstm"), {"state", "gates", "newton"}),
    "para_gru": (pararnn.TINY_GRU, {"state", "gates", "newton"}),
    "para_lstm": (pararnn.TINY_LSTM, {"state", "gates", "newton"}),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def looped(text, tmp_path_factory):
    config = run_config(text, steps=4, monitors="depth,state", monitor_every=2, eval_depths=(1, 3))
    runs = tmp_path_factory.mktemp("runs")
    return train("jaxrec.models.huginn:TINY", HUGINN, config, runs=runs)


def watched(outcome):
    return [
        line for line in read(outcome.run.folder / "metrics.jsonl") if line["kind"] == "monitor"
    ]


@pytest.mark.parametrize("name", GIVES)
def test_every_model_says_what_it_can_give(name, text):
    model_config, gives = GIVES[name]
    config = run_config(text)
    mesh = sharding.build_mesh("data=1")
    steps = build_steps(model_config, config, mesh)

    def build(*names):
        return monitors.build_monitor(
            names,
            "this model",
            monitors.language_model_forward,
            steps.computing,
            steps.abstract["params"],
            monitors.abstract_batch(2, 16, mesh),
            mesh,
        )

    for monitor in sorted(set(MONITORS) - gives)[:1]:
        with pytest.raises(UserError, match=f"nothing to say of {monitor}") as error:
            build(monitor)
        given = str(error.value).rpartition("give ")[2].rstrip(".").split(", ")
        assert set(given) == gives
    assert build(*gives) is not None
    assert build() is None


def test_a_looped_model_is_watched_at_the_interval(looped):
    lines = watched(looped)
    at_steps = [line for line in lines if "latent_rms" in line]
    assert [line["step"] for line in at_steps] == [2, 4]
    for line in at_steps:
        for name in ("latent_rms", "latent_change", "token_correlation", "effective_rank"):
            by_depth = line[f"{name}_by_depth"]
            assert len(by_depth) == HUGINN.mean_depth
            assert by_depth[-1] == line[name] and np.isfinite(by_depth).all()
        assert 1 <= line["effective_rank"] <= HUGINN.width
        assert -1 <= line["token_correlation"] <= 1
        assert len(line["stream_rms_by_time"]) == 8


def test_the_numbers_are_those_of_the_model(looped):
    """The last line, from the final parameters, against `latent_changes` and NumPy."""
    config, data = looped.run.config, looped.data
    batches = Batches(data.train, batch=config.batch, time=config.time, seed=config.seed)
    batch = batches(
        config.steps - 1, sharding.host_rows(config.batch, sharding.build_mesh("data=1"))
    )
    assert not np.any(np.diff(batch["segment_ids"], axis=1)), "latent_changes knows one document"
    key = jax.random.key(0)
    changes = latent_changes(looped.model, batch["inputs"], depth=HUGINN.mean_depth, key=key)
    line = [line for line in watched(looped) if "latent_rms" in line][-1]
    want = np.mean(np.asarray(changes), axis=(1, 2))
    np.testing.assert_allclose(line["latent_change_by_depth"], want, rtol=1e-4)


def test_at_evaluation_depths_are_compared_with_the_deepest(looped):
    (line,) = [line for line in watched(looped) if "kl_to_deepest" in line]
    assert set(line["kl_to_deepest"]) == {"1", "3"}
    assert line["kl_to_deepest"]["3"] == pytest.approx(0, abs=1e-6)
    assert line["kl_to_deepest"]["1"] > 1e-6


def test_at_evaluation_the_state_is_watched_at_the_depths(looped):
    """As `latent_changes` has it of the same windows, and one loop behind the deepest."""
    (line,) = [line for line in watched(looped) if "state_change" in line]
    config, data = looped.run.config, looped.data
    windows = Batches(
        data.valid, batch=config.batch, time=config.time, shuffle=False, max_windows=config.batch
    )
    batch = windows(0, slice(None))
    assert not np.any(np.diff(batch["segment_ids"], axis=1)), "latent_changes knows one document"
    changes = latent_changes(looped.model, batch["inputs"], depth=4, key=jax.random.key(0))
    want = np.mean(np.asarray(changes), axis=(1, 2))
    assert line["state_change"] == pytest.approx({"1": want[0], "3": want[2]}, rel=1e-4)
    assert line["fixed_point_distance"] == pytest.approx(want[3], rel=1e-4)


def test_the_plot_has_a_panel_for_each(looped, monkeypatch):
    saved, real = [], Figure.savefig

    def save(figure, *arguments, **options):
        saved.append(figure)
        real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    picture = plot_curves(looped.run.folder)
    assert picture.read_bytes().startswith(b"\x89PNG")
    titles = {panel.get_title() for panel in saved[0].axes if panel.get_visible()}
    names = {name for line in watched(looped) for name in line} - {"step", "kind", "time"}
    assert {name.replace("_", " ") for name in names} <= titles and len(names) > 8


def test_the_step_is_the_same_program_with_and_without(text):
    mesh = sharding.build_mesh("data=1")
    programs = set()
    for names in ("", "state,gates"):
        config = run_config(text, monitors=names)
        steps = build_steps(LINEAR_RNN, config, mesh)
        batch = monitors.abstract_batch(config.batch, config.time, mesh)
        programs.add(steps.train.lower(steps.abstract, batch, jnp.int32(0)).as_text())
    assert len(programs) == 1


def test_what_is_not_watched_trains_the_same(text, looped, tmp_path):
    config = dataclasses.replace(looped.run.config, monitors="")
    plain = train("jaxrec.models.huginn:TINY", HUGINN, config, runs=tmp_path)
    assert not watched(plain)
    jax.tree.map(np.testing.assert_array_equal, plain.state["params"], looped.state["params"])


def look(model_config, *names, mesh="data=1"):
    """What one look at a fresh model and its first batch says."""
    mesh = sharding.build_mesh(mesh)
    config = run_config("-")
    steps = build_steps(model_config, config, mesh)
    tokens = np.random.default_rng(0).integers(0, 200, (2, 16)).astype(np.int32)
    batch = {"inputs": tokens, "labels": tokens, "segment_ids": np.zeros_like(tokens)}
    monitor = monitors.build_monitor(
        names,
        "this model",
        monitors.language_model_forward,
        steps.computing,
        steps.abstract["params"],
        batch,
        mesh,
    )
    params = nnx.to_pure_dict(nnx.split(initialised(model_config))[1])
    places = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract["params"])
    return monitors.summary(
        monitor(jax.device_put(params, places), sharding.put_batch(batch, mesh))
    )


def test_gates_of_a_linear_recurrence():
    found = look(LINEAR_RNN, "gates")
    assert 0.9 < found["largest_decay"] < 1
    assert found["stability_margin"] == 1 - found["largest_decay"]
    assert sum(found["memory_steps"]) == pytest.approx(1)
    assert 0 <= found["saturated_gates"] < 0.1


def test_no_more_rows_are_watched_than_a_step_has_in_memory():
    batch = monitors.abstract_batch(6, 8, sharding.build_mesh("data=1"))
    model = nnx.eval_shape(lambda: LINEAR_RNN.build(rngs=nnx.Rngs(0)))
    for parts in (1, 3):
        forward = functools.partial(monitors.language_model_forward, parts=parts)
        assert jax.eval_shape(forward, model, batch)[0].shape[0] == 6 // parts


def test_many_devices_see_what_one_sees():
    names = ("state", "gates")
    one, four = (look(LINEAR_RNN, *names, mesh=mesh) for mesh in ("data=1", "data=2,seq=2"))
    assert one.keys() == four.keys()
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_newton_is_watched_as_it_is_measured():
    found = look(PARARNN, "newton")
    assert found["newton_iterations"] >= 2
    assert found["newton_unsettled_share"] == 0
    assert 0 <= found["newton_residual_median"] <= found["newton_residual_p90"] < 1e-6


@pytest.mark.parametrize("max_iters", [None, 2])
def test_newton_is_compared_with_a_run_step_by_step(max_iters):
    """What has not settled is told by how far it is from where it should be."""
    solver = Solver(method="newton", max_iters=max_iters, tol=None if max_iters is None else 1.0)
    config = dataclasses.replace(PARARNN, solver=solver)
    mesh = sharding.build_mesh("data=1")
    steps = build_steps(config, run_config("-"), mesh)
    error = monitors.build_solver_error(monitors.language_model_forward, steps.computing, mesh)
    tokens = np.random.default_rng(0).integers(0, 200, (2, 16)).astype(np.int32)
    params = nnx.to_pure_dict(nnx.split(initialised(config))[1])
    found = error(params, {"inputs": tokens, "segment_ids": np.zeros_like(tokens)})
    assert found < 1e-6 if max_iters is None else found > 1e-5


@pytest.mark.slow
def test_a_solver_is_watched_by_cycle(tmp_path):
    model = dataclasses.replace(hrm.SUDOKU_4X4, width=16, heads=2, high_layers=1, low_layers=1)
    data = PuzzleDataConfig(puzzles=4, held_out=2, augmentations=0)
    config = PuzzleConfig(
        name="p",
        steps=1,
        batch=4,
        monitors="depth,state",
        monitor_every=1,
        eval_every=0,
        eval_puzzles=1,
        data=data,
    )
    outcome = train_puzzles("jaxrec.models.hrm:SUDOKU_4X4", model, config, runs=tmp_path)
    (line,) = watched(outcome)
    assert len(line["latent_rms_by_depth"]) == model.max_segments * model.high_cycles
    assert line["latent_rms"] == pytest.approx(1, rel=1e-2)  # its last norm has no scale
    *earlier, last = line["kl_to_deepest_by_depth"]
    assert len(earlier) == model.max_segments - 1 and last == 0 < min(earlier)


def test_they_are_options_of_train_and_kept_when_a_command_is_printed():
    words = ["--monitors", "depth, state,depth", "--monitor-every", "7"]
    path, arguments = parse(["jaxrec.models.huginn:TINY", *words])
    assert arguments.train.monitor_names == ("depth", "state")
    assert arguments.train.monitor_every == 7
    assert "--monitors 'depth, state,depth' --monitor-every 7" in command_line(path, arguments)


def test_unknown_monitors_and_those_a_model_lacks_are_refused_before_anything_is_written(
    text, tmp_path
):
    with pytest.raises(UserError, match="monitors must be one of depth, state, gates, newton"):
        run_config(text, monitors="depht")
    config = run_config(text, monitors="gates,state")
    with pytest.raises(UserError, match=r"nothing to say of gates\. It can give depth, state"):
        train("jaxrec.models.huginn:TINY", HUGINN, config, runs=tmp_path)
    assert not any(tmp_path.iterdir())
