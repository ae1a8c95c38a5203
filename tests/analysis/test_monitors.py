"""The numbers of monitors against NumPy, on arrays whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.analysis import monitors


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_loop_numbers():
    old, new = drawn(2, 5, 4), drawn(2, 5, 4) + 1
    found = monitors.loop_numbers((old, new))
    change = np.linalg.norm(new - old, axis=-1) / np.linalg.norm(new, axis=-1)
    np.testing.assert_allclose(found["latent_change"], np.mean(change), rtol=1e-6)
    np.testing.assert_allclose(found["latent_rms"], np.sqrt(np.mean(new**2)), rtol=1e-6)


def test_correlation_is_the_mean_cosine_of_pairs():
    x = drawn(2, 5, 4)
    cosines = []
    for row in x.astype(np.float64):
        for i in range(5):
            for j in range(5):
                if i != j:
                    norms = np.linalg.norm(row[i]) * np.linalg.norm(row[j])
                    cosines.append(row[i] @ row[j] / norms)
    np.testing.assert_allclose(monitors.token_correlation(x), np.mean(cosines), atol=1e-6)
    alike = np.broadcast_to(x[:, :1], x.shape)
    np.testing.assert_allclose(monitors.token_correlation(alike), 1, atol=1e-6)
    assert monitors.token_correlation(x[:, :1]) == 1


@pytest.mark.parametrize("shape", [(2, 3, 16), (2, 30, 4)])
def test_effective_rank_is_that_of_the_singular_values(shape):
    x = drawn(*shape)
    values = np.linalg.svd(x.reshape(-1, shape[-1]).astype(np.float64), compute_uv=False) ** 2
    share = values / values.sum()
    want = np.exp(-np.sum(share * np.log(share)))
    np.testing.assert_allclose(monitors.effective_rank(x), want, rtol=1e-5)


def test_effective_rank_of_what_is_known():
    orthogonal = np.eye(8, dtype=np.float32)[None]
    np.testing.assert_allclose(monitors.effective_rank(orthogonal), 8, rtol=1e-5)
    collapsed = drawn(2, 40, 1) * drawn(64)
    np.testing.assert_allclose(monitors.effective_rank(1e20 * collapsed), 1, atol=1e-3)
    assert monitors.effective_rank(np.zeros((1, 3, 4), np.float32)) == 1


def test_size_by_time():
    x = drawn(2, 19, 4)
    found = monitors.stream_numbers(x)
    want = [np.sqrt(np.mean(part**2)) for part in np.array_split(x, 8, axis=1)]
    np.testing.assert_allclose(found["stream_rms_by_time"], want, rtol=1e-6)
    assert monitors.stream_numbers(x[:, :3])["stream_rms_by_time"].shape == (3,)


def test_decays_fall_into_the_bins_of_their_memory():
    steps = np.array([0.5, 2, 2.5, 5, 20, 50, 200, 500, 5000])
    phase = np.exp(1j * np.arange(9))
    a = np.exp(-1 / steps) * phase
    found = monitors.decay_numbers(jnp.asarray(a, jnp.complex64))
    want = np.array([1, 2, 1, 1, 1, 1, 1, 1]) / 9
    np.testing.assert_allclose(found["memory_steps"], want, atol=1e-6)
    np.testing.assert_allclose(found["largest_decay"], np.exp(-1 / 5000), rtol=1e-6)


def test_saturated_gates_are_counted_at_both_ends():
    gates = np.array([0.001, 0.02, 0.5, 0.98, 0.995], np.float32)
    np.testing.assert_allclose(monitors.gate_numbers(gates)["saturated_gates"], 0.4)


def test_divergence_is_that_of_the_distributions():
    a, b = drawn(3, 5), drawn(3, 5) * 2
    p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (a, b))
    want = np.sum(p * np.log(p / q), axis=-1)
    np.testing.assert_allclose(monitors.divergence(a, b), want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(monitors.divergence(a, a), 0, atol=1e-6)


def test_memory_of_a_complex_state():
    state = jnp.asarray([3 + 4j, 0], jnp.complex64)
    want = np.sqrt(25 / 2)
    np.testing.assert_allclose(monitors.memory_numbers(state)["memory_rms"], want, rtol=1e-6)
    assert jax.eval_shape(monitors.memory_numbers, state)["memory_rms"].dtype == jnp.float32
