"""What the tests of all models share: drawn parameters, toy data and a few steps of training."""

import functools

import jax
import numpy as np
import optax
from flax import nnx

from jaxrec.training.losses import cross_entropy


@functools.cache
def drawn(config):
    """The model with every parameter drawn by NumPy, so that none is zero or one, and at once."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))

    def parameter(path, leaf):
        if path[-1].key == "decay":
            return rng.uniform(-5, -2, leaf.shape).astype(np.float32)
        x = 0.1 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        return x.astype(np.float32)

    drawn = jax.tree_util.tree_map_with_path(parameter, nnx.to_pure_dict(state))
    return nnx.merge(graph, jax.device_put(drawn))


def abstract(config):
    """The model of a configuration as shapes; only to be traced, under `jax.eval_shape`."""
    return config.build(rngs=nnx.Rngs(0))


def parameters(config) -> int:
    """How many numbers the model of a configuration has; none is allocated."""
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model)[1]))


@functools.partial(jax.jit, static_argnames="remat")
def run(model, tokens, state=None, *, remat="none", **options):
    """A compiled call of a model without a loop; one compilation per shape."""
    return model(tokens, state, remat=remat, **options)


def initialised(config):
    """The model as training finds it. The rbg generator compiles faster than the default one."""
    build = jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))
    return build(jax.random.key(0, impl="rbg"))


def counting(vocab_size: int, batch: int = 4, time: int = 24) -> np.ndarray:
    """Rows that count upwards by 1, 2 or 3, modulo the vocabulary: tokens (b t+1)."""
    rng = np.random.default_rng(0)
    start, step = rng.integers(0, vocab_size, (batch, 1)), rng.integers(1, 4, (batch, 1))
    return ((start + step * np.arange(time + 1)) % vocab_size).astype(np.int32)


def losses(model, tokens: np.ndarray, steps: int = 20, **loop) -> list[float]:
    """The loss before each of some AdamW steps on one batch."""
    optimizer = optax.adamw(3e-3)

    def loss(model):
        logits, _ = model(tokens[:, :-1], **loop)
        return cross_entropy(logits, tokens[:, 1:])

    @jax.jit
    def train(model):
        def step(carry, _):
            model, state = carry
            value, gradient = jax.value_and_grad(loss)(model)
            with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
                updates, state = optimizer.update(gradient, state, model)
            return (optax.apply_updates(model, updates), state), value

        return jax.lax.scan(step, (model, optimizer.init(model)), None, length=steps)[1]

    return train(model).tolist()
