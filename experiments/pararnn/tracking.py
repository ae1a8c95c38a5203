"""Where a state is tracked: parity, modular arithmetic, and permutations of five elements."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

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
HEAD_CHANNELS = 8  # of the sLSTM: as many as `newton_scan` takes together
LENGTHS = {4: 0.07, 8: 0.25, 16: 0.45, TRAINED: 1.0}
"""Steps of a sequence until this share of training, where sequences grow."""


class Lessons(NamedTuple):
    """How a task is trained."""

    tokens: int  # which are also the answers
    width: int
    layers: int
    steps: int
    make: Callable[..., synthetic.Task]
    batch: int  # sequences of the trained length
    # Whether sequences grow, more of them while they are short; else the answers asked for do.
    grows: bool


TASKS = {
    "parity": Lessons(2, 32, 1, 400, synthetic.parity, 32, False),
    "modular arithmetic": Lessons(
        7, 64, 2, 500, functools.partial(synthetic.modular_arithmetic, modulus=4), 32, True
    ),
    "permutations": Lessons(120, 128, 1, 1500, synthetic.permutations, 32, True),
}
STATE_MODELS = (
    "ParaGRU",
    "ParaLSTM",
    "sLSTM",
    "sLSTM, one head",
    "GRU",
    "RG-LRU",
    "transformer",
)


def tiny(model: Any) -> Any:
    """A model of the same kind that compiles and runs in seconds."""
    names = {field.name for field in dataclasses.fields(model)}
    sizes = {"width": 16, "mlp_width": 16, "recurrent_width": 16, "inner_width": 16}
    sizes |= {"layers": 1, "step_rank": 2, "heads": 1, "kv_heads": 1}
    return dataclasses.replace(model, **{k: v for k, v in sizes.items() if k in names})


def state_models(lessons: Lessons) -> dict[str, Any]:
    """Recurrent entries of ParaRNNs begin within 2 and have no limit: a sign that an input flips is
    kept only by entries beyond 1.
    """
    width = lessons.width
    shared: dict[str, Any] = {"vocab_size": lessons.tokens, "width": width, "context": ASKED}
    shared |= {"layers": lessons.layers, "mlp_width": 2 * width}
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
        "sLSTM": rnn.RNNConfig(**shared, cell="slstm", heads=width // HEAD_CHANNELS),
        "sLSTM, one head": rnn.RNNConfig(**shared, cell="slstm"),
        "GRU": rnn.RNNConfig(**shared),
        "RG-LRU": lru,
        "transformer": transformer,
    }


def state(tasks: list[str], models: list[str], smoke: bool) -> dict[str, Any]:
    """Trains these models on these tasks; accuracy by position, up to four times as far."""
    examples = 4 if smoke else 128
    trained, asked = (4, 8) if smoke else (TRAINED, ASKED)
    optimizer = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=30, weight_decay=0.0, final_fraction=0.05
    )
    found: dict[str, Any] = {}
    for task in tasks:
        lessons = TASKS[task]
        if smoke:
            lessons = lessons._replace(steps=2, batch=4)
        test = lessons.make(examples, asked, seed=10**6).batch()
        found[task] = lessons._asdict() | {"models": {}}
        del found[task]["make"]
        every = state_models(lessons)
        for name, config in ((name, every[name]) for name in models):
            results = train_task(
                tiny(config) if smoke else config,
                functools.partial(lesson, lessons, trained),
                steps=lessons.steps,
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
    return {"trained_at": trained, "tasks": found}


def together(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Tasks and models that were not run again stay as they are, where the training is the same."""
    tasks = old | new
    for task in new.keys() & old.keys():
        before, now = ({k: v for k, v in x[task].items() if k != "models"} for x in (old, new))
        if before == now:
            models = old[task]["models"] | new[task]["models"]
            tasks[task] = now | {"models": {k: models[k] for k in STATE_MODELS if k in models}}
    return tasks


def lesson(lessons: Lessons, trained: int, step: int) -> dict[str, np.ndarray]:
    """The batch of a step, at first with few answers from the beginning of a sequence.

    A state that is right for a few steps is what a model needs to learn the next one.
    """
    done = step / lessons.steps
    if lessons.grows:
        length = min(next(t for t, until in LENGTHS.items() if done < until), trained)
        return lessons.make(lessons.batch * trained // length, length, seed=step).batch()
    batch = lessons.make(lessons.batch, trained, seed=step).batch()
    batch["labels"][:, int(FIRST + done / GROWN * (trained - FIRST)) :] = IGNORED
    return batch


@jax.jit
def predict(model: Any, inputs: jax.Array) -> jax.Array:
    return jnp.argmax(model(inputs)[0], axis=-1)


def accuracy(model: Any, test: dict[str, np.ndarray], begin: int, end: int) -> float:
    """Share of right answers between two positions."""
    labels = test["labels"][:, begin:end]
    right = np.asarray(predict(model, test["inputs"]))[:, begin:end] == labels
    return float(np.mean(right[labels != IGNORED]))
