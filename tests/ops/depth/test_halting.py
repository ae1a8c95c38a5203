"""Adaptive computation time: the worked trace, a scalar loop, both forms, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.depth.halting import (
    adaptive_loop,
    begin_halting,
    global_probability,
    halt,
    ponder_loss,
)

RULES = ["interpolate", "accumulate", "copy-halted"]


@pytest.mark.parametrize(
    ("rule", "weights"), [("interpolate", [0.12, 0.4, 0.2]), ("accumulate", [0.3, 0.5, 0.2])]
)
def test_the_worked_trace(rule, weights):
    """p = 0.3, 0.5, 0.4: two loops count in part, the third gets the remainder 0.2."""
    states = np.eye(3, dtype=np.float32)[:, None, None]  # the output shows each state's weight
    halting = begin_halting(jnp.zeros((1, 1, 3)))
    expected = [(0.3, 0, 1), (0.8, 0, 2), (1.0, 0.2, 3), (1.0, 0.2, 3)]
    for p, new, numbers in zip([0.3, 0.5, 0.4, 0.9], [*states, states[0]], expected, strict=True):
        halting = halt(halting, jnp.full((1, 1), p), jnp.asarray(new), rule=rule)
        got = [float(x[0, 0]) for x in halting[:3]]
        np.testing.assert_allclose(got, numbers, atol=1e-6)
    np.testing.assert_allclose(halting.output[0, 0], weights, atol=1e-6)
    assert float((halting.updates + halting.remainder)[0, 0]) == pytest.approx(3.2)


def test_a_probability_near_one_halts_at_once():
    new = jnp.ones((1, 1, 2))
    halting = halt(begin_halting(new), jnp.full((1, 1), 0.995), new, rule="interpolate")
    assert [float(x[0, 0]) for x in halting[:3]] == [1, 1, 1]
    np.testing.assert_array_equal(halting.output, new)


MATRIX = 0.5 * np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
VECTOR = np.random.default_rng(1).normal(size=4).astype(np.float32)
STATE = np.random.default_rng(2).normal(size=(2, 3, 4)).astype(np.float32)


def loop(matrix, state, **options):
    """A layer that mixes positions, so that halted ones matter to others."""
    return adaptive_loop(
        step=lambda s, t, passes: (
            jnp.tanh(s @ matrix + jnp.mean(s, axis=1, keepdims=True)),
            passes + 1,
        ),
        probability=lambda s: jax.nn.sigmoid(s @ VECTOR - 0.5),
        prepare=lambda s, t: s + 0.1 * t.astype(jnp.float32),
        state=state,
        max_loops=9,
        memory=jnp.zeros((), jnp.int32),
        **options,
    )


def naive(rule, epsilon=0.01):
    s, shape = STATE.astype(np.float64), STATE.shape[:2]
    h, rem, n, out = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros_like(s)
    for t in range(9):
        old, s = s, s + 0.1 * t
        p = 1 / (1 + np.exp(-(s @ VECTOR - 0.5)))
        s = np.tanh(s @ MATRIX + s.mean(1, keepdims=True))
        for at in np.ndindex(shape):
            if h[at] >= 1:
                if rule == "copy-halted":
                    s[at] = old[at]
                continue
            n[at] += 1
            if h[at] + p[at] > 1 - epsilon:
                u = rem[at] = 1 - h[at]
                h[at] = 1
            else:
                u = p[at]
                h[at] += u
            out[at] = u * s[at] + ((1 - u) if rule == "interpolate" else 1) * out[at]
    return out, n + rem


@pytest.mark.parametrize("rule", RULES)
def test_the_loop_equals_a_scalar_one_in_both_forms(rule):
    output, ponder = naive(rule)
    assert len(np.unique(np.floor(ponder))) > 1, "positions should halt at different loops"
    for differentiable in (True, False):
        end = jax.jit(lambda m, s, d=differentiable: loop(m, s, rule=rule, differentiable=d))(
            MATRIX, STATE
        )
        np.testing.assert_allclose(end.halting.output, output, atol=2e-6)
        np.testing.assert_allclose(end.ponder, ponder, atol=2e-6)
        assert end.memory == end.loops == (9 if differentiable else int(ponder.max()))


def test_only_the_remainder_trains_the_ponder_time():
    """Its gradient is that of minus the probabilities before the last loop."""

    def ponder(p):
        halting = begin_halting(jnp.zeros((1, 1, 1)))
        for each in p:
            halting = halt(halting, each[None, None], jnp.ones((1, 1, 1)), rule="accumulate")
        return ponder_loss(jax.lax.stop_gradient(halting.updates) + halting.remainder)

    np.testing.assert_allclose(jax.grad(ponder)(jnp.array([0.3, 0.5, 0.4])), [-1, -1, 0])


def test_padding_does_not_ponder_and_rows_may_halt_as_one():
    ponder = jnp.array([[1.0, 2.0, 9.0]])
    assert ponder_loss(ponder) == 4
    assert ponder_loss(ponder, jnp.array([[True, True, False]])) == 1.5
    np.testing.assert_allclose(global_probability(ponder), [[4, 4, 4]])
    masked = global_probability(ponder, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(masked, [[1.5, 1.5, 1.5]])


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule must be one of"):
        halt(begin_halting(jnp.zeros((1, 1, 1))), jnp.zeros((1, 1)), jnp.zeros((1, 1, 1)), rule="x")
