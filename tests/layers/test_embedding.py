"""Lookup and its transpose."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.layers.embedding import Embedding


def embedding(dtype=jnp.float32):
    layer = Embedding(5, 3, init=jax.nn.initializers.zeros, rngs=nnx.Rngs(0))
    layer.table = nnx.Param(jnp.arange(15, dtype=dtype).reshape(5, 3), axes=("vocab", "embed"))
    return layer


TOKENS = np.array([[0, 4], [2, 2]], np.int32)


def test_rows_are_looked_up():
    got = jax.jit(lambda layer, tokens: layer(tokens))(embedding(), TOKENS)
    np.testing.assert_array_equal(got, np.arange(15).reshape(5, 3)[TOKENS])


def test_logits_are_products_with_every_row():
    x = np.array([[[1, 0, 0], [0, 1, -1]]], np.float32)
    got = jax.jit(lambda layer, x: layer.logits(x))(embedding(), x)
    np.testing.assert_array_equal(got, [[[0, 3, 6, 9, 12], [-1, -1, -1, -1, -1]]])


def test_bfloat16_logits_are_summed_and_returned_in_float32():
    """256 + 1 is no bfloat16 number."""
    x = np.array([[[256, 1, 0]]], jnp.bfloat16)
    layer = embedding(jnp.bfloat16)
    layer.table = nnx.Param(jnp.ones((1, 3), jnp.bfloat16), axes=("vocab", "embed"))
    got = jax.jit(lambda layer, x: layer.logits(x))(layer, x)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [[[257]]])


def test_the_table_names_its_axes():
    assert embedding().table.get_metadata("axes") == ("vocab", "embed")
