"""Multi-head attention as a layer: projections, rotation, cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.linear import Linear
from jaxrec.ops import attention, rotary


class Attention(nnx.Module):
    """Self-attention with rotary positions and grouped key-value heads.

    Without `causal` every token sees every other one that the mask of a view, if there is one, does
    not hide, and there is nothing to cache. With
    `qk_bias`, a constant is added to queries and keys before the rotation; `bias` is that of the
    projections to queries, keys and values, `out_bias` that of the last one. `rotary_base` is the
    base of the angles, None for no rotation, `rotary_pairing` how channels are paired (see
    `ops.rotary`), and `rotary_width` how many channels of a head are rotated, the first ones; None:
    all. `window` is the number of tokens that one sees, itself included; None: all.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_width: int | None = None,
        qk_bias: bool = False,
        bias: bool = False,
        out_bias: bool = False,
        rotary_base: float | None = 10000.0,
        rotary_pairing: rotary.Pairing = "half",
        rotary_width: int | None = None,
        window: int | None = None,
        causal: bool = True,
        init: Initializer,
        out_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        head_width = head_width or width // heads
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ValueError(
                f"Attention: {heads} heads cannot share {kv_heads} key-value heads evenly."
            )
        if window is not None and not causal:
            raise ValueError("Attention: a window looks back, so it needs causal attention.")
        self.query = Linear(
            width,
            (heads, head_width),
            init=init,
            axes=("embed", "heads", None),
            bias=bias,
            rngs=rngs,
        )
        self.key_value = Linear(
            width,
            (2, kv_heads, head_width),
            init=init,
            axes=("embed", None, "kv_heads", None),
            bias=bias,
            rngs=rngs,
        )
        self.out = Linear(
            heads * head_width,
            width,
            init=out_init or init,
            axes=("heads", "embed"),
            bias=out_bias,
            rngs=rngs,
        )

        def constant(heads: int, name: str) -> nnx.Param | None:
            return nnx.Param(jnp.zeros((heads, head_width)), axes=(name, None)) if qk_bias else None

        self.query_bias, self.key_bias = constant(heads, "heads"), constant(kv_heads, "kv_heads")
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.rotary_base, self.rotary_pairing = rotary_base, rotary_pairing
        self.rotary_width, self.window = rotary_width or head_width, window
        self.causal = causal

    def init_state(self, batch: int, *, capacity: int, slots: int = 1) -> attention.KVCache:
        """An empty cache in the dtype of the weights for `capacity` tokens; for any number once
        `capacity` reaches the window.
        """
        dtype = self.key_value.kernel[...].dtype
        capacity = min(capacity, self.window or capacity)
        return attention.init_cache(slots, batch, capacity, self.kv_heads, self.head_width, dtype)

    def angles(self, view: attention.View) -> rotary.Rotation | None:
        """The rotation of the tokens in view; the same for all layers built alike."""
        if self.rotary_base is None:
            return None
        return rotary.rotation(view.positions, self.rotary_width, self.rotary_base)

    def __call__(
        self,
        x: Array,
        cache: attention.KVCache | None = None,
        *,
        segment_ids: Array | None = None,
        view: attention.View | None = None,
        angles: rotary.Rotation | None = None,
        slot: Array | int = 0,
        extend: Callable[..., tuple[attention.KVCache, Array, Array, attention.View]] | None = None,
    ) -> tuple[Array, attention.KVCache | None]:
        """Attends over x (b t d) and what the cache holds.

        Args:
          x: activations (b t d).
          cache: keys and values so far, or None to keep none.
          segment_ids: int (b t), see `ops.attention.open_view`.
          view: the opened timeline when several layers share one cache; None opens it here.
          angles: rotation for that view; None computes it here.
          slot: where in the cache this execution of the layer keeps its keys and values.
          extend: (cache, slot, k, v, view) -> (cache, k, v, view), what is stored and what is read
            instead of that slot, see `ops.depth.cache`.

        Returns:
          (b t d), and the cache with these tokens written.

        Raises:
          ValueError: there is a cache or segments, and attention is not causal.
        """
        batch, time, _ = x.shape
        if not self.causal and not (cache is None and segment_ids is None):
            raise ValueError("Attention: without causality there are no caches and no segments.")
        if view is None:
            view, cache = attention.open_view(cache, (batch, time), segment_ids, window=self.window)
        if angles is None:
            angles = self.angles(view)
        with jax.named_scope("attention"):
            q, kv = self.query(x), self.key_value(x)
            k, v = kv[:, :, 0], kv[:, :, 1]
            if self.query_bias is not None and self.key_bias is not None:
                q = q + self.query_bias[...].astype(q.dtype)[None, None]
                k = k + self.key_bias[...].astype(k.dtype)[None, None]
            if angles is not None:
                q = rotary.rotate(q, angles, self.rotary_pairing)
                k = rotary.rotate(k, angles, self.rotary_pairing)
            if cache is not None and extend is not None:
                cache, k, v, view = extend(cache, slot, k, v, view)
            elif cache is not None and self.window is None:
                cache = attention.write(cache, slot, k, v, view.start)
                k, v = attention.read(cache, slot)
            elif cache is not None:
                cache, k, v = attention.extend(cache, slot, k, v, view.start)
            y = attention.attend(q, k, v, view, window=self.window, causal=self.causal)
            return self.out(y.reshape(batch, time, -1)), cache


class CrossAttention(nnx.Module):
    """Attention from one sequence to another, without positions of its own."""

    def __init__(self, width: int, heads: int, *, init: Initializer, rngs: nnx.Rngs):
        size = width // heads
        self.query = Linear(
            width, (heads, size), init=init, axes=("embed", "heads", None), rngs=rngs
        )
        self.key_value = Linear(
            width, (2, heads, size), init=init, axes=("embed", None, "heads", None), rngs=rngs
        )
        self.out = Linear(heads * size, width, init=init, axes=("heads", "embed"), rngs=rngs)

    def read(self, source: Array) -> tuple[Array, Array]:
        """Keys and values (b s h k) of the other sequence (b s d)."""
        kv = self.key_value(source)
        return kv[:, :, 0], kv[:, :, 1]

    def __call__(self, x: Array, source: tuple[Array, Array], is_token: Array) -> Array:
        """Attends from x (b t d) to what `read` made, where is_token, bool (b s), is True."""
        batch, time, _ = x.shape
        k, v = source
        with jax.named_scope("cross_attention"):
            mask = jnp.broadcast_to(is_token[:, None], (batch, time, k.shape[1]))
            view = attention.View(jnp.zeros((batch, time), jnp.int32), mask, jnp.int32(0))
            y = attention.attend(self.query(x), k, v, view, causal=False)
            return self.out(y.reshape(batch, time, -1))
