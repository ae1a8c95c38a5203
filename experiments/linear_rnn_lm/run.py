"""RG-LRU, Mamba, RecurrentGemma and a transformer as language models: equal parameters and time.

Each first makes a few steps to learn how long one takes, then a run of as many as fit into
--minutes. Writes results.json and curves.png; with --smoke, tiny models run for seconds and nothing
is written.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxrec.models import linear_rnn, mamba, recurrentgemma
from jaxrec.training.comparison import equal_time, plot_equal_time
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
MODELS = {
    "RG-LRU": linear_rnn.TINY,
    "Mamba": mamba.TINY,
    "RecurrentGemma": recurrentgemma.TINY,
    "transformer": dataclasses.replace(recurrentgemma.TINY, pattern=("attention",), kv_heads=4),
}
"""Each has about a million parameters. The transformer is RecurrentGemma with attention in every
layer, over all of a sequence, and as many key-value heads as heads."""
CONFIG = TrainConfig(
    batch=8,
    time=256,
    log_every=5,
    eval_every=0,
    eval_batches=16,
    save_every=0,
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.05),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.6, help="of training, for each model")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models, a few steps, nothing written"
    )
    options = parser.parse_args()
    models, config, minutes = MODELS, CONFIG, options.minutes
    if options.smoke:
        models = {name: shrunk(model) for name, model in MODELS.items()}
        config, minutes = dataclasses.replace(CONFIG, batch=2, time=32, eval_batches=1), 0
    results, curves = equal_time(models, config, minutes, stream=sys.stderr)
    text = json.dumps(results | {"versions": versions()}, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot_equal_time(curves, HERE / "curves.png")


def shrunk(model: Any) -> Any:
    """A model of the same kind that compiles and runs in seconds."""
    sizes = {"width": 16, "layers": 1}
    if isinstance(model, mamba.MambaConfig):
        return dataclasses.replace(model, **sizes, inner_width=16, step_rank=2)
    return dataclasses.replace(model, **sizes, recurrent_width=16, mlp_width=16)


if __name__ == "__main__":
    main()
