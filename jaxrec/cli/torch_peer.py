"""What benchmarks beside PyTorch programs share: arrays across, the loss there, and agreement."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

import jaxrec
from jaxrec.cli.timing import WrongNumbers
from jaxrec.convert import engine
from jaxrec.training.losses import cross_entropy

PEERS = Path(jaxrec.__file__).parents[1] / "benchmarks" / "peers"
TOLERANCE = 1e-5
"""Largest difference between two programs, both in float32, relative to the largest value of an
array. Measured: up to 2e-6."""


def load(name: str) -> Any | None:
    """benchmarks/peers/NAME.py of this checkout; None without it or without PyTorch."""
    file = PEERS / f"{name}.py"
    if importlib.util.find_spec("torch") is None or not file.exists():
        return None
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_torch(*arrays: Array) -> list[Any]:
    """Copies; integers as int64, which PyTorch's indices and labels are."""
    import torch

    tensors = [torch.from_numpy(np.array(x)) for x in arrays]
    return [x if x.is_floating_point() else x.long() for x in tensors]


def torch_loss(logits: Any, labels: Any) -> Any:
    """The cross entropy of logits (b t vocab)."""
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def differences(
    system: str,
    model: Any,
    logits: Callable[[Any], Array],
    labels: Array,
    theirs: Any,
    their_logits: Callable[[], Any],
) -> dict[str, float]:
    """Largest difference of the logits and of each gradient, relative to their largest value.

    Args:
      system: whose conversion table names the parameters.
      model: ours.
      logits: of our model, (b t vocab).
      labels: int (b t), for the loss whose gradients are compared.
      theirs: the PyTorch module with the same weights.
      their_logits: of the same tokens.
    """

    def loss(model: Any) -> tuple[Array, Array]:
        scores = logits(model)
        return cross_entropy(scores, labels), scores

    (_, scores), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    their_scores = their_logits()
    torch_loss(their_scores, *to_torch(labels)).backward()
    their_gradient = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    found = {"the logits": relative_error(np.asarray(scores), their_scores.detach().numpy())}
    for name, value in engine.to_tensors(engine.find(system), model, gradient).items():
        found[f"the gradient of {name}"] = relative_error(value, their_gradient[name])
    return found


def relative_error(value: np.ndarray, their_value: np.ndarray) -> float:
    """The largest difference over the largest value of theirs."""
    return float(np.max(np.abs(value - their_value)) / np.max(np.abs(their_value)))


def refuse_differences(who: str, found: Mapping[str, float]) -> None:
    """Checks what `differences` found.

    Raises:
      WrongNumbers: something differs by more than `TOLERANCE`; the message names it.
    """
    for what, error in found.items():
        if not error <= TOLERANCE:  # also refuses NaN
            raise WrongNumbers(
                f"{who} and jaxrec differ: {what} by {error:.1e} of the largest value, allowed are"
                f" {TOLERANCE:.0e}."
            )
