"""The mixer's start, its options and its state; its values are in the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.mlstm import MLSTM
from jaxrec.training.sharding import build_mesh
from tests import references
from tests.ops.time.test_sharded import collectives

INIT = jax.nn.initializers.normal()


def build(**options):
    make = jax.jit(lambda key: MLSTM(8, 2, 4, 6, init=INIT, rngs=nnx.Rngs(key), **options))
    return make(jax.random.key(0))


def test_gates_begin_closed_to_inputs_and_open_to_the_past():
    mixer = build()
    np.testing.assert_array_equal(mixer.input_gate.bias[...], [-10, -10])
    np.testing.assert_array_equal(mixer.forget_gate.bias[...], [3, 6])
    for gate in (mixer.input_gate, mixer.forget_gate, mixer.output_gate):
        np.testing.assert_array_equal(gate.kernel[...], np.zeros_like(gate.kernel[...]))


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_there_when_asked_for(bias):
    params = nnx.to_pure_dict(nnx.split(build(bias=bias))[1])
    always = {"input_gate", "forget_gate"}
    assert {name for name, leaves in params.items() if "bias" in leaves} == (
        set(params) if bias else always
    )


@pytest.mark.parametrize("cap", [None, 2.0])
def test_gates_are_capped(cap):
    rng = np.random.default_rng(0)
    mixer = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), build(gate_soft_cap=cap)
    )
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    y, _ = jax.jit(mixer)(x, mixer.init_state(2))
    params = jax.device_get(nnx.to_pure_dict(nnx.split(mixer)[1]))
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    state = [np.zeros(leaf.shape) for leaf in mixer.init_state(2)]
    never = np.zeros((2, 5), bool)
    want, *_ = references.mlstm_mixer(params, x.astype(np.float64), *state, never, cap)
    np.testing.assert_allclose(y, want, atol=1e-5 * np.max(np.abs(want)))


def test_the_state_is_float32_whatever_the_activations():
    mixer = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), build())
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    y, state = jax.eval_shape(lambda mixer, x: mixer(x, mixer.init_state(2)), mixer, x)
    assert y.dtype == jnp.bfloat16
    assert [leaf.shape for leaf in state] == [(2, 2, 2, 3), (2, 2, 2), (2, 2)]
    assert all(leaf.dtype == jnp.float32 for leaf in state)


def test_no_sequence_is_gathered():
    """A head's map is a decay and a state of 2 x 3 numbers and the 2 of the normaliser."""
    rng = np.random.default_rng(0)
    mixer = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), build())
    x = rng.normal(size=(2, 32, 8)).astype(np.float32)
    state = mixer.init_state(2)
    want = jax.jit(mixer)(x, state)
    devices = build_mesh("seq=4")
    with jax.set_mesh(devices):
        place = jax.NamedSharding(devices, jax.P(None, "seq"))
        program = jax.jit(mixer, in_shardings=(place, None)).lower(x, state).compile()
        got = program(jax.device_put(x, place), state)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5 * np.max(np.abs(right)))
    _, largest = collectives(program)
    assert largest <= 4 * 2 * 2 * 2 * (1 + 3 + 1) < x.size
