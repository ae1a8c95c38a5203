"""Short causal depthwise convolution in time, y_t = sum_j w_j x_{t-j} + bias, with resets and a
carried window.
"""

import jax.numpy as jnp
from jax import Array


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
    """
    batch, time, _ = x.shape
    width = kernel.shape[0]
    inputs = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    if reset is None:
        reset = jnp.zeros((batch, time), jnp.bool_)
    # Whether a reset lies among the last `lag` steps up to each step; before the first step there
    # is none.
    resets = jnp.concatenate([jnp.zeros((batch, width - 1), jnp.bool_), reset], axis=1)
    y = jnp.broadcast_to(bias.astype(x.dtype), x.shape)
    cut = jnp.zeros((batch, time), jnp.bool_)
    lost = []
    for lag in range(width):
        begin = width - 1 - lag
        past = inputs[:, begin : begin + time]
        y = y + jnp.where(cut[..., None], 0, past) * kernel[None, None, begin].astype(x.dtype)
        lost.append(cut[:, -1])
        cut = cut | resets[:, begin : begin + time]
    window = inputs[:, time:].astype(state.dtype)
    # The input at distance `lag` from the end is lost to the future if a reset came after it.
    forgotten = jnp.stack(lost[::-1], axis=1)[:, 1:]
    return y, jnp.where(forgotten[..., None], 0, window)
