"""The convolutional view against sums in float64 and against the recurrent view; the recurrence
itself is in the laws.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import hippo
from jaxrec.ops.discretize import discretize_diagonal, generalised_bilinear
from jaxrec.ops.time import (
    dense_scan,
    diagonal_kernel,
    diagonal_last_state,
    fft_conv,
    krylov,
    linear_scan,
)
from jaxrec.testing import assert_close


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("time, taps", [(1, 1), (2, 2), (7, 7), (8, 3), (5, 20), (63, 100)])
def test_the_convolution_is_the_sum_and_does_not_wrap(time, taps):
    u, kernel = normal(2, time, 3), normal(taps, 3) + 1
    want = np.zeros(u.shape)
    for t in range(time):
        for j in range(min(t + 1, taps)):
            want[:, t] += kernel[j].astype(np.float64) * u[:, t - j]
    assert_close(jax.jit(fft_conv)(u, kernel), want, rtol=2e-6)


def test_several_kernels_for_each_channel():
    u, kernel = normal(2, 5, 3), normal(5, 3, 4)
    y = fft_conv(u[..., None], kernel)
    for m in range(4):
        assert_close(y[..., m], fft_conv(u, kernel[..., m]), rtol=1e-6)


def test_the_convolution_is_float32_whatever_comes_in():
    y = jax.eval_shape(fft_conv, normal(2, 5, 3).astype(jnp.bfloat16), normal(5, 3))
    assert y.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"u must be \(b t \.\.\.\) and kernel \(s \.\.\.\), got"):
        fft_conv(normal(2, 5, 3), normal(5))


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_krylov_columns_are_powers(length):
    a, b = hippo.legs(4)
    a_bar, b_bar = generalised_bilinear(
        a.astype(np.float32), b.astype(np.float32), jnp.array([0.1, 0.5]), 0.5
    )
    columns = jax.jit(krylov, static_argnums=2)(a_bar, b_bar, length)
    x = np.asarray(b_bar, np.float64)
    for j in range(length):
        assert_close(columns[..., j], x, atol=1e-6)
        x = np.einsum("dnk,dk->dn", np.asarray(a_bar, np.float64), x)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_the_diagonal_kernel_is_a_sum_of_powers(length, dtype):
    log_decay = -np.abs(normal(3, 4))
    weight = normal(3, 4)
    if dtype == np.complex64:
        log_decay, weight = log_decay + 2j * normal(3, 4), weight + 1j * normal(3, 4)[::-1]
    log_decay, weight = log_decay.astype(dtype), weight.astype(dtype)
    j = np.arange(length)[:, None, None]
    want = np.sum(weight * np.exp(j * log_decay.astype(np.complex128)), axis=-1)
    got = jax.jit(diagonal_kernel, static_argnums=2)(log_decay, weight, length)
    assert got.dtype == dtype
    assert_close(got, want if dtype == np.complex64 else want.real, rtol=3e-6)


def test_the_kernel_neither_underflows_early_nor_turns_into_nan():
    log_decay = jnp.array([[-100.0 + 1j, -1e-3 + 3j]])
    kernel = diagonal_kernel(log_decay, jnp.ones_like(log_decay), 4096)
    assert np.all(np.isfinite(kernel))
    assert np.abs(kernel[-1, 0]) == pytest.approx(np.exp(-4.095), rel=1e-4)


@jax.jit
def views_of_a_diagonal_system(eigenvalues, step, weight, u):
    """y by recurrence and by convolution, and the last state by either."""
    decay, gain = discretize_diagonal(eigenvalues, step)
    log_decay = eigenvalues * step.astype(eigenvalues.dtype)
    x, last = linear_scan(decay[None, None], gain[None, None] * u[..., None].astype(gain.dtype))
    scanned = jnp.real(jnp.sum(weight[None, None] * x, axis=-1))
    kernel = diagonal_kernel(log_decay, weight * gain, u.shape[1])
    convolved = fft_conv(u, jnp.real(kernel))
    return (scanned, convolved), (last, diagonal_last_state(log_decay, gain, u))


@pytest.mark.parametrize("time", [1, 2, 7, 30])
def test_both_views_of_a_diagonal_system_agree(time):
    eigenvalues = np.broadcast_to(hippo.s4d_lin(8).astype(np.complex64), (3, 4))
    step = np.array([[0.01], [0.1], [0.5]], np.float32)
    weight = normal(3, 4) + 1j * normal(4, 3).T
    for left, right in views_of_a_diagonal_system(eigenvalues, step, weight, normal(2, time, 3)):
        assert_close(left, right, rtol=3e-6)


def test_both_views_of_a_dense_system_agree():
    u, c = normal(2, 30, 3), normal(3, 2, 4)
    a, b = hippo.legs(4)
    step = jnp.array([0.01, 0.1, 0.5])

    @jax.jit
    def views(u):
        a_bar, b_bar = generalised_bilinear(
            jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), step, 0.5
        )
        y, last = dense_scan(a_bar, b_bar, c, u, jnp.zeros((2, 3, 4)))
        columns = krylov(a_bar, b_bar, 30)
        kernel = jnp.einsum("dmn,dnt->tdm", c, columns)
        ends = last, jnp.einsum("dnt,btd->bdn", columns[..., ::-1], u)
        return (y, fft_conv(u[..., None], kernel)), ends

    for left, right in views(u):
        assert_close(left, right, rtol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("time", [16384])
def test_both_views_of_a_long_sequence_agree(time):
    """The state rounds once a step in one view and never in the other; the slowest decay, exp(-dt /
    2) with dt = 1e-3, gathers about 700 roundings, 4e-5.
    """
    eigenvalues = np.broadcast_to(hippo.s4d_inv(32).astype(np.complex64), (2, 16))
    step = np.array([[1e-3], [1e-2]], np.float32)
    weight = np.ones((2, 16), np.complex64)
    for left, right in views_of_a_diagonal_system(eigenvalues, step, weight, normal(1, time, 2)):
        assert_close(left, right, rtol=1e-4)
