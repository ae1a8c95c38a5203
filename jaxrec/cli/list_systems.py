"""`jaxrec list`: what the library holds."""

import importlib
import pkgutil
from dataclasses import dataclass, is_dataclass
from typing import Any

from jaxrec import convert, models
from jaxrec.convert.engine import DESCRIBED_BY

EXPERIMENTS = {
    "graph_classifier": "experiments/plstm_graphs",
    "hrm": "experiments/hrm_sudoku",
    "huginn": "experiments/huginn",
    "linear_rnn": "experiments/linear_rnn_lm",
    "mamba": "experiments/linear_rnn_lm",
    "pararnn": "experiments/pararnn",
    "plstm": "experiments/plstm_lm",
    "plstm_vision": "experiments/plstm_arrow",
    "recurrentgemma": "experiments/linear_rnn_lm",
    "rnn": "experiments/pararnn",
    "sequence_classifier": "experiments/s4_lssl",
    "vit": "experiments/plstm_arrow",
}
GOLDEN = {
    "graph_classifier": "tests/golden/test_plstm_graphs.py",
    "hrm": "tests/golden/test_hrm.py",
    "huginn": "tests/golden/test_huginn.py",
    "linear_attention": "tests/golden/test_fla.py",
    "mamba": "tests/golden/test_mamba.py",
    "mamba2": "tests/golden/test_mamba2.py",
    "pararnn": "tests/golden/test_pararnn_lm.py",
    "plstm": "tests/golden/test_plstm.py",
    "plstm_vision": "tests/golden/test_plstm.py",
    "prefix_linear": "tests/golden/test_prefix_linear_attention.py",
    "recurrentgemma": "tests/golden/test_recurrentgemma.py",
    "sequence_classifier": "tests/golden/test_s5.py",
    "rwkv": "tests/golden/test_rwkv.py",
    "xlstm": "tests/golden/test_xlstm.py",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Show models with their published sizes, parity, conversion and experiment."""

    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: Arguments) -> int:
    """Prints the list."""
    import json

    rows = systems()
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("configuration", "parameters", "golden", "conversion", "experiment"):
        table.add_column(
            column, justify="right" if column == "parameters" else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(
            row["path"],
            f"{row['parameters']:,}",
            row["golden"] or "-",
            "both ways" if row["conversion"] else "-",
            row["experiment"] or "-",
        )
    Console(width=160).print(table)  # a narrow terminal breaks lines; names are never cut
    return 0


def systems() -> list[dict[str, Any]]:
    """One row for every published size of every model; parameters counted on abstract shapes."""
    import jax
    from flax import nnx

    rows: list[dict[str, Any]] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(models.__path__)):
        sizes = vars(importlib.import_module(f"jaxrec.models.{module}"))
        for name, config in sizes.items():
            if not is_dataclass(config) or isinstance(config, type):
                continue
            abstract = nnx.eval_shape(lambda config=config: config.build(rngs=nnx.Rngs(0)))
            rows.append(
                {
                    "path": f"jaxrec.models.{module}:{name}",
                    "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract)),
                    "golden": GOLDEN.get(module),
                    "conversion": DESCRIBED_BY.get(module, module) in convert.SYSTEMS,
                    "experiment": EXPERIMENTS.get(module),
                }
            )
    return rows
