"""pLSTM on sequences and grids against its original: operators and their gradients, transitions,
layers, the classifier of images, the language model.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.convert.engine import find, to_tensors
from jaxrec.layers.plstm import PLSTMConfig
from jaxrec.models.plstm import PLSTMLMConfig
from jaxrec.ops.time import GridGates, gating_tensor, grid_scan, mark_scan
from tests.golden.harness import Case, cases, check_round_trip
from tests.golden.test_plstm_graphs import LAYERS, OPERATORS, PICTURES, found

OPS = ("plstm_1d", "plstm_2d", "plstm_2d_fused")
KINDS = ("pLSTM1DLayer", "pLSTM2DLayer", "pLSTM2DLayerFused")
MODELS = ("pLSTMLM", "pLSTMVisionModel")


def is_module(config):
    names = {config.get(name) for name in ("class_name", "_shortname", "_short_name")}
    return bool(names & {*KINDS, *MODELS}) or "transition_dim" in config


FOLDERS = found(is_module)
ONE_AXIS, TWO_AXES, FUSED = (found(lambda c, op=op: c.get("op") == op) for op in OPS)


def each(folders):
    return pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name)


def test_no_case_is_of_an_unknown_kind():
    """Those of graphs and pictures have tests of their own."""
    tests = [FOLDERS, ONE_AXIS, TWO_AXES, FUSED, LAYERS, OPERATORS, PICTURES]
    assert sorted(folder for found in tests for folder in found) == sorted(cases("plstm"))


@each(ONE_AXIS)
@pytest.mark.parametrize("chunk", [1, 32])
def test_operator_on_sequences(folder, chunk):
    """Theirs has heads in the batch."""
    case = Case(folder)
    names = {"q": "Q", "k": "K", "v": "V", "source": "S0", "transition": "T0", "mark": "M0"}
    names |= {"direct": "D0"}
    given = {name: case[f"in_{theirs}"][:, :, None] for name, theirs in names.items()}
    if "in_C_initial" in case:
        names["state"], given["state"] = "C_initial", case["in_C_initial"][:, None]
    check_scale(case)

    @jax.jit
    def both(given):
        def loss(given):
            y, last = mark_scan(**given, chunk=chunk)
            total = jnp.sum(y[:, :, 0] * case["cot_O"])
            if "cot_C_last" in case:
                total = total + jnp.sum(last[:, 0] * case["cot_C_last"])
            return total, (y, last)

        return jax.grad(loss, has_aux=True)(given)

    gradient, (y, last) = both(given)
    case.check("out_O", y[:, :, 0])
    if "out_C_last" in case:
        case.check("out_C_last", last[:, 0])
    for name, theirs in names.items():
        axis = 1 if name == "state" else 2
        if f"grad_{theirs}" in case:
            case.check(f"grad_{theirs}", np.squeeze(gradient[name], axis))
    case.assert_all_looked_at()


GATE_NAMES = ("S0_r", "S0_d", "T0_rl", "T0_du", "T0_dl", "T0_ru", "M0_l", "M0_u")


def check_scale(case):
    assert case.config.get("QK_scale", "DK**-0.5") == "DK**-0.5"


@each(TWO_AXES)
@pytest.mark.parametrize("form", [{}, {"method": "sequential"}, {"tile": 3}], ids=str)
def test_operator_on_grids(folder, form):
    case = Case(folder)
    names = [name for name in GATE_NAMES if f"in_{name}" in case]
    gates = {name: case[f"in_{name}"][:, :, :, None] for name in names}
    given = [case[f"in_{name}"][:, :, :, None] for name in ("Q", "K", "V", "D0")]

    @jax.jit
    def both(given, gates):
        def loss(given, gates):
            q, k, v, direct = given
            y = grid_scan(q, k, v, GridGates(*map(gates.get, GATE_NAMES)), direct, **form)
            return jnp.sum(y[:, :, :, 0] * case["cot_O"]), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(given, gates)

    (of_given, of_gates), y = both(given, gates)
    case.check("out_O", y[:, :, :, 0])
    gradient = dict(zip(("Q", "K", "V", "D0"), of_given, strict=True)) | of_gates
    for name, value in gradient.items():
        if f"grad_{name}" in case:
            case.check(f"grad_{name}", value[:, :, :, 0])
    case.assert_all_looked_at()


@each(FUSED)
def test_four_orientations_and_their_gating_tensor(folder):
    """Theirs are [B, orientation, X, Y, ...]; out_G, if there, is [B, X, X', Y, Y', ...]."""
    case = Case(folder)
    names = [name for name in GATE_NAMES if f"in_{name}" in case]
    gates = {name: np.moveaxis(case[f"in_{name}"], 1, 3)[:, :, :, :, None] for name in names}
    given = [case[f"in_{name}"][:, :, :, None] for name in ("Q", "K", "V", "D0")]
    jo, jq, jk, jv = case["in_D0"].shape[3:]
    has_tensor = "out_G" in case

    @jax.jit
    def both(given, gates):
        def loss(given, gates):
            q, k, v, direct = given
            of_nodes = GridGates(*map(gates.get, GATE_NAMES))
            y = grid_scan(q, k, v, of_nodes, direct, orientation=(0, 1, 2, 3))[:, :, :, 0]
            total = jnp.sum(y * case["cot_O"])
            if not has_tensor:
                return total, (y, None)
            g = gating_tensor(of_nodes, direct, orientation=(0, 1, 2, 3))[:, 0]
            g = g.reshape(*g.shape[:3], jo, jq, *g.shape[4:6], jk, jv)
            g = jnp.transpose(g, (0, 1, 5, 2, 6, 3, 4, 7, 8))
            if "cot_G" in case:
                total += jnp.sum(g * case["cot_G"])
            return total, (y, g)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(given, gates)

    (of_given, of_gates), (y, g) = both(given, gates)
    case.check("out_O", y)
    if has_tensor:
        case.check("out_G", g)
    gradient = {
        name: value[:, :, :, 0] for name, value in zip("Q K V D0".split(), of_given, strict=True)
    }
    gradient |= {name: jnp.moveaxis(x[:, :, :, :, 0], 3, 1) for name, x in of_gates.items()}
    for name, value in gradient.items():
        if f"grad_{name}" in case:
            case.check(f"grad_{name}", value)
    case.assert_all_looked_at()


def output(model, x):
    """What a model of any kind makes of x."""
    if isinstance(model.config, PLSTMConfig):
        return model(x, model.init_state(x.shape[0]))[0]
    if isinstance(model.config, PLSTMLMConfig):
        return model(x.astype(jnp.int32))[0]
    return model(x)


def with_the_originals_gradient(model, case, time):
    """On sequences longer than its chunks of 2^levels the original's backward pass leaves out all
    that comes from the chunks before, unless it is asked for the last state. The exact gradient is
    one of the laws.
    """
    config = case.config
    if "block_stack" in config:
        config = config["block_stack"]["block"].get("interaction_module", {})
    if config.get("class_name") == "pLSTM1DLayer" and time > 2 ** config["levels"]:
        layer = model.blocks.mixer if isinstance(model.config, PLSTMLMConfig) else model
        layer.config = dataclasses.replace(layer.config, gradient_chunk=2 ** config["levels"])
    return model


def test_outputs_and_gradients(case):
    model = with_the_originals_gradient(case.load_model(), case, case["in_x"].shape[1])
    x = jnp.asarray(case["in_x"])
    has_gradient = jnp.issubdtype(x.dtype, jnp.floating)

    @jax.jit
    def both(model, x):
        def loss(model, x):
            y = output(model, x)
            return jnp.sum(y * case["cot_out"]), y

        argnums = (0, 1) if has_gradient else (0,)
        return jax.grad(loss, argnums=argnums, has_aux=True)(model, x)

    gradients, y = both(model, x)
    case.check("out", y)
    tensors = to_tensors(find(case.system), model, gradients[0])
    for name in case.names("grad_"):
        theirs = name.removeprefix("grad_").replace("__", ".")
        got = gradients[1] if theirs == "x" else tensors[theirs]
        case.check(name, got)


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    case.assert_all_looked_at()
