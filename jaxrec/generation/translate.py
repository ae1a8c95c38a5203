"""From one sequence to another with an encoder and a decoder: the best token at every step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.errors import UserError
from jaxrec.generation.autoregressive import STOPPED


def translate(
    model: Any,
    source: np.ndarray | Array,
    *,
    begin: int,
    end: int,
    max_new_tokens: int,
    is_token: np.ndarray | Array | None = None,
    offset: np.ndarray | Array | None = None,
) -> np.ndarray:
    """Writes a sequence for every source.

    Args:
      model: has `read`, as `models.universal_transformer` with an encoder; it runs as one compiled
        loop that ends when all rows have.
      source: int (b s).
      begin: the token that stands before the first one.
      end: the token after which a row ends; it is not given.
      max_new_tokens: at most so many, >= 1.
      is_token: bool (b s), False for padding; None: there is none.
      offset: int32 (b), the position of the first token of each row; None: 0.

    Returns:
      int32 (b max_new_tokens), `STOPPED` behind the end of a row.

    Raises:
      UserError: there is nothing to write, or begin or end is no token.
    """
    vocab_size = model.config.vocab_size
    if max_new_tokens < 1:
        raise UserError(f"translate: max_new_tokens must be >= 1, got {max_new_tokens}.")
    if not (0 <= begin < vocab_size and 0 <= end < vocab_size):
        raise UserError(
            f"translate: begin and end must be tokens below {vocab_size}, got {begin} and {end}."
        )
    return np.asarray(_translate(model, source, is_token, offset, max_new_tokens, begin, end))


_Carry = tuple[Array, Array, Array, Any, Array]


@functools.partial(jax.jit, static_argnums=4)
def _translate(
    model: Any,
    source: Array,
    is_token: Array | None,
    offset: Array | None,
    count: int,
    begin: int,
    end: int,
) -> Array:
    rows = source.shape[0]

    def busy(carry: _Carry) -> Array:
        index, _, running, _, _ = carry
        return (index < count) & jnp.any(running)

    def body(carry: _Carry) -> _Carry:
        index, token, running, state, written = carry
        logits, state = model(token[:, None], state, offset=offset)
        new = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        running = running & (new != end)
        column = jnp.where(running, new, STOPPED)[:, None]
        written = jax.lax.dynamic_update_slice(written, column, (0, index))
        return index + 1, new, running, state, written

    carry = (
        jnp.zeros((), jnp.int32),
        jnp.full(rows, begin, jnp.int32),
        jnp.ones(rows, jnp.bool_),
        model.read(source, capacity=count, is_token=is_token, offset=offset),
        jnp.full((rows, count), STOPPED, jnp.int32),
    )
    return jax.lax.while_loop(busy, body, carry)[-1]
