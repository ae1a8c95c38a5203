"""The layer's start, its gates, positions and state; its values are in the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.linear_attention import DecayGate, LinearAttention
from jaxrec.training.sharding import build_mesh
from tests import references

INIT = truncated_normal(0.3)


def build(heads=2, **options):
    def layer(key):
        return LinearAttention(8, heads, 4, 6, init=INIT, rngs=nnx.Rngs(key), **options)

    return jax.jit(layer)(jax.random.key(0))


def gate(kind):
    return jax.jit(lambda key: DecayGate(8, 64, 4, kind, rank=3, init=INIT, rngs=nnx.Rngs(key)))(
        jax.random.key(0)
    )


@pytest.mark.parametrize("kind", ["step", "key_step"])
def test_decays_of_steps_begin_between_those_of_mamba(kind):
    """At x = 0: rates uniform in [1, 16] times steps log-uniform in [1e-3, 1e-1]."""
    unit = gate(kind)
    rate = np.exp(unit.log_rate[...])
    assert np.min(rate) >= 1 and np.max(rate) <= 16.001
    decay = -jax.jit(unit)(jnp.zeros((1, 1, 8)))
    assert decay.shape == ((1, 1, 64) if kind == "step" else (1, 1, 64, 4))
    assert np.min(decay) >= 1e-3 * 0.999 and np.max(decay) <= 1.6 * 1.001


def test_logistic_decays_begin_at_log_2_over_16():
    decay = jax.jit(gate("logistic"))(jnp.zeros((1, 1, 8)))
    np.testing.assert_allclose(decay, np.full((1, 1, 64, 4), -np.log(2) / 16), rtol=1e-6)


def test_constant_decays_are_retnets():
    """Of a state that holds one key, what is left after a step, by head: 31/32, 63/64, 127/128."""
    layer, x = build(heads=3, gate="constant"), jnp.zeros((1, 1, 8))
    state = layer.init_state(1)._replace(hidden=jnp.ones((1, 3, 4, 6)))
    _, after = jax.jit(layer)(x, state)
    np.testing.assert_allclose(after.hidden[0, :, 0, 0], [31 / 32, 63 / 64, 127 / 128], rtol=1e-6)


def test_keys_of_the_delta_rule_have_length_one():
    """However long the inputs are, writing a key twice leaves its value there, not twice of it."""
    layer = build(rule="delta", beta_scale=2.0)
    layer.write.kernel = nnx.Param(jnp.zeros((8, 2)), axes=("embed", "heads"))  # beta is 1
    x = jnp.full((1, 1, 8), 100.0)
    _, once = jax.jit(layer)(x, layer.init_state(1))
    _, twice = jax.jit(layer)(x, once)
    np.testing.assert_allclose(twice.hidden, once.hidden, rtol=1e-4, atol=1e-3)


def test_rotation_depends_on_distance_alone():
    """The same tokens later in a stream read the same, as long as nothing came before."""
    layer = build(gate="constant", rotary_base=10.0)
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    state, run = layer.init_state(1), jax.jit(layer)
    early, _ = run(x, state)
    late, after = run(x, state._replace(position=jnp.full(1, 40, jnp.int32)))
    np.testing.assert_allclose(late, early, atol=1e-5)
    assert after.position == 45


def test_positions_go_on_and_restart_at_resets():
    layer = build(rotary_base=10.0)
    reset = np.zeros((2, 4), bool)
    reset[0, 2] = True
    x = jnp.ones((2, 4, 8))
    _, state = jax.jit(layer)(x, layer.init_state(2), reset=reset)
    np.testing.assert_array_equal(state.position, [2, 4])
    _, state = jax.jit(layer)(x, state)
    np.testing.assert_array_equal(state.position, [6, 8])


@pytest.mark.parametrize(
    "conv_width, windows", [(None, []), (4, [(2, 3, 8), (2, 3, 8), (2, 3, 12)])]
)
def test_the_state_is_float32_whatever_the_activations(conv_width, windows):
    layer = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), build(conv_width=conv_width, gate="logistic")
    )
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    y, state = jax.eval_shape(lambda layer, x: layer(x, layer.init_state(2)), layer, x)
    assert y.dtype == jnp.bfloat16
    assert state.hidden.dtype == jnp.float32 and state.hidden.shape == (2, 2, 4, 6)
    assert [window.shape for window in state.windows] == windows
    assert all(window.dtype == jnp.float32 for window in state.windows)


def test_an_unknown_gate_is_named():
    with pytest.raises(ValueError, match=r"gate must be one of \('none', .*got 'vector'"):
        build(gate="vector")


def test_what_is_read_is_normalised_by_head():
    """Values a thousand times as large change nothing that a head gives."""
    layer = build(output_gate=False)
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    y, _ = jax.jit(layer)(x, layer.init_state(1))
    layer.value.kernel = nnx.Param(1e3 * layer.value.kernel[...], axes=("embed", "heads", None))
    larger, _ = jax.jit(layer)(x, layer.init_state(1))
    np.testing.assert_allclose(larger, y, atol=1e-3)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(layer)[1]))
    assert np.std(references.linear(params["value"], x)) > 100


def test_time_may_lie_on_several_devices():
    """Convolutions, positions and states reach across the devices, and resets end them there."""
    layer = build(rule="delta", gate="step", conv_width=4, rotary_base=10.0, chunk=2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 16, 8)).astype(np.float32)
    reset = rng.random((2, 16)) < 0.15
    state = layer.init_state(2)
    state = state._replace(hidden=rng.normal(size=state.hidden.shape).astype(np.float32))

    def run(layer, x, state, reset):
        return layer(x, state, reset=reset)

    want = jax.jit(run)(layer, x, state, reset)
    mesh = build_mesh("seq=4")
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(None, "seq"))
        got = jax.jit(run)(layer, *jax.device_put((x, state, reset), (place, None, place)))
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)
