"""The attention layer's own doors; what it computes is in the laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.attention import Attention, CrossAttention
from jaxrec.layers.linear import truncated_normal
from jaxrec.ops import attention
from tests import references

apply = jax.jit(lambda layer, *args, **options: layer(*args, **options))


def build(**options):
    make = functools.partial(Attention, 8, 4, init=truncated_normal(0.3), **options)
    return jax.jit(lambda key: make(rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_shapes_of_projections():
    layer = build(kv_heads=2, head_width=6, qk_bias=True)
    shapes = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.split(layer)[1]))
    assert shapes == {
        "query": {"kernel": (8, 4, 6)},
        "key_value": {"kernel": (8, 2, 2, 6)},
        "out": {"kernel": (24, 8)},
        "query_bias": (4, 6),
        "key_bias": (2, 6),
    }


def test_the_cache_has_the_weights_dtype_and_one_slot_per_execution():
    layer = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), build(kv_heads=2))
    cache = layer.init_state(3, capacity=5, slots=7)
    assert cache.k.shape == (7, 3, 2, 2, 5)
    assert cache.v.shape == (7, 3, 2, 5, 2)
    assert cache.k.dtype == jnp.bfloat16
    assert cache.capacity == 5


def test_layers_that_share_a_cache_and_a_view_equal_layers_with_their_own():
    layer = build()
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)

    @jax.jit
    def run(layer, x):
        shared = layer.init_state(2, capacity=5, slots=2)
        view, shared = attention.open_view(shared, (2, 5))
        angles, y = layer.angles(view), x
        for slot in (0, 1):
            y, shared = layer(y, shared, view=view, angles=angles, slot=slot)
        first, own_first = layer(x, layer.init_state(2, capacity=5))
        second, own_second = layer(first, layer.init_state(2, capacity=5))
        return (y, shared.k), (second, jnp.concatenate([own_first.k, own_second.k]))

    for left, right in zip(*run(layer, x), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_without_a_cache_none_is_returned():
    x = np.ones((1, 3, 8), np.float32)
    y, cache = apply(build(), x)
    assert cache is None
    assert y.shape == (1, 3, 8)


def test_heads_must_share_evenly():
    with pytest.raises(ValueError, match="4 heads cannot share 3 key-value heads evenly"):
        Attention(8, 4, kv_heads=3, init=truncated_normal(1.0), rngs=nnx.Rngs(0))


def test_cross_attention_reads_another_sequence_without_its_padding():
    rng = np.random.default_rng(0)
    layer = CrossAttention(8, 2, init=truncated_normal(0.5), rngs=nnx.Rngs(0))
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    source = rng.normal(size=(2, 5, 8)).astype(np.float32)
    is_token = np.arange(5)[None] < np.array([[5], [2]])
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(layer)[1]))
    q, kv = references.linear(params["query"], x), references.linear(params["key_value"], source)
    sees = np.broadcast_to(is_token[:, None], (2, 3, 5))
    want = references.attend(q, kv[:, :, 0], kv[:, :, 1], sees).reshape(2, 3, 8)
    got = layer(x, layer.read(source), is_token)
    np.testing.assert_allclose(got, references.linear(params["out"], want), atol=5e-6)
