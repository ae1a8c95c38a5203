"""Slots of executions against a dictionary per token, for cores of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import attention
from jaxrec.ops.depth import cache
from jaxrec.ops.depth.cache import Layout

STRATEGIES = [
    "full",
    "skip-compress-s4",
    "latest",
    "available-m3",
    "always-last-m3",
    "latest-m3-compress-s3",
    "latest-compress-s6",
    "latest-compress-r2",
    "always-last-compress-s6",
    "available-compress-anchor",
]
CORE, PRELUDE, CODA = 3, 1, 1
LOOPS = np.array([[3, 1, 12, 2, 5], [2, 2, 1, 4, 0]])  # of the tokens that are there already
NOW = 5  # index of the token that attends


def renamed(layout, execution):
    """The slot of an execution, and the names of the original's folds."""
    if layout.fold == "ring":
        return execution % layout.size
    if layout.fold == "merge":
        return execution // layout.size
    if layout.fold == "anchor" and execution >= 8 * layout.core:
        return 8 * layout.core + execution % layout.core
    return execution


def stored(layout, loops):
    """{slot: last execution that wrote it} of one token."""
    return {renamed(layout, e): e for e in range(loops * layout.core)}


def reads(layout, tokens, slot):
    """The execution whose keys each token gives, None where it is not seen."""
    any_missing = any(slot not in token for token in tokens)
    found = []
    for token in tokens:
        same = [s for s in token if s % layout.core == slot % layout.core]
        if layout.lookup in ("full", "skip"):
            same = [s for s in same if s == slot]
        elif layout.lookup != "always-last" or not any_missing:
            same = [s for s in same if s <= slot]
        found.append(token[max(same)] if same else None)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_token_gives_what_a_dictionary_would(strategy):
    layout = Layout.of(strategy, PRELUDE, CORE, CODA)
    depth, capacity = 12, 8
    # Where all slots are taken for granted, a token that ran nothing is nobody's business.
    all_loops = np.maximum(LOOPS, 1) if layout.is_complete else LOOPS
    empty = cache.init_cache(layout, depth, 2, capacity, 1, 2, jnp.dtype("float32"))
    assert empty.kv.k.shape[0] == layout.slots(depth) == PRELUDE + len(stored(layout, 12)) + CODA
    # Keys and values say who wrote them: 100 for each token and one for each execution.
    kv = np.full(empty.kv.v.shape, np.nan, np.float32)
    loops = np.zeros((2, capacity), np.int32)
    for row in range(2):
        for token in range(NOW):
            loops[row, token] = all_loops[row, token]
            for slot, execution in stored(layout, all_loops[row, token]).items():
                kv[PRELUDE + slot, row, 0, token] = 100 * token + execution
    held = attention.KVCache(
        k=jnp.asarray(np.nan_to_num(np.swapaxes(kv, 3, 4))),
        v=jnp.asarray(np.nan_to_num(kv)),
        segment=jnp.where(jnp.arange(capacity)[None] < NOW, 1, -1) * jnp.ones((2, 1), jnp.int32),
        position=jnp.full(2, NOW, jnp.int32),
        length=jnp.asarray(NOW, jnp.int32),
    )
    begun = cache.DepthCache(held, jnp.asarray(loops), layout)
    view, opened = cache.open_view(begun, (2, 1))

    @jax.jit
    def run(kv, execution):
        new = jnp.full((2, 1, 1, 2), 100 * NOW, jnp.float32) + execution.astype(jnp.float32)
        return cache.core_extend(opened)(kv, execution, new, new, view)

    kv = opened.kv
    for execution in range(depth * CORE):
        kv, k, v, seen = run(kv, jnp.asarray(execution, jnp.int32))
        now = {renamed(layout, e): e for e in range(execution + 1)}
        for row in range(2):
            tokens = [*(stored(layout, n) for n in all_loops[row]), now]
            expected = reads(layout, tokens, renamed(layout, execution))
            for token, source in enumerate(expected):
                assert seen.mask[row, 0, token] == (source is not None), (execution, token)
                if source is not None:
                    np.testing.assert_array_equal(k[row, token], 100 * token + source)
                    np.testing.assert_array_equal(v[row, token], 100 * token + source)


def test_a_random_slot_is_of_the_same_block_and_not_deeper_and_the_same_in_every_run():
    layout = Layout.of("randomized", PRELUDE, CORE, CODA)
    capacity, execution = 64, 3 * CORE + 1
    begun = cache.init_cache(layout, 4, 1, capacity, 1, 1, jnp.dtype("float32"))
    # Keys are the executions that wrote them, or would have: of three loops, of one and of none.
    written = jnp.arange(begun.kv.k.shape[0], dtype=jnp.float32) - PRELUDE
    kv = begun.kv._replace(
        k=jnp.broadcast_to(written[:, None, None, None, None], begun.kv.k.shape),
        segment=jnp.where(jnp.arange(capacity)[None] < capacity - 1, 1, -1),
        position=jnp.full(1, capacity - 1),
        length=jnp.int32(capacity - 1),
    )
    loops = jnp.array([[3] * 40 + [1] * 20 + [0] * 4])
    view, opened = cache.open_view(cache.DepthCache(kv, loops, layout), (1, 1))
    new = jnp.full((1, 1, 1, 1), execution, jnp.float32)

    def read():
        _, k, _, seen = cache.core_extend(opened)(
            opened.kv, jnp.asarray(execution, jnp.int32), new, new, view
        )
        return np.asarray(k)[0, :, 0, 0], seen.mask[0, 0]

    k, mask = read()
    assert set(k[:40]) == {1, CORE + 1, 2 * CORE + 1}
    assert set(k[40:60]) == {1} and k[-1] % CORE == 1 and k[-1] <= execution
    np.testing.assert_array_equal(mask, [True] * 60 + [False] * 3 + [True])
    np.testing.assert_array_equal(read()[0], k)


def test_rows_that_do_not_keep_leave_what_they_have():
    layout = Layout.of("latest-compress-s3", PRELUDE, CORE, CODA)
    begun = cache.init_cache(layout, 4, 2, 3, 1, 2, jnp.dtype("float32"))
    view, opened = cache.open_view(begun, (2, 1))
    ones = jnp.ones((2, 1, 1, 2))
    extend = cache.core_extend(opened, keep=jnp.array([True, False]))
    kv, k, _, _ = extend(opened.kv, jnp.asarray(4, jnp.int32), ones, ones, view)
    np.testing.assert_array_equal(k[:, 0, 0, 0], [1, 0])
    assert np.sum(kv.k) == np.sum(kv.v) == 2


def test_a_cut_is_a_shorter_length():
    layout = Layout.of("full", PRELUDE, CORE, CODA)
    begun = cache.init_cache(layout, 1, 1, 6, 1, 2, jnp.dtype("float32"))
    _, five = cache.open_view(begun, (1, 5))
    three = cache.cut(five, jnp.asarray(3, jnp.int32))
    assert three.kv.k is five.kv.k and three.kv.segment is five.kv.segment
    view, again = cache.open_view(three, (1, 2))
    np.testing.assert_array_equal(view.positions, [[3, 4]])
    np.testing.assert_array_equal(view.mask[0, 0], [True] * 4 + [False] * 2)
    assert again.kv.length == 5


def test_memory_of_each_strategy():
    """Two bytes of 3 heads of 8 channels for each of 10 tokens in 4 rows, keys and values."""
    per_slot = 2 * 2 * 3 * 8 * 10 * 4
    for strategy, core_slots in [
        ("full", 32 * 4),
        ("latest-m4-compress-s4", 4),
        ("latest-m4-compress-s8", 8),
        ("latest-m4-compress-r4", 32),
        ("latest-m4-compress-anchor", 36),
    ]:
        layout = Layout.of(strategy, 2, 4, 2)
        made = jax.eval_shape(
            lambda layout=layout: cache.init_cache(layout, 32, 4, 10, 3, 8, jnp.dtype("bfloat16"))
        )
        assert made.nbytes == (2 + core_slots + 2) * per_slot


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("newest", "Unknown cache strategy 'newest'. Expected one of full, skip, latest"),
        ("latest-m4-compress-q4", "Unknown cache strategy"),
        ("latest-m4", "for a core of 4 blocks, but this model has 3"),
        ("latest-compress-s0", "expected a number of slots >= 1"),
    ],
)
def test_unknown_strategies_are_refused(strategy, message):
    with pytest.raises(ValueError, match=message):
        Layout.of(strategy, PRELUDE, CORE, CODA)
