"""What a looped model makes of its depth: how far each loop still moves the latent states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.models.huginn import Huginn, Latent
from jaxrec.ops import attention
from jaxrec.ops.depth.exits import relative_change


@functools.partial(jax.jit, static_argnames="depth")
def latent_changes(model: Huginn, tokens: Array, *, depth: int, key: Array | None = None) -> Array:
    """|s^k - s^{k-1}| / |s^k| of every loop k and token, float32 (l b t) with l = depth.

    Args:
      model: a looped model.
      tokens: int (b t).
      depth: number of loops.
      key: draws the initial latent state; None begins at zero.

    The measure by which Geiping et al. (2025), arXiv:2502.05171, section 6.1, end a token's loop.
    """
    batch, time = tokens.shape
    view, _ = attention.open_view(None, (batch, time))
    injected = model.inject(model.embed(tokens, view)[0])

    def loop(z: Latent, _: None) -> tuple[Latent, Array]:
        after = model.loop(z, injected, view)
        return after, relative_change(after.state, z.state)

    begin = Latent(model.init_latent(key, batch, time), None, jnp.zeros((), jnp.int32))
    return lax.scan(loop, begin, None, length=depth)[1]


def loops_to_settle(changes: np.ndarray, threshold: float) -> np.ndarray:
    """After how many loops each token of `latent_changes` first moved less than the threshold, int
    (b t); all of them and one more where none did.
    """
    is_settled = np.asarray(changes) < threshold
    return np.where(is_settled.any(axis=0), is_settled.argmax(axis=0) + 1, len(is_settled) + 1)
