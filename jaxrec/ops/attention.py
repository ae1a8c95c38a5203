"""Causal softmax attention over documents packed in a row, with a key-value cache that is a plain
value.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(k)) v_s   over s <= t in the segment of t

Without a view, as over the patches of an image, the sum is over all s.

Vaswani et al., Attention is all you need (2017), arXiv:1706.03762; grouped heads: Ainslie et al.
(2023), arXiv:2305.13245.

A cache holds the keys and values of several slots: one per layer, or, in a looped model, one per
execution of a layer. All slots share one timeline (which token lies where), so a cache is opened
once per call of the model and then written slot by slot.

With a window w, a token sees itself and the w - 1 tokens before it. A cache for w tokens is then
enough for any number: it is a ring, in which token i lies at place i modulo its capacity.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops import segments

Method = Literal["auto", "blocked", "library"]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far. Slots that nobody writes stay zero.

    Heads come before time, and in keys time comes last, so that a step's two products read a slot
    as it lies; with time first a step takes longer on CPU.
    """

    k: Array  # (l b h k s) by slot l and source time s; after rotation
    v: Array  # (l b h s k)
    segment: Array  # int32 (b s): segment of each token; EMPTY where nothing is written
    position: Array  # int32 (b): position that the next token has if its segment goes on
    length: Array  # int32 (): tokens written

    @property
    def capacity(self) -> int:
        """The number of tokens that fit."""
        return self.segment.shape[1]


EMPTY = -1  # no token has this segment
HIDDEN = -1e30  # added to the score of a key that must not be seen; exp of it is 0
BLOCKS = 4  # of queries: leaves out 3/8 of the square; a fixed number keeps the trace constant


class View(NamedTuple):
    """What the tokens of one call may see, shared by all layers."""

    positions: Array  # int32 (b t): position of each token inside its segment
    mask: Array | None  # bool (b t s); None: causal and nothing else
    start: Array  # int32 (): index of the first of these tokens in the cache


def init_cache(
    slots: int, batch: int, capacity: int, heads: int, head_width: int, dtype: jnp.dtype
) -> KVCache:
    """An empty cache for `capacity` tokens."""
    return KVCache(
        k=jnp.zeros((slots, batch, heads, head_width, capacity), dtype),
        v=jnp.zeros((slots, batch, heads, capacity, head_width), dtype),
        segment=jnp.full((batch, capacity), EMPTY, jnp.int32),
        position=jnp.zeros(batch, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def open_view(
    cache: KVCache | None,
    shape: tuple[int, int],
    segment_ids: Array | None = None,
    *,
    window: int | None = None,
) -> tuple[View, KVCache | None]:
    """Enters the next tokens into the timeline.

    Args:
      cache: tokens so far, or None: there are none and none will be kept.
      shape: (b, t) of the tokens that come. A cache must have room for them: indices beyond the
        capacity would silently overwrite its end, so whoever allocates the cache checks.
      segment_ids: int32 (b t) >= 0, an id not used again after another one in its row; a token sees
        only tokens of its own segment, and positions
        restart where a segment begins. None: the last token's segment goes on.
      window: how many tokens one sees, itself included; None: all. With a window the cache is a
        ring, read and written by `extend`, and may hold any number of tokens if its capacity is
        at least the window.

    Returns:
      The view, and the cache with its timeline advanced (keys and values are written by the
      layers).

    Raises:
      ValueError: the cache is one of another batch.
    """
    batch, time = shape
    if cache is None:
        start = jnp.zeros((), jnp.int32)
        index = jnp.arange(time, dtype=jnp.int32)
        if segment_ids is None:
            positions = jnp.broadcast_to(index, shape)
            if window is None or window >= time:
                return View(positions, None, start), None
            segment_ids = jnp.ones(shape, jnp.int32)
        else:
            reset = segments.resets(segment_ids)
            positions = segments.positions(reset, jnp.zeros(batch, jnp.int32))
        mask = _causal(segment_ids, segment_ids, index, index, window)
        return View(positions, mask, start), None

    segments.check_batch(cache.segment, batch)
    start, capacity = cache.length, cache.capacity
    before = jnp.maximum(start - 1, 0)
    last = lax.dynamic_index_in_dim(
        cache.segment, before if window is None else before % capacity, axis=1, keepdims=False
    )
    if segment_ids is None:
        segment_ids = segments.continued(last, time)
    # Before the first token `last` is EMPTY, which begins a segment at position 0.
    position = segments.positions(segments.resets(segment_ids, last), cache.position)
    index, place = start + jnp.arange(time, dtype=jnp.int32), jnp.arange(capacity, dtype=jnp.int32)
    if window is None:
        written = lax.dynamic_update_slice_in_dim(cache.segment, segment_ids, start, axis=1)
        seen, seen_index = written, place
    else:
        kept = min(time, capacity)
        places = index[-kept:] % capacity
        written = jnp.asarray(cache.segment).at[:, places].set(segment_ids[:, -kept:])
        if time == 1:  # what the new token takes the place of is out of its sight
            seen, seen_index = written, _index_at(place, start + 1)
        else:
            seen = jnp.concatenate([cache.segment, segment_ids], axis=1)
            seen_index = jnp.concatenate([_index_at(place, start), index])
    cache = cache._replace(segment=written, position=position[:, -1] + 1, length=start + time)
    return View(position, _causal(segment_ids, seen, index, seen_index, window), start), cache


def _index_at(place: Array, length: Array) -> Array:
    """The last of `length` tokens that was written at each place of a ring; negative: none was."""
    return length - 1 - (length - 1 - place) % place.shape[0]


def _causal(
    query_segment: Array,
    key_segment: Array,
    query_index: Array,
    key_index: Array,
    window: int | None,
) -> Array:
    """bool (b t s): key s is not later than query t, in its window and in the same segment."""
    ago = query_index[:, None] - key_index[None, :]
    visible = (ago >= 0) & (key_index >= 0)[None, :]
    if window is not None:
        visible &= ago < window
    return visible[None] & (query_segment[:, :, None] == key_segment[:, None, :])


def write(
    cache: KVCache,
    slot: Array | int,
    k: Array,
    v: Array,
    start: Array,
    *,
    keep: Array | None = None,
) -> KVCache:
    """Stores k, v (b t h k) of the tokens from index `start` on in one slot; with `keep`, bool (b),
    of these rows only.
    """
    slot = jnp.asarray(slot, jnp.int32)
    k = jnp.transpose(k, (0, 2, 3, 1))[None].astype(cache.k.dtype)
    v = jnp.swapaxes(v, 1, 2)[None].astype(cache.v.dtype)
    k_place, v_place = (slot, 0, 0, 0, start), (slot, 0, 0, start, 0)
    if keep is not None:
        rows = keep[None, :, None, None, None]
        k = jnp.where(rows, k, lax.dynamic_slice(cache.k, k_place, k.shape))
        v = jnp.where(rows, v, lax.dynamic_slice(cache.v, v_place, v.shape))
    return cache._replace(
        k=lax.dynamic_update_slice(cache.k, k, k_place),
        v=lax.dynamic_update_slice(cache.v, v, v_place),
    )


def read(cache: KVCache, slot: Array | int) -> tuple[Array, Array]:
    """Keys and values (b s h k) of one slot."""
    k, v = (lax.dynamic_index_in_dim(x, slot, axis=0, keepdims=False) for x in (cache.k, cache.v))
    return jnp.transpose(k, (0, 3, 1, 2)), jnp.swapaxes(v, 1, 2)


def gather(cache: KVCache, slots: Array) -> tuple[Array, Array]:
    """Keys and values (b s h k) of each token from its own slot, int (b s)."""
    k = jnp.take_along_axis(cache.k, slots[None, :, None, None, :], axis=0)[0]
    v = jnp.take_along_axis(cache.v, slots[None, :, None, :, None], axis=0)[0]
    return jnp.transpose(k, (0, 3, 1, 2)), jnp.swapaxes(v, 1, 2)


def extend(
    cache: KVCache, slot: Array | int, k: Array, v: Array, start: Array
) -> tuple[KVCache, Array, Array]:
    """Stores k, v (b t h k) of the tokens from index `start` on in one slot of a ring.

    Returns:
      The cache, and the keys and values (b s h k) that the view of these tokens speaks of: those in
      the ring for one token; for more, those that were in it, followed by the new ones.
    """
    time, capacity = k.shape[1], cache.capacity
    if time == 1:
        cache = write(cache, slot, k, v, start % capacity)
        return cache, *read(cache, slot)
    old_k, old_v = read(cache, slot)
    kept = min(time, capacity)
    place = (start + jnp.arange(time - kept, time, dtype=jnp.int32)) % capacity
    # Axes that are indexed by arrays come first: (s b h k).
    new_k, new_v = (jnp.moveaxis(x[:, -kept:], 1, 0) for x in (k, v))
    cache = cache._replace(
        k=jnp.asarray(cache.k).at[slot, :, :, :, place].set(new_k.astype(cache.k.dtype)),
        v=jnp.asarray(cache.v).at[slot, :, :, place].set(new_v.astype(cache.v.dtype)),
    )
    old_k, old_v = old_k.astype(k.dtype), old_v.astype(v.dtype)
    return cache, jnp.concatenate([old_k, k], axis=1), jnp.concatenate([old_v, v], axis=1)


def attend(
    q: Array,
    k: Array,
    v: Array,
    view: View | None,
    *,
    window: int | None = None,
    causal: bool = True,
    method: Method = "auto",
) -> Array:
    """Softmax attention with scale 1/sqrt(k); scores and softmax in float32.

    Args:
      q: queries (b t h k).
      k: keys (b s g k) with g dividing h: each key head serves h/g query heads in a row.
      v: values (b s g k).
      view: which sources a query sees; a query that sees none returns the mean of all values. None:
        every query sees every source.
      causal: the view, or its mask, hides what is later; False: nothing but its mask is hidden,
        such as padding of sources that are not the queries' own sequence.
      window: that of the view; "blocked" leaves out keys that are out of it for a whole block.
      method: "blocked" leaves out keys that all queries of a block precede, in a fixed number of
        blocks; "library" is `jax.nn.dot_product_attention`, which has fused kernels on
        accelerators; "auto" is blocked on CPU, where that is faster, and the library elsewhere.

    Returns:
      (b t h k) in q's dtype.

    Raises:
      ValueError: the method is unknown, or the shapes do not fit.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape[::3] != q.shape[::3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "attend: q must be (b t h k), k and v both (b s g k) with h a multiple of g, got"
            f" {q.shape}, {k.shape} and {v.shape}."
        )
    if method not in get_args(Method):
        raise ValueError(f"attend: method must be one of {get_args(Method)}, got {method!r}.")
    blocked = functools.partial(_blocked, window=window, causal=causal)
    library = functools.partial(_library, causal=causal)
    if method == "auto":
        return lax.platform_dependent(q, k, v, view, cpu=blocked, default=library)
    return (blocked if method == "blocked" else library)(q, k, v, view)


def _library(q: Array, k: Array, v: Array, view: View | None, *, causal: bool) -> Array:
    mask = None if view is None or view.mask is None else view.mask[:, None]
    causal = causal and view is not None and mask is None
    # JAX widens bfloat16 scores by implicit promotion, which strict mode would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)


def _blocked(
    q: Array, k: Array, v: Array, view: View | None, *, window: int | None, causal: bool
) -> Array:
    batch, time, heads, width = q.shape
    source, groups = k.shape[1], k.shape[2]
    causal = causal and view is not None
    mask = None if view is None else view.mask
    if mask is None:
        mask = jnp.ones((time, source), jnp.bool_)[None]
        mask = jnp.tril(mask) if causal else mask
    bias = jnp.where(mask, 0.0, HIDDEN)[:, None, None]
    # Heads before time, so that each product is a plain matrix product per head.
    q = q.reshape(batch, time, groups, heads // groups, width)
    q = jnp.transpose(q, (0, 2, 3, 1, 4))
    # Sums of products beside an axis of size 1 take XLA on CPU ten times as long, but where there
    # is a cache it is the other way round.
    no_axis = heads == groups and time == source > 1
    if no_axis:
        q, bias = q[:, :, 0], bias[:, 0]
    of_heads = "bg" if no_axis else "bgh"
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    # Only where nothing was cached before (t = s) do positions in q and k agree.
    halved = causal and time == source and time >= 16 * BLOCKS
    blocks = BLOCKS if halved else 1
    ends = [time * (i + 1) // blocks for i in range(blocks)]
    parts = []
    for begin, end in zip([0, *ends], ends, strict=False):
        seen = slice(0, source)
        if blocks > 1:
            seen = slice(0 if window is None else max(0, begin - window + 1), end)
        scores = jnp.einsum(
            f"{of_heads}tk,bgsk->{of_heads}ts",
            q[..., begin:end, :],
            k[:, :, seen],
            preferred_element_type=jnp.float32,
        )
        scores = scores * width**-0.5 + bias[..., begin:end, seen]
        weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        y = jnp.einsum(
            f"{of_heads}ts,bgsk->{of_heads}tk",
            weights.astype(v.dtype),
            v[:, :, seen],
            preferred_element_type=jnp.float32,
        )
        parts.append(y / jnp.sum(weights, axis=-1, keepdims=True))
    y = jnp.concatenate(parts, axis=-2)
    y = jnp.transpose(y[:, :, None] if no_axis else y, (0, 3, 1, 2, 4))
    return y.reshape(batch, time, heads, width).astype(q.dtype)
