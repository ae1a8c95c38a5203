"""The fingerprint sees every byte and no mesh."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrec.training.fingerprint import fingerprint
from jaxrec.training.sharding import build_mesh

DTYPES = ["float32", "float16", "int8", "int32", "uint32", "bool", "complex64", ml_dtypes.bfloat16]


def draw(dtype, shape=(3, 5)):
    rng = np.random.default_rng(0)
    if np.dtype(dtype) == np.dtype(bool):
        return rng.random(shape) < 0.5
    return (
        (10 * rng.standard_normal(shape))
        .astype(np.uint8 if dtype == "uint32" else "float32")
        .astype(dtype)
    )


def naive(x):
    """Row-major words times odd weights, in Python integers."""
    x = np.ascontiguousarray(x)
    size = 4 if x.dtype == np.complex64 else x.dtype.itemsize
    words = np.frombuffer(x.tobytes(), dtype=f"uint{8 * size}")
    return sum(int(word) * (2 * i + 1) for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 0), (2, 3, 4)])
def test_equals_the_plain_sum(dtype, shape):
    x = draw(dtype, shape)
    assert int(fingerprint(jnp.asarray(x))) == naive(x)


@pytest.mark.parametrize("dtype", ["float32", "int8", ml_dtypes.bfloat16], ids=str)
def test_any_flipped_byte_changes_it(dtype):
    x = draw(dtype)
    whole = int(fingerprint(jnp.asarray(x)))
    data = x.tobytes()
    for place in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= mask
            y = np.frombuffer(bytes(damaged), dtype).reshape(x.shape)
            assert int(fingerprint(jnp.asarray(y))) != whole


def test_minus_zero_and_nan_count():
    assert int(fingerprint(jnp.array([0.0]))) != int(fingerprint(jnp.array([-0.0])))
    assert int(fingerprint(jnp.array([jnp.nan]))) != int(fingerprint(jnp.array([jnp.inf])))


def test_swapped_elements_change_it():
    assert int(fingerprint(jnp.array([1.0, 2.0]))) != int(fingerprint(jnp.array([2.0, 1.0])))


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("model", "data")])
def test_does_not_depend_on_the_mesh(spec):
    x = draw("float32", (8, 12))
    spread = jax.device_put(x, NamedSharding(build_mesh("data=2,model=4"), spec))
    assert int(fingerprint(spread)) == naive(x)


def test_a_key_counts_by_its_data():
    key = jax.random.key(3)
    assert int(fingerprint(key)) == int(fingerprint(jax.random.key_data(key)))
