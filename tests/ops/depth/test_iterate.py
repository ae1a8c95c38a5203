"""How loops in depth stop, what they report, and where gradients end; values are in the laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.depth import iterate
from jaxrec.ops.depth.remat import REMAT_POLICIES


def double(z):
    return 2 * z


def is_large(new, old):
    return jnp.all(new >= 10, axis=-1)


Z = np.array([[1.0, 1.0], [20.0, 20.0], [0.1, 0.1]], np.float32)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("options", [{}, {"grad_steps": 2}, {"grad_steps": 9}, {"grad_steps": 0}])
def test_info_counts_the_steps(traced, options):
    run = functools.partial(iterate, double, **options)
    z, info = jax.jit(run)(Z, jnp.int32(5)) if traced else jax.jit(lambda z: run(z, 5))(Z)
    np.testing.assert_array_equal(z, Z * 32)
    assert (info.steps, info.converged) == (5, False)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("options", [{}, {"grad_steps": 3}, {"grad_steps": 6}])
def test_until_halts_each_element(traced, options):
    run = functools.partial(iterate, double, until=is_large, **options)
    z, info = jax.jit(run)(Z, jnp.int32(6)) if traced else jax.jit(lambda z: run(z, 6))(Z)
    # 1 is large after four steps; 20 after the one that is always taken; 0.1 not within six.
    np.testing.assert_array_equal(info.steps, [4, 1, 6])
    np.testing.assert_array_equal(info.converged, [True, True, False])
    np.testing.assert_array_equal(z, Z * np.array([[16], [2], [64]], np.float32))


def test_the_loop_ends_once_all_have_halted():
    """Counted by the step itself, in a leaf that no element owns."""
    calls = []

    def step(z):
        jax.debug.callback(lambda: calls.append(1))
        return 2 * z

    jax.jit(lambda z: iterate(step, z, 1000, until=is_large))(Z[:2])[0].block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 4


def test_until_may_cover_several_leading_axes_and_many_leaves():
    z = {"x": np.ones((2, 3, 4), np.float32), "n": np.arange(6, dtype=np.int32).reshape(2, 3)}

    def step(z):
        return {"x": z["x"] + 1, "n": z["n"] + 1}

    got, info = jax.jit(lambda z: iterate(step, z, 9, until=lambda new, old: new["n"] >= 3))(z)
    want = np.array([[3, 2, 1], [1, 1, 1]])
    np.testing.assert_array_equal(info.steps, want)
    np.testing.assert_array_equal(got["n"], z["n"] + want)
    np.testing.assert_array_equal(got["x"], z["x"] + want[..., None])


def step_with(w):
    return lambda z: jnp.tanh(z * w)


@pytest.mark.parametrize("n", [0, 2, 3, 7])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_truncated_gradient_equals_the_unrolled_loop(n, remat):
    """Bitwise the same steps: n - 3 behind `stop_gradient`, then 3 unrolled."""

    @jax.jit
    def both(w, z, traced):
        def loss(w, z):
            return jnp.sum(iterate(step_with(w), z, traced, grad_steps=3, remat=remat)[0] ** 2)

        def unrolled(w, z):
            for k in range(n):
                z = jnp.tanh(z * w)
                if k == n - 3 - 1:
                    z = jax.lax.stop_gradient(z)
            return jnp.sum(z**2)

        return [jax.value_and_grad(f, argnums=(0, 1))(w, z) for f in (loss, unrolled)]

    (value, got), (want_value, want) = both(np.float32(1.3), Z[0], np.int32(n))
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
    assert np.any(got[1] != 0) == (n <= 3)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_the_gradient_stores_no_weights(remat):
    """Whatever else it stores once per step."""

    def loss(w, z, n):
        return jnp.sum(iterate(lambda z: jnp.tanh(z @ w), z, n, grad_steps=3, remat=remat)[0])

    weights, z = np.ones((4, 4), np.float32), np.ones((2, 4), np.float32)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(weights, z, np.int32(5))
    assert "f32[3,2,4]" in str(jaxpr)  # states
    assert "f32[3,4,4]" not in str(jaxpr)


@pytest.mark.parametrize("traced", [False, True])
def test_halted_elements_get_the_gradient_of_the_steps_they_took(traced):
    @jax.jit
    def gradient(z, n):
        def loss(z):
            n_steps = n if traced else 6
            return jnp.sum(iterate(double, z, n_steps, until=is_large, grad_steps=6)[0])

        return jax.grad(loss)(z)

    np.testing.assert_array_equal(gradient(Z, np.int32(6))[:, 0], [16, 2, 64])


def test_a_traced_loop_compiles_once():
    traces = []

    @jax.jit
    def run(z, n):
        traces.append(1)
        return iterate(double, z, n)[0]

    for n in (0, 1, 50):
        np.testing.assert_array_equal(run(Z, np.int32(n)), Z * np.float32(2) ** n)
    assert len(traces) == 1


def test_an_unbounded_loop_says_that_it_has_no_reverse_gradient():
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(lambda z, n: jnp.sum(iterate(double, z, n)[0])))(Z, np.int32(3))


def test_forward_gradients_need_no_bound():
    def three(z):
        return iterate(double, z, jnp.int32(3))[0]

    _, slope = jax.jit(lambda z: jax.jvp(three, (z,), (z,)))(Z)
    np.testing.assert_array_equal(slope, 8 * Z)


def test_loops_nest_and_map():
    def outer(z):
        return iterate(double, z, 2)[0] + 1

    nested = jax.jit(jax.vmap(lambda z, n: iterate(outer, z, n)[0]))
    got = nested(Z, np.array([0, 1, 2], np.int32))
    np.testing.assert_array_equal(got, [Z[0], 4 * Z[1] + 1, 16 * Z[2] + 5])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": -1}, "iterate: n must be >= 0, got -1"),
        ({"n": 2, "grad_steps": -3}, "iterate: grad_steps must be >= 0, got -3"),
        ({"n": 2, "until": lambda new, old: jnp.sum(new)}, "until must return a bool array"),
        ({"n": 2, "remat": "all"}, r"remat must be one of .*'none'.*, got 'all'"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        iterate(double, Z, **options)
