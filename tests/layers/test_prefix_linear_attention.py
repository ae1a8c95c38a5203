"""Prefix linear attention where the laws and the golden cases do not look: padding, resets, the
original's way to mask.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.prefix_linear_attention import PrefixLinearAttention
from tests import references

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 9, 8)).astype(np.float32)
ATOL = 5e-6  # ten times the gap between float32 and float64, 4e-7


def build(**options):
    init = jax.nn.initializers.normal(0.5)
    return PrefixLinearAttention(8, 2, 3, init=init, rngs=nnx.Rngs(0), **options)


@jax.jit
def run(layer, x, state, prefix=None, reset=None):
    return layer(x, state, prefix=prefix, reset=reset)


def prefix(time, begin, end):
    place = np.arange(time)
    return np.broadcast_to((begin <= place) & (place < end), (2, time))


def test_all_tokens_see_all_of_the_prefix_and_nothing_else_that_is_to_come():
    layer = build()
    state = layer.init_state(2)
    y, _ = run(layer, X, state, prefix(9, 0, 4))
    for changed, sees in ((3, range(9)), (6, range(6, 9))):
        other = X.copy()
        other[:, changed] += 1
        moved = np.any(run(layer, other, state, prefix(9, 0, 4))[0] != y, axis=(0, 2))
        np.testing.assert_array_equal(moved, [t in sees for t in range(9)])


def test_a_padded_prefix_equals_one_without_padding():
    layer = build()
    first = np.zeros((2, 9), bool)
    first[:, [0, 3]] = True  # padding is a document of its own
    y, state = run(layer, X, layer.init_state(2) + 1, prefix(9, 3, 6), first)
    alone, last = run(layer, X[:, 3:], layer.init_state(2), prefix(6, 0, 3))
    np.testing.assert_allclose(y[:, 3:], alone, atol=ATOL)
    np.testing.assert_allclose(state, last, atol=ATOL)


def test_a_later_document_sees_nothing_of_the_prefix():
    layer = build()
    reset = np.zeros((2, 9), bool)
    reset[:, 5] = True
    y, _ = run(layer, X, layer.init_state(2), prefix(9, 0, 4), reset)
    alone, _ = run(layer, X[:, 5:], layer.init_state(2))
    np.testing.assert_allclose(y[:, 5:], alone, atol=ATOL)


@pytest.mark.parametrize("before", [True, False])
def test_the_original_reads_padding_as_the_constant_feature(before):
    """Its keys are zeroed before the feature map, whose first number is always 1."""
    layer = build(masks_before_features=before)
    valid = prefix(9, 3, 6)
    state = layer.read(X, layer.init_state(2), valid)
    params = nnx.to_pure_dict(nnx.split(layer)[1])

    def of_heads(name):
        return np.einsum("btd,dhk->bthk", X, params[name]["kernel"])

    mask = valid[..., None, None]
    keys = references.taylor(of_heads("prefix_key") * mask)
    values = np.concatenate([of_heads("prefix_value"), np.ones((2, 9, 2, 1))], axis=-1)
    read = prefix(9, 0, 6) if before else valid  # padding in front, not what follows
    want = np.einsum("bthf,bthv->bhfv", keys * read[..., None, None], values)
    np.testing.assert_allclose(state, want, atol=ATOL)


def test_a_width_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="width 8 does not divide into 3 heads"):
        PrefixLinearAttention(8, 3, 3, init=jax.nn.initializers.zeros, rngs=nnx.Rngs(0))
