"""A text, two models and a run small enough for tests."""

import dataclasses
import json
import shutil
import textwrap

from jaxrec.models import huginn, linear_rnn, universal_transformer
from jaxrec.training.config import DataConfig, OptimizerConfig, TrainConfig

HUGINN = dataclasses.replace(
    huginn.TINY,
    width=16,
    heads=2,
    mlp_width=24,
    core_layers=1,
    context=64,
    mean_depth=2,
    backprop_depth=2,
)
LINEAR_RNN = dataclasses.replace(
    linear_rnn.TINY, width=16, recurrent_width=16, heads=2, mlp_width=24, layers=2, context=64
)
UNIVERSAL = dataclasses.replace(
    universal_transformer.TINY, width=16, heads=2, mlp_width=24, steps=3, context=64
)
MODELS = {"jaxrec.models.huginn:TINY": HUGINN, "jaxrec.models.linear_rnn:TINY": LINEAR_RNN}


def write_text(folder):
    """Real text, several documents: source files of the standard library."""
    folder.mkdir()
    for module in (textwrap, shutil, json, dataclasses):
        shutil.copy(module.__file__, folder / f"{module.__name__}.py")
    return folder


def run_config(text, **changes) -> TrainConfig:
    """A run of a few steps with the same learning rate at every step, whatever its length."""
    usual = {
        "name": "run",
        "steps": 8,
        "batch": 8,
        "time": 16,
        "log_every": 1,
        "eval_every": 0,
        "eval_batches": 1,
        "eval_depths": (1, 2),
        "save_every": 4,
        "data": DataConfig(source=str(text), valid_fraction=0.2),
        "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=0, schedule="constant"),
    }
    return TrainConfig(**(usual | changes))


def model_options(config, default) -> list[str]:
    """Command-line options that turn the default model configuration into `config`."""
    words = []
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name)) != getattr(default, field.name):
            words += [f"--model.{field.name.replace('_', '-')}", str(value)]
    return words
