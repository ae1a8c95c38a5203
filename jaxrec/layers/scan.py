"""The linear recurrence as layers call it: over all devices among which time is split."""

import jax
from jax import Array

from jaxrec.layers.axes import time_axis
from jaxrec.ops.time import linear_scan, sharded_linear_scan


def scan_over_time(
    a: Array,
    b: Array,
    h0: Array | None = None,
    *,
    reverse: bool = False,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """`linear_scan`, by `sharded_linear_scan` where the current mesh splits time into equal parts.

    Left to the compiler, a scan over an axis that is split gathers the whole sequence.
    """
    axis = time_axis()
    if axis is None or b.shape[1] % jax.sharding.get_abstract_mesh().shape[axis]:
        return linear_scan(a, b, h0, reverse=reverse, reset=reset)
    return sharded_linear_scan(a, b, h0, axis=axis, reverse=reverse, reset=reset)
