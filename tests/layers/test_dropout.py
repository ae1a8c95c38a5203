"""Dropout: how much is dropped, what is left, and nothing without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.layers.dropout import dropout

X = jnp.ones((100, 100), jnp.bfloat16)


def test_what_is_kept_grows_so_that_the_mean_stays():
    y = dropout(X, 0.25, jax.random.key(0))
    assert y.dtype == X.dtype
    assert set(np.unique(y.astype(jnp.float32)).tolist()) == {0.0, 1.3359375}
    assert float(jnp.mean(y.astype(jnp.float32))) == pytest.approx(1, abs=0.03)


def test_nothing_happens_without_a_key_or_a_rate():
    assert dropout(X, 0.25, None) is X
    assert dropout(X, 0.0, jax.random.key(0)) is X
