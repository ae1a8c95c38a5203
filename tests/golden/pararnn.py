"""Newton's method as the original ParaRNN iterates it, a fixed number of times from f(0, x)."""

import jax
import jax.numpy as jnp

from jaxrec.layers.pararnn import ParaRNN
from jaxrec.ops.cells import para_gru, para_lstm
from jaxrec.ops.newton import newton_scan


class Iteration:
    """That of one kind of cell. Of the LSTM the derivatives are taken with the output gate and the
    last tanh at the iterate's own c, and not at the c that follows from the state before.

    `functions` are the cell's nonlinearities by role, all of them.
    """

    def __init__(self, kind, functions):
        self.is_lstm = kind == "lstm"
        self.functions = functions

    def step(self, params, h, inputs):
        """The cell; inputs are u and the iterate."""
        cell = para_lstm if self.is_lstm else para_gru
        return cell(params, h, inputs[0], **self.functions)

    def as_differentiated(self, params, before, inputs):
        """A step with the original's derivatives."""
        u, own = inputs
        if not self.is_lstm:
            return self.step(params, before, inputs)
        (a, p), c, h = params, before[:, 0], before[:, 1]
        f = self.functions["forget"](a[0][None] * h + u[:, 0] + p[0][None] * c)
        new = f * c + (1 - f) * self.functions["candidate"](a[2][None] * h + u[:, 2])
        new = own[:, 0] + new - jax.lax.stop_gradient(new)
        o = self.functions["output"](a[1][None] * h + u[:, 1] + p[1][None] * new)
        return jnp.stack([new, o * self.functions["cell"](new)], axis=1)

    def jacobian(self, params, before, inputs):
        """Its Jacobian, (b d) or (b 2 2 d)."""

        def along(direction):
            run = lambda h: self.as_differentiated(params, h, inputs)  # noqa: E731
            return jax.jvp(run, (before,), (direction,))[1]

        if not self.is_lstm:
            return along(jnp.ones_like(before))
        columns = [along(jnp.zeros_like(before).at[:, j].set(1)) for j in range(2)]
        return jnp.stack(columns, axis=2)

    def guess(self, params, u, h0):
        """f(0, x_t) at all times."""
        zeros = jnp.zeros((*u.shape[:2], *h0.shape[1:]), u.dtype)
        return self.at_all_times(params, zeros, u)

    def at_all_times(self, params, before, u):
        """f(h_{t-1}, x_t)."""
        return jax.vmap(self.step, in_axes=(None, 1, 1), out_axes=1)(params, before, (u, before))

    def improve(self, params, u, h0, h, relaxation=1.0):
        """The next iterate."""
        return newton_scan(
            self.step,
            params,
            (u, h),
            h0,
            jacobian=self.jacobian,
            method="newton",
            guess=h,
            max_iters=1,
            tol=float(jnp.finfo(h.dtype).eps),
            window=h.shape[1],
            relaxation=relaxation,
            safeguard=False,
            check=False,
        )[0]


def solve_as_the_original(iterations, functions):
    """What stands in for `ParaRNN.solve`: so many iterations, whatever they have come to."""

    def solve(self: ParaRNN, u, state, *, reset=None):
        assert reset is None, "the original has none"
        iteration = Iteration(self.config.cell, functions[self.config.cell])
        params = self.recurrence()
        h = iteration.guess(params, u, state)
        for _ in range(iterations):
            h = iteration.improve(params, u, state, h)
        return h, None

    return solve
