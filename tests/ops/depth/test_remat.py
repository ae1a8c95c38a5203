"""Rematerialisation changes memory and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.depth import remat_scan, remat_step
from jaxrec.ops.depth.remat import REMAT_POLICIES, Apart
from jaxrec.ops.newton import newton_scan
from jaxrec.ops.time import linear_scan, matrix_scan, selective_scan

STEPS, WIDTH = 11, 64


def body(carry, x):
    """Carries 64 numbers and makes 64 x 64 on the way, so that what is stored can be told apart."""
    inner = jnp.sin(carry[:, None] * jnp.cos(carry)[None, :])
    carry = jnp.tanh(inner.mean(axis=1) + x["u"])
    return carry, {"y": carry[:2], "twice": 2 * carry[0]}


def inputs(steps=STEPS):
    rng = np.random.default_rng(0)
    carry = rng.normal(size=WIDTH).astype(np.float32)
    return carry, {"u": rng.normal(size=(steps, WIDTH)).astype(np.float32)}


@functools.cache
def value_and_gradient(remat):
    def loss(carry, xs):
        last, ys = remat_scan(body, carry, xs, remat=remat)
        return jnp.sum(last**2) + jnp.sum(ys["y"]) + jnp.sum(ys["twice"]), (last, ys)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("steps", [1, 9, 11])
@pytest.mark.parametrize("remat", REMAT_POLICIES[1:])
def test_values_and_gradients_are_those_of_a_plain_scan(remat, steps):
    want = value_and_gradient("none")(*inputs(steps))
    got = value_and_gradient(remat)(*inputs(steps))
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_steps_with_inputs_apart_are_those_of_a_scan():
    carry, xs = inputs(3)
    other = np.arange(3, dtype=np.float32)

    def with_other(carry, x):
        carry, y = body(carry, x[0])
        return carry, y | {"other": x[1]}

    apart = Apart(tuple({"u": xs["u"][i]} for i in range(3)))
    got = jax.jit(lambda carry, *xs: remat_scan(with_other, carry, xs))(carry, apart, other)
    want = jax.jit(lambda carry, *xs: remat_scan(with_other, carry, xs))(carry, xs, other)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)


def test_what_the_gradient_keeps():
    """Floats alive between the passes, as the sizes of what the forward pass hands over."""

    def kept(remat, steps=100):
        def pullback(carry, xs):
            return jax.vjp(lambda carry: remat_scan(body, carry, xs, remat=remat)[0], carry)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, *inputs(steps)))
        return sum(leaf.size for leaf in leaves)

    xs = 100 * WIDTH  # every policy needs the inputs again
    assert kept("none") > 100 * WIDTH * WIDTH
    assert kept("block") <= 100 * WIDTH + 2 * xs
    assert kept("sqrt") <= 10 * WIDTH + 2 * xs


SCANS = {
    "linear": lambda x: linear_scan(jax.nn.sigmoid(x), x)[0],
    "complex": lambda x: linear_scan(jax.nn.sigmoid(x), jax.lax.complex(x, x))[0].real,
    "matrix": lambda x: matrix_scan(*[x[:, :, None]] * 3, -(x[:, :, :1] ** 2))[0][:, :, 0],
    "newton": lambda x: newton_scan(
        lambda _, h, x: jnp.tanh(h + x), None, x, x[:, 0], method="newton"
    )[0],
    "selective": lambda x: selective_scan(x, x**2, -jnp.ones((4, 2)), *[x[..., :2]] * 2)[0],
}


@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
def test_products_and_results_of_recurrences_are_not_computed_again(scan):
    x = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)

    def loops(remat):
        """Loops of the gradient, without the one over the three steps of depth."""

        def loss(x):
            return jnp.sum(
                remat_scan(lambda z, _: (scan(z), None), x, None, length=3, remat=remat)[0]
            )

        program = str(jax.make_jaxpr(jax.grad(loss))(x))
        return program.count(" scan[") + program.count(" while[")

    assert loops("none") == loops("dots") < loops("block")


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_without_inputs_the_length_says_how_long(remat):
    last, _ = jax.jit(
        lambda z: remat_scan(lambda z, _: (z + 1, None), z, None, length=7, remat=remat)
    )(np.float32(0))
    assert last == 7


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_no_steps(remat):
    carry, xs = inputs(0)
    last, ys = jax.jit(lambda carry, xs: remat_scan(body, carry, xs, remat=remat))(carry, xs)
    np.testing.assert_array_equal(last, carry)
    assert ys["y"].shape == (0, 2)


def test_an_unknown_policy_is_named():
    for call in (remat_scan, lambda body, *_, remat: remat_step(body, remat=remat)):
        with pytest.raises(ValueError, match=r"remat must be one of .*got 'full'"):
            call(body, *inputs(), remat="full")


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_a_step_of_its_own_keeps_what_a_step_of_a_scan_does(remat):
    def layer(x, w):
        return jnp.tanh(jnp.sin(x @ w) @ w)

    def products(step):
        def loss(w, x):
            return jnp.sum(step(x, w))

        return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 3)), jnp.ones((2, 3)))).count(
            "dot_general"
        )

    again = 0 if remat in ("none", "dots") else 2
    assert products(remat_step(layer, remat=remat)) == products(layer) + again
