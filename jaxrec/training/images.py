"""Training a classifier on images from disk, over a mesh: the recipe of DeiT III.

A step mixes the images of a batch in pairs, by fading one into the other or by pasting a rectangle,
and their labels likewise,

    x = w x_i + (1 - w) x_j,   y = w y_i + (1 - w) y_j,   w ~ Beta(alpha, alpha);

the loss is that of a separate yes or no for every class, or of one among all. Everything random is
a function of the seed and the step, so that a run that was stopped goes on as if it had not been.

Touvron et al., DeiT III: revenge of the ViT (2022), arXiv:2204.07118; Zhang et al., mixup (2017),
arXiv:1710.09412; Yun et al., CutMix (2019), arXiv:1905.04899; Hoffer et al., Augment your batch
(2019), arXiv:1901.09335 (repeats).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.analysis.nonfinite import first_nonfinite_leaf
from jaxrec.config import to_dict
from jaxrec.errors import UserError
from jaxrec.training import hosts, optim, sharding
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import CommonConfig, OptimizerConfig, Precision
from jaxrec.training.data.batches import prefetch
from jaxrec.training.data.images import ImageFolder, Images
from jaxrec.training.lock import locked
from jaxrec.training.metrics import MetricsLog, report, truncate_after
from jaxrec.training.sharding import OnMesh
from jaxrec.training.step import cast_matrices, is_matrix, step_key

Loss = Literal["each", "one"]
State = dict[str, Any]

FREE = ("mesh", "log_every", "save_epochs", "batch_limit")
"""Settings that a run may change when it goes on: its numbers are the same."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours of ImageNet, in shares of white."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings(CommonConfig):
    """One run; the defaults are those of pLSTM-Vis-T on ImageNet-1k but for the mesh."""

    epochs: int = 800
    """Times as many images are read as there are, >= 1."""
    batch: int = 2048
    """Images per step over all devices, >= 1."""
    warmup_epochs: int = 5
    """Epochs in which the learning rate grows to its peak, >= 0."""
    repeats: int = 3
    """So many times in a row an image is read, changed each time in another way, >= 1."""
    loss: Loss = "each"
    """each: a logistic loss of every class, their mean; one: the cross entropy."""
    smoothing: float = 0.0
    """Share of the label that is spread over all classes, in [0, 1)."""
    mixup: float = 0.8
    """alpha of fading, >= 0; 0: none."""
    cutmix: float = 1.0
    """alpha of pasting, >= 0; 0: none. With both, each is taken in half of the steps."""
    precision: Precision = "bfloat16"
    """Of activations and products; parameters, gates and norms are float32."""
    save_epochs: int = 10
    """Epochs between two checkpoints with a measured accuracy, >= 1; there is one at the end."""
    log_every: int = 50
    """Steps between two lines of metrics, >= 1."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            name="lamb",
            learning_rate=4e-3,
            beta2=0.999,
            epsilon=1e-6,
            weight_decay=0.02,
            clip_norm=1.0,
            final_fraction=1e-3,
        )
    )
    """The rule and its schedule, but for the warm-up, which is counted in epochs here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "repeats", "save_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1; got {getattr(self, name)}.")
        for name in ("warmup_epochs", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be >= 0; got {getattr(self, name)}.")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"smoothing must lie in [0, 1); got {self.smoothing}.")
        if self.loss not in get_args(Loss):
            raise UserError(f"loss must be one of {', '.join(get_args(Loss))}; got {self.loss!r}.")


class ImageSteps(NamedTuple):
    """One run's compiled functions."""

    init: Callable[[], State]
    train: Callable[[State, Images], tuple[State, Array]]  # consumes the state; the loss
    right: Callable[[Any, Images, Array], Array]  # (params, images, weights) -> images right
    abstract: State  # shapes, dtypes and shardings of the state
    merge: Callable[[Any], Any]  # params -> model


class ImageResults(NamedTuple):
    """What came out of a run."""

    model: Any
    accuracy: float  # share of the images held out
    steps: int


def build_image_steps(
    model_config: Any, settings: ImageSettings, mesh: Mesh, steps_per_epoch: int
) -> ImageSteps:
    """Prepares a run; nothing is computed or allocated before the first call.

    Args:
      model_config: of a classifier of images with 3 channels, such as `PLSTMVisionConfig`.
      settings: of the run.
      mesh: the devices.
      steps_per_epoch: of the run.

    Raises:
      UserError: a parameter or the batch does not divide over the mesh.
    """
    sharding.check_batch(settings.batch, mesh.shape["seq"], mesh)
    abstract_model = nnx.eval_shape(lambda: model_config.build(rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(abstract_model)
    matrices, dtype = is_matrix(abstract_model), jnp.dtype(settings.precision)
    warmup = settings.warmup_epochs * steps_per_epoch
    rule = dataclasses.replace(settings.optimizer, warmup_steps=warmup)
    optimizer = optim.build(
        rule,
        settings.epochs * steps_per_epoch,
        nnx.to_pure_dict(variables),
        sharding.stacked_axes(abstract_model),
    )

    def init() -> State:
        model = model_config.build(rngs=nnx.Rngs(settings.seed))
        params = nnx.to_pure_dict(nnx.split(model)[1])
        step = jnp.zeros((), jnp.int32)
        return {"params": params, "opt_state": optimizer.init(params), "step": step}

    def logits(params: Any, images: Array, key: Array | None) -> Array:
        return nnx.merge(graph, cast_matrices(params, matrices, dtype))(images, key=key)

    def train(state: State, batch: Images) -> tuple[State, Array]:
        mix_key, drop_key = jax.random.split(step_key(settings.seed, state["step"]))
        labels = jax.nn.one_hot(batch.labels, model_config.classes)
        labels = (1 - settings.smoothing) * labels + settings.smoothing / model_config.classes
        images, labels = mixed(_normalised(batch.images), labels, settings, mix_key)

        def loss(params: Any) -> Array:
            scores = logits(params, images, drop_key)
            if settings.loss == "each":
                return jnp.mean(optax.sigmoid_binary_cross_entropy(scores, labels))
            return jnp.mean(optax.softmax_cross_entropy(scores, labels))

        value, gradient = jax.value_and_grad(loss)(state["params"])
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, value

    def right(params: Any, batch: Images, weights: Array) -> Array:
        found = jnp.argmax(logits(params, _normalised(batch.images), None), axis=-1)
        return jnp.sum(jnp.where(found == batch.labels, weights, 0.0))

    abstract, places = sharding.placed(jax.eval_shape(init), abstract_model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return ImageSteps(
        init=OnMesh(jax.jit(init, out_shardings=places), mesh),
        train=OnMesh(jax.jit(train, donate_argnums=0, out_shardings=(places, everywhere)), mesh),
        right=OnMesh(jax.jit(right, out_shardings=everywhere), mesh),
        abstract=abstract,
        merge=lambda params: nnx.merge(graph, params),
    )


def mixed(images: Array, labels: Array, settings: ImageSettings, key: Array) -> tuple[Array, Array]:
    """Mixes every image with the one that stands as far from the other end of the batch.

    Args:
      images: (b x y c).
      labels: weights of the classes, (b classes).
      settings: mixup and cutmix are read.
      key: of what is drawn, the same for all of the batch.

    Returns:
      Both, mixed; as they are if neither is wanted.
    """
    choice, fade, paste, place = jax.random.split(key, 4)
    width, height = images.shape[1:3]

    def faded() -> tuple[Array, Array]:
        weight = jax.random.beta(fade, settings.mixup, settings.mixup)
        return jnp.full((width, height), weight), weight

    def pasted() -> tuple[Array, Array]:
        kept = jax.random.beta(paste, settings.cutmix, settings.cutmix)
        size, at = jnp.sqrt(1 - kept), jax.random.uniform(place, (2,))

        def inside(count: int, centre: Array) -> Array:
            near = jnp.abs(jnp.arange(count, dtype=jnp.float32) + 0.5 - centre * count)
            return near < size * count / 2

        hole = inside(width, at[0])[:, None] & inside(height, at[1])[None]
        mask = jnp.where(hole, 0.0, 1.0)
        return mask, jnp.mean(mask)

    if settings.mixup and settings.cutmix:
        mask, weight = jax.lax.cond(jax.random.bernoulli(choice), faded, pasted)
    elif settings.mixup or settings.cutmix:
        mask, weight = faded() if settings.mixup else pasted()
    else:
        return images, labels
    mask = mask[None, :, :, None]
    images = mask * images + (1 - mask) * images[::-1]
    return images, weight * labels + (1 - weight) * labels[::-1]


def _normalised(images: Array | np.ndarray) -> Array:
    mean, deviation = (jnp.array(x, jnp.float32)[None, None, None] for x in (MEAN, DEVIATION))
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / deviation


def train_images(
    model_config: Any,
    train: ImageFolder,
    valid: ImageFolder,
    settings: ImageSettings,
    folder: Path,
    *,
    start: Callable[[ImageSteps], Any] | None = None,
    stream: TextIO | None = None,
) -> ImageResults:
    """Trains a classifier, or goes on with the run that the folder holds.

    Args:
      model_config: of the model; its classes and the images' size must be those of the data.
      train: images to learn from.
      valid: images held out.
      settings: of the run; the same when it goes on.
      folder: of the run: metrics.jsonl and checkpoints.
      start: what gives the parameters that a new run begins with, from its steps; None draws them.
      stream: where a line is written for each line of metrics; nowhere if None.

    Raises:
      UserError: the data do not fit the model, the folder holds a run with other settings or
        another process writes into it, a batch did not come, the loss or a parameter is not finite,
        or a checkpoint could not be written or read.
    """
    _check(model_config, train, valid, settings)
    mesh = sharding.build_mesh(settings.mesh)
    per_epoch = len(train) // settings.batch
    steps = build_image_steps(model_config, settings, mesh, per_epoch)
    last, save_every = settings.epochs * per_epoch, settings.save_epochs * per_epoch
    read = functools.partial(batch_of, train, settings)
    score = functools.partial(_accuracy, steps, valid, settings, mesh)
    with contextlib.ExitStack() as stack:
        unlocked = hosts.first_does(lambda: stack.enter_context(locked(folder)))
        if unlocked is not None and stream is not None:
            print(unlocked, file=stream, flush=True)
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
        first = checkpoints.latest_step() or 0
        told = _told(model_config, settings)
        if first:
            _check_same(folder, checkpoints.meta(first), told)
            state = checkpoints.restore(first, steps.abstract)
        else:
            state = steps.init()
            if start is not None:
                state["params"] = start(steps)
        truncate_after(folder / "metrics.jsonl", first)
        log = stack.enter_context(MetricsLog(folder))
        accuracy = score(state) if first == last else 0.0
        rows = sharding.host_rows(settings.batch, mesh)
        made = prefetch(read, first, last, rows, limit=settings.batch_limit)
        ahead = stack.enter_context(contextlib.closing(made))
        for step, batch in ahead:
            state, loss = steps.train(state, sharding.put_rows(batch, mesh))
            now = step + 1
            logs, saves = now % settings.log_every == 0, now % save_every == 0
            if logs or saves or now == last:
                _check_finite(now, loss, state["params"], checkpoints.latest_step() or 0)
            if logs or now == last:
                report(log, stream, now, {"loss": float(loss)}, "train")
            if saves or now == last:
                accuracy = score(state)
                report(log, stream, now, {"accuracy": accuracy}, "valid")
                checkpoints.save(now, state, told)
    return ImageResults(steps.merge(state["params"]), accuracy, last)


def _told(model_config: Any, settings: ImageSettings) -> dict[str, Any]:
    """What a checkpoint says of its run, and a run that goes on must say too."""
    told = {f"model.{name}": value for name, value in to_dict(model_config).items()}
    told |= {name: value for name, value in to_dict(settings).items() if name not in FREE}
    return told


def _check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for name in here.keys() | there.keys():
        if there.get(name) != here.get(name):
            raise UserError(
                f"{folder} holds a run with {name} {there.get(name)}; this one has"
                f" {here.get(name)}. Choose another folder, or repeat the settings of the run that"
                " is there."
            )


def _check_finite(step: int, loss: Array, params: Any, good: int) -> None:
    place = f"is {float(loss)}"
    if np.isfinite(float(loss)):
        leaf = first_nonfinite_leaf(params)
        if leaf is None:
            return
        place = f"is {float(loss)}, but parameter {leaf} is not finite after it"
    raise UserError(
        f"The loss of step {step} {place}. Lower the learning rate; the last good state is that of"
        f" step {good}."
    )


def batch_of(data: ImageFolder, settings: ImageSettings, step: int, rows: slice) -> Images:
    """The images of a step of training: a function of the seed and the step alone.

    Every epoch reads as many images as there are, in another order, each several times in a row;
    with three repeats a third of them.
    """
    per_epoch = len(data) // settings.batch
    epoch, within = divmod(step, per_epoch)
    order = np.random.default_rng((settings.seed, epoch)).permutation(len(data))
    places = within * settings.batch + np.arange(settings.batch)[rows]
    seeds = [(settings.seed, epoch, int(place)) for place in places]
    return data.read(order[places // settings.repeats].tolist(), seeds)


def _accuracy(
    steps: ImageSteps, data: ImageFolder, settings: ImageSettings, mesh: Mesh, state: State
) -> float:
    """Share of all images; each host reads its part of every batch."""
    right = 0.0
    for begin in range(0, len(data), settings.batch):
        places = (begin + np.arange(settings.batch))[sharding.host_rows(settings.batch, mesh)]
        weights = (places < len(data)).astype(np.float32)
        batch = data.read((places % len(data)).tolist())
        right += float(steps.right(state["params"], *sharding.put_rows((batch, weights), mesh)))
    return right / len(data)


def _check(
    model_config: Any, train: ImageFolder, valid: ImageFolder, settings: ImageSettings
) -> None:
    if train.classes != valid.classes or len(train.classes) != model_config.classes:
        raise UserError(
            f"The model has {model_config.classes} classes, the folder of training"
            f" {len(train.classes)} and that of testing {len(valid.classes)}; they must be the"
            " same, by name and number."
        )
    if model_config.inputs != 3 or train.size % model_config.patch or train.size != valid.size:
        raise UserError(
            f"Images of {train.size} and {valid.size} pixels with 3 colours do not fit a model with"
            f" patches of {model_config.patch} and {model_config.inputs} colours."
        )
    if len(train) < settings.batch:
        raise UserError(
            f"A batch of {settings.batch} needs as many images of training, got {len(train)}."
        )
