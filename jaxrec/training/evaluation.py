"""Loss and bits per byte on validation text, at several depths."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxrec.errors import UserError
from jaxrec.models.protocol import LanguageModelConfig
from jaxrec.training import monitors, sharding
from jaxrec.training.config import TrainConfig
from jaxrec.training.data import Batches, Data, load_data
from jaxrec.training.runs import load_model
from jaxrec.training.step import Steps, build_steps

NO_LOOP = "-"
"""Stands for the depth of a model without a loop."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """By depth, as text so that JSON can hold it; NO_LOOP for a model without a loop."""

    loss: dict[str, float]  # mean negative log-likelihood, nats per token
    bits_per_byte: dict[str, float]  # of the text that the tokens spell
    tokens: int  # tokens scored

    def __str__(self) -> str:
        return "  ".join(f"depth {d}: {bits:.3f}" for d, bits in self.bits_per_byte.items())


def evaluate_run(
    folder: Path,
    *,
    depths: tuple[int, ...] | None = None,
    source: str | None = None,
    batches: int | None = None,
    step: int | None = None,
    ema: bool = False,
) -> tuple[Evaluation, int]:
    """Evaluates a trained model on one device.

    Args:
      folder: the run.
      depths: loop counts; see `evaluation_depths` for None.
      source: other text to evaluate on; the run's if None. The validation side of its split is
        used.
      batches: how many batches, spread over the text; all if None.
      step: which checkpoint; the newest if None.
      ema: the running average instead of the parameters.

    Returns:
      The evaluation and the step that was evaluated.

    Raises:
      UserError: the run, checkpoint or text cannot be read.
    """
    model, tokenizer, run, step = load_model(folder, step=step, ema=ema)
    old = run.config
    data = load_data(source or old.data.source, tokenizer.name, old.data.valid_fraction)
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"{source} holds tokens of {data.tokenizer.name}; the model of {folder} reads"
            f" {tokenizer.name}. Give the text itself, or a folder made with that tokenizer."
        )
    if depths is not None and run.model_config.mean_depth is None:
        raise UserError(f"The model of {folder} has no loop. Leave --depths out.")
    config = dataclasses.replace(old, eval_depths=depths or old.eval_depths)
    mesh = sharding.build_mesh("data=1")
    steps = build_steps(run.model_config, config, mesh)
    params = nnx.to_pure_dict(nnx.split(model)[1])
    result = evaluate(steps, params, run.model_config, config, data, mesh, batches=batches)
    return result, step


def evaluation_depths(model_config: LanguageModelConfig, config: TrainConfig) -> tuple[int, ...]:
    """Depths to evaluate: those configured, or powers of two up to four times the mean; none
    without a loop.
    """
    mean = model_config.mean_depth
    if mean is None:
        return ()
    powers = tuple(2**i for i in range((4 * mean).bit_length()))
    return config.eval_depths or powers


def measure(
    steps: Steps, params: Any, config: TrainConfig, data: Data, mesh: Mesh
) -> dict[str, float]:
    """What the model says of itself on one batch of validation windows, see `models.protocol`;
    nothing for a model without `measure`. Arguments as of `evaluate`.
    """
    found = jax.device_get(steps.measure(params, _first_batch(config, data, mesh)))
    return {name: float(value) for name, value in found.items()}


def build_comparisons(
    steps: Steps, model_config: LanguageModelConfig, config: TrainConfig, data: Data, mesh: Mesh
) -> Callable[[Any], dict[str, Any]]:
    """What the monitors of a run say at an evaluation, see `training.monitors`.

    Args:
      steps: the run's compiled functions.
      model_config: for the depths.
      config: monitors, sizes and depths.
      data: whose validation side is read.
      mesh: where batches go.

    Returns:
      params -> numbers of one batch of validation windows. With the monitor "depth", of a model
      whose depth is chosen: kl_to_deepest, nats per token, and state_change, by depth as text, and
      fixed_point_distance; with "newton": newton_error.
    """
    names, forward = config.monitor_names, monitors.language_model_forward
    depths = evaluation_depths(model_config, config) if "depth" in names else ()
    divergence = monitors.build_divergence(steps.computing, mesh)
    changes = monitors.build_changes(forward, steps.computing, max(depths, default=0), mesh)
    error = monitors.build_solver_error(forward, steps.computing, mesh)

    def compare(params: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not (depths or "newton" in names):
            return found
        batch = _first_batch(config, data, mesh)
        if depths:
            changed, deepest = np.asarray(changes(params, batch)), jnp.int32(max(depths))
            found["kl_to_deepest"] = {
                str(depth): float(divergence(params, batch, jnp.int32(depth), deepest))
                for depth in depths
            }
            found["state_change"] = {str(depth): float(changed[depth - 1]) for depth in depths}
            found["fixed_point_distance"] = float(changed[-1])
        if "newton" in names:
            found["newton_error"] = float(error(params, batch))
        return found

    return compare


def _first_batch(config: TrainConfig, data: Data, mesh: Mesh) -> Any:
    windows = Batches(
        data.valid, batch=config.batch, time=config.time, shuffle=False, max_windows=config.batch
    )
    return sharding.put_batch(windows(0, sharding.host_rows(config.batch, mesh)), mesh)


def evaluate(
    steps: Steps,
    params: Any,
    model_config: LanguageModelConfig,
    config: TrainConfig,
    data: Data,
    mesh: Mesh,
    *,
    batches: int | None = None,
) -> Evaluation:
    """Scores validation windows at every depth; each window begins from an empty context.

        bits per byte = nats per token / ln 2 * tokens per byte of the validation text

    Args:
      steps: the run's compiled functions.
      params: parameters, on the mesh.
      model_config: for the depths.
      config: sizes and depths.
      data: whose validation side is read.
      mesh: where batches go.
      batches: how many batches of windows, spread evenly over the text; all of it if None.
    """
    windows = Batches(
        data.valid,
        batch=config.batch,
        time=config.time,
        shuffle=False,
        max_windows=None if batches is None else batches * config.batch,
    )
    loss, labels = {}, 0.0
    for depth in evaluation_depths(model_config, config) or (None,):
        sums = []
        for index in range(windows.num_batches):
            batch = sharding.put_batch(windows(index, sharding.host_rows(config.batch, mesh)), mesh)
            sums.append(steps.evaluate(params, batch, jnp.int32(depth or 0)))
        nats, labels = (float(total) for total in np.sum(jax.device_get(sums), axis=0))
        loss[NO_LOOP if depth is None else str(depth)] = nats / labels
    # The first token of a document is never a label, so it is not counted here either.
    tokens_per_byte = (len(data.valid.tokens) - len(data.valid.starts)) / data.valid.num_bytes
    bits = {depth: nats / float(np.log(2)) * tokens_per_byte for depth, nats in loss.items()}
    return Evaluation(loss, bits, int(labels))
