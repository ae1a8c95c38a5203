"""The gradient at the solution: one linear recurrence backwards, then one derivative of the step.

    l_t = g_t + J_{t+1}^T l_{t+1},   dparams = sum_t (df_t/dparams)^T l_t,   dx_t = (df_t/dx)^T l_t

Windows bound the memory: the last one first, which hands on J_1^T l_1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.newton.jacobian import value_and_jacobian
from jaxrec.ops.newton.line import Line
from jaxrec.ops.newton.plan import Floats, Others, Plan, windowed
from jaxrec.ops.time.block import LARGEST_UNROLLED
from jaxrec.ops.time.loop import over_time

LARGEST_WINDOW = 256
"""Steps whose derivative is taken at once where the forward pass has gone one by one."""


def pull_back(
    plan: Plan, floats: Floats, others: Others, h0: Array, h: Array, dh: Array, line: Line
) -> tuple[Floats, Array]:
    """Gradients of params and x, and of the state before the first step.

    Args:
      plan: of the call.
      floats: of params and x.
      others: of params and x.
      h0: state before the first step.
      h: the solution, (b t ...).
      dh: its cotangent.
      line: of time.
    """
    reset = others[2]
    structure = plan.structure
    batch, time = h.shape[:2]
    if reset is None:
        reset = jnp.zeros((batch, time), jnp.bool_)
    cut = reset.reshape(batch, time, *[1] * (h.ndim - 2))
    before = jnp.where(cut, jnp.zeros((), h.dtype), line.before(h, h0))

    def adjoint(params: Any, x: Any, before: Array, cut: Array, dh: Array, after: Array) -> Any:
        _, jacobian = value_and_jacobian(
            plan.function(params, x), structure.split(before), analytic=plan.matrices(params, x)
        )
        cut = cut.reshape(*cut.shape, *[1] * (jacobian.ndim - 2))
        jacobian = jnp.where(cut, jnp.zeros((), h.dtype), jacobian)
        adjoints, out = line.adjoint(jacobian, structure.split(dh), structure.split(after))
        return structure.joined(adjoints), structure.joined(out)

    def adjoint_step_by_step(
        params: Any, x: Any, before: Array, cut: Array, dh: Array, after: Array
    ) -> Any:
        def step(after: Array, inputs: Any) -> tuple[Array, Array]:
            x, before, cut, dh = inputs
            total = dh + after
            [after] = jax.vjp(lambda h: plan.step(params, h, x), before)[1](total)
            cut = cut.reshape(-1, *[1] * (after.ndim - 1))
            return jnp.where(cut, jnp.zeros((), after.dtype), after), total

        out, adjoints = over_time(step, after, (x, before, cut, dh), reverse=True)
        return adjoints, out

    # Large matrices cost more to build than products with them one by one.
    one_by_one = adjoint if structure.size <= LARGEST_UNROLLED else adjoint_step_by_step

    def body(carry: tuple[Array, Any], inputs: Any) -> tuple[tuple[Array, Any], Any]:
        after, sums = carry
        x_floats, x_others, before, cut, dh = inputs
        params, x = plan.split.join((floats[0], x_floats), (others[0], x_others))
        arguments = (params, x, before, cut, dh, after)
        if line.axis is not None or plan.method not in ("auto", "sequential"):
            adjoints, after = adjoint(*arguments)
        elif plan.method == "sequential":
            adjoints, after = one_by_one(*arguments)
        else:
            adjoints, after = lax.platform_dependent(*arguments, cpu=one_by_one, default=adjoint)

        def value(param_floats: Any, x_floats: Any) -> Array:
            params, x = plan.split.join((param_floats, x_floats), (others[0], x_others))
            return jax.vmap(plan.step, in_axes=(None, 1, 1), out_axes=1)(params, before, x)

        _, pull = jax.vjp(value, floats[0], x_floats)
        dparams, dx = pull(adjoints)
        sums = jax.tree.map(lambda total, d: total + d.astype(total.dtype), sums, dparams)
        return (after, sums), dx

    window = plan.window
    if line.axis is None and plan.method in ("auto", "sequential"):
        window = min(window, LARGEST_WINDOW)
    cut_up, put_together = windowed(time, window)
    x_floats, x_others, before, reset = cut_up((floats[1], others[1], before, reset))
    padding = cut_up.padding()
    # The steps that repeat the last one have no cotangent of their own.
    dh = jnp.where(padding.reshape(*padding.shape, *[1] * (h.ndim - 2)), 0, cut_up(dh))
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p.dtype)), floats[0])
    (dh0, sums), dx = lax.scan(
        body, (jnp.zeros_like(h0), zeros), (x_floats, x_others, before, reset, dh), reverse=True
    )
    dparams = jax.tree.map(lambda total, p: line.sum(total).astype(p.dtype), sums, floats[0])
    return (dparams, put_together(dx)), dh0


def _wide(dtype: Any) -> Any:
    """The dtype of sums over windows."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
