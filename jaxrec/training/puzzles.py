"""Training a solver of puzzles: one segment a step, with the carry as a part of the state.

Parameters move by the optimizer, the vectors of the puzzles in the batch by their gradient's sign.
Everything random is a function of the seed and the step, and the carry is in every checkpoint, so
that a run that was stopped goes on as if it had not been.

Wang et al., Hierarchical reasoning model (2025), arXiv:2506.21734, section 2 and appendix.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.errors import UserError
from jaxrec.models.hrm import HRM, Fixed, HRMConfig, Rows, Table
from jaxrec.ops.depth import RematPolicy
from jaxrec.training import optim, pondering, sharding
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import OptimizerConfig, Precision
from jaxrec.training.data.batches import prefetch
from jaxrec.training.data.puzzle_batches import GroupBatches, OrderedBatches
from jaxrec.training.data.puzzles import Rows as HostRows
from jaxrec.training.metrics import MetricsLog, report, truncate_after
from jaxrec.training.sharding import OnMesh
from jaxrec.training.step import cast_matrices, is_matrix, step_key

State = dict[str, Any]
LOSSES = ("answer_loss", "q_halt_loss", "q_continue_loss")
"""Metrics of a segment that are sums over all rows, not over those that halted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PuzzleSettings:
    """One run; learning rates and decays are those of Sudoku-Extreme with 1000 puzzles."""

    steps: int
    """Segments, >= 1."""
    seed: int = 0
    """Seed of the parameters and of exploration."""
    puzzle_rate: float = 1e-4
    """Peak learning rate of the puzzles' vectors, > 0; its schedule is the optimizer's."""
    puzzle_decay: float = 1.0
    """Share of a vector removed per step, times the learning rate, >= 0."""
    remat: RematPolicy = "none"
    """What the gradient stores of the layers of a stack."""
    precision: Precision = "float32"
    """Of activations, states and products."""
    mesh: str = "data=1"
    """Devices per mesh axis, as in `TrainConfig`."""
    log_every: int = 50
    """Steps between two lines of metrics, >= 1."""
    eval_every: int = 1000
    """Steps between two evaluations, each with a checkpoint, >= 1; there is one at the end."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            name="atan2",
            learning_rate=1e-4,
            weight_decay=1.0,
            clip_norm=None,
            schedule="constant",
            warmup_steps=2000,
        )
    )
    """The rule of all other parameters, and the schedule."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1; got {getattr(self, name)}.")
        if not 0 < self.puzzle_rate < float("inf"):
            raise UserError(f"puzzle_rate must be > 0; got {self.puzzle_rate}.")
        if not self.puzzle_decay >= 0:
            raise UserError(f"puzzle_decay must be >= 0; got {self.puzzle_decay}.")


class PuzzleScores(NamedTuple):
    """How held-out puzzles were solved, by the number of segments."""

    exact: np.ndarray  # (M): share solved after segment 1, 2, ... M
    accuracy: np.ndarray  # (M): share of right tokens
    halted_exact: float  # share solved where each puzzle ends when q_halt > q_continue
    halted_segments: float  # segments that these puzzles take on average


class PuzzleSteps(NamedTuple):
    """One run's compiled functions."""

    init: Callable[[], State]
    train: Callable[[State, Rows], tuple[State, dict[str, Array]]]  # consumes the state
    evaluate: Callable[[State, Rows], tuple[Array, ...]]  # of every row: right and solved (M b),
    # and whether q_halt > q_continue (M b)
    abstract: State  # shapes, dtypes and shardings of the state
    merge: Callable[[State], HRM]


class PuzzleResults(NamedTuple):
    """What came out of a run."""

    model: HRM
    scores: PuzzleScores


def build_puzzle_steps(
    config: HRMConfig, settings: PuzzleSettings, batch: int, mesh: Mesh
) -> PuzzleSteps:
    """Prepares a run; nothing is computed or allocated before the first call.

    Raises:
      UserError: a parameter or the batch does not divide over the mesh.
    """
    sharding.check_batch(batch, mesh.shape["seq"], mesh)
    abstract_model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    graph, *kinds = nnx.split(abstract_model, nnx.Param, Table, Fixed)
    trained = kinds[0]
    matrices, dtype = is_matrix(trained), jnp.dtype(settings.precision)
    rate = optim.schedule(settings.optimizer, settings.steps)
    puzzle_share = settings.puzzle_rate / settings.optimizer.learning_rate
    optimizer = optim.build(
        settings.optimizer,
        settings.steps,
        nnx.to_pure_dict(trained),
        sharding.stacked_axes(trained),
    )
    decay = settings.optimizer.ema_decay

    def init() -> State:
        model = config.build(rngs=nnx.Rngs(settings.seed))
        _, *kinds = nnx.split(model, nnx.Param, Table, Fixed)
        params, table, fixed = (nnx.to_pure_dict(kind) for kind in kinds)
        nothing = jnp.zeros((batch, config.length), jnp.int32)
        rows = Rows(nothing, nothing, jnp.zeros(batch, jnp.int32))
        state = {"params": params, "table": table, "fixed": fixed}
        return state | {
            "opt_state": optimizer.init(params),
            "ema": None if decay is None else jax.tree.map(jnp.copy, params),
            "carry": solver(state, params).init_carry(rows),
            "step": jnp.zeros((), jnp.int32),
        }

    def solver(state: State, params: Any) -> HRM:
        params = cast_matrices(params, matrices, dtype)
        return nnx.merge(graph, params, state["table"], state["fixed"])

    def train(state: State, offered: Rows) -> tuple[State, dict[str, Array]]:
        params, table = state["params"], state["table"]
        carry = pondering.take_next(solver(state, params), state["carry"], offered)
        explore = pondering.draws(
            step_key(settings.seed, state["step"]), batch, config.max_segments
        )

        def loss(params: Any, vectors: Array | None) -> tuple[Array, pondering.Segment]:
            model = solver(state, params)
            total, segment = pondering.segment(model, carry, vectors, explore, remat=settings.remat)
            return total / batch, segment

        vectors = solver(state, params).vectors_of(carry.rows.puzzle)
        graded = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, segment), (gradient, of_vectors) = graded(params, vectors)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        if of_vectors is not None:
            table = jax.tree.map(
                lambda rows: optim.sign_sgd_rows(
                    rows,
                    carry.rows.puzzle,
                    of_vectors,
                    rate=rate(state["step"]) * puzzle_share,
                    weight_decay=settings.puzzle_decay,
                ),
                table,
            )
        new = state | {
            "params": params,
            "table": table,
            "opt_state": opt_state,
            "ema": None if decay is None else optim.ema_update(state["ema"], params, decay),
            "carry": segment.carry,
            "step": state["step"] + 1,
        }
        return new, {"loss": value, **segment.metrics}

    def evaluate(state: State, rows: Rows) -> tuple[Array, ...]:
        model = solver(state, state["params"] if decay is None else state["ema"])
        vectors = model.vectors_of(rows.puzzle)

        def body(carry: pondering.Carry, _: None) -> tuple[pondering.Carry, tuple[Array, ...]]:
            segment = pondering.segment(model, carry, vectors)[1]
            right, solved = pondering.scores(segment.logits, rows.labels)
            return segment.carry, (right, solved, segment.q[:, 0] > segment.q[:, 1])

        carry = pondering.take_next(model, model.init_carry(rows), rows)
        return jax.lax.scan(body, carry, length=config.max_segments)[1]

    abstract, places = sharding.placed(
        jax.eval_shape(init), abstract_model, mesh, by_row=("carry",)
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return PuzzleSteps(
        init=OnMesh(jax.jit(init, out_shardings=places), mesh),
        train=OnMesh(jax.jit(train, donate_argnums=0, out_shardings=(places, everywhere)), mesh),
        evaluate=OnMesh(jax.jit(evaluate, out_shardings=everywhere), mesh),
        abstract=abstract,
        merge=lambda state: nnx.merge(
            graph,
            state["params"] if decay is None else state["ema"],
            state["table"],
            state["fixed"],
        ),
    )


def train_puzzles(
    config: HRMConfig,
    train: GroupBatches,
    valid: OrderedBatches,
    settings: PuzzleSettings,
    folder: Path,
    *,
    stream: TextIO | None = None,
) -> PuzzleResults:
    """Trains a solver, or goes on with the run that the folder holds.

    Args:
      config: of the model; its length and its vocabulary must be those of the data.
      train: batches to learn from.
      valid: a pass over held-out puzzles.
      settings: of the run; the same when it goes on.
      folder: of the run: metrics.jsonl and checkpoints.
      stream: where a line is written for each line of metrics; nowhere if None.

    Raises:
      UserError: the data do not fit the model, the loss is not finite, or a checkpoint could not
        be written or read.
    """
    for name, data in (("train", train), ("valid", valid)):
        _check(name, data(0), config)
    mesh = sharding.build_mesh(settings.mesh)
    steps = build_puzzle_steps(config, settings, train.batch, mesh)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
        first = checkpoints.latest_step() or 0
        state = checkpoints.restore(first, steps.abstract) if first else steps.init()
        truncate_after(folder / "metrics.jsonl", first)
        log = stack.enter_context(MetricsLog(folder))
        scores = score(steps, valid, state, mesh) if first == settings.steps else None
        rows = sharding.host_rows(train.batch)
        ahead = prefetch(train, first, settings.steps, rows)
        for step, batch in stack.enter_context(contextlib.closing(ahead)):
            state, metrics = steps.train(state, _put(batch, mesh))
            now = step + 1
            if now % settings.log_every == 0 or now == settings.steps:
                values = _means(jax.device_get(metrics), train.batch)
                report(log, stream, now, values, "train")
                if not np.isfinite(values["loss"]):
                    raise UserError(
                        f"The loss of step {now} is {values['loss']}. Lower the learning rate; the"
                        f" last good state is that of step {checkpoints.latest_step() or 0}."
                    )
            if now % settings.eval_every == 0 or now == settings.steps:
                scores = score(steps, valid, state, mesh)
                report(log, stream, now, _summary(scores), "valid")
                checkpoints.save(now, state, _summary(scores))
    assert scores is not None, "the last step is evaluated"
    return PuzzleResults(steps.merge(state), scores)


def score(steps: PuzzleSteps, data: OrderedBatches, state: State, mesh: Mesh) -> PuzzleScores:
    """Lets every puzzle of a pass have all segments, and says what was solved after each."""
    parts = []
    for step in range(data.num_batches):
        rows = _put(data(step, sharding.host_rows(data.batch)), mesh)
        right, solved, halts = jax.device_get(steps.evaluate(state, rows))
        real = min(data.batch, data.count - step * data.batch)
        parts.append([x[:, :real] for x in (right, solved, halts)])
    right, solved, halts = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    halts[-1] = True
    end = np.argmax(halts, axis=0)
    return PuzzleScores(
        exact=np.mean(solved, axis=1),
        accuracy=np.mean(right, axis=1),
        halted_exact=float(np.mean(solved[end, np.arange(len(end))])),
        halted_segments=float(np.mean(end + 1)),
    )


def _put(rows: HostRows, mesh: Mesh) -> Rows:
    return Rows(*sharding.put_rows(tuple(rows), mesh))


def _means(metrics: dict[str, Any], batch: int) -> dict[str, float]:
    """Losses per row, and the rest per row that halted, of which there may be none."""
    values = {name: float(value) for name, value in metrics.items()}
    count = values.pop("count")
    means = {name: values.pop(name) / batch for name in LOSSES if name in values}
    return {"loss": values.pop("loss"), **means, "halted": count} | (
        {name: value / count for name, value in values.items()} if count else {}
    )


def _summary(scores: PuzzleScores) -> dict[str, float]:
    return {
        "exact_accuracy": float(scores.exact[-1]),
        "accuracy": float(scores.accuracy[-1]),
        "halted_exact_accuracy": scores.halted_exact,
        "halted_segments": scores.halted_segments,
    }


def _check(name: str, rows: Any, config: HRMConfig) -> None:
    """Refuses a batch that the model cannot read."""
    length = rows.tokens.shape[1]
    largest = max(int(rows.tokens.max()), int(rows.labels.max()))
    if length != config.length or largest >= config.vocab_size:
        raise UserError(
            f"{name}: puzzles of {length} tokens up to {largest} do not fit a model of"
            f" {config.length} tokens of a vocabulary of {config.vocab_size}."
        )
    if config.puzzle_width and int(rows.puzzle.max()) >= config.puzzles:
        raise UserError(
            f"{name}: there is a puzzle {int(rows.puzzle.max())}, but the model has vectors for"
            f" {config.puzzles}."
        )
