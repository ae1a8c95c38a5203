"""Masks drawn as rows of 0 and 1, grouped heads, and the cache as a value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import attention
from tests import references


@functools.partial(jax.jit, static_argnames=("shape", "window"))
def open_view(cache, shape, segment_ids=None, window=None):
    return attention.open_view(cache, shape, segment_ids, window=window)


@functools.partial(jax.jit, static_argnames="method")
def attend(q, k, v, view, method):
    return attention.attend(q, k, v, view, method=method)


methods = pytest.mark.parametrize("method", ["blocked", "library"])


def ids(*rows):
    return np.array(rows, np.int32)


def mask(text):
    """A drawing of rows of 0 and 1 as bool (t s)."""
    return np.array([[int(c) for c in row] for row in text.split()], bool)


def empty(capacity, batch=1):
    return attention.init_cache(2, batch, capacity, 1, 2, jnp.float32)


def test_without_cache_or_segments_there_is_nothing_but_causality():
    view, cache = open_view(None, (2, 4))
    assert cache is None
    assert view.mask is None
    np.testing.assert_array_equal(view.positions, [[0, 1, 2, 3]] * 2)


def test_segments_see_themselves_only():
    view, _ = open_view(None, (1, 6), ids([1, 1, 2, 2, 2, 0]))
    want = mask("""
        100000
        110000
        001000
        001100
        001110
        000001
    """)
    np.testing.assert_array_equal(view.mask[0], want)
    np.testing.assert_array_equal(view.positions, [[0, 1, 0, 1, 2, 0]])


def test_a_window_sees_the_last_tokens_of_the_same_segment():
    view, _ = open_view(None, (1, 5), window=3)
    want = mask("""
        10000
        11000
        11100
        01110
        00111
    """)
    np.testing.assert_array_equal(view.mask[0], want)
    view, _ = open_view(None, (1, 5), ids([1, 1, 2, 2, 2]), window=2)
    want = mask("""
        10000
        11000
        00100
        00110
        00011
    """)
    np.testing.assert_array_equal(view.mask[0], want)


def test_a_ring_keeps_the_window_whatever_the_lengths_of_the_calls():
    """Columns are the places of the ring of three and, with several tokens, then the new ones."""
    _, cache = open_view(empty(3), (1, 2), window=3)  # tokens 0 1 at places 0 1
    view, cache = open_view(cache, (1, 3), window=3)  # tokens 2 3 4 at places 2 0 1
    want = mask("""
        110100
        010110
        000111
    """)
    np.testing.assert_array_equal(view.mask[0], want)
    np.testing.assert_array_equal(view.positions, [[2, 3, 4]])
    view, cache = open_view(cache, (1, 1), window=3)  # token 5 takes the place of 2
    np.testing.assert_array_equal(view.mask[0], mask("111"))
    view, cache = open_view(cache, (1, 1), ids([7]), window=3)  # a document begins
    np.testing.assert_array_equal(view.mask[0], mask("100"))
    np.testing.assert_array_equal(view.positions, [[0]])


def test_a_ring_holds_the_last_keys_each_at_its_place():
    def column(*tokens):
        return jnp.asarray(np.array(tokens, np.float32)[None, :, None, None].repeat(2, -1))

    cache = empty(3)
    _, cache = open_view(cache, (1, 2), window=3)
    cache, k, _ = attention.extend(cache, 1, column(10, 11), column(10, 11), jnp.int32(0))
    np.testing.assert_array_equal(k[0, :, 0, 0], [0, 0, 0, 10, 11])
    start = cache.length
    _, cache = open_view(cache, (1, 4), window=3)  # more than fit: the first is forgotten
    new = column(12, 13, 14, 15)
    cache, k, v = attention.extend(cache, 1, new, new, start)
    np.testing.assert_array_equal(k[0, :, 0, 0], [10, 11, 0, 12, 13, 14, 15])
    np.testing.assert_array_equal(v[0, :, 0, 0], [10, 11, 0, 12, 13, 14, 15])
    kept, _ = attention.read(cache, 1)
    np.testing.assert_array_equal(kept[0, :, 0, 0], [13, 14, 15])  # tokens 3 4 5
    start = cache.length
    _, cache = open_view(cache, (1, 1), window=3)
    cache, k, _ = attention.extend(cache, 1, column(16), column(16), start)
    np.testing.assert_array_equal(k[0, :, 0, 0], [16, 14, 15])
    assert not np.any(cache.k[0])  # the other slot


def test_a_cache_is_filled_from_the_left():
    view, cache = open_view(empty(5), (1, 2))
    np.testing.assert_array_equal(view.mask[0], mask("10000 11000"))
    assert cache.length == 2 and view.start == 0
    view, cache = open_view(cache, (1, 2))
    np.testing.assert_array_equal(view.mask[0], mask("11100 11110"))
    np.testing.assert_array_equal(view.positions, [[2, 3]])
    view, cache = open_view(cache, (1, 1))
    np.testing.assert_array_equal(view.mask[0], mask("11111"))
    np.testing.assert_array_equal(cache.segment, [[1, 1, 1, 1, 1]])
    assert cache.length == cache.capacity == 5


def test_prompts_of_different_length_are_padded_on_the_left():
    view, cache = open_view(empty(5, batch=2), (2, 3), ids([0, 0, 1], [1, 1, 1]))
    np.testing.assert_array_equal(view.mask[0], mask("10000 11000 00100"))
    np.testing.assert_array_equal(view.mask[1], mask("10000 11000 11100"))
    np.testing.assert_array_equal(view.positions, [[0, 1, 0], [0, 1, 2]])
    view, _ = open_view(cache, (2, 1))
    np.testing.assert_array_equal(view.mask[:, 0], mask("00110 11110"))
    np.testing.assert_array_equal(view.positions, [[1], [3]])


def test_a_segment_goes_on_over_calls_or_another_one_begins():
    _, cache = open_view(empty(6, batch=2), (2, 3), ids([1, 2, 2], [1, 1, 1]))
    view, cache = open_view(cache, (2, 2), ids([2, 2], [2, 2]))
    np.testing.assert_array_equal(view.mask[0], mask("011100 011110"))
    np.testing.assert_array_equal(view.mask[1], mask("000100 000110"))
    np.testing.assert_array_equal(view.positions, [[2, 3], [0, 1]])
    view, _ = open_view(cache, (2, 1))
    np.testing.assert_array_equal(view.positions, [[4], [2]])


def test_slots_hold_what_was_written():
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 1, 3, 1, 2)).astype(np.float32)
    cache = jax.jit(attention.write)(empty(5), np.int32(1), k, v, np.int32(2))
    got_k, got_v = jax.jit(attention.read)(cache, np.int32(1))
    np.testing.assert_array_equal(got_k[:, 2:], k)
    np.testing.assert_array_equal(got_v[:, 2:], v)
    for untouched in (got_k[:, :2], got_v[:, :2], *jax.jit(attention.read)(cache, np.int32(0))):
        assert not np.any(untouched)


def test_a_cache_keeps_its_dtype():
    cache = attention.init_cache(1, 1, 2, 1, 2, jnp.bfloat16)
    k = np.ones((1, 2, 1, 2), np.float32)
    written = jax.eval_shape(attention.write, cache, 0, k, k, cache.length)
    assert written.k.dtype == written.v.dtype == jnp.bfloat16


@methods
@pytest.mark.parametrize(
    "time, key_heads, packed", [(6, 1, True), (6, 4, False), (67, 2, True), (67, 2, False)]
)
def test_grouped_heads_equal_one_query_and_one_head_at_a_time(method, time, key_heads, packed):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, time, 4, 3)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, time, key_heads, 3)).astype(np.float32)
    reset = np.zeros((2, time), bool)
    reset[0, [2, 5]] = packed
    segment = np.cumsum(reset, axis=1, dtype=np.int32) if packed else None
    view, _ = open_view(None, (2, time), segment)
    want = references.attend(*(x.astype(np.float64) for x in (q, k, v)), references.visible(reset))
    # Ten times the float32-float64 gap of the reference, 1.5e-7.
    np.testing.assert_allclose(attend(q, k, v, view, method), want, atol=1.5e-6)


@methods
@pytest.mark.parametrize("time", [6, 67])
def test_without_causality_only_the_mask_hides(method, time):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, time, 4, 3)).astype(np.float32)
    sees = rng.random((2, time, time)) < 0.5
    sees[:, :, 0] = True
    view = attention.View(np.zeros((2, time), np.int32), sees, np.int32(0))
    want = references.attend(*(x.astype(np.float64) for x in (q, k, v)), sees)
    y = attention.attend(q, k, v, view, causal=False, method=method)
    np.testing.assert_allclose(y, want, atol=1.5e-6)


@methods
@pytest.mark.parametrize("time", [6, 67])
def test_without_a_view_all_see_all(method, time):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, time, 4, 3)).astype(np.float32)
    everything = np.ones((2, time, time), bool)
    want = references.attend(*(x.astype(np.float64) for x in (q, k, v)), everything)
    np.testing.assert_allclose(attend(q, k, v, None, method), want, atol=1.5e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_both_methods_have_the_same_gradients(packed):
    """Over several blocks of queries; the laws compare one block with the loop."""
    rng = np.random.default_rng(0)
    q, k, v, weights = rng.normal(size=(4, 2, 67, 4, 3)).astype(np.float32)
    segment = rng.integers(1, 3, (2, 67), dtype=np.int32) if packed else None
    view, _ = open_view(None, (2, 67), segment)

    def gradient(method):
        def loss(*qkv):
            return jnp.sum(attention.attend(*qkv, view, method=method) * weights)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for left, right in zip(gradient("blocked"), gradient("library"), strict=True):
        # Gradients around 1, each off by no more than the values above.
        np.testing.assert_allclose(left, right, atol=3e-6)


@methods
def test_scores_are_summed_and_scaled_in_float32(method):
    """256 equal bfloat16 products: summed in bfloat16 they would stop growing."""
    q = np.ones((1, 1, 1, 257), jnp.bfloat16)
    k = np.stack([np.ones(257), np.r_[np.ones(256), -15.0]]).astype(jnp.bfloat16)[None, :, None]
    v = np.array([[0.0], [1.0]], jnp.bfloat16)[None, :, None]
    v = np.broadcast_to(v, (1, 2, 1, 257))
    view = attention.View(None, np.ones((1, 1, 2), bool), None)
    y = attend(q, k, v, view, method)
    assert y.dtype == jnp.bfloat16
    weight = 1 / (1 + np.exp(16 / 257**0.5))  # = 0.269
    np.testing.assert_allclose(y.astype(jnp.float32), weight, rtol=2.0**-8)


def test_an_unknown_method_is_named():
    q = np.ones((1, 2, 1, 2), np.float32)
    view, _ = open_view(None, (1, 2))
    with pytest.raises(ValueError, match=r"attend: method must be one of .*got 'flash'"):
        attention.attend(q, q, q, view, method="flash")


@pytest.mark.parametrize(
    "k, v",
    [((1, 2, 2, 2), (1, 2, 2, 3)), ((1, 2, 4, 2), (1, 2, 4, 2)), ((1, 2, 2, 4), (1, 2, 2, 4))],
)
def test_shapes_that_do_not_fit_are_named(k, v):
    q, (k, v) = np.ones((1, 2, 6, 2), np.float32), (np.ones(x, np.float32) for x in (k, v))
    view, _ = open_view(None, (1, 2))
    with pytest.raises(ValueError, match=r"attend: q must be \(b t h k\), k and v both"):
        attention.attend(q, k, v, view)
