"""The causal convolution by hand; its values, gradients and state are in the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.conv import causal_conv, causal_conv_2d, centred_conv

conv = jax.jit(causal_conv)
KERNEL = np.array([[100.0], [10.0], [1.0]], np.float32)  # oldest, middle, present
BIAS = np.array([0.5], np.float32)


def column(*values):
    return np.array(values, np.float32)[None, :, None]


def test_digits_show_which_inputs_were_seen():
    y, window = conv(column(1, 2, 3, 4), KERNEL, BIAS, column(8, 9))
    np.testing.assert_array_equal(y, column(891.5, 912.5, 123.5, 234.5))
    np.testing.assert_array_equal(window, column(3, 4))


@pytest.mark.parametrize(
    "reset, seen, window",
    [
        ([1, 0, 0, 0], [1.5, 12.5, 123.5, 234.5], [3, 4]),
        ([0, 1, 0, 0], [891.5, 2.5, 23.5, 234.5], [3, 4]),
        ([0, 0, 0, 1], [891.5, 912.5, 123.5, 4.5], [0, 4]),
        ([0, 0, 1, 1], [891.5, 912.5, 3.5, 4.5], [0, 4]),
        ([1, 1, 1, 1], [1.5, 2.5, 3.5, 4.5], [0, 4]),
    ],
)
def test_a_reset_hides_what_lies_before_it(reset, seen, window):
    reset = np.array(reset, bool)[None]
    y, last = conv(column(1, 2, 3, 4), KERNEL, BIAS, column(8, 9), reset)
    np.testing.assert_array_equal(y, column(*seen))
    np.testing.assert_array_equal(last, column(*window))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_any_width(width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 3)).astype(np.float32)
    kernel = rng.normal(size=(width, 3)).astype(np.float32)
    y, window = conv(x, kernel, np.zeros(3, np.float32), np.zeros((2, width - 1, 3), np.float32))
    padded = np.concatenate([np.zeros((2, width - 1, 3)), x], axis=1)
    want = sum(padded[:, j : j + 6] * kernel[j] for j in range(width))
    np.testing.assert_allclose(y, want, atol=1e-6)
    assert window.shape == (2, width - 1, 3)


def test_the_window_is_float32_whatever_the_activations():
    y, window = conv(column(1, 2, 3, 4).astype(jnp.bfloat16), KERNEL, BIAS, column(8, 9))
    assert y.dtype == jnp.bfloat16
    assert window.dtype == jnp.float32


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": np.ones((3, 2), np.float32)},
        {"bias": np.ones(2, np.float32)},
        {"state": column(1, 2, 3)},
        {"reset": np.ones((1, 3), bool)},
    ],
)
def test_shapes_that_do_not_fit_are_named(change):
    fits = {"kernel": KERNEL, "bias": BIAS, "state": column(8, 9), "reset": None}
    with pytest.raises(ValueError, match=r"causal_conv: x must be \(b t e\), kernel \(w e\)"):
        causal_conv(column(1, 2, 3, 4), **(fits | change))


def test_on_a_grid_it_sees_what_comes_before_along_both_axes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
    kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 2, 2), (2,)))
    want = np.broadcast_to(bias, x.shape).astype(np.float64)
    for i, j, a, b in np.ndindex(4, 3, 3, 2):
        if i >= a and j >= b:
            want[:, i, j] += kernel[2 - a, 1 - b] * x[:, i - a, j - b]
    np.testing.assert_allclose(jax.jit(causal_conv_2d)(x, kernel, bias), want, atol=1e-5)


def test_on_a_grid_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"causal_conv_2d: x must be \(b x y e\)"):
        causal_conv_2d(np.ones((1, 2, 2, 3)), np.ones((2, 2, 2)), np.ones(3))


def test_a_centred_convolution_sees_both_sides_and_zeros_outside():
    y = centred_conv(column(1, 2, 3, 4), KERNEL, BIAS)
    np.testing.assert_array_equal(y, column(12.5, 123.5, 234.5, 340.5))


def test_a_centred_convolution_has_a_middle():
    with pytest.raises(ValueError, match="odd number of taps, got 2"):
        centred_conv(column(1, 2), KERNEL[:2], BIAS)
