"""What the laws do not say of grids: orientations, all forms alike, bounded memory, no padding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrec.ops.time import GridGates, gating_tensor, grid_scan
from tests import references

SIZES = {"jt": 2, "jk": 1, "jv": 2, "jo": 3, "jq": 1}
AXES = {
    **dict.fromkeys(GridGates._fields[:2], ("jt", "jk", "jv")),
    **dict.fromkeys(GridGates._fields[2:6], ("jt", "jt")),
    **dict.fromkeys(GridGates._fields[6:], ("jo", "jq", "jt")),
}


def inputs(x, y, *, sizes=SIZES, several=None, absent=(), heads=2, width=3):
    """q, k, v, gates (a dict), direct."""
    rng = np.random.default_rng(x * 100 + y)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    lead = (2, x, y, heads)
    q, k, v = (draw(*lead, width, sizes[axis]) for axis in ("jq", "jk", "jv"))
    of_gates = (*lead[:3], several, heads) if several else lead
    gates = {
        name: draw(*of_gates, *(sizes[axis] for axis in axes))
        for name, axes in AXES.items()
        if name not in absent
    }
    for name in gates:
        if name.startswith("transition"):
            gates[name] *= np.float32(0.3)
    direct = draw(*lead, *(sizes[axis] for axis in ("jo", "jq", "jk", "jv")))
    return q, k, v, gates, direct


def as_gates(gates):
    return GridGates(**(dict.fromkeys(GridGates._fields) | gates))


def run(q, k, v, gates, direct, **options):
    return jax.jit(lambda *a: grid_scan(*a, **options))(q, k, v, as_gates(gates), direct)


FORMS = [{"method": "sequential"}, {"method": "rows"}, {"method": "parallel"}, {"tile": 2}]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


@forms
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 2)], ids=str)
def test_any_shape_equals_the_node_loop(form, shape):
    case = inputs(*shape)
    y, want = run(*case, **form), references.grid_scan(*case)
    np.testing.assert_allclose(y, want, atol=2e-6 * np.max(np.abs(want)))


@forms
@pytest.mark.parametrize("orientation", [1, 2, 3])
def test_every_orientation_equals_the_node_loop(form, orientation):
    case = inputs(3, 4)
    y = run(*case, orientation=orientation, **form)
    want = references.grid_scan(*case, orientation)
    np.testing.assert_allclose(y, want, atol=2e-6 * np.max(np.abs(want)))


@pytest.mark.parametrize(
    ("form", "absent"),
    list(zip(FORMS, [(), ("transition_dl",), ("transition_ru",), ("transition_dl",)], strict=True)),
    ids=str,
)
def test_four_orientations_together_are_the_sum_of_each_with_d_once(form, absent):
    q, k, v, gates, direct = inputs(5, 3, several=4, absent=absent)
    y = run(q, k, v, gates, direct, orientation=(0, 1, 2, 3), **form)
    want = sum(
        references.grid_scan(
            q, k, v, {n: z[:, :, :, o] for n, z in gates.items()}, direct * (o == 0), o
        )
        for o in range(4)
    )
    np.testing.assert_allclose(y, want, atol=2e-6 * np.max(np.abs(want)))


def test_orientations_may_be_any_and_in_any_order():
    q, k, v, gates, direct = inputs(3, 4, several=2)
    y = run(q, k, v, gates, direct, orientation=(3, 2))
    want = sum(
        references.grid_scan(
            q, k, v, {n: z[:, :, :, i] for n, z in gates.items()}, direct * (i == 0), o
        )
        for i, o in enumerate((3, 2))
    )
    np.testing.assert_allclose(y, want, atol=2e-6 * np.max(np.abs(want)))


def test_scalar_gates_need_no_axes_of_state_tracking():
    ones = dict.fromkeys(SIZES, 1)
    q, k, v, gates, direct = inputs(3, 4, sizes=ones)
    flat = {name: z.reshape(z.shape[:4]) for name, z in gates.items()}
    y = run(q[..., 0], k[..., 0], v[..., 0], flat, direct.reshape(direct.shape[:4]))
    np.testing.assert_array_equal(y, run(q, k, v, gates, direct)[..., 0])


def test_the_gating_tensor_weighs_every_input():
    q, k, v, gates, direct = inputs(3, 4, sizes=dict.fromkeys(SIZES, 1))
    g = jax.jit(gating_tensor)(as_gates(gates), direct)
    assert g.shape == (2, 2, 3, 4, 1, 3, 4, 1)
    q, k, v = (np.moveaxis(z[..., 0], 3, 1) for z in (q, k, v))
    scores = np.einsum("bhxyk,bhzwk->bhxyzw", q, k) * g[:, :, :, :, 0, :, :, 0]
    y = np.einsum("bhxyzw,bhzwv->bxyhv", scores, v) / 3**0.5
    want = references.grid_scan(*inputs(3, 4, sizes=dict.fromkeys(SIZES, 1)))[..., 0]
    np.testing.assert_allclose(y, want, atol=2e-6 * np.max(np.abs(want)))


@pytest.mark.parametrize("form", FORMS[1:3], ids=str)
def test_gradients_of_all_forms_agree(form):
    case = inputs(4, 3, several=4, absent=("transition_dl",))

    def loss(case, form):
        q, k, v, gates, direct = case
        y = grid_scan(q, k, v, as_gates(gates), direct, orientation=(0, 1, 2, 3), **form)
        return jnp.sum(y**3)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for got, want in zip(
        jax.tree.leaves(gradient(case, Form(form))),
        jax.tree.leaves(gradient(case, Form(method="sequential"))),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.max(np.abs(want)))


class Form(dict):
    """Options that can be a static argument."""

    def __hash__(self):
        return hash(tuple(self.items()))


def test_gradients_are_exact_where_transitions_are_zero():
    """The derivative of a product of gates of which some are zero is that of the others."""
    q, k, v, gates, direct = inputs(2, 5, sizes=dict.fromkeys(SIZES, 1))
    gates = gates | {"transition_du": gates["transition_du"] * 0}

    def loss(gates, method):
        return jnp.sum(grid_scan(q, k, v, as_gates(gates), direct, method=method) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got, want = (gradient(gates, method) for method in ("parallel", "sequential"))
    for name in gates:
        np.testing.assert_allclose(
            got[name], want[name], atol=1e-5 * np.max(np.abs(want[name])), err_msg=name
        )


def abstract(x, y, heads=1, width=4):
    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    lead = (1, x, y, heads)
    return (
        of(*lead, width),
        of(*lead, width),
        of(*lead, width),
        GridGates(*[of(*lead)] * 8),
        of(*lead),
    )


def test_tiles_bound_the_memory_of_the_gradient():
    """Of 4 times the nodes: 16 times as much with one gating tensor, about 4 with tiles."""

    def bytes_of(side, tile):
        def loss(case):
            return jnp.sum(grid_scan(*case, tile=tile) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(abstract(side, side)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, tiled = bytes_of(48, 48), bytes_of(48, 8)
    assert tiled < whole / 4
    assert bytes_of(48, 8) < 6 * bytes_of(24, 8)


def work(jaxpr):
    """Numbers that additions, products and matrix products make, with those of loops counted as
    often as they run.
    """
    total = 0
    for equation in jaxpr.eqns:
        sizes = sum(variable.aval.size for variable in equation.outvars)
        inner = sum(work(x) for x in jaxprs_in_params(equation.params))
        total += equation.params.get("length", 1) * inner
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * sizes * math.prod(left[axis] for axis in contracted)
        total += sizes * (equation.primitive.name in ("add", "mul", "reduce_sum"))
    return total


def flops(x, y, method):
    run = functools.partial(grid_scan, method=method)
    return work(jax.make_jaxpr(run)(*abstract(x, y, width=16)).jaxpr)


@pytest.mark.parametrize("method", ["parallel", "rows"])
@pytest.mark.parametrize("sides", [(9, 9), (12, 12), (13, 13), (14, 14), (13, 20)], ids=str)
def test_a_grid_costs_what_it_holds(sides, method):
    """At most as its nodes squared, where padding to a power of two would cost as a grid of 16 or
    32 a side.
    """
    x, y = sides
    nodes = x * y / 16**2
    assert flops(x, y, method) < 1.15 * nodes**2 * flops(16, 16, method)


def test_the_trace_grows_with_the_logarithm():
    def equations(side):
        return len(str(jax.make_jaxpr(grid_scan)(*abstract(side, side))).splitlines())

    sizes = [equations(side) for side in (4, 8, 16, 32)]
    assert np.diff(sizes)[-1] <= np.diff(sizes)[0] + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": jnp.zeros((2, 3, 4, 2, 3), jnp.bfloat16)},
            "q, k and v must have one floating dtype",
        ),
        ({"direct": jnp.zeros((2, 3, 4, 2), jnp.bfloat16)}, "gates must all be float32"),
        ({"direct": jnp.zeros((2, 3, 5, 2))}, r"direct must be \(b=2 x=3 y=4 h=2\)"),
        ({"orientation": 4}, "orientation must be 0, 1, 2 or 3"),
        ({"orientation": (0, -1)}, "orientation must be 0, 1, 2 or 3"),
        ({"orientation": ()}, "orientation must be 0, 1, 2 or 3"),
        ({"method": "fast"}, "method must be one of"),
        ({"tile": 0}, "tile must be >= 1"),
        ({"tile": 2, "method": "sequential"}, "the method auto or parallel"),
    ],
)
def test_bad_input_is_refused(change, message):
    lead = jnp.zeros((2, 3, 4, 2))
    wide = jnp.zeros((2, 3, 4, 2, 3))
    good = {"q": wide, "k": wide, "v": wide, "gates": GridGates(*[lead] * 8), "direct": lead}
    with pytest.raises(ValueError, match=message):
        grid_scan(**(good | change))


def test_gates_of_another_number_of_orientations_are_refused():
    wide, lead = jnp.zeros((2, 3, 4, 2, 3)), jnp.zeros((2, 3, 4, 2))
    gates = GridGates(*[jnp.zeros((2, 3, 4, 3, 2))] * 8)
    with pytest.raises(ValueError, match="gates are of 3 orientations, but orientation names 4"):
        grid_scan(wide, wide, wide, gates, lead, orientation=(0, 1, 2, 3))


def test_an_empty_grid_is_refused():
    wide, lead = jnp.zeros((2, 0, 4, 2, 3)), jnp.zeros((2, 0, 4, 2))
    with pytest.raises(ValueError, match="the grid has no nodes"):
        grid_scan(wide, wide, wide, GridGates(*[lead] * 8), lead)
