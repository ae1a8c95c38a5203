"""S5 layers as the parameters of the original's module, complex numbers in a trailing axis of two
(arXiv:2208.04933).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, same
from jaxrec.layers.s5 import S5Config

FIELDS = {
    "H": "width",
    "P": "state",
    "blocks": "blocks",
    "conj_sym": "conj_sym",
    "bidirectional": "bidirectional",
    "clip_eigs": "clip_eigs",
    "step_rescale": "step_rescale",
    "C_init": "output_init",
    "discretization": "discretization",
}
OPTIONAL = {"dt_min": "dt_min", "dt_max": "dt_max"}  # only where the steps began
UNUSED = ("L",)  # length of a sequence
PARTS = ("real", "imag")


def _read_config(data: Mapping[str, Any]) -> S5Config:
    fields.check_names("s5", data, [*OPTIONAL, *UNUSED], FIELDS)
    fields.check_most("s5", data, "P")
    ours = {field: data[name] for name, field in (FIELDS | OPTIONAL).items() if name in data}
    return fields.build("s5", S5Config, ours)


def _write_config(config: S5Config) -> dict[str, Any]:
    return {name: getattr(config, ours) for name, ours in (FIELDS | OPTIONAL).items()}


def _complex(source: str, target: str) -> Rule:
    """(... 2) becomes the two parameters that end in _real and _imag."""
    return Rule(
        source,
        tuple(f"{target}_{part}" for part in PARTS),
        lambda x, _: (x[..., 0], x[..., 1]),
        lambda xs: np.stack(xs, axis=-1),
    )


def _outputs(config: S5Config) -> list[Rule]:
    """C; of a bidirectional layer C1 and C2, or, drawn as complex numbers, one C (d 2n 2)."""
    if not config.bidirectional:
        return [_complex("C", "output")]
    if config.output_init != "complex_normal":
        return [_complex("C1", "output"), _complex("C2", "reverse_output")]

    def halves(x: np.ndarray, _: Any) -> list[np.ndarray]:
        forward, backward = np.split(x, 2, axis=1)
        return [part[..., i] for part in (forward, backward) for i in range(2)]

    def joined(xs: Any) -> np.ndarray:
        pairs = [np.stack(xs[i : i + 2], axis=-1) for i in (0, 2)]
        return np.concatenate(pairs, axis=1)

    targets = tuple(f"{name}_{part}" for name in ("output", "reverse_output") for part in PARTS)
    return [Rule("C", targets, halves, joined)]


def _rules(config: S5Config) -> list[Rule]:
    return [
        same("Lambda_re", "eigenvalue_real"),
        same("Lambda_im", "eigenvalue_imag"),
        _complex("B", "input"),
        *_outputs(config),
        same("D", "skip"),
        Rule("log_step", ("log_step",), lambda x, _: (x[:, 0],), lambda xs: xs[0][:, None]),
    ]


SYSTEM = System(name="s5", read_config=_read_config, write_config=_write_config, rules=_rules)
