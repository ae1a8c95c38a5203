"""RG-LRU, Mamba, RecurrentGemma and a transformer as language models: equal parameters and time.

Each makes as many steps as fit into --minutes, in which its learning rate rises and falls. Writes
results.json and curves.png; with --smoke, tiny models run for seconds and nothing is written.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jaxrec.models import linear_rnn, mamba, recurrentgemma
from jaxrec.training.comparison import run_experiment

MODELS = {
    "RG-LRU": linear_rnn.TINY,
    "Mamba": mamba.TINY,
    "RecurrentGemma": recurrentgemma.TINY,
    "transformer": dataclasses.replace(recurrentgemma.TINY, pattern=("attention",), kv_heads=4),
}
"""Each has about a million parameters. The transformer is RecurrentGemma with attention in every
layer, over all of a sequence, and as many key-value heads as heads."""


def shrunk(model: Any) -> Any:
    """A model of the same kind that compiles and runs in seconds."""
    sizes = {"width": 16, "layers": 1}
    if isinstance(model, mamba.MambaConfig):
        return dataclasses.replace(model, **sizes, inner_width=16, step_rank=2)
    return dataclasses.replace(model, **sizes, recurrent_width=16, mlp_width=16)


if __name__ == "__main__":
    small = {name: shrunk(model) for name, model in MODELS.items()}
    print(run_experiment(__doc__, Path(__file__).parent, MODELS, small, minutes=1.6))
