"""Test-time depth of a looped language model on real text, beside a linear RNN of the same size.

Writes results.json; with --smoke, tiny models run for seconds and nothing is written.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxrec.analysis.text_baselines import gzip_bits_per_byte, ngram_bits_per_byte
from jaxrec.models import huginn, linear_rnn
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.loop import train
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models, a few steps, no results.json"
    )
    smoke = parser.parse_args().smoke
    results = run(smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not smoke:
        (HERE / "results.json").write_text(text + "\n")


def run(smoke: bool) -> dict[str, Any]:
    """Trains both models on the same batches and returns what there is to report."""
    config = TrainConfig(
        steps=300,
        batch=8,
        time=256,
        eval_every=0,
        eval_batches=16,
        eval_depths=DEPTHS,
        save_every=0,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.05),
    )
    looped, linear = huginn.TINY, linear_rnn.TINY
    if smoke:
        config = dataclasses.replace(
            config, steps=2, batch=2, time=32, eval_batches=1, eval_depths=(1, 2)
        )
        looped = dataclasses.replace(looped, width=16, heads=2, mlp_width=16)
        linear = dataclasses.replace(linear, width=16, recurrent_width=16, mlp_width=16, layers=1)
    results: dict[str, Any] = {
        "steps": config.steps,
        "tokens": config.steps * config.batch * config.time,
    }
    for name, model in {"huginn": looped, "linear_rnn": linear}.items():
        with tempfile.TemporaryDirectory() as runs:
            begin = time.perf_counter()
            outcome = train(
                f"jaxrec.models.{name}:TINY", model, config, runs=Path(runs), stream=sys.stderr
            )
            seconds = time.perf_counter() - begin
        assert outcome.evaluation is not None, "the run was not interrupted"
        results[name] = {
            "parameters": count(outcome.state["params"]),
            "minutes": round(seconds / 60, 2),
            "bits_per_byte": {d: round(x, 4) for d, x in outcome.evaluation.bits_per_byte.items()},
        }
    data = outcome.data
    train_text, valid_text = (
        data.tokenizer.decode(side.tokens) for side in (data.train, data.valid)
    )
    results["gzip -9"] = round(gzip_bits_per_byte(valid_text), 4)
    results["order-3 byte model"] = round(ngram_bits_per_byte(train_text, valid_text, order=3), 4)
    return results | {
        "mean_depth": looped.mean_depth,
        "data": data.provenance,
        "versions": versions(),
    }


def count(params: Any) -> int:
    """Number of parameters."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
