"""Training a solver of puzzles: one segment a step, with the carry as a part of the state.

Parameters move by the optimizer, the vectors of the puzzles in the batch by their gradient's sign.
Everything random is a function of the seed and the step, and the carry is in every checkpoint, so
that a run that was stopped goes on as if it had not been.

Wang et al., Hierarchical reasoning model (2025), arXiv:2506.21734, section 2 and appendix.
"""

import dataclasses
import functools
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
from jaxrec.training import monitors, optim, pondering, running, sharding
from jaxrec.training.config import PuzzleConfig
from jaxrec.training.data import arc
from jaxrec.training.data.puzzle_sources import PuzzleData, load_puzzles, made_size
from jaxrec.training.running import (
    State,
    averaged,
    ended,
    open_run,
    run_folder,
    run_steps,
    settling,
    updating,
)
from jaxrec.training.runs import Run, read_run, trained_model
from jaxrec.training.sharding import OnMesh
from jaxrec.training.step import cast_matrices, is_matrix, step_key

LOSSES = ("answer_loss", "q_halt_loss", "q_continue_loss")
"""Metrics of a segment that are sums over all rows, not over those that halted."""
FINAL = 4
"""So many times the puzzles of an evaluation on the way are solved by the one at the end."""


@dataclasses.dataclass(frozen=True)
class PuzzleScores:
    """How held-out puzzles were solved, by the number of segments."""

    exact: tuple[float, ...]  # share solved after segment 1, 2, ... M
    accuracy: tuple[float, ...]  # share of right tokens
    halted_exact: float  # share solved where each puzzle ends when q_halt > q_continue
    halted_segments: float  # segments that these puzzles take on average
    puzzles: int
    two_attempts: float | None = None  # of ARC: share of tests of which one of two votes is right

    def __str__(self) -> str:
        shares = "  ".join(f"{share:.1%}" for share in self.exact)
        return (
            f"solved by segment: {shares}; halting by itself {self.halted_exact:.1%}"
            f" in {self.halted_segments:.2f}"
        )


class PuzzleSteps(NamedTuple):
    """One run's compiled functions."""

    init: Callable[[], State]
    train: Callable[[State, Rows[Array]], tuple[State, dict[str, Array]]]  # consumes the state
    evaluate: Callable[[Any, Rows[Array]], pondering.Solution]  # (params, rows)
    abstract: State  # shapes, dtypes and shardings of the state
    merge: Callable[[Any], HRM]  # params -> model
    computing: Callable[[Any], HRM]  # params -> model in the dtypes in which it computes


Outcome = running.Outcome[PuzzleData, PuzzleScores]


def build_puzzle_steps(model_config: HRMConfig, config: PuzzleConfig, mesh: Mesh) -> PuzzleSteps:
    """Prepares a run; nothing is computed or allocated before the first call.

    Raises:
      UserError: a parameter or the batch does not divide over the mesh.
    """
    sharding.check_batch(config.batch, mesh.shape["seq"], mesh)
    abstract_model = nnx.eval_shape(lambda: model_config.build(rngs=nnx.Rngs(0)))
    whole, _ = nnx.split(abstract_model)
    graph, of_optimizer, *_ = nnx.split(abstract_model, nnx.Param, Table, Fixed)
    matrices, dtype = is_matrix(of_optimizer), jnp.dtype(config.precision)
    rate = optim.schedule(config.optimizer, config.steps)
    puzzle_share = config.puzzle_rate / config.optimizer.learning_rate
    optimizer = optim.build(
        config.optimizer,
        config.steps,
        nnx.to_pure_dict(of_optimizer),
        sharding.stacked_axes(of_optimizer),
    )
    decay = config.optimizer.ema_decay

    def parts(params: Any) -> list[Any]:
        """What the optimizer moves, the vectors of the puzzles, and what stays."""
        kinds = nnx.split(nnx.merge(whole, params), nnx.Param, Table, Fixed)[1:]
        return [nnx.to_pure_dict(kind) for kind in kinds]

    def together(*parts: Any) -> Any:
        return nnx.to_pure_dict(nnx.split(nnx.merge(graph, *parts))[1])

    def solver(trained: Any, table: Any, fixed: Any) -> HRM:
        return nnx.merge(graph, cast_matrices(trained, matrices, dtype), table, fixed)

    def computing(params: Any) -> HRM:
        return solver(*parts(params))

    def init() -> State:
        model = model_config.build(rngs=nnx.Rngs(config.seed))
        params = nnx.to_pure_dict(nnx.split(model)[1])
        trained, *others = parts(params)
        nothing = jnp.zeros((config.batch, model_config.length), jnp.int32)
        rows = Rows(nothing, nothing, jnp.zeros(config.batch, jnp.int32))
        return {
            "params": params,
            "opt_state": optimizer.init(trained),
            "ema": None if decay is None else jax.tree.map(jnp.copy, params),
            "carry": solver(trained, *others).init_carry(rows),
            "step": jnp.zeros((), jnp.int32),
        }

    def train(state: State, offered: Rows[Array]) -> tuple[State, dict[str, Array]]:
        step = state["step"]
        trained, table, fixed = parts(state["params"])
        model = solver(trained, table, fixed)
        carry = pondering.take_next(model, state["carry"], offered)
        explore = pondering.draws(
            step_key(config.seed, step), config.batch, model_config.max_segments
        )

        def loss(trained: Any, vectors: Array | None) -> tuple[Array, pondering.Segment]:
            model = solver(trained, table, fixed)
            total, segment = pondering.segment(model, carry, vectors, explore, remat=config.remat)
            return total / config.batch, segment

        graded = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, segment), (gradient, of_vectors) = graded(
            trained, model.vectors_of(carry.rows.puzzle)
        )
        updates, opt_state = optimizer.update(gradient, state["opt_state"], trained)
        trained = optax.apply_updates(trained, updates)
        if of_vectors is not None:
            table = jax.tree.map(
                lambda rows: optim.sign_sgd_rows(
                    rows,
                    carry.rows.puzzle,
                    of_vectors,
                    rate=rate(step) * puzzle_share,
                    weight_decay=config.puzzle_decay,
                ),
                table,
            )
        ema = state["ema"]
        if decay is not None:  # vectors that few batches read are not averaged
            ema = together(optim.ema_update(parts(ema)[0], trained, decay), table, fixed)
        healthy = optim.all_finite((value, trained, table))
        new = {
            "params": together(trained, table, fixed),
            "opt_state": opt_state,
            "ema": ema,
            "carry": segment.carry,
            "step": step + 1,
        }
        metrics = {"loss": value, "learning_rate": rate(step), "healthy": healthy}
        return new, metrics | segment.metrics

    def evaluate(params: Any, rows: Rows[Array]) -> pondering.Solution:
        return pondering.solve(computing(params), rows)

    abstract, places = sharding.placed(
        jax.eval_shape(init), abstract_model, mesh, by_row=("carry",)
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return PuzzleSteps(
        init=OnMesh(jax.jit(init, out_shardings=places), mesh),
        train=OnMesh(jax.jit(train, donate_argnums=0, out_shardings=(places, everywhere)), mesh),
        evaluate=OnMesh(jax.jit(evaluate, out_shardings=everywhere), mesh),
        abstract=abstract,
        merge=lambda params: nnx.merge(whole, params),
        computing=computing,
    )


def train_puzzles(
    model_path: str,
    model_config: HRMConfig,
    config: PuzzleConfig,
    *,
    runs: Path = Path("runs"),
    resume: bool = False,
    start: Path | None = None,
    stream: TextIO | None = None,
) -> Outcome:
    """Trains a solver, or goes on with the run that its folder holds.

    Args:
      model_path: how the model is named, for run.json and messages.
      model_config: the architecture; its length and its vocabulary must be those of the puzzles.
      config: everything else.
      runs: folder of all runs.
      resume: insist that there is a run to go on with. Without it a run is resumed if there is one.
      start: folder of another run, whose newest parameters a new run begins with; None draws them.
      stream: where progress is shown, such as sys.stdout; nowhere if None.

    Returns:
      The outcome, with the final state. SIGTERM and SIGINT end the run early, after a checkpoint.

    Raises:
      UserError: bad configuration, puzzles or folder; a checkpoint could not be written or read; or
        the loss or a parameter was not finite (the state before stays in the last checkpoint).
    """
    mesh = sharding.build_mesh(config.mesh)
    check_size(model_config, config.data.source, made_size(config.data.source))
    if stream is not None:
        print(f"Making or reading the puzzles {config.data.source}.", file=stream, flush=True)
    data = load_puzzles(config.data)
    check_fits(model_config, data)
    run = Run(
        run_folder(runs, config.name, model_path), model_path, model_config, config, data.provenance
    )
    steps = build_puzzle_steps(model_config, config, mesh)
    tokens = jax.ShapeDtypeStruct((config.batch, model_config.length), jnp.int32)
    monitor = monitors.build_monitor(
        config.monitor_names,
        model_path,
        pondering.solve,
        steps.computing,
        steps.abstract["params"],
        Rows(tokens, tokens, jax.ShapeDtypeStruct((config.batch,), jnp.int32)),
        mesh,
    )
    batches = data.batches(config.batch, config.seed, config.data.epochs)
    with open_run(run, steps, resume=resume, start=start, stream=stream) as now:

        def evaluation(step: int, puzzles: int) -> PuzzleScores:
            scores = score(steps, averaged(now.state), data, config.batch, mesh, puzzles=puzzles)
            now.log.log(step, dataclasses.asdict(scores), kind="valid")
            now.progress.note(f"step {step}  {scores}")
            return scores

        step = run_steps(
            now,
            batches,
            rows=sharding.host_rows(config.batch, mesh),
            update=updating(now, steps.train, monitor, lambda rows: _put(rows, mesh)),
            settle=settling(now, functools.partial(_means, batch=config.batch), _shown),
            evaluate=lambda step: evaluation(step, config.eval_puzzles),
        )
        return ended(
            now,
            step,
            data=data,
            evaluate=lambda step: evaluation(step, FINAL * config.eval_puzzles),
            merge=steps.merge,
            mesh=mesh,
        )


def evaluate_puzzles_run(
    folder: Path,
    *,
    source: str | None = None,
    batches: int | None = None,
    step: int | None = None,
    ema: bool = False,
) -> tuple[PuzzleScores, int]:
    """Scores a trained solver on one device.

    Args:
      folder: the run.
      source: other puzzles; the run's if None. Those that are held out are solved.
      batches: how many batches, spread over them; all if None.
      step: which checkpoint; the newest if None.
      ema: the running average instead of the parameters.

    Returns:
      The scores and the step that was scored.

    Raises:
      UserError: the run, checkpoint or puzzles cannot be read, or do not fit each other.
    """
    run, model, data, step = load_solver(folder, source=source, step=step, ema=ema)
    mesh = sharding.build_mesh("data=1")
    steps = build_puzzle_steps(run.model_config, run.config, mesh)
    params = nnx.to_pure_dict(nnx.split(model)[1])
    puzzles = None if batches is None else batches * run.config.batch
    return score(steps, params, data, run.config.batch, mesh, puzzles=puzzles), step


class LoadedSolver(NamedTuple):
    """A trained solver and what it is asked."""

    run: Run
    model: HRM
    data: PuzzleData
    step: int  # updates made


def load_solver(
    folder: Path, *, source: str | None = None, step: int | None = None, ema: bool = False
) -> LoadedSolver:
    """Loads a trained solver with its puzzles; arguments as of `evaluate_puzzles_run`.

    Raises:
      UserError: the folder is no run of a solver, holds no such checkpoint, or the puzzles cannot
        be read or do not fit it.
    """
    run = read_run(folder)
    if not isinstance(run.config, PuzzleConfig):
        raise UserError(f"{folder} is the run of a language model, which solves no puzzles.")
    data = load_puzzles(
        dataclasses.replace(run.config.data, source=source or run.config.data.source)
    )
    check_fits(run.model_config, data)
    model, step = trained_model(run, step=step, ema=ema)
    return LoadedSolver(run, model, data, step)


def score(
    steps: PuzzleSteps,
    params: Any,
    data: PuzzleData,
    batch: int,
    mesh: Mesh,
    *,
    puzzles: int | None = None,
) -> PuzzleScores:
    """Lets held-out puzzles have all segments, and says what was solved after each.

    Args:
      steps: the run's compiled functions.
      params: parameters, on the mesh.
      data: whose held-out side is solved.
      batch: of the run.
      mesh: where batches go.
      puzzles: how many, spread over all; all of them if None.
    """
    batches = data.held_out(batch, puzzles)
    votes = arc.Votes(data.names) if data.names and data.tasks and puzzles is None else None
    found: list[tuple[np.ndarray, ...]] = []
    for index in range(batches.num_batches):
        rows = _put(batches(index, sharding.host_rows(batch, mesh)), mesh)
        answers, right, solved, q = jax.device_get(steps.evaluate(params, rows))
        real = min(batch, batches.count - index * batch)
        found.append((right[:, :real], solved[:, :real], (q[..., 0] > q[..., 1])[:, :real]))
        if votes is not None:
            votes.add(batches(index), answers[-1], q[-1, :, 0])
    right, solved, halts = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
    halts[-1] = True
    end = np.argmax(halts, axis=0)
    return PuzzleScores(
        exact=tuple(np.mean(solved, axis=1).tolist()),
        accuracy=tuple(np.mean(right, axis=1).tolist()),
        halted_exact=float(np.mean(solved[end, np.arange(len(end))])),
        halted_segments=float(np.mean(end + 1)),
        puzzles=batches.count,
        two_attempts=None if votes is None else votes.score(data.tasks or ()),
    )


def check_fits(model_config: HRMConfig, data: PuzzleData) -> None:
    """Checks that model and puzzles belong together.

    Raises:
      UserError: they differ in length, or the puzzles have more tokens or vectors than the model.
    """
    source = data.provenance["source"]
    check_size(model_config, source, (data.length, data.vocabulary))
    if model_config.puzzle_width and data.identifiers > model_config.puzzles:
        raise UserError(
            f"{source} has {data.identifiers} vectors of puzzles, the model has room for"
            f" {model_config.puzzles}. Train one with --model.puzzles {data.identifiers}."
        )


def check_size(model_config: HRMConfig, source: str, size: tuple[int, int] | None) -> None:
    """Checks that a model reads puzzles of so many places and tokens, if they are known.

    Raises:
      UserError: it does not.
    """
    if size is not None and size != (model_config.length, model_config.vocab_size):
        length, vocabulary = size
        raise UserError(
            f"{source} has puzzles of {length} places and {vocabulary} tokens, the model"
            f" reads {model_config.length} places and {model_config.vocab_size} tokens. Choose"
            f" other puzzles by --data, or train a model with --model.length {length}"
            f" --model.vocab-size {vocabulary}."
        )


def _put(rows: Rows[np.ndarray], mesh: Mesh) -> Rows[Array]:
    return Rows(*sharding.put_rows(tuple(rows), mesh))


def _means(steps: list[dict[str, float]], batch: int) -> dict[str, float]:
    """Losses per row, and the rest per row that halted, of which there may be none."""
    sums = {name: sum(step[name] for step in steps) for name in steps[0]}
    count, rows = sums.pop("count"), len(steps) * batch
    means = {
        "loss": sums.pop("loss") / len(steps),
        "learning_rate": sums.pop("learning_rate") / len(steps),
        "puzzles_per_second": rows / sums.pop("seconds"),
        **{name: sums.pop(name) / rows for name in LOSSES if name in sums},
        "halted": count / len(steps),
    }
    return means | ({name: total / count for name, total in sums.items()} if count else {})


def _shown(line: dict[str, float]) -> dict[str, float | None]:
    return {
        "loss": line["loss"],
        "solved": line.get("exact_accuracy"),
        "puzzles_per_second": line["puzzles_per_second"],
    }
