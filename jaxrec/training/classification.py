"""Training a classifier of sequences or images in one process that keeps nothing on disk, with
another learning rate for the state-space parameters; `classifier_runs` trains in a run folder.

As S5 does (Smith et al. 2022, arXiv:2208.04933, appendix G.2.1): eigenvalues, time steps, input
matrices and norms move at a rate of their own, usually smaller, and do not decay.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxrec.training.config import ClassifierConfig, OptimizerConfig
from jaxrec.training.data.examples import Examples
from jaxrec.training.optim import scale_by_adam, schedule

STATE_SPACE_PARAMETERS = (
    "eigenvalue_real",
    "eigenvalue_imag",
    "log_rate",
    "frequency",
    "transition",
    "input",
    "input_real",
    "input_imag",
    "log_step",
    "decay",
)
"""Names of the parameters with the learning rate of their own, beside all of a block's norm."""


class ClassificationData(NamedTuple):
    """What is learned from, and what is held out."""

    train: Examples
    valid: Examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationSettings:
    """One training run."""

    epochs: int = 30
    """Passes over the training examples, >= 1."""
    batch: int = 64
    """Examples per step, >= 1; at most as many as there are. What an epoch leaves over is not
    used."""
    seed: int = 0
    """Seed of the parameters, the order of the examples, and dropout."""
    state_space_rate: float = 1e-3
    """Peak learning rate of the state-space parameters, > 0."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=4e-3, beta2=0.999, weight_decay=0.05, clip_norm=None, warmup_steps=20
        )
    )
    """AdamW and its schedule, for all other parameters; the state-space rate has the same
    schedule."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(
                f"ClassificationSettings: epochs and batch must be >= 1, got {self.epochs} and"
                f" {self.batch}."
            )
        if not 0 < self.state_space_rate < float("inf"):
            raise ValueError(
                "ClassificationSettings: state_space_rate must be > 0, got"
                f" {self.state_space_rate}."
            )
        if self.optimizer.name != "adamw":
            raise ValueError(
                f"ClassificationSettings: the optimizer must be adamw, got {self.optimizer.name}."
            )


class ClassificationResults(NamedTuple):
    """What came out of a run."""

    model: Any  # the trained model
    losses: np.ndarray  # float32 (steps), nats
    accuracy: float  # share of held-out examples


def train_classifier(
    config: Any, data: ClassificationData, settings: ClassificationSettings
) -> ClassificationResults:
    """Trains a freshly built model.

    Args:
      config: of the model, such as `SequenceClassifierConfig`; `build(rngs=)` gives a model that is
        called as `model(inputs, lengths, key=key)` and returns logits (b classes). `inputs` is its
        number of features, and `axes`, if there is one, what an example has before them.
      data: examples to learn from and to hold out.
      settings: length of the run, seed, learning rates.

    Raises:
      ValueError: the arrays do not fit each other or the model, or there are fewer examples than
        one batch needs.
    """
    for name, examples in data._asdict().items():
        check_examples(f"train_classifier: data.{name}", examples, config)
    count = data.train.inputs.shape[0]
    if count < settings.batch:
        raise ValueError(
            f"train_classifier: a batch of {settings.batch} needs as many examples, got {count}."
        )
    steps_per_epoch = count // settings.batch
    steps = settings.epochs * steps_per_epoch
    graph, start, step = _trainer(config, dataclasses.replace(settings, seed=0), steps)
    init_key, dropout_key = jax.random.split(jax.random.key(settings.seed))
    params, moments = start(init_key)
    losses = []
    order = np.random.default_rng(settings.seed)
    for epoch in range(settings.epochs):
        shuffled = order.permutation(count)
        for i in range(steps_per_epoch):
            picked = shuffled[i * settings.batch : (i + 1) * settings.batch]
            batch = data.train.rows(picked)
            key = jax.random.fold_in(dropout_key, epoch * steps_per_epoch + i)
            params, moments, value = step(params, moments, batch, key)
            losses.append(value)
    model = nnx.merge(graph, params)
    return ClassificationResults(model, np.array(losses), accuracy(model, data.valid))


@functools.cache
def _trainer(
    config: Any, settings: ClassificationSettings, steps: int
) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The model without its parameters, what begins a run, and one step of it; runs that differ in
    their seed share what is compiled.
    """
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(model)
    optimizer = optimizer_for(nnx.to_pure_dict(variables), settings, steps)

    @jax.jit
    def start(key: Array) -> tuple[Any, Any]:
        params = nnx.to_pure_dict(nnx.split(config.build(rngs=nnx.Rngs(key)))[1])
        return params, optimizer.init(params)

    @jax.jit
    def step(params: Any, moments: Any, batch: Examples, key: Array) -> tuple[Any, Any, Array]:
        def loss(params: Any) -> Array:
            logits = nnx.merge(graph, params)(numbers(batch.inputs), batch.lengths, key=key)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return jnp.mean(losses)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    return graph, start, step


def numbers(inputs: Array | np.ndarray) -> Array | np.ndarray:
    """Inputs as a model reads them: of bytes, shares of 255."""
    return inputs.astype(jnp.float32) / 255 if inputs.dtype == jnp.uint8 else inputs


@jax.jit
def _predicted(model: Any, x: Examples, options: dict[str, Any]) -> Array:
    return jnp.argmax(model(numbers(x.inputs), x.lengths, **options), axis=-1)


def accuracy(model: Any, examples: Examples, *, batch: int = 256, **options: Any) -> float:
    """Share of the examples whose label has the largest logit.

    Args:
      model: as trained by `train_classifier`.
      examples: at least one.
      batch: examples at once.
      **options: further arguments of the model, such as step_rescale.
    """
    right = 0
    for begin in range(0, examples.labels.shape[0], batch):
        part = examples.rows(slice(begin, begin + batch))
        right += int(np.sum(np.asarray(_predicted(model, part, options)) == part.labels))
    return right / examples.labels.shape[0]


def optimizer_for(
    params: Any, settings: ClassificationSettings | ClassifierConfig, steps: int
) -> optax.GradientTransformation:
    """AdamW in two groups: state-space parameters and norms at their own rate without decay; the
    rest at the optimizer's, its matrices with decay.
    """
    config = settings.optimizer
    own = jax.tree_util.tree_map_with_path(lambda path, _: _is_state_space(path), params)
    decays = jax.tree_util.tree_map_with_path(
        lambda path, own: not own and path[-1].key != "bias", own
    )
    ratio = settings.state_space_rate / config.learning_rate

    def slow(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda u, own: u * ratio if own else u, updates, own)

    return optax.chain(
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(schedule(config, steps)),
        optax.stateless(slow),
    )


def _is_state_space(path: Any) -> bool:
    return path[-1].key in STATE_SPACE_PARAMETERS or any(key.key == "norm" for key in path)


def check_examples(name: str, examples: Examples, config: Any) -> None:
    """Checks that examples fit a model.

    Args:
      name: of the examples, for the message.
      examples: at least one.
      config: of the model, see `train_classifier`.

    Raises:
      ValueError: they do not.
    """
    inputs, labels, lengths = examples
    axes = getattr(config, "axes", ("t",))
    fits = inputs.ndim == len(axes) + 2 and inputs.shape[-1] == config.inputs
    if not fits or labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"{name}: inputs must be (b {' '.join(axes)} {config.inputs}) and labels (b), got"
            f" {inputs.shape} and {labels.shape}."
        )
    if lengths is not None and axes != ("t",):
        raise ValueError(f"{name}: only sequences have lengths.")
    if not (labels.min() >= 0 and labels.max() < config.classes):
        raise ValueError(
            f"{name}: labels must lie in [0, {config.classes}), got {labels.min()} to"
            f" {labels.max()}."
        )
    if lengths is not None and not (lengths.min() >= 1 and lengths.max() <= inputs.shape[1]):
        raise ValueError(
            f"{name}: lengths must lie in [1, {inputs.shape[1]}], got {lengths.min()} to"
            f" {lengths.max()}."
        )
