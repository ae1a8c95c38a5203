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
from pathlib import Path
from typing import Any

import jax
import numpy as np
from figures import plot_state, plot_text
from tracking import STATE_MODELS, TASKS, state, tiny, together

from jaxrec.models import linear_rnn, mamba, pararnn, recurrentgemma
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
TEXT_MODELS = {
    "ParaGRU": pararnn.TINY_GRU,
    "ParaLSTM": pararnn.TINY_LSTM,
    "RG-LRU": linear_rnn.TINY,
    "Mamba": mamba.TINY,
    "transformer": dataclasses.replace(recurrentgemma.TINY, pattern=("attention",), kv_heads=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["state", "text"], choices=["state", "text"])
    parser.add_argument("--steps", type=int, default=300, help="of each model on text")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=[*TASKS], help="of state")
    parser.add_argument(
        "--models", nargs="+", default=[*STATE_MODELS], choices=STATE_MODELS, help="of state"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    if options.smoke:
        tracked = state(options.tasks, options.models, True)
        print(json.dumps({"text": text(2, True), "state": tracked}, indent=2))
        return
    file = HERE / "results.json"
    for part in options.parts:
        # A part that is not run again stays as the file has it.
        results = json.loads(file.read_text()) if file.exists() else {}
        if part == "text":
            results[part], draw = text(options.steps, False), plot_text
        else:
            found, draw = state(options.tasks, options.models, False), plot_state
            found["tasks"] = together(results.get(part, {}).get("tasks", {}), found["tasks"])
            results[part] = found
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


if __name__ == "__main__":
    main()
