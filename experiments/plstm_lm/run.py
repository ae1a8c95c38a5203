"""pLSTM as a language model, beside RG-LRU and a transformer: equal parameters and equal time.

Each makes as many steps as fit into --minutes, in which its learning rate rises and falls. Writes
results.json and curves.png; with --smoke, tiny models run for seconds and nothing is written.
"""

import dataclasses
from pathlib import Path

from jaxrec.models import linear_rnn, plstm, recurrentgemma
from jaxrec.training.comparison import run_experiment

MODELS = {
    "pLSTM": plstm.TINY,
    "RG-LRU": linear_rnn.TINY,
    "transformer": dataclasses.replace(recurrentgemma.TINY, pattern=("attention",), kv_heads=4),
}
"""Each has about a million parameters; the transformer is that of experiments/linear_rnn_lm."""
SMALL = {"width": 16, "layers": 1}
SMOKE = {
    "pLSTM": plstm.lm_config(vocab_size=272, heads=2, context=64, **SMALL),
    "RG-LRU": dataclasses.replace(linear_rnn.TINY, recurrent_width=16, mlp_width=16, **SMALL),
}


if __name__ == "__main__":
    print(run_experiment(__doc__, Path(__file__).parent, MODELS, SMOKE, minutes=3.0))
