"""Dense GRU cells with the names of Equinox, as DEER and ELK were published with
(arXiv:2309.12252, arXiv:2407.19115).
"""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, folded, same, transposed
from jaxrec.layers.cells import CellConfig

FIELDS = {"input_size": "inputs", "hidden_size": "width"}
UNUSED = ("batch", "seq_length", "recurrent_gain", "trace_iterations", "elk_sigmasq", "seed")


def _read_config(data: Mapping[str, Any]) -> CellConfig:
    fields.check_names("deer_elk", data, UNUSED, FIELDS)
    ours = {field: data[name] for name, field in FIELDS.items()}
    return fields.build("deer_elk", CellConfig, ours | {"kind": "gru"})


def _write_config(config: CellConfig) -> dict[str, Any]:
    return {name: getattr(config, ours) for name, ours in FIELDS.items()}


def _rules(config: CellConfig) -> list[Rule]:
    return [  # rows: reset, update, candidate
        transposed("weight_ih", "input/kernel"),
        folded("bias", "input/bias"),
        transposed("weight_hh", "recurrent"),
        same("bias_n", "candidate_bias"),
    ]


SYSTEM = System(name="deer_elk", read_config=_read_config, write_config=_write_config, rules=_rules)
