"""What to say when a loss or gradient is not finite: where it began, and what was kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.analysis.nonfinite import first_nonfinite, first_nonfinite_leaf
from jaxrec.training.data import HostBatch
from jaxrec.training.runs import Run
from jaxrec.training.step import Steps, step_key


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
    arrays_and_place: dict[str, Any] = {"step": step, "depth": depth or 0, **batch}
    np.savez(file, **arrays_and_place)
    place = first_nonfinite_leaf(state["params"])
    if place is None:
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        key = step_key(run.config.seed, state["step"])
        loss = lambda params: steps.loss(params, arrays, jnp.int32(depth or 0), key)  # noqa: E731
        finding = first_nonfinite(jax.value_and_grad(loss), jax.device_get(state["params"]))
        place = "the update of the parameters" if finding is None else str(finding)
    else:
        place = f"parameter {place}"
    kept = (
        "no checkpoint was written yet" if last_good is None else f"checkpoint {last_good} is good"
    )
    return (
        f"Stopped at step {step + 1}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}."
        f" First not finite: {place}. The batch is in {file}; {kept}."
        " Lower optimizer.learning_rate or optimizer.clip_norm, or use precision float32."
    )
