"""What has a convolutional view computes the same by it as by its scan, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.lssl import LSSLConfig
from jaxrec.layers.s4d import S4DConfig
from jaxrec.testing import assert_close

TRAINED = {"train_transition": True, "train_step": True}
CONFIGS = [
    *(LSSLConfig(width=3, state=4, outputs=2, alpha=alpha, **TRAINED) for alpha in (0.0, 0.5, 1.0)),
    *(
        S4DConfig(width=3, state=6, init=init, discretization=discretization)
        for init in ("lin", "inv", "legs")
        for discretization in ("zoh", "bilinear")
    ),
]
SIGNAL = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="method")
def run(layer, x, **options):
    return layer(x, **options)


@pytest.fixture(params=CONFIGS, ids=str, scope="module")
def layer(request):
    return jax.jit(lambda key: request.param.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_both_views_agree_and_so_do_their_gradients(layer):
    @functools.partial(jax.jit, static_argnames="method")
    def gradient(layer, method):
        return jax.grad(lambda layer: jnp.sum(jnp.sin(layer(SIGNAL, method=method)[0])))(layer)

    convolved, scanned = (run(layer, SIGNAL, method=method) for method in ("conv", "scan"))
    for left, right in zip(convolved, scanned, strict=True):
        assert_close(left, right, rtol=5e-6)
    gradients = [jax.tree.leaves(gradient(layer, method)) for method in ("conv", "scan")]
    for left, right in zip(*gradients, strict=True):
        assert np.any(right)
        assert_close(left, right, rtol=2e-5)


def test_what_was_convolved_can_be_continued_step_by_step(layer):
    whole, _ = run(layer, SIGNAL)
    y, state = run(layer, SIGNAL[:, :6], method="conv")
    outputs = [y]
    for t in range(6, 9):
        y, state = run(layer, SIGNAL[:, t : t + 1], state=state)
        outputs.append(y)
    assert_close(np.concatenate(outputs, axis=1), whole, rtol=5e-6)
