"""Monitors: numbers of the inside of a model, at an interval, as switches of any run.

    depth   size and change of the latent state by loop, of a solver of puzzles also the divergence
            of every segment's answer from the last one's; at evaluation, of a language model whose
            depth is chosen, the divergence of every depth from the deepest, the change of the state
            in its last loop, and what one loop more would change: the distance to a fixed point
    state   size, token correlation and effective rank of the stream by layer or loop; size by time
            and of the states that are carried
    gates   largest |a| and what it leaves to 1, memories of the decays, share of saturated gates
    newton  iterations, residuals, rows that do not settle, windows run step by step; see
            `measure` in `models.protocol`; at evaluation, how far the states are from those of a
            run step by step

One compiled program beside the step computes them all, so that other steps cost nothing. What a
model can give is found by tracing it: see `ops.notes` for how numbers leave a layer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.analysis import monitors
from jaxrec.errors import UserError
from jaxrec.models.protocol import loop_inputs, text_prefix
from jaxrec.ops import notes
from jaxrec.training import sharding
from jaxrec.training.config import MONITORS
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.sharding import OnMesh

Monitor = Callable[..., dict[str, Array]]  # (params, batch) -> numbers; see `summary`
Forward = Callable[[Any, Any], Any]  # (model, batch) -> anything: what is watched

READS: dict[str, dict[str, notes.Reducer]] = {
    "depth": {"loop": monitors.loop_numbers, "answer": lambda logits: {ANSWERS: logits}},
    "state": {
        "stream": monitors.stream_numbers,
        "loop": lambda states: monitors.stream_numbers(states[1]),
        "memory": monitors.memory_numbers,
    },
    "gates": {"decay": monitors.decay_numbers, "gate": monitors.gate_numbers},
}
"""Monitor -> the notes that it reads, and what it makes of each."""
ANSWERS = "answers"  # logits of every segment, which become `kl_to_deepest`
NEWTON = "newton_iterations"  # a model that measures it can give the monitor
BY_DEPTH = (
    *("latent_rms", "latent_change", "stream_rms", "token_correlation", "effective_rank"),
    *("memory_rms", "kl_to_deepest"),
)
"""Numbers of every loop or layer, of which the last stands for the model as well."""


def build_monitor(
    names: tuple[str, ...],
    path: str,
    forward: Forward,
    model_of: Callable[[Any], Any],
    abstract: Any,
    batch: Any,
    mesh: Mesh,
) -> Monitor | None:
    """Prepares the monitors of a run; nothing is compiled before the first call.

    Args:
      names: of `MONITORS`; none gives None.
      path: how the model is named, in messages.
      forward: a call of the model.
      model_of: parameters -> model.
      abstract: the parameters' shapes.
      batch: the shapes of what `forward` reads.
      mesh: where the run is.

    Raises:
      UserError: the model cannot give one of them; the message says which it can.
    """
    if not names:
        return None

    def watch(wanted: tuple[str, ...], params: Any, batch: Any) -> dict[str, Array]:
        model = model_of(params)
        found: dict[str, Array] = {}
        for numbers in notes.collect(forward, reducers(wanted))(model, batch)[1].values():
            found |= numbers
        if ANSWERS in found:
            answers = found.pop(ANSWERS)
            each = monitors.divergence(answers[-1:], answers)
            found["kl_to_deepest"] = jnp.mean(each, axis=tuple(range(1, each.ndim)))
        return found | (_newton(model, batch) if "newton" in wanted else {})

    def given(name: str) -> bool:
        return bool(jax.eval_shape(partial(watch, (name,)), abstract, batch))

    if any(not given(name) for name in names):
        known = [name for name in MONITORS if given(name)]
        missing = ", ".join(name for name in names if name not in known)
        raise UserError(
            f"--monitors: {path} has nothing to say of {missing}."
            f" It can give {', '.join(known) or 'none'}."
        )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return OnMesh(jax.jit(partial(watch, names), out_shardings=everywhere), mesh)


def reducers(names: tuple[str, ...]) -> dict[str, notes.Reducer]:
    """What to make of each note that these monitors read."""
    readers: dict[str, list[notes.Reducer]] = {}
    for name in names:
        for note, reducer in READS.get(name, {}).items():
            readers.setdefault(note, []).append(reducer)

    def of(several: list[notes.Reducer]) -> notes.Reducer:
        return lambda value: {k: v for reducer in several for k, v in reducer(value).items()}

    return {note: of(several) for note, several in readers.items()}


def language_model_forward(
    model: Any, batch: Mapping[str, Array], *, parts: int = 1, depth: int | None = None
) -> Any:
    """A call of a language model at a depth (None: its mean), from a drawn latent state, on one of
    so many parts of a batch: no more rows than a step has in memory at once.
    """
    tokens, segments = (
        x.reshape(-1, parts, *x.shape[1:])[:, 0] for x in (batch["inputs"], batch["segment_ids"])
    )
    depth = model.config.mean_depth if depth is None else depth
    options = loop_inputs(model.config, depth, jax.random.key(0))
    prefix = text_prefix(model.config, segments)
    if prefix is not None:
        options["prefix"] = prefix
    return model(tokens, segment_ids=segments, **options)


def build_divergence(model_of: Callable[[Any], Any], mesh: Mesh) -> Callable[..., Array]:
    """(params, batch, depth, deepest) -> the mean divergence of a depth from the deepest over the
    tokens that count, of a language model whose depth is chosen.
    """

    def run(params: Any, batch: Mapping[str, Array], depth: Array, deepest: Array) -> Array:
        model, key = model_of(params), jax.random.key(0)

        def logits(depth: Array) -> Array:
            segments = batch["segment_ids"]
            return model(batch["inputs"], segment_ids=segments, depth=depth, key=key)[0]

        values = monitors.divergence(logits(deepest), logits(depth))
        counts = batch["labels"] != IGNORED
        total = jnp.sum(jnp.where(counts, values, 0))
        return total / jnp.maximum(jnp.sum(counts, dtype=values.dtype), 1)

    return OnMesh(jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec())), mesh)


def build_changes(
    forward: Callable[..., Any], model_of: Callable[[Any], Any], deepest: int, mesh: Mesh
) -> Callable[..., Array]:
    """(params, batch) -> the change of the latent state in each of `deepest` + 1 loops, see
    `analysis.monitors.loop_numbers`.

    Args:
      forward: (model, batch, depth) -> anything.
      model_of: parameters -> model.
      deepest: depth.
      mesh: where the run is.
    """

    def run(params: Any, batch: Any) -> Array:
        watched = notes.collect(
            partial(forward, depth=deepest + 1), {"loop": monitors.loop_numbers}
        )
        return watched(model_of(params), batch)[1]["loop"]["latent_change"]

    return OnMesh(jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec())), mesh)


def build_solver_error(
    forward: Forward, model_of: Callable[[Any], Any], mesh: Mesh
) -> Callable[..., Array]:
    """(params, batch) -> the largest `newton_error` of all layers, see `analysis.monitors`."""

    def run(params: Any, batch: Any) -> Array:
        watched = notes.collect(forward, {"solved": monitors.solver_numbers})
        return jnp.max(watched(model_of(params), batch)[1]["solved"]["newton_error"])

    return OnMesh(jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec())), mesh)


def summary(found: Mapping[str, Array]) -> dict[str, Any]:
    """What is logged, on the host: numbers, and lists by depth, time or bin."""
    arrays = {name: np.asarray(value) for name, value in jax.device_get(dict(found)).items()}
    line: dict[str, Any] = {}
    for name, value in arrays.items():
        if name in BY_DEPTH:
            line[name] = float(value[-1])
            line[f"{name}_by_depth"] = value.tolist()
        elif name == "stream_rms_by_time":
            line[name] = value[-1].tolist()
        elif name == "largest_decay":
            line[name] = float(np.max(value))
            line["stability_margin"] = 1 - line[name]
        elif name == "memory_steps":
            line[name] = np.mean(value, axis=0).tolist()
        else:
            line[name] = float(np.mean(value))
    return line


def abstract_batch(batch: int, time: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of a language model."""
    place = sharding.batch_sharding(mesh)
    shape = jax.ShapeDtypeStruct((batch, time), jnp.int32, sharding=place)
    return dict.fromkeys(("inputs", "labels", "segment_ids"), shape)


def _newton(model: Any, batch: Any) -> dict[str, Array]:
    """What the model measures, if it is solved by Newton's method."""
    if not hasattr(model, "measure"):
        return {}
    found = model.measure(batch["inputs"], segment_ids=batch["segment_ids"])
    return found if NEWTON in found else {}
