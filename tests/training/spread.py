"""Every model that there is, small enough to be trained for 20 steps on several meshes.

A subject trains on a mesh and gives its losses and its compiled step. Language models are found: of
every module of `jaxrec.models` each preset with TINY in its name, made smaller. The rest stand in
`OTHERS`.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from jaxrec import models
from jaxrec.layers.s4d import S4DConfig
from jaxrec.layers.s5 import S5Config
from jaxrec.models import graph_classifier, hrm, plstm, universal_transformer
from jaxrec.models.plstm_vision import vision_config
from jaxrec.models.protocol import LanguageModelConfig, training_call
from jaxrec.models.sequence_classifier import SequenceClassifierConfig
from jaxrec.models.vit import ViTConfig
from jaxrec.training import optim, sharding
from jaxrec.training.config import OptimizerConfig, PuzzleConfig, TrainConfig
from jaxrec.training.data.graphs import made_graphs
from jaxrec.training.data.images import Images
from jaxrec.training.graphs import bucketed, ordered
from jaxrec.training.images import ImageSettings, build_image_steps
from jaxrec.training.losses import cross_entropy
from jaxrec.training.puzzles import build_puzzle_steps
from jaxrec.training.step import build_steps

STEPS, BATCH, TIME, VOCABULARY, WIDTH = 20, 8, 20, 256, 32
MESHES = ("data=8", "fsdp=8", "data=2,model=4", "data=2,seq=4")
# The first updates of Adam have the sign of a gradient, whatever its size. At the full rate, what
# is rounding of a gradient near zero becomes a change of the losses: 9e-4 in 20 steps of GLA,
# against 4e-7 with a warm-up. Gradients are not cut, so that their size shows in the moments.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=STEPS, schedule="constant", clip_norm=None
)
SMALL = {
    "vocab_size": VOCABULARY,
    "width": WIDTH,
    "layers": 3,
    "heads": 4,
    "mlp_width": 64,
    "recurrent_width": 32,
    "inner_width": 64,
    "key_width": 8,
    "value_width": 16,
    "head_width": 8,
    "feature_width": 4,
    "step_rank": 4,
    "state_size": 8,
    "gate_rank": 4,
    "steps": 3,
    "context": 64,
    "window": 8,
    "chunk": 4,
}
"""Sizes that divide by all meshes, and none that a device's rows times TIME could be taken for; a
width that the model has only once stays one."""


class Trial(NamedTuple):
    """What came of training on a mesh."""

    losses: np.ndarray  # (STEPS)
    gradients: np.ndarray  # (STEPS): global norms of Adam's first moment
    text: str  # of the compiled step
    params: Any  # abstract, with where they lie


class Program(NamedTuple):
    """What is run on a mesh."""

    init: Callable[[], Any]  # the state
    train: Any  # (state, *batch) -> state, metrics or the loss alone
    batch: Callable[[int], tuple[Any, ...]]  # of a step


class Subject(NamedTuple):
    """A model, and how it is trained."""

    module: str
    name: str
    program: Callable[[str], Program]  # on a mesh


def subjects() -> list[Subject]:
    """All of them, in a fixed order."""
    found = []
    for info in pkgutil.iter_modules(models.__path__):
        module = importlib.import_module(f"{models.__name__}.{info.name}")
        for name, preset in sorted(vars(module).items()):
            is_other = any(other.module == info.name and other.name == name for other in OTHERS)
            if "TINY" in name and isinstance(preset, LanguageModelConfig) and not is_other:
                program = functools.partial(language_model, smaller(preset))
                found.append(Subject(info.name, name, program))
    return found + OTHERS


def smaller(preset: Any) -> Any:
    """The configuration in the sizes of `SMALL`."""
    if isinstance(preset, plstm.PLSTMLMConfig):  # whose sizes depend on each other
        return plstm.lm_config(vocab_size=VOCABULARY, width=32, layers=3)
    fields = {field.name for field in dataclasses.fields(preset)} & SMALL.keys()
    return dataclasses.replace(
        preset, **{name: SMALL[name] for name in fields if getattr(preset, name) not in (None, 1)}
    )


@functools.cache
def trial(subject: Subject, mesh: str) -> Trial:
    """Compiles the step once, and trains."""
    program = subject.program(mesh)
    state = program.init()
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state["params"]
    )
    compiled = program.train.lower(state, *program.batch(0)).compile()
    losses, gradients = [], []
    for step in range(STEPS):
        state, metrics = compiled(state, *program.batch(step))
        # One program with collectives at a time: see `sharding.is_virtual`.
        jax.block_until_ready(state)
        losses.append(float(metrics["loss"] if isinstance(metrics, dict) else metrics))
        gradients.append(first_moment(state["opt_state"]))
    return Trial(np.array(losses), np.array(gradients), compiled.as_text(), params)


def first_moment(state: Any) -> float:
    """The global norm of the gradient's running mean."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    squares = [np.sum(np.square(x)) for path, x in leaves if ".mu" in jax.tree_util.keystr(path)]
    assert squares
    return float(np.sqrt(np.sum(squares)))


def tokens(step: int, batch: int = BATCH) -> dict[str, np.ndarray]:
    """A batch whose rows are two documents each."""
    rng = np.random.default_rng(step)
    inputs, labels = rng.integers(0, VOCABULARY, (2, batch, TIME), dtype=np.int32)
    cuts = rng.integers(1, TIME, (batch, 1))
    segments = 1 + (np.arange(TIME)[None] >= cuts).astype(np.int32)
    return {"inputs": inputs, "labels": labels, "segment_ids": segments}


def language_model(config: Any, mesh: str, **changes: Any) -> Program:
    """As `jaxrec train` does; changes are those of the run."""
    run = TrainConfig(
        **{"steps": STEPS, "batch": BATCH, "time": TIME, "mesh": mesh, "optimizer": OPTIMIZER}
        | changes
    )
    devices = sharding.build_mesh(mesh)
    steps = build_steps(config, run, devices)

    def batch(step: int) -> tuple[Any, np.int32]:
        depth = config.sample_depth(np.random.default_rng((run.seed, step)))
        return sharding.put_batch(tokens(step, run.batch), devices), np.int32(depth or 0)

    return Program(steps.init, steps.train, batch)


def puzzles(mesh: str) -> Program:
    """HRM, whose vectors of puzzles are moved by another rule than the rest."""
    config = hrm.HRMConfig(
        vocab_size=8,
        length=7,
        width=32,
        heads=4,
        puzzles=16,
        puzzle_width=32,
        high_layers=1,
        low_layers=2,
        max_segments=3,
    )
    run = PuzzleConfig(steps=STEPS, batch=BATCH, mesh=mesh, optimizer=OPTIMIZER)
    devices = sharding.build_mesh(mesh)
    steps = build_puzzle_steps(config, run, devices)

    def batch(step: int) -> tuple[Any]:
        rng = np.random.default_rng(step)
        asked, answers = rng.integers(1, 8, (2, BATCH, 7), dtype=np.int32)
        puzzle = rng.integers(0, 16, BATCH, dtype=np.int32)
        return (hrm.Rows(*sharding.put_rows((asked, answers, puzzle), devices)),)

    return Program(steps.init, steps.train, batch)


def images(config: Any, mesh: str) -> Program:
    """A classifier of images."""
    run = ImageSettings(
        epochs=1, batch=BATCH, warmup_epochs=0, mesh=mesh, precision="float32", optimizer=OPTIMIZER
    )
    devices = sharding.build_mesh(mesh)
    steps = build_image_steps(config, run, devices, STEPS)

    def batch(step: int) -> tuple[Any]:
        rng = np.random.default_rng(step)
        pixels = rng.integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8)
        labels = rng.integers(0, config.classes, BATCH, dtype=np.int32)
        return (Images(*sharding.put_rows((pixels, labels), devices)),)

    return Program(steps.init, steps.train, batch)


def any_model(
    config: Any, loss: Callable[[Any, Any], Any], batch: Callable[[int], Any], mesh: str
) -> Program:
    """A model whose trainer knows of one device only: a plain step of training, with parameters,
    moments and batches where the table puts them."""
    devices = sharding.build_mesh(mesh)
    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(abstract)
    axes = sharding.stacked_axes(abstract)
    optimizer = optim.build(OPTIMIZER, STEPS, nnx.to_pure_dict(variables), axes)

    def init() -> dict[str, Any]:
        params = nnx.to_pure_dict(nnx.split(config.build(rngs=nnx.Rngs(0)))[1])
        return {"params": params, "opt_state": optimizer.init(params)}

    def train(state: Any, batch: Any) -> tuple[Any, Any]:
        params = state["params"]
        value, gradient = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), batch))(params)
        moves, moments = optimizer.update(gradient, state["opt_state"], params)
        params = jax.tree.map(lambda x, move: x + move, params, moves)
        return {"params": params, "opt_state": moments}, value

    _, places = sharding.placed(jax.eval_shape(init), abstract, devices)
    return Program(
        sharding.OnMesh(jax.jit(init, out_shardings=places), devices),
        sharding.OnMesh(jax.jit(train, out_shardings=(places, None)), devices),
        lambda step: (sharding.put_rows(batch(step), devices),),
    )


def of_sequences(model: Any, batch: Any) -> Any:
    """Of a classifier."""
    x, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


def sequences(step: int) -> Any:
    """For a classifier."""
    rng = np.random.default_rng(step)
    return rng.normal(size=(BATCH, TIME, 2)).astype(np.float32), rng.integers(
        0, 4, BATCH, dtype=np.int32
    )


def graphs(step: int) -> Any:
    """One bucket of graphs, the same in every step."""
    del step
    (bucket,) = bucketed(ordered(made_graphs("reachability", BATCH, seed=0, nodes=(4, 7))))
    return bucket


def of_translation(model: Any, batch: dict[str, Any]) -> Any:
    """Of a model with a source, as `training.tasks` has it."""
    options = {"source": batch["source"]}
    logits, penalty = training_call(model, batch["inputs"], jax.random.key(0), options)
    return cross_entropy(logits, batch["labels"], penalty)


def translations(step: int) -> dict[str, np.ndarray]:
    """The source is another text."""
    now = tokens(step)
    return {
        "inputs": now["inputs"],
        "labels": now["labels"],
        "source": tokens(step + STEPS)["inputs"],
    }


VISION = vision_config(width=32, heads=4, layers=2, patch=2, grid=(4, 4), classes=4)
VIT = ViTConfig(classes=4, width=32, heads=4, layers=2, mlp_width=64, patch=4, grid=(2, 2))
GRAPHS = graph_classifier.GraphClassifierConfig(features=3, classes=2, width=32, layers=2)
CLASSIFIER = SequenceClassifierConfig(
    inputs=2, classes=4, mixer=S5Config(width=32, state=8), layers=2
)
S4D_CLASSIFIER = dataclasses.replace(CLASSIFIER, mixer=S4DConfig(width=32, state=8))
TRANSLATOR = smaller(
    universal_transformer.adaptive(universal_transformer.UT_TINY),
)


def _plain(module: str, name: str, config: Any, loss: Any, batch: Any) -> Subject:
    return Subject(module, name, functools.partial(any_model, config, loss, batch))


OTHERS = [
    Subject("hrm", "SUDOKU", puzzles),
    Subject("vit", "VIT", functools.partial(images, VIT)),
    Subject("plstm_vision", "VISION", functools.partial(images, VISION)),
    _plain(
        "graph_classifier",
        "GRAPHS",
        GRAPHS,
        lambda model, bucket: of_sequences(model, (bucket.inputs, bucket.labels)),
        graphs,
    ),
    _plain("sequence_classifier", "S5", CLASSIFIER, of_sequences, sequences),
    _plain("sequence_classifier", "S4D", S4D_CLASSIFIER, of_sequences, sequences),
    _plain("universal_transformer", "UT_TINY", TRANSLATOR, of_translation, translations),
]
