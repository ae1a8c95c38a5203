"""pLSTM layers on grids, and what the laws do not say of those on sequences."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.plstm import PLSTMConfig, PLSTMGridConfig
from jaxrec.layers.plstm_gates import (
    Gate,
    GateConfig,
    Projection,
    ProjectionConfig,
    TransitionConfig,
    TransitionLayerConfig,
)
from tests import references
from tests.models import toy

GRID = PLSTMGridConfig(
    width=8,
    heads=2,
    key_width=3,
    value_width=2,
    jt=2,
    jv=2,
    jo=2,
    source=GateConfig(sub_heads=8),
    transition=TransitionConfig(sub_heads=4),
    norm_epsilon=0.1,
)
D = dataclasses.replace(GRID, mode="D", fused=False)
X = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
SEQUENCE = PLSTMConfig(width=8, heads=2, key_width=3, value_width=1, skip=False)


def run(config, x=X):
    return jax.jit(lambda layer, x: layer(x))(toy.drawn(config), x)


def test_a_fused_layer_equals_the_node_loop():
    params = jax.device_get(nnx.to_pure_dict(nnx.split(toy.drawn(GRID))[1]))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    want = references.plstm_grid(wide, X.astype(np.float64), GRID)
    np.testing.assert_allclose(run(GRID), want, atol=5e-6 * np.max(np.abs(want)))


@pytest.mark.parametrize("axis", [1, 2])
def test_corrected_flips_make_a_layer_without_preference(axis):
    """With gates that do not differ between orientations the layer of a flipped grid is the flipped
    layer; the original's is not, for it never runs towards smaller y.
    """
    config = dataclasses.replace(
        D,
        source=GateConfig(weight=False),
        mark=GateConfig(weight=False),
        transition=TransitionConfig(weight=False, eigenvalue_factor=0.7),
    )
    plain = config.build(rngs=nnx.Rngs(0))
    call = jax.jit(lambda layer, x: layer(x))
    flipped = np.flip(call(plain, np.flip(X, axis)), axis)
    np.testing.assert_allclose(flipped, call(plain, X), atol=2e-5)
    original = dataclasses.replace(config, flips="original").build(rngs=nnx.Rngs(0))
    difference = np.max(np.abs(np.flip(call(original, np.flip(X, axis)), axis) - call(original, X)))
    assert (difference > 1e-3) == (axis == 2)


def test_the_original_flips_y_by_the_third_bit():
    original = dataclasses.replace(D, flips="original", orientations=(0, 1, 4, 5))
    assert original.directions == (0, 1, 2, 3) == D.directions
    assert dataclasses.replace(D, flips="original").directions == (0, 1, 0, 1)


def test_the_chirality_says_which_turn_there_is():
    absent = {}
    for chirality in ("L", "R"):
        gates = toy.drawn(dataclasses.replace(D, chirality=chirality)).gates(X, X)
        absent[chirality] = gates.transition_dl is None, gates.transition_ru is None
    assert absent == {"L": (True, False), "R": (False, True)}


@pytest.mark.parametrize("mode", ["P", "D"])
def test_bfloat16_keeps_gates_in_float32(mode):
    layer = jax.tree.map(
        lambda z: z.astype(jnp.bfloat16), toy.drawn(dataclasses.replace(GRID, mode=mode))
    )
    y = jax.jit(lambda layer, x: layer(x))(layer, X.astype(jnp.bfloat16))
    gates = jax.eval_shape(lambda x: layer.gates(x, x), X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and np.all(np.isfinite(y.astype(np.float32)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gates))


def test_a_convolution_is_read_by_those_that_are_named():
    config = dataclasses.replace(GRID, conv_width=(3, 2), skip=True)
    layer = toy.drawn(config)
    silent = dataclasses.replace(config, conv_inputs="")
    without = dataclasses.replace(silent, conv_width=None)
    assert np.any(run(config) != run(silent))
    assert "conv" in nnx.to_pure_dict(nnx.split(layer)[1])
    assert toy.parameters(silent) == toy.parameters(without) + 7 * 8


def test_the_originals_gradient_stays_inside_chunks_and_the_output_does_not_change():
    exact, cut = SEQUENCE, dataclasses.replace(SEQUENCE, gradient_chunk=4)
    x = np.random.default_rng(1).normal(size=(1, 8, 8)).astype(np.float32)

    def late(layer, x):
        return jnp.sum(layer(x, layer.init_state(1))[0][:, 7])

    layers = toy.drawn(exact), toy.drawn(cut)
    np.testing.assert_allclose(late(layers[0], x), late(layers[1], x), rtol=1e-5)
    whole, inside = (jax.jit(jax.grad(late, argnums=1))(layer, x) for layer in layers)
    assert np.all(np.any(whole != 0, axis=-1))
    # The convolution's window of 4 reaches one step before the last chunk's first key.
    np.testing.assert_array_equal(inside[:, :1], 0)
    assert np.any(inside[:, 4:] != 0)


@pytest.mark.parametrize("activation", ["identity", "tanh", "logsigmoid"])
def test_activations_of_gates(activation):
    config = GateConfig(activation=activation, activation_scale=2.0, weight=False, bias_init=0.5)
    (value,) = Gate(config, 4, 1, (), rngs=nnx.Rngs(0))(jnp.zeros((1, 4)))[0]
    want = {"identity": 0.5, "tanh": 2 * np.tanh(0.25), "logsigmoid": (1 + np.exp(-0.5)) ** -2}
    assert value == pytest.approx(want[activation], rel=1e-6)


@pytest.mark.parametrize("kind", ["tanh", "logsigmoid", "expexp"])
def test_eigenvalues_of_transitions(kind):
    options = TransitionConfig(eigenvalues=kind, eigenvalue_factor=1.5)
    config = TransitionLayerConfig(width=4, heads=1, tracked=1, options=options)
    value = config.build(rngs=nnx.Rngs(0))(jnp.zeros((1, 4)))[0, 0, 0, 0]
    want = {"tanh": np.tanh(1.5), "logsigmoid": (1 + np.exp(-1)) ** -1.5}
    want["expexp"] = np.exp(-1.5 * np.exp(-1))
    assert value == pytest.approx(want[kind], rel=1e-6)


def test_transitions_without_weights_are_those_of_their_biases():
    """O diag(tanh(factor lambda)) I in float64, whatever the input and the weights are."""
    options = TransitionConfig(weight=False, eigenvalue_factor=0.7, normaliser="qr")
    config = TransitionLayerConfig(width=4, heads=2, tracked=3, options=options)
    made = toy.drawn(config)
    got = made(jnp.full((2, 5, 4), 3.0))
    values, *mixed = (
        np.asarray(x.bias[...], np.float64) for x in (made.eigenvalues, made.into, made.out)
    )
    values, (into, out) = np.tanh(0.7 * values), (np.linalg.qr(x)[0] for x in mixed)
    want = out @ (values[..., None] * into)
    np.testing.assert_allclose(got, np.broadcast_to(want, (2, 5, *want.shape)), atol=1e-5)


def test_normalised_projections_have_unit_mean_square():
    config = ProjectionConfig(normalised=True)
    made = Projection(config, 4, 2, 3, 5, rngs=nnx.Rngs(0))(X[..., :4])
    np.testing.assert_allclose(np.mean(made**2, axis=-1), 1, rtol=2e-2)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (GRID, {"value_width": 3}, "must be the width 8, got 2 * 3 * 2 = 12"),
        (GRID, {"mode": "Q"}, "mode must be one of P, D"),
        (GRID, {"orientations": (0, 1)}, "a fused layer has the orientations (0, 1, 2, 3)"),
        (GRID, {"flips": "original"}, "a fused layer has the orientations (0, 1, 2, 3)"),
        (D, {"orientations": (4,)}, "orientations must lie in 0 to 3, got (4,)"),
        (D, {"orientations": ()}, "orientations must lie in 0 to 3"),
        (GRID, {"conv_width": (3, 1)}, "conv_width must be >= 2 along x and y"),
        (GRID, {"tie_query_key": True, "jk": 2}, "tie_query_key needs jk = jq, got 2 and 1"),
        (SEQUENCE, {"conv_width": 1}, "conv_width must be >= 2"),
        (SEQUENCE, {"chunk": 0}, "chunk must be >= 1"),
        (SEQUENCE, {"norm": "batch"}, "norm must be one of rms, layer"),
    ],
)
def test_bad_configurations_are_refused(config, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(config, **change)


def test_parts_that_do_not_divide_are_refused():
    config = dataclasses.replace(GRID, source=GateConfig(sub_heads=3))
    with pytest.raises(ValueError, match="sub_heads 3 must divide the width 8"):
        nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    config = dataclasses.replace(GRID, query=ProjectionConfig(sub_heads=3))
    with pytest.raises(ValueError, match="3 sub_heads of 8 channels cannot make 2 heads of 3"):
        nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
