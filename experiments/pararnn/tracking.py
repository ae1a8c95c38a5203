"""Where a state is tracked: parity, modular arithmetic, and permutations of five elements."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models import linear_rnn, pararnn, recurrentgemma, rnn
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data import synthetic
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.tasks import train_task

TRAINED, ASKED = 32, 128  # steps of a sequence in training, and in the test
FIRST, GROWN = 2, 0.8  # steps asked for at the beginning; share of training until all are
TASKS: dict[str, tuple[int, int, int, Callable[..., synthetic.Task]]] = {
    "parity": (2, 32, 400, synthetic.parity),
    "modular arithmetic": (8, 64, 1000, synthetic.modular_arithmetic),
    "permutations": (120, 128, 1500, synthetic.permutations),
}
"""Tokens, which are also the answers, channels, steps, and what makes the sequences."""


def tiny(model: Any) -> Any:
    """A model of the same kind that compiles and runs in seconds."""
    names = {field.name for field in dataclasses.fields(model)}
    sizes = {"width": 16, "mlp_width": 16, "recurrent_width": 16, "inner_width": 16}
    sizes |= {"layers": 1, "step_rank": 2, "heads": 1, "kv_heads": 1}
    return dataclasses.replace(model, **{k: v for k, v in sizes.items() if k in names})


def state_models(vocab: int, width: int) -> dict[str, Any]:
    """One layer each. Recurrent entries of ParaRNNs begin within 2 and have no limit: a sign that
    an input flips is kept only by entries beyond 1."""
    shared: dict[str, Any] = {"vocab_size": vocab, "width": width, "layers": 1, "context": ASKED}
    shared["mlp_width"] = 2 * width
    para = pararnn.ParaRNNLMConfig(
        **shared, heads=1, conv_width=2, recurrent_limit=None, recurrent_scale=2.0
    )
    lru = linear_rnn.LinearRNNConfig(**shared, recurrent_width=width, heads=2)
    transformer = recurrentgemma.RecurrentGemmaConfig(
        **shared, recurrent_width=width, heads=4, kv_heads=4, window=ASKED, pattern=("attention",)
    )
    return {
        "ParaGRU": para,
        "ParaLSTM": dataclasses.replace(para, cell="lstm"),
        "GRU": rnn.RNNConfig(**shared),
        "RG-LRU": lru,
        "transformer": transformer,
    }


def state(tasks: list[str], smoke: bool) -> dict[str, Any]:
    """Trains every model on these tasks; accuracy by position, up to four times as far."""
    batch, examples = (4, 4) if smoke else (32, 128)
    trained, asked = (4, 8) if smoke else (TRAINED, ASKED)
    optimizer = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=30, weight_decay=0.0, final_fraction=0.05
    )
    found: dict[str, Any] = {}
    for task in tasks:
        vocab, width, steps, make = TASKS[task]
        steps = 2 if smoke else steps
        test = make(examples, asked, seed=10**6).batch()
        found[task] = {"steps": steps, "width": width, "models": {}}
        for name, config in state_models(vocab, width).items():
            results = train_task(
                tiny(config) if smoke else config,
                lambda step, make=make, steps=steps: lesson(
                    make(batch, trained, seed=step), step / (GROWN * steps)
                ),
                steps=steps,
                optimizer=optimizer,
            )
            ends = [2**k for k in range(2, asked.bit_length()) if trained <= 2**k <= asked]
            by_range = {
                f"{begin + 1}-{end}": round(accuracy(results.model, test, begin, end), 4)
                for begin, end in zip([0, *ends], ends, strict=False)
            }
            loss = round(float(np.mean(results.losses[-20:])), 4)
            found[task]["models"][name] = {"accuracy": by_range, "last_loss": loss}
            print(f"{task}, {name}: {found[task]['models'][name]}", file=sys.stderr, flush=True)
    return {"batch": batch, "trained_at": trained, "tasks": found}


def lesson(task: synthetic.Task, grown: float) -> dict[str, np.ndarray]:
    """A batch that asks for the first answers only: FIRST at the beginning, all from grown = 1 on.

    A state that is right for a few steps is what a model needs to learn the next one.
    """
    time = task.labels.shape[1]
    batch = task.batch()
    batch["labels"][:, int(FIRST + grown * (time - FIRST)) :] = IGNORED
    return batch


@jax.jit
def predict(model: Any, inputs: jax.Array) -> jax.Array:
    return jnp.argmax(model(inputs)[0], axis=-1)


def accuracy(model: Any, test: dict[str, np.ndarray], begin: int, end: int) -> float:
    """Share of right answers between two positions."""
    labels = test["labels"][:, begin:end]
    right = np.asarray(predict(model, test["inputs"]))[:, begin:end] == labels
    return float(np.mean(right[labels != IGNORED]))
