"""The RG-LRU alone, as the parameters of the original's layer (arXiv:2402.19427); whole models are
in `recurrentgemma`.
"""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, same
from jaxrec.layers.rglru import RGLRUConfig

FIELDS = {"width": "width", "num_heads": "heads"}
UNUSED = ("B", "T")  # sizes of an input
GATES = {"a_gate": "recurrence_gate", "input_gate": "input_gate"}


def _read_config(data: Mapping[str, Any]) -> RGLRUConfig:
    fields.check_names("rglru", data, UNUSED, FIELDS)
    fields.check_counts("rglru", data, *FIELDS)
    return fields.build("rglru", RGLRUConfig, {ours: data[name] for name, ours in FIELDS.items()})


def _write_config(config: RGLRUConfig) -> dict[str, Any]:
    return {name: getattr(config, ours) for name, ours in FIELDS.items()}


def _rules(config: RGLRUConfig) -> list[Rule]:
    rules = [same("a_param", "decay")]
    for theirs, ours in GATES.items():
        rules.append(same(f"{theirs}.w", f"{ours}/kernel"))
        rules.append(same(f"{theirs}.b", f"{ours}/bias"))
    return rules


SYSTEM = System(name="rglru", read_config=_read_config, write_config=_write_config, rules=_rules)
