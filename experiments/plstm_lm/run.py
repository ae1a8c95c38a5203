"""pLSTM as a language model, beside RG-LRU and a transformer: equal parameters and equal time.

Each first makes a few steps to learn how long one takes, then a run of as many as fit into
--minutes. Writes results.json and curves.png; with --smoke, tiny models run for seconds and nothing
is written.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from jaxrec.models import linear_rnn, plstm, recurrentgemma
from jaxrec.training.comparison import equal_time, plot_equal_time
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
MODELS = {
    "pLSTM": plstm.TINY,
    "RG-LRU": linear_rnn.TINY,
    "transformer": dataclasses.replace(recurrentgemma.TINY, pattern=("attention",), kv_heads=4),
}
"""Each has about a million parameters; the transformer is that of experiments/linear_rnn_lm."""
CONFIG = TrainConfig(
    batch=8,
    time=256,
    log_every=5,
    eval_every=0,
    eval_batches=16,
    save_every=0,
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.05),
)
SMALL = {"width": 16, "layers": 1}
SMOKE = {
    "pLSTM": plstm.lm_config(vocab_size=272, heads=2, context=64, **SMALL),
    "RG-LRU": dataclasses.replace(linear_rnn.TINY, recurrent_width=16, mlp_width=16, **SMALL),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, for each model")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models, a few steps, nothing written"
    )
    options = parser.parse_args()
    models, config, minutes = MODELS, CONFIG, options.minutes
    if options.smoke:
        models, minutes = SMOKE, 0
        config = dataclasses.replace(CONFIG, batch=2, time=32, eval_batches=1)
    results, curves = equal_time(models, config, minutes, stream=sys.stderr)
    text = json.dumps(results | {"versions": versions()}, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot_equal_time(curves, HERE / "curves.png")


if __name__ == "__main__":
    main()
