"""Nonlinear RNNs that are trained in parallel: as language models, and where a state is tracked.

Text: ParaGRU and ParaLSTM beside RG-LRU, Mamba and a transformer of about a million parameters,
each over the same bytes. State: parity, modular arithmetic and permutations of five elements,
learned at one length and asked for at longer ones. Writes results.json, text.png and state.png;
with --smoke, tiny models make a few steps and nothing is written.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models import linear_rnn, mamba, pararnn, recurrentgemma, rnn
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.data import synthetic
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from jaxrec.training.runs import versions
from jaxrec.training.tasks import train_task

HERE = Path(__file__).parent
TEXT_MODELS = {
    "ParaGRU": pararnn.TINY_GRU,
    "ParaLSTM": pararnn.TINY_LSTM,
    "RG-LRU": linear_rnn.TINY,
    "Mamba": mamba.TINY,
    "transformer": dataclasses.replace(recurrentgemma.TINY, pattern=("attention",), kv_heads=4),
}
TRAINED, ASKED = 32, 128  # steps of a sequence in training, and in the test
FIRST, GROWN = 4, 0.6  # steps asked for at the beginning; share of training until all are
TASKS: dict[str, tuple[int, Callable[..., synthetic.Task]]] = {
    "parity": (2, synthetic.parity),
    "modular arithmetic": (8, synthetic.modular_arithmetic),
    "permutations": (120, synthetic.permutations),
}
"""Tokens, which are also the answers, and what makes the sequences."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["state", "text"], choices=["state", "text"])
    parser.add_argument("--steps", type=int, default=60, help="of each model on text")
    parser.add_argument("--task-steps", type=int, default=2000, help="of each model on each task")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    if options.smoke:
        print(json.dumps({"text": text(2, True), "state": state(2, True)}, indent=2))
        return
    file = HERE / "results.json"
    for part in options.parts:
        # A part that is not run again stays as the file has it.
        results = json.loads(file.read_text()) if file.exists() else {}
        run, draw = {"text": (text, plot_text), "state": (state, plot_state)}[part]
        results[part] = run(options.steps if part == "text" else options.task_steps, False)
        results[part] |= {"versions": versions()}
        file.write_text(json.dumps(results, indent=2) + "\n")
        draw(results[part], HERE / f"{part}.png")


def text(steps: int, smoke: bool) -> dict[str, Any]:
    """Trains every language model; bits per byte, and what ParaRNNs say of themselves."""
    config = TrainConfig(
        name="run",
        steps=steps,
        batch=2 if smoke else 8,
        time=32 if smoke else 256,
        log_every=1 if smoke else 5,
        eval_every=0 if smoke else 15,
        eval_batches=1 if smoke else 4,
        save_every=0,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=30, final_fraction=0.05),
    )
    models = {}
    for name, model in TEXT_MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            outcome = train(
                name, tiny(model) if smoke else model, config, runs=Path(folder), stream=sys.stderr
            )
            lines = read(outcome.run.folder / "metrics.jsonl")
        assert outcome.evaluation is not None, "the run was not interrupted"
        training = [line for line in lines if line["kind"] == "train"]
        models[name] = {
            "parameters": sum(x.size for x in jax.tree.leaves(outcome.state["params"])),
            "bits_per_byte": round(next(iter(outcome.evaluation.bits_per_byte.values())), 4),
            "tokens_per_second": round(
                float(np.median([line["tokens_per_second"] for line in training]))
            ),
            "curve": [[line["step"], round(line["bits_per_byte"], 4)] for line in training],
            "newton": [
                {key: value for key, value in line.items() if key not in ("kind", "time")}
                for line in lines
                if line["kind"] == "model"
            ],
        }
    bytes_read = steps * config.batch * config.time
    return {"steps": steps, "bytes": bytes_read, "models": models, "data": outcome.data.provenance}


def tiny(model: Any) -> Any:
    """A model of the same kind that compiles and runs in seconds."""
    names = {field.name for field in dataclasses.fields(model)}
    sizes = {"width": 16, "mlp_width": 16, "recurrent_width": 16, "inner_width": 16}
    sizes |= {"layers": 1, "step_rank": 2, "heads": 1, "kv_heads": 1}
    return dataclasses.replace(model, **{k: v for k, v in sizes.items() if k in names})


def state_models(vocab: int) -> dict[str, Any]:
    """Two layers of width 64; no limit on recurrent entries, which parity has to exceed."""
    shared: dict[str, Any] = {"vocab_size": vocab, "width": 64, "layers": 2, "mlp_width": 128}
    shared["context"] = ASKED
    para = pararnn.ParaRNNLMConfig(**shared, heads=1, recurrent_limit=None)
    lru = linear_rnn.LinearRNNConfig(**shared, recurrent_width=64, heads=2)
    transformer = recurrentgemma.RecurrentGemmaConfig(
        **shared, recurrent_width=64, heads=4, kv_heads=4, window=ASKED, pattern=("attention",)
    )
    return {
        "ParaGRU": para,
        "ParaLSTM": dataclasses.replace(para, cell="lstm"),
        "GRU": rnn.RNNConfig(**shared),
        "RG-LRU": lru,
        "transformer": transformer,
    }


def state(steps: int, smoke: bool) -> dict[str, Any]:
    """Trains every model on every task; accuracy by position, up to four times as far."""
    batch, examples = (4, 4) if smoke else (32, 128)
    trained, asked = (4, 8) if smoke else (TRAINED, ASKED)
    optimizer = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=30, weight_decay=0.0, final_fraction=0.05
    )
    found: dict[str, Any] = {}
    for task, (vocab, make) in TASKS.items():
        test = make(examples, asked, seed=10**6).batch()
        for name, config in state_models(vocab).items():
            results = train_task(
                tiny(config) if smoke else config,
                lambda step, make=make: lesson(
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
            print(f"{task}, {name}: {by_range}", file=sys.stderr, flush=True)
            loss = round(float(np.mean(results.losses[-20:])), 4)
            found.setdefault(task, {})[name] = {"accuracy": by_range, "last_loss": loss}
    return {"steps": steps, "batch": batch, "trained_at": trained, "tasks": found}


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


def plot_text(results: dict[str, Any], target: Path) -> None:
    """Bits per byte; Newton's iterations and the Lyapunov exponent of the ParaRNNs."""
    figure, panels = canvas(3)
    for name, model in results["models"].items():
        panels[0].plot(*zip(*model["curve"], strict=True), label=name)
        for panel, measure in zip(panels[1:], ("newton_iterations", "lyapunov"), strict=True):
            if model["newton"]:
                points = [(line["step"], line[measure]) for line in model["newton"]]
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
    panels[0].set(ylabel="bits per byte in training", ylim=(1.8, 5), xlabel="step")
    panels[1].set(ylabel="Newton's iterations", xlabel="step", ylim=(0, None))
    panels[2].set(ylabel="Lyapunov exponent", xlabel="step")
    panels[0].legend(frameon=False)
    figure.savefig(target, dpi=80)


def plot_state(results: dict[str, Any], target: Path) -> None:
    """Accuracy over position, one panel per task."""
    figure, panels = canvas(len(results["tasks"]))
    for panel, (task, models) in zip(panels, results["tasks"].items(), strict=True):
        for name, model in models.items():
            ranges = list(model["accuracy"])
            panel.plot(ranges, list(model["accuracy"].values()), marker="o", label=name)
        panel.set(
            title=task, xlabel=f"position; trained on {results['trained_at']}", ylim=(0, 1.03)
        )
    panels[0].set(ylabel="share of right answers")
    panels[0].legend(frameon=False)
    figure.savefig(target, dpi=80)


def canvas(columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns)
    for panel in panels:
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


if __name__ == "__main__":
    main()
