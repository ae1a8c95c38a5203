"""A checksum of arrays that does not depend on how they are spread over devices.

With u_i the bits of element i as uint32 and i its row-major index,

    fingerprint = sum_i u_i (2 i + 1)    modulo 2^32.

Integer addition modulo 2^32 is exact in any order, so every mesh gives the same number. The weights
are odd, hence invertible modulo 2^32: a change of any one element, be it one bit, changes the sum.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def fingerprint(x: Array) -> Array:
    """Returns the fingerprint of an array of any shape and dtype, a uint32 scalar.

    Typed keys count by their key data, complex numbers as pairs, and 64-bit elements as two words.
    """
    return _fingerprint(
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )


@jax.jit
def _fingerprint(x: Array) -> Array:
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):  # a flat iota would gather a sharded array
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(
            stride % 2**32
        )
        stride *= words.shape[axis]
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


def _words(x: Array) -> Array:
    """The bits of x as uint32; elements wider than 32 bits get a trailing axis of words."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    about = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    word = f"uint{min(about(x.dtype).bits, 32)}"
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
