"""Short depthwise convolutions: causal in time, y_t = sum_j w_j x_{t-j} + bias, with resets and a
carried window; centred in time; causal on a grid.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops import segments


def causal_conv(
    x: Array, kernel: Array, bias: Array, state: Array, reset: Array | None = None
) -> tuple[Array, Array]:
    """Convolves each channel with its own kernel over the present and the w - 1 inputs before it.

    Args:
      x: input (b t e).
      kernel: (w e); the last row weighs the present input, the first the oldest.
      bias: (e).
      state: the w - 1 inputs before the first one, oldest first, (b w-1 e) float32; zeros at the
        beginning.
      reset: bool (b t); no input from before a True reaches this step or later ones.

    Returns:
      y (b t e) in x's dtype and the next call's state.

    Raises:
      ValueError: the shapes do not fit.
    """
    if (
        (x.ndim, kernel.ndim) != (3, 2)
        or {kernel.shape[1:], bias.shape} != {x.shape[2:]}
        or state.shape != (x.shape[0], kernel.shape[0] - 1, x.shape[2])
        or (reset is not None and reset.shape != x.shape[:2])
    ):
        raise ValueError(
            "causal_conv: x must be (b t e), kernel (w e), bias (e), state (b w-1 e) and reset"
            f" (b t), got {x.shape}, {kernel.shape}, {bias.shape}, {state.shape} and"
            f" {None if reset is None else reset.shape}."
        )
    time, width = x.shape[1], kernel.shape[0]
    inputs = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    since = None
    if reset is not None:
        # How many steps ago the last reset was. Before the first step there is none. A number per
        # step, because what is left of the mask in the loop over channels must be cheap.
        far_back = jnp.full(x.shape[:1], width, jnp.int32)
        since = segments.positions(reset, far_back)
    # The product with the identity changes nothing and keeps XLA from cutting the kernel out of a
    # stack of layers anew for every element, which takes several times as long on CPU.
    identity = jnp.eye(width, dtype=kernel.dtype)
    kernel = jnp.matmul(identity, kernel, precision=lax.Precision.HIGHEST)
    with jax.numpy_dtype_promotion("standard"):  # the sum over taps is never below float32
        wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.broadcast_to(bias.astype(wide), x.shape)
    for lag in range(width):
        begin = width - 1 - lag
        past = inputs[:, begin : begin + time]
        if since is not None and lag > 0:
            past = jnp.where((since >= lag)[..., None], past, 0)
        y = y + past.astype(wide) * kernel[None, None, begin].astype(wide)
    window = inputs[:, time:].astype(state.dtype)
    if since is not None:
        # The input at distance `lag` from the last step is lost to the future if one came since.
        lags = jnp.arange(width - 2, -1, -1, dtype=jnp.int32)
        window = jnp.where((since[:, -1:] >= lags[None])[..., None], window, 0)
    return y.astype(x.dtype), window


def centred_conv(x: Array, kernel: Array, bias: Array) -> Array:
    """Convolves each channel over as many steps before the present one as behind it.

        y_t = sum_j w_j x_{t+j} + bias,  |j| <= (w - 1) / 2,    zero outside the sequence

    Args:
      x: input (b t e).
      kernel: (w e), w odd; the first row weighs the earliest input.
      bias: (e).

    Returns:
      y (b t e) in x's dtype.

    Raises:
      ValueError: w is even, or the shapes do not fit.
    """
    width = kernel.shape[0]
    if width % 2 == 0:
        raise ValueError(f"centred_conv: the kernel must have an odd number of taps, got {width}.")
    half = width // 2
    behind = jnp.pad(x, [(0, 0), (0, half), (0, 0)])
    before = jnp.zeros((x.shape[0], width - 1, x.shape[2]))
    return causal_conv(behind, kernel, bias, before)[0][:, half:]


def causal_conv_2d(x: Array, kernel: Array, bias: Array) -> Array:
    """Convolves each channel over the present node of a grid and those before it along both axes.

        y_{i,j} = sum_{a,b} w_{a,b} x_{i-a,j-b} + bias,    zero outside the grid

    Args:
      x: input (b x y e).
      kernel: (w v e); the last row and column weigh the present input, the first the oldest.
      bias: (e).

    Returns:
      y (b x y e) in x's dtype.

    Raises:
      ValueError: the shapes do not fit.
    """
    if (x.ndim, kernel.ndim) != (4, 3) or {kernel.shape[2:], bias.shape} != {x.shape[3:]}:
        raise ValueError(
            "causal_conv_2d: x must be (b x y e), kernel (w v e) and bias (e), got"
            f" {x.shape}, {kernel.shape} and {bias.shape}."
        )
    width, height = kernel.shape[:2]
    with jax.numpy_dtype_promotion("standard"):  # the sum over taps is never below float32
        wide = jnp.promote_types(x.dtype, jnp.float32)
    inputs = jnp.pad(x, [(0, 0), (width - 1, 0), (height - 1, 0), (0, 0)])
    y = jnp.broadcast_to(bias.astype(wide), x.shape)
    for i in range(width):
        for j in range(height):
            past = inputs[:, i : i + x.shape[1], j : j + x.shape[2]]
            y = y + past.astype(wide) * kernel[None, None, None, i, j].astype(wide)
    return y.astype(x.dtype)
