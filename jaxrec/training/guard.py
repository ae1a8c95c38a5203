"""What to say when a loss or gradient is not finite: where it began, and what was kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.analysis.nonfinite import first_nonfinite, first_nonfinite_leaf
from jaxrec.training import hosts
from jaxrec.training.config import TrainConfig
from jaxrec.training.data import HostBatch
from jaxrec.training.runs import Run
from jaxrec.training.step import Steps, microbatches, step_key

_UNKNOWN = "not looked for on several hosts; resume on one"


def explain_bad_step(
    run: Run,
    steps: Steps,
    state: dict[str, Any],
    step: int,
    depth: int | None,
    batch: HostBatch,
    numbers: dict[str, Any],
    last_good: int | None,
) -> str:
    """Writes the batch to bad_batch.npz, replays it, and returns one line for the user.

    Args:
      run: where to write.
      steps: the run's functions.
      state: the state that the bad step met.
      step: index of the bad step.
      depth: its number of loops, None without a loop.
      batch: its batch, on the host.
      numbers: its metrics.
      last_good: step of the newest checkpoint, or None.
    """
    file = run.folder / "bad_batch.npz"
    if hosts.several():  # none of them has all parameters, to replay the step
        file = run.folder / f"bad_batch.{jax.process_index()}.npz"
    arrays_and_place: dict[str, Any] = {"step": step, "depth": depth or 0, **batch}
    np.savez(file, **arrays_and_place)
    place = _UNKNOWN if hosts.several() else first_nonfinite_leaf(state["params"])
    if place is None:
        key = step_key(run.config.seed, state["step"])
        place = _replayed(steps, run.config, state["params"], batch, jnp.int32(depth or 0), key)
    elif place is not _UNKNOWN:
        place = f"parameter {place}"
    kept = (
        "no checkpoint was written yet" if last_good is None else f"checkpoint {last_good} is good"
    )
    return (
        f"Stopped at step {step + 1}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}."
        f" First not finite: {place}. The batch is in {file}; {kept}."
        f" {_advice(run.config)}"
    )


def _replayed(
    steps: Steps, config: TrainConfig, params: Any, batch: HostBatch, depth: Array, key: Array
) -> str:
    """Where the loss or the gradient of the batch, or of its first bad part, went wrong."""
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    parts = [(arrays, key)]
    if config.accumulate > 1:
        stacked = microbatches(arrays, key, config.accumulate)
        parts = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.accumulate)]
    params = jax.device_get(params)
    for i, (part, key) in enumerate(parts):
        loss = lambda params, part=part, key=key: steps.loss(params, part, depth, key)  # noqa: E731
        finding = first_nonfinite(jax.value_and_grad(loss), params)
        if finding is not None:
            return f"{finding}" + (f", in microbatch {i}" if len(parts) > 1 else "")
    return "the update of the parameters"


def _advice(config: TrainConfig) -> str:
    means = ["lower optimizer.learning_rate"]
    means.append(f"{'set' if config.optimizer.clip_norm is None else 'lower'} optimizer.clip_norm")
    if config.precision != "float32":
        means.append("use precision float32")
    return f"{', '.join(means[:-1])} or {means[-1]}.".capitalize()
