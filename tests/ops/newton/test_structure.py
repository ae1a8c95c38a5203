"""Finding the structure of a cell's Jacobian, and refusing a wrong one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.newton import newton_scan
from jaxrec.ops.newton import structure as structures

RNG = np.random.default_rng(0)


def draw(*shape):
    return (0.4 * RNG.normal(size=shape)).astype(np.float32)


def mixing(subscripts):
    """A tanh cell whose state is mixed as an einsum of params and state."""
    return lambda params, h, x: jnp.tanh(x + jnp.einsum(subscripts, params, h))


CASES = [  # cell, params, state without batch, kind, (before, size, after)
    ("d,bd->bd", (6,), (6,), "diagonal", (1, 1, 6)),
    ("mn,bmn->bmn", (2, 3), (2, 3), "diagonal", (1, 1, 6)),
    ("mkn,bkn->bmn", (2, 2, 5), (2, 5), "block", (1, 2, 5)),
    ("nmk,bnk->bnm", (5, 3, 3), (5, 3), "block", (5, 3, 1)),
    ("de,be->bd", (6, 6), (6,), "dense", (1, 6, 1)),
    ("hde,bhe->bhd", (2, 9, 9), (2, 9), "dense", (1, 18, 1)),
]
cases = pytest.mark.parametrize("subscripts, params, state, kind, sizes", CASES)


@cases
def test_the_narrowest_structure_is_found(subscripts, params, state, kind, sizes):
    h, x = draw(2, *state), draw(2, *state)
    found = structures.find(None, mixing(subscripts), draw(*params), h, x, check=True)
    assert (found.kind, (found.before, found.size, found.after)) == (kind, sizes)


@cases
def test_states_are_taken_apart_and_put_together(subscripts, params, state, kind, sizes):
    structure = structures.Structure(kind, state, *sizes)
    h = draw(2, 7, *state)
    apart = structure.split(h)
    assert apart.shape == (2, 7, sizes[1], sizes[0] * sizes[2])
    np.testing.assert_array_equal(structure.joined(apart), h)


def packed(params, h, x):
    c, h = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([jnp.tanh(x + params[None] * h), jnp.tanh(c)], axis=-1)


def test_a_packed_state_is_found():
    found = structures.find(None, packed, draw(3), draw(2, 6), draw(2, 3), check=True)
    assert (found.kind, found.size, found.after) == ("block", 2, 3)


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("declared", ["diagonal", "block"])
def test_a_wrong_structure_is_refused(declared, is_traced):
    def run(params):
        x, h0 = draw(2, 5, 6), draw(2, 6)
        return newton_scan(mixing("de,be->bd"), params, x, h0, jacobian=declared)[0]

    with pytest.raises(ValueError, match=f"the step's Jacobian is not {declared} for a state of"):
        (jax.jit(run) if is_traced else run)(draw(6, 6))


def test_a_mask_among_traced_parameters_may_be_believed():
    """Concrete parameters are tried as they are; check=False is for those that are not."""
    cell = lambda params, h, x: jnp.tanh(x + h @ (params[0] * params[1]))  # noqa: E731
    params, x, h0 = (draw(4, 4), np.eye(4, dtype=np.float32)), draw(2, 5, 4), draw(2, 4)
    want, _ = newton_scan(cell, params, x, h0, jacobian="diagonal", method="newton")

    def run(params, check):
        return newton_scan(cell, params, x, h0, jacobian="diagonal", method="newton", check=check)

    with pytest.raises(ValueError, match="check=False if the parameters"):
        jax.jit(run, static_argnums=1)(params, True)
    got, info = jax.jit(run, static_argnums=1)(params, False)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert info.converged


def test_batch_elements_that_talk_are_refused():
    cell = lambda params, h, x: jnp.tanh(x + jnp.mean(h, axis=0, keepdims=True))  # noqa: E731
    with pytest.raises(ValueError, match="one of them changes another"):
        newton_scan(cell, (), draw(2, 5, 4), draw(2, 4))


def test_a_state_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"a block Jacobian needs a state .* got shape \(2, 5\)"):
        newton_scan(mixing("de,be->bd"), draw(5, 5), draw(2, 4, 5), draw(2, 5), jacobian="block")


def cell(params, h, x):
    return jnp.tanh(x + h @ params)


def matrices(params, h, x):
    return (1 - cell(params, h, x) ** 2)[:, :, None] * params.T[None]


def diagonal(params, h, x):
    return (1 - jnp.tanh(x + params[None] * h) ** 2) * params[None]


@pytest.mark.parametrize(
    "step, params, jacobian",
    [(cell, (4, 4), matrices), (mixing("d,bd->bd"), (4,), diagonal)],
)
def test_an_analytic_jacobian(step, params, jacobian):
    params, x, h0 = draw(*params), draw(2, 7, 4), draw(2, 4)

    def loss(params, jacobian):
        h, info = newton_scan(step, params, x, h0, jacobian=jacobian, method="newton")
        return jnp.sum(h**2), (h, info)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((_, (h, info)), grad), ((_, (want, _)), want_grad) = run(params, jacobian), run(params, None)
    np.testing.assert_allclose(h, want, atol=1e-6)
    np.testing.assert_allclose(grad, want_grad, atol=1e-5)
    assert info.converged


@pytest.mark.parametrize(
    "jacobian, message",
    [
        (lambda p, h, x: jnp.swapaxes(matrices(p, h, x), 1, 2), "disagrees with the derivative"),
        (lambda p, h, x: matrices(p, h, x)[:, :3], r"shaped as the state, \(b \.\.\.\), or"),
    ],
)
def test_a_wrong_analytic_jacobian_is_refused(jacobian, message):
    with pytest.raises(ValueError, match=message):
        newton_scan(cell, draw(4, 4), draw(2, 7, 4), draw(2, 4), jacobian=jacobian)
