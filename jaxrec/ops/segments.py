"""Several documents in one row of tokens: where each begins, and how far into it a token is."""

import jax.numpy as jnp
from jax import Array, lax

NOTHING = -1
"""The segment of the token before the first one."""


def before_the_first(batch: int) -> Array:
    """The segment of the last token of each row when there was none, int32 (b)."""
    return jnp.full(batch, NOTHING, jnp.int32)


def check_batch(previous: Array, batch: int) -> None:
    """Refuses a state of another batch.

    Args:
      previous: what the state holds for each sequence, (b ...).
      batch: how many sequences come.

    Raises:
      ValueError: it is not as many.
    """
    if previous.shape[0] != batch:
        raise ValueError(
            f"The state holds {previous.shape[0]} sequences, but {batch} came. Take it from"
            f" init_state({batch}) or from the call before, with the same batch size."
        )


def continued(previous: Array, time: int) -> Array:
    """Segment ids int32 (b t) of tokens that go on with the segment `previous` (b), or begin
    segment 1 after nothing or padding, which is segment 0.
    """
    return jnp.broadcast_to(jnp.maximum(previous, 1)[:, None], (previous.shape[0], time))


def resets(segment_ids: Array, previous: Array | None = None) -> Array:
    """Marks the tokens at which another segment begins.

    Args:
      segment_ids: int (b t).
      previous: the segment of the token before the first one, int (b); None: there was none, so
        that the first token begins a segment.

    Returns:
      bool (b t), ready to be the `reset` of a scan.
    """
    first = jnp.ones_like(segment_ids[:, :1], dtype=jnp.bool_)
    if previous is not None:
        first = segment_ids[:, :1] != previous[:, None]
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def positions(reset: Array, start: Array) -> Array:
    """Counts tokens from the last reset.

    Args:
      reset: bool (b t), True where a segment begins.
      start: position of the first token if it does not begin a segment, int (b).

    Returns:
      int32 (b t), 0 at every reset.
    """
    index = jnp.broadcast_to(jnp.arange(reset.shape[1], dtype=jnp.int32), reset.shape)
    begin = jnp.where(reset, index, jnp.iinfo(jnp.int32).min)
    return index - jnp.maximum(lax.cummax(begin, axis=1), -start[:, None])
