"""The axis of time as a solver sees it: whole, or spread over the devices of a mesh axis.

All arrays are one device's part, states (b t m n). On a spread axis `solve` and `adjoint` exchange
one map of each device, `up_to`, `largest` and `sum` a flag, a number or a sum, and `before` sends a
state to the next device.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time import block, scan
from jaxrec.ops.time.scan import Method, shifted
from jaxrec.ops.time.sharded import from_all


class Line(NamedTuple):
    """Time on one device, or on all devices of a mesh axis inside of `shard_map`."""

    axis: str | None = None
    method: Method = "auto"  # of the linear scans on each device

    def before(self, h: Array, start: Array) -> Array:
        """The state before each step, and `start` (b ...) before the first."""
        if self.axis is not None:
            size = lax.axis_size(self.axis)
            onwards = [(i, i + 1) for i in range(size - 1)]
            arrived = lax.ppermute(h[:, -1], self.axis, onwards)
            start = jnp.where(lax.axis_index(self.axis) == 0, start, arrived)
        return shifted(h, start, towards_start=False)

    def solve(self, jacobian: Array, r: Array) -> Array:
        """d_t = J_t d_{t-1} + r_t from zero; J is (b t m n) or (b t m m n)."""
        start = jnp.zeros_like(r[:, 0])
        if self.axis is not None:
            _, start = self._exchange(*_total(jacobian, r), start, reverse=False)
        run = scan.run if jacobian.ndim == r.ndim else block.run
        return run(jacobian, r, start, False, self.method)[0]

    def adjoint(self, jacobian: Array, g: Array, after: Array) -> tuple[Array, Array]:
        """l_t = g_t + J_{t+1}^T l_{t+1}, where `after` (b m n) comes in behind the last step.

        Returns:
          l, and J_1^T l_1, which goes out before the first.
        """
        run = scan.run_adjoint if jacobian.ndim == g.ndim else block.run_adjoint
        if self.axis is None:
            return run(jacobian, g, after, False, self.method)
        _, alone = run(jacobian, g, jnp.zeros_like(after), False, self.method)
        product, _ = _total(jacobian, jnp.zeros_like(g))
        if product.ndim > after.ndim:
            product = block.transposed(product)
        out, after = self._exchange(product, alone, after, reverse=True)
        return run(jacobian, g, after, False, self.method)[0], out

    def up_to(self, holds: Array) -> tuple[Array, Array]:
        """Whether something held at this step and all before, bool (b t), and at all, ()."""
        so_far = lax.cummin(holds.astype(jnp.int8), axis=1) == 1
        if self.axis is None:
            return so_far, jnp.all(so_far[:, -1])
        every = from_all(so_far[:, -1].astype(jnp.int32), self.axis) == 1  # (devices b)
        earlier = jnp.arange(every.shape[0], dtype=jnp.int32) < lax.axis_index(self.axis)
        so_far = so_far & jnp.all(every | ~earlier[:, None], axis=0)[:, None]
        return so_far, jnp.all(every)

    def largest(self, x: Array) -> Array:
        """The largest number of all, ()."""
        x = jnp.max(x)
        return x if self.axis is None else lax.pmax(x, self.axis)

    def sum(self, x: Array) -> Array:
        """The sum over devices."""
        return x if self.axis is None else lax.psum(x, self.axis)

    def _exchange(
        self, product: Array, alone: Array, start: Array, *, reverse: bool
    ) -> tuple[Array, Array]:
        """The state that leaves the last device, and the one that enters this one."""
        assert self.axis is not None
        # One array, and so one exchange: (b m 2 n) of a diagonal, (b m m+1 n) of matrices.
        is_diagonal = product.ndim == alone.ndim
        matrices = product[:, :, None] if is_diagonal else product
        every = from_all(jnp.concatenate([matrices, alone[:, :, None]], axis=2), self.axis)

        def step(state: Array, one: Array) -> tuple[Array, Array]:
            p, q = one[:, :, :-1], one[:, :, -1]
            new = p[:, :, 0] * state if is_diagonal else block.apply(p, state)
            return new + q, state

        last, entering = lax.scan(step, start, every, reverse=reverse)
        rank = lax.axis_index(self.axis)
        return last, lax.dynamic_index_in_dim(entering, rank, keepdims=False)


def _total(jacobian: Array, r: Array) -> tuple[Array, Array]:
    """The map d -> P d + q of all steps together."""
    if jacobian.ndim > r.ndim:
        return block.total(jacobian, r)
    _, alone = scan.run(jacobian, r, jnp.zeros_like(r[:, 0]), False, "auto")
    return jnp.prod(jacobian, axis=1), alone
