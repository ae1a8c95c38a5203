"""S5 where the laws do not look: its start, both directions, padding, other rates, bad input."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.s5 import S5Config
from jaxrec.layers.ssm import decay_measures
from jaxrec.ops import hippo
from jaxrec.testing import assert_close
from tests import references

BIDIRECTIONAL = S5Config(width=3, state=4, blocks=2, bidirectional=True)
run = jax.jit(lambda layer, x, **options: layer(x, **options))


def build(config):
    return jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


def parameters(layer):
    state = nnx.to_pure_dict(nnx.split(layer)[1])
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)


@pytest.fixture(scope="module")
def bidirectional():
    return build(BIDIRECTIONAL)


def joined(real, imag):
    return np.asarray(real[...]) + 1j * np.asarray(imag[...])


def signal(batch=2, time=7, width=3):
    return np.random.default_rng(0).normal(size=(batch, time, width)).astype(np.float32)


def test_it_begins_at_blocks_of_hippo():
    layer = build(S5Config(width=4, state=6, blocks=2))
    half = hippo.legs_normal_plus_rank_one(6).eigenvalues[:3]
    np.testing.assert_allclose(layer.eigenvalue_imag[...], np.tile(half.imag, 2), rtol=1e-6)
    np.testing.assert_array_equal(layer.eigenvalue_real[...], -0.5)
    steps = np.exp(layer.log_step[...])
    assert np.all((steps >= 1e-3 * 0.999) & (steps <= 0.1 * 1.001))


def test_with_all_eigenvalues_the_input_matrix_was_real():
    """B in the basis of eigenvectors stands for a real B, and half of it for all of it."""
    full = build(S5Config(width=64, state=8, conj_sym=False))
    vectors = hippo.legs_normal_plus_rank_one(8).vectors
    b = vectors @ joined(full.input_real, full.input_imag)
    assert np.max(np.abs(b.imag)) < 1e-6
    assert np.std(b.real) == pytest.approx(8**-0.5, rel=0.1)


@pytest.mark.parametrize(
    "init, deviation",
    [("trunc_standard_normal", 8**-0.5), ("lecun_normal", (8 * 64) ** -0.5), ("complex_normal", 1)],
)
def test_the_output_matrix_begins_with_its_deviation(init, deviation):
    """Of the complex number: V is unitary, so C V has the deviation of C, 2^(1/2) of each part."""
    layer = build(S5Config(width=64, state=8, conj_sym=False, output_init=init))
    c = joined(layer.output_real, layer.output_imag)
    parts = 1 if init == "complex_normal" else 2**0.5
    assert np.std(c) == pytest.approx(parts * deviation, rel=0.1)


def test_both_directions_equal_the_loop(bidirectional):
    """The loop run on the signal, and run on the mirrored signal with the second C."""
    params, x = parameters(bidirectional), signal().astype(np.float64)
    reset, zeros = np.zeros((2, 7), bool), np.zeros((2, 4), np.complex128)
    options = (zeros, reset, "zoh", True)
    forward, _ = references.s5(params, x, *options)
    backward = params | {f"output_{p}": params[f"reverse_output_{p}"] for p in ("real", "imag")}
    backward["skip"] = np.zeros(3)
    mirrored, _ = references.s5(backward, x[:, ::-1], *options)
    y, state = run(bidirectional, signal())
    assert state is None
    assert_close(y, forward + mirrored[:, ::-1], rtol=2e-6)


@pytest.mark.parametrize("filler", [0.0, 1e6, np.nan, np.inf])
def test_padding_changes_nothing(bidirectional, filler):
    x, valid = signal(), np.arange(7)[None] < np.array([[4], [6]])
    y, _ = run(bidirectional, np.where(valid[..., None], x, np.float32(filler)), valid=valid)
    assert np.all(np.isfinite(y))
    for i, length in enumerate((4, 6)):
        alone, _ = run(bidirectional, x[i : i + 1, :length])
        assert_close(y[i, :length], alone[0], rtol=2e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_documents_do_not_talk_in_either_direction(bidirectional, padded):
    """Three documents in a row, the last one begun by padding if there is some."""
    x = signal(batch=1, time=9)
    reset = np.zeros((1, 9), bool)
    reset[0, [3, 6]] = True
    valid = np.arange(9)[None] != 5 if padded else None
    y, _ = run(bidirectional, x, reset=reset, valid=valid)
    for begin, end in ((0, 3), (3, 5 if padded else 6), (6, 9)):
        alone, _ = run(bidirectional, x[:, begin:end])
        assert_close(y[:, begin:end], alone, rtol=2e-6)


def test_a_state_after_padding_is_zero():
    layer = build(dataclasses.replace(BIDIRECTIONAL, bidirectional=False))
    _, state = run(layer, signal(), valid=np.arange(7)[None] < np.array([[4], [7]]))
    assert not np.any(state[0]) and np.any(state[1])


def of_unequal_steps(params, x, intervals, reset, conj_sym, bidirectional):
    """Every step has a system of its own; a loop in float64."""
    eigenvalues = params["eigenvalue_real"] + 1j * params["eigenvalue_imag"]
    b, c, back = (
        params[f"{name}_real"] + 1j * params[f"{name}_imag"]
        for name in ("input", "output", *(["reverse_output"] if bidirectional else ["output"]))
    )
    y = params["skip"] * x
    for matrix, times in ((c, range(x.shape[1])), (back, range(x.shape[1])[::-1])):
        if matrix is back and not bidirectional:
            break
        state = np.zeros((len(x), len(eigenvalues)), complex)
        for t in times:
            if times.step > 0:
                state[reset[:, t]] = 0
            elif t + 1 < x.shape[1]:
                state[reset[:, t + 1]] = 0
            z = eigenvalues * np.exp(params["log_step"]) * intervals[:, t, None]
            state = np.exp(z) * state + np.expm1(z) / eigenvalues * (x[:, t] @ b.T)
            y[:, t] += (2 if conj_sym else 1) * (state @ matrix.T).real
    return y


@pytest.mark.parametrize("conj_sym, bidirectional", [(True, False), (False, True)])
def test_samples_at_unequal_intervals_equal_the_loop(conj_sym, bidirectional):
    layer = build(
        S5Config(width=3, state=4, blocks=2, conj_sym=conj_sym, bidirectional=bidirectional)
    )
    rng = np.random.default_rng(1)
    intervals = np.exp(rng.normal(size=(2, 7))).astype(np.float32)
    reset = rng.random((2, 7)) < 0.2
    y, state = run(layer, signal(), step_rescale=intervals, reset=reset)
    options = (intervals, reset, conj_sym, bidirectional)
    want = of_unequal_steps(parameters(layer), signal().astype(np.float64), *options)
    assert_close(y, want, rtol=2e-6)
    ones = run(layer, signal(), step_rescale=np.full((2, 7), 2, np.float32))[0]
    assert_close(ones, run(layer, signal(), step_rescale=2.0)[0], rtol=2e-6)
    if bidirectional:
        return
    stream, parts = layer.init_state(2), []
    for t in range(7):
        part, stream = run(
            layer,
            signal()[:, t : t + 1],
            state=stream,
            step_rescale=intervals[:, t : t + 1],
            reset=reset[:, t : t + 1],
        )
        parts.append(part)
    assert_close(np.concatenate(parts, axis=1), y, rtol=2e-6)
    assert_close(stream, state, rtol=2e-6)
    gradient = jax.grad(lambda steps: jnp.sum(layer(signal(), step_rescale=steps)[0] ** 2))
    assert np.all(gradient(jnp.asarray(intervals)) != 0)


def test_intervals_of_padding_do_not_matter(bidirectional):
    valid = np.arange(7)[None] < np.array([[4], [6]])
    intervals = np.full((2, 7), 1.5, np.float32)
    want, _ = run(bidirectional, signal(), valid=valid, step_rescale=intervals)
    wild = np.where(valid, intervals, np.float32(np.nan))
    got, _ = run(bidirectional, signal(), valid=valid, step_rescale=wild)
    np.testing.assert_array_equal(got[valid], want[valid])


def test_all_eigenvalues_in_both_directions_equal_the_loop():
    """Without conjugate symmetry nothing is doubled."""
    layer = build(dataclasses.replace(BIDIRECTIONAL, conj_sym=False, discretization="bilinear"))
    params, x = parameters(layer), signal().astype(np.float64)
    options = (np.zeros((2, 4), complex), np.zeros((2, 7), bool), "bilinear", False)
    forward, _ = references.s5(params, x, *options)
    backward = params | {f"output_{p}": params[f"reverse_output_{p}"] for p in ("real", "imag")}
    mirrored, _ = references.s5(backward | {"skip": np.zeros(3)}, x[:, ::-1], *options)
    assert_close(run(layer, signal())[0], forward + mirrored[:, ::-1], rtol=2e-6)


def without_skip(layer):
    layer.skip = nnx.Param(jnp.zeros_like(layer.skip[...]), axes=("embed",))
    return layer


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_every_second_sample_needs_twice_the_step(discretization):
    """Of a slow signal: the system is one in continuous time, and y is what it is at those
    times.
    """
    config = S5Config(width=1, state=4, dt_min=1e-3, dt_max=1e-3, discretization=discretization)
    layer, again = (
        without_skip(build(dataclasses.replace(config, step_rescale=r))) for r in (1.0, 2.0)
    )
    time = np.arange(4000, dtype=np.float32)
    x = np.sin(2 * np.pi * time / 2000)[None, :, None]
    dense, _ = run(layer, x)
    sparse, _ = run(layer, x[:, ::2], step_rescale=2.0)
    plain, _ = run(layer, x[:, ::2])
    configured, _ = run(again, x[:, ::2])
    assert_close(configured, sparse, rtol=1e-5)
    scale = np.max(np.abs(dense))
    assert np.max(np.abs(sparse - dense[:, ::2])) < 0.02 * scale
    assert np.max(np.abs(plain - dense[:, ::2])) > 0.1 * scale


def test_clipped_eigenvalues_are_stable():
    for clip in (False, True):
        layer = build(S5Config(width=2, state=2, clip_eigs=clip))
        layer.eigenvalue_real = nnx.Param(jnp.array([0.5, -0.5]), axes=("state",))
        decay, _ = layer.discretized()
        assert bool(np.all(np.abs(decay) < 1)) == clip
        assert bool(decay_measures(layer.largest_decay())["unstable"]) != clip


@pytest.mark.parametrize(
    "options",
    [
        dict(zip(("conj_sym", "bidirectional", "output_init"), values, strict=True))
        for values in itertools.product(
            (False, True), (False, True), ("lecun_normal", "complex_normal")
        )
    ],
    ids=str,
)
def test_every_parameter_receives_a_gradient(options):
    layer = build(S5Config(width=3, state=2, **options))
    gradient = jax.grad(lambda layer: jnp.sum(layer(signal())[0] ** 2))(layer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(leaf), path


def test_bad_input_is_refused(bidirectional):
    with pytest.raises(ValueError, match=r"holds equally many conjugate pairs, .* got 3 and 2"):
        S5Config(width=2, state=3, blocks=2)
    with pytest.raises(ValueError, match=r"output_init must be one of .* got 'zeros'"):
        S5Config(width=2, state=2, output_init="zeros")
    with pytest.raises(ValueError, match=r"0 < dt_min <= dt_max, got 0\.0 and 0\.1"):
        S5Config(width=2, state=2, dt_min=0.0)
    with pytest.raises(ValueError, match=r"step_rescale must be > 0, got -1\.0"):
        bidirectional(signal(), step_rescale=-1.0)
    with pytest.raises(ValueError, match=r"one number or \(b t\) = \(2, 7\), got shape \(7,\)"):
        bidirectional(signal(), step_rescale=np.ones(7))
    with pytest.raises(ValueError, match=r"step_rescale must be > 0, got 0\.0"):
        bidirectional(signal(), step_rescale=np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"has no state to stream from"):
        bidirectional.init_state(2)
    with pytest.raises(ValueError, match=r"a bidirectional layer cannot stream"):
        bidirectional(signal(), jnp.zeros((2, 4), jnp.complex64))
    layer = build(dataclasses.replace(BIDIRECTIONAL, bidirectional=False))
    with pytest.raises(ValueError, match=r"needs a state of shape \(2, 4\), got \(3, 4\)"):
        layer(signal(), layer.init_state(3))
