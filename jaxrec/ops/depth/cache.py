"""Keys and values of a looped model, one slot for each execution of a block.

Loop i of core block j is execution e = i r + j of r core blocks. A token that ran fewer loops than
the one that now attends to it lacks the slot that is asked for; a strategy says what is read then,
and whether executions share slots, so that memory does not grow with depth:

    name = lookup[-m<r>][-compress-<fold>], such as "full" or "latest-m4-compress-s4"

    full, skip         such a token is not seen
    latest, available  its deepest slot of the same block that is not deeper than the one asked for
    always-last        if any token seen lacks the slot: of every token the deepest of that block
    randomized         of every token one of those of that block up to the one asked for, drawn for
                       each execution and token, the same in every run: what a strategy must beat

    s<n>     slot e mod n: a ring; n = r keeps the last loop only
    r<n>     slot e div n: n executions in a row overwrite each other
    anchor   own slots for eight loops, later ones share those of a ninth

Geiping et al. (2025), arXiv:2502.05171, section 6.2; names and folds are those of its published
code, with its 2 + 4 blocks generalised to any.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops import attention

Lookup = Literal["full", "skip", "latest", "available", "always-last", "randomized"]
Fold = Literal["none", "ring", "merge", "anchor"]
Extend = Callable[
    [attention.KVCache, Array, Array, Array, attention.View],
    tuple[attention.KVCache, Array, Array, attention.View],
]

ANCHOR_LOOPS = 8
_NAME = re.compile(
    f"({'|'.join(get_args(Lookup))})(?:-m([0-9]+))?(?:-compress-(?:([sr])([0-9]+)|(anchor)))?"
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which execution lies in which slot, and what is read where a slot is missing."""

    prelude: int  # blocks, each with its own slot
    core: int
    coda: int
    lookup: Lookup
    fold: Fold
    size: int  # n of the fold

    @classmethod
    def of(cls, strategy: str, prelude: int, core: int, coda: int) -> "Layout":
        """The layout of a named strategy for so many blocks.

        Raises:
          ValueError: there is no such strategy, or it is that of another number of core blocks.
        """
        match = _NAME.fullmatch(strategy)
        if match is None:
            raise ValueError(
                f"Unknown cache strategy {strategy!r}. Expected one of"
                f" {', '.join(get_args(Lookup))} and possibly -m{core} and -compress-sN,"
                f" -compress-rN or -compress-anchor, such as 'latest-m{core}-compress-s{core}'."
            )
        lookup, modulus, kind, size, anchor = match.groups()
        if modulus is not None and int(modulus) != core:
            raise ValueError(
                f"Cache strategy {strategy!r} is for a core of {modulus} blocks, but this model has"
                f" {core}. Write -m{core}, or leave it out."
            )
        if size is not None and int(size) < 1:
            raise ValueError(f"Cache strategy {strategy!r}: expected a number of slots >= 1.")
        folds: dict[str | None, Fold] = {"s": "ring", "r": "merge", None: "none"}
        fold: Fold = "anchor" if anchor else folds[kind]
        return cls(prelude, core, coda, cast(Lookup, lookup), fold, int(size or 0))

    def slot(self, execution: Array) -> Array:
        """The slot of a core execution, counted from the first core slot."""
        match self.fold:
            case "ring":
                return execution % self.size
            case "merge":
                return execution // self.size
            case "anchor":
                own = ANCHOR_LOOPS * self.core
                return jnp.where(execution < own, execution, own + (execution - own) % self.core)
            case _:
                return execution

    def held(self, executions: Any) -> Any:
        """How many core slots a token has after so many executions, int or Array: always the first
        ones.
        """
        least = min if isinstance(executions, int) else jnp.minimum
        match self.fold:
            case "ring":
                return least(executions, self.size)
            case "merge":
                return -(-executions // self.size)
            case "anchor":
                return least(executions, (ANCHOR_LOOPS + 1) * self.core)
            case _:
                return executions

    @property
    def is_complete(self) -> bool:
        """Every token that ran a loop has every slot."""
        return self.fold == "ring" and self.size <= self.core

    def slots(self, depth: int) -> int:
        """The number of slots of a cache for up to `depth` loops."""
        return self.prelude + self.held(depth * self.core) + self.coda


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kv", "loops"], meta_fields=["layout"]
)
@dataclasses.dataclass(frozen=True)
class DepthCache:
    """A cache by slot: those of the prelude, of the core, of the coda."""

    kv: attention.KVCache
    loops: Array  # int32 (b s): loops that each token ran
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; also of an abstract cache."""
        return sum(x.size * x.dtype.itemsize for x in (self.kv.k, self.kv.v))

    @property
    def coda_slot(self) -> int:
        """The first slot of the coda: the last ones, wherever a loop has ended."""
        return self.kv.k.shape[0] - self.layout.coda


def init_cache(
    layout: Layout,
    depth: int,
    batch: int,
    capacity: int,
    heads: int,
    head_width: int,
    dtype: jnp.dtype,
) -> DepthCache:
    """An empty cache for `capacity` tokens at up to `depth` loops."""
    slots = layout.slots(depth)
    kv = attention.init_cache(slots, batch, capacity, heads, head_width, dtype)
    return DepthCache(kv, jnp.zeros((batch, capacity), jnp.int32), layout)


def open_view(
    cache: DepthCache | None, shape: tuple[int, int], segment_ids: Array | None = None
) -> tuple[attention.View, DepthCache | None]:
    """Enters the next tokens into the timeline, see `ops.attention.open_view`."""
    if cache is None:
        return attention.open_view(None, shape, segment_ids)[0], None
    view, kv = attention.open_view(cache.kv, shape, segment_ids)
    assert kv is not None, "a cache was given"
    return view, dataclasses.replace(cache, kv=kv)


def cut(cache: DepthCache, length: Array) -> DepthCache:
    """Forgets all tokens but the first `length`, int32 (); those cut are of the last segment.

    Nothing is erased: what lies beyond the length is later than every query.
    """
    dropped = cache.kv.length - length
    kv = cache.kv._replace(position=cache.kv.position - dropped, length=length)
    return dataclasses.replace(cache, kv=kv)


def set_loops(cache: DepthCache, view: attention.View, loops: Array) -> DepthCache:
    """Notes how many loops the tokens in view ran, int32 () or (b)."""
    batch, time = view.positions.shape
    loops = jnp.broadcast_to(loops[..., None], (batch, time))
    return dataclasses.replace(
        cache, loops=lax.dynamic_update_slice(cache.loops, loops, (0, view.start))
    )


def core_extend(cache: DepthCache, keep: Array | None = None) -> Extend:
    """How a core block stores its keys and values and what it reads, by the cache's strategy.

    Args:
      cache: the cache whose view was opened.
      keep: bool (b), rows that store theirs; the others leave what they have. None: all.

    Returns:
      (kv, execution, k, v, view) -> (kv, k (b s h k), v, view): the view hides what is missing.
    """
    layout, loops = cache.layout, cache.loops

    def extend(
        kv: attention.KVCache, execution: Array, k: Array, v: Array, view: attention.View
    ) -> tuple[attention.KVCache, Array, Array, attention.View]:
        slot = layout.slot(execution)
        kv = attention.write(kv, layout.prelude + slot, k, v, view.start, keep=keep)
        if layout.is_complete:
            return kv, *attention.read(kv, layout.prelude + slot), view
        assert view.mask is not None, "with a cache there is a mask"
        is_new = jnp.arange(kv.capacity, dtype=jnp.int32) >= view.start
        held = layout.held(jnp.where(is_new[None], execution + 1, layout.core * loops))  # (b s)
        present = slot < held
        if layout.lookup in ("full", "skip"):
            k, v = attention.read(kv, layout.prelude + slot)
            return kv, k, v, view._replace(mask=view.mask & present[:, None])
        if layout.lookup == "always-last":
            deepest = held - 1 - (held - 1 - slot) % layout.core
            is_seen = jnp.any(view.mask, axis=1)
            any_missing = jnp.any(is_seen & ~present, axis=1, keepdims=True)
            source = jnp.where(any_missing, deepest, slot)
        else:
            shallower = slot - layout.core * ((slot - held) // layout.core + 1)
            source = jnp.where(present, slot, shallower)
            if layout.lookup == "randomized":
                source = _drawn(source, layout.core, execution, view.start)
        k, v = attention.gather(kv, layout.prelude + jnp.maximum(source, 0))
        return kv, k, v, view._replace(mask=view.mask & (source >= 0)[:, None])

    return extend


def _drawn(deepest: Array, core: int, execution: Array, start: Array) -> Array:
    """A slot of the same block, at most as deep, for each of deepest (b s); below 0 is none."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), execution), start)
    loop = jax.random.randint(key, deepest.shape, 0, jnp.maximum(deepest // core, 0) + 1)
    return jnp.where(deepest < 0, deepest, deepest % core + core * loop)
