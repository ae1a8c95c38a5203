"""Notes come out of loops in order, cost nothing when nobody asks, and leave results alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import notes
from jaxrec.ops.depth import iterate, remat_scan, remat_step
from jaxrec.ops.depth.remat import REMAT_POLICIES


def size(x):
    return {"sum": jnp.sum(x)}


def nested(x, remat="none"):
    def inner(x, i):
        notes.note("inner", x)
        return x + i, None

    def outer(x, i):
        x, _ = remat_scan(inner, x, jnp.arange(2, dtype=jnp.float32), remat=remat)
        notes.note("outer", lambda: x)
        notes.note("outer", -x)
        return x * i, i

    return remat_scan(outer, x, jnp.array([1.0, 2.0, 3.0]), remat=remat)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_notes_of_nested_loops_come_in_order(remat):
    x = jnp.ones(2)
    (end, ys), found = jax.jit(
        notes.collect(lambda x: nested(x, remat), dict.fromkeys(("inner", "outer"), size))
    )(x)
    inner, outer, value = [], [], 1.0
    for i in (1, 2, 3):
        for j in (0, 1):
            inner.append(2 * value)
            value += j
        outer += [2 * value, -2 * value]
        value *= i
    np.testing.assert_allclose(found["inner"]["sum"], inner)
    # Notes of one loop lie beside each other, those of its body one after another.
    np.testing.assert_allclose(np.sort(found["outer"]["sum"]), np.sort(outer))
    np.testing.assert_allclose(end, value)
    np.testing.assert_allclose(ys, [1, 2, 3])


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_notes_of_a_single_step_that_is_computed_again(remat):
    def step(x):
        notes.note("x", x)
        notes.note("x", 2 * x)
        return jnp.sin(x)

    def loss(x):
        return jnp.sum(remat_step(step, remat=remat)(x))

    gradient = jax.grad(lambda x: notes.collect(loss, {"x": size})(x), has_aux=True)
    slope, found = jax.jit(gradient)(jnp.ones(2))
    np.testing.assert_allclose(found["x"]["sum"], [2, 4])
    np.testing.assert_allclose(slope, np.cos(np.ones(2)), rtol=1e-6)


def test_without_a_reader_the_program_is_the_same():
    def bare(x):
        return remat_scan(lambda x, i: (x * i, None), x, jnp.arange(3, dtype=jnp.float32))[0]

    def noting(x):
        def body(x, i):
            notes.note("x", lambda: jnp.sin(x))
            return x * i, None

        return remat_scan(body, x, jnp.arange(3, dtype=jnp.float32))[0]

    x = jnp.ones(2)
    assert str(jax.make_jaxpr(bare)(x)) == str(jax.make_jaxpr(noting)(x))
    asked = notes.collect(noting, {"other": size})
    np.testing.assert_array_equal(asked(x)[0], bare(x))
    assert asked(x)[1] == {}


def test_a_loop_of_known_length_notes_every_step_and_one_of_unknown_length_none():
    def step(z):
        notes.note("z", z)
        return 2 * z

    z = jnp.ones(())
    run = notes.collect(lambda n: iterate(step, z, n, grad_steps=1)[0], {"z": size})
    end, found = run(4)
    assert end == 16
    np.testing.assert_array_equal(found["z"]["sum"], [1, 2, 4, 8])
    end, found = jax.jit(run)(jnp.int32(4))
    assert end == 16 and found == {}


def test_nobody_is_left_listening_after_an_error():
    def fails():
        raise KeyError("x")

    with pytest.raises(KeyError):
        notes.collect(fails, {"x": size})()
    assert not notes.is_collecting()
