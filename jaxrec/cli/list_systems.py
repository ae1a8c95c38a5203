"""`jaxrec list`: what the library holds."""

import importlib
import pkgutil
from dataclasses import dataclass, is_dataclass
from typing import Any

import tyro

from jaxrec import convert, models
from jaxrec.convert.engine import DESCRIBED_BY
from jaxrec.errors import UserError
from jaxrec.models.hrm import Fixed, HRMConfig
from jaxrec.models.protocol import LanguageModelConfig
from jaxrec.models.sequence_classifier import SequenceClassifierConfig

EXPERIMENTS = {
    "graph_classifier": "experiments/plstm_graphs",
    "hrm": "experiments/hrm_sudoku, experiments/hrm_maze",
    "huginn": "experiments/huginn, experiments/recurrent_depth, experiments/parallel_sampler",
    "linear_attention": "experiments/recall",
    "linear_rnn": "experiments/linear_rnn_lm",
    "mamba": "experiments/linear_rnn_lm",
    "mamba2": "experiments/recall",
    "pararnn": "experiments/pararnn",
    "plstm": "experiments/plstm_lm",
    "plstm_vision": "experiments/plstm_arrow, experiments/plstm_imagenet",
    "prefix_linear": "experiments/jrt",
    "recurrentgemma": "experiments/linear_rnn_lm",
    "rnn": "experiments/pararnn",
    "sequence_classifier": "experiments/s4_lssl",
    "universal_transformer": "experiments/universal_transformer",
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

    only: tyro.conf.Positional[str] = ""
    """Only configurations whose path contains this, such as huginn; all if left out."""
    counts: bool = False
    """Count parameters, which builds every model as shapes: about a second for each."""
    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: Arguments) -> int:
    """Prints the list.

    Raises:
      UserError: there is nothing to list.
    """
    import json

    rows = systems(only=arguments.only, counts=arguments.counts)
    if not rows:
        raise UserError(f"No configuration has {arguments.only!r} in its path.")
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns: tuple[str, ...] = (
        "configuration",
        "parameters",
        "train on",
        "golden",
        "conversion",
        "experiment",
    )
    if not arguments.counts:
        columns = tuple(column for column in columns if column != "parameters")
    for column in columns:
        table.add_column(
            column, justify="right" if column == "parameters" else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(
            row["path"],
            *([f"{row['parameters']:,}"] if arguments.counts else []),
            row["trains_on"] or "-",
            row["golden"] or "-",
            "both ways" if row["conversion"] else "-",
            row["experiment"] or "-",
        )
    Console(width=250).print(table)  # a narrow terminal breaks lines; names are never cut
    return 0


def systems(*, only: str = "", counts: bool = False) -> list[dict[str, Any]]:
    """One row for every published size of every model.

    Args:
      only: part of the paths that are listed.
      counts: count parameters, on abstract shapes; otherwise they are None.
    """
    rows: list[dict[str, Any]] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(models.__path__)):
        sizes = vars(importlib.import_module(f"jaxrec.models.{module}"))
        for name, config in sizes.items():
            if not is_dataclass(config) or isinstance(config, type):
                continue
            path = f"jaxrec.models.{module}:{name}"
            if only not in path:
                continue
            rows.append(
                {
                    "path": path,
                    "parameters": _parameters(config) if counts else None,
                    "trains_on": _trains_on(config),
                    "golden": GOLDEN.get(module),
                    "conversion": DESCRIBED_BY.get(module, module) in convert.SYSTEMS,
                    "experiment": EXPERIMENTS.get(module),
                }
            )
    return rows


def _parameters(config: Any) -> int:
    import jax
    from flax import nnx

    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Not(Fixed))))


def _trains_on(config: Any) -> str | None:
    """What `jaxrec train` gives such a model; None if it is trained from Python."""
    if isinstance(config, HRMConfig):
        return "puzzles"
    if isinstance(config, SequenceClassifierConfig):
        return "sequences"
    return "text" if isinstance(config, LanguageModelConfig) else None
