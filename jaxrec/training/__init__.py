"""Training: data, optimizers, sharding, checkpoints, and the loop that ties them together."""

import importlib
from typing import Any

from jaxrec.training.config import (
    ClassifierConfig,
    DataConfig,
    ExamplesConfig,
    OptimizerConfig,
    PuzzleConfig,
    PuzzleDataConfig,
    TrainConfig,
)

_LATER = {
    "train": "loop",
    "train_puzzles": "puzzles",
    "train_classifier_run": "classifier_runs",
    "evaluate_run": "evaluation",
    "evaluate_puzzles_run": "puzzles",
    "evaluate_classifier_run": "classifier_runs",
    "load_model": "runs",
    "read_run": "runs",
}

__all__ = [
    "ClassifierConfig",
    "DataConfig",
    "ExamplesConfig",
    "OptimizerConfig",
    "PuzzleConfig",
    "PuzzleDataConfig",
    "TrainConfig",
    *_LATER,
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: they need orbax and rich, and a second that `--help` should not cost.
    if name not in _LATER:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
