"""Mamba-2 checkpoints of the Hugging Face layout, `model_type` mamba2 (arXiv:2405.21060)."""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import activations, fields
from jaxrec.convert.engine import Rule, System, same
from jaxrec.convert.mamba import FIELDS as OF_MAMBA
from jaxrec.convert.mamba import ORIGINAL, refuse_original, shared_rules, tied_head
from jaxrec.errors import UserError
from jaxrec.models.mamba2 import Mamba2Config

FIELDS = {
    **{name: ours for name, ours in OF_MAMBA.items() if ours not in ("step_scale", "step_init")},
    "num_heads": "heads",
    "head_dim": "head_width",
    "n_groups": "groups",
    "time_step_limit": "step_limit",
}
DEFAULTS: dict[str, Any] = {  # what the original takes for a field that its file leaves out
    "num_heads": 128,
    "num_hidden_layers": 64,
    "n_groups": 8,
    "expand": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
REQUIRED = ("vocab_size", "hidden_size")
UNUSED = (  # an option of older files that the original does not read, and how it runs the scan
    "norm_before_gate chunk_size time_step_rank"
).split()


def _read_config(data: Mapping[str, Any]) -> Mamba2Config:
    refuse_original("mamba2", data)
    fields.check_names("mamba2", data, [*FIELDS, *DEFAULTS, *UNUSED, "model_type"], REQUIRED)
    fields.check_values("mamba2", data, {"model_type": "mamba2"})
    data = DEFAULTS | dict(data)
    fields.check_counts("mamba2", data, "hidden_size", "num_heads", "expand")
    ours = {field: data[name] for name, field in FIELDS.items() if name in data}
    ours["activation"] = activations.read("mamba2", "hidden_act", data["hidden_act"])
    config = fields.build("mamba2", Mamba2Config, ours)
    if config.inner_width != data["expand"] * config.width:
        raise UserError(
            f"mamba2: num_heads times head_dim must be expand times hidden_size, got"
            f" {config.heads} x {config.head_width} and {data['expand']} x {config.width}."
        )
    return config


def _write_config(config: Mamba2Config) -> dict[str, Any]:
    if config.inner_width % config.width:
        raise UserError(
            "mamba2: the format has only inner widths that are multiples of the width,"
            f" got {config.inner_width} and {config.width}."
        )
    data = {name: getattr(config, ours) for name, ours in FIELDS.items()}
    return data | {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "time_step_limit": list(config.step_limit),
        "expand": config.inner_width // config.width,
        "hidden_act": activations.write(config.activation),
    }


def _rules(config: Mamba2Config) -> list[Rule]:
    theirs, ours = "backbone.layers.{i}.mixer.", "blocks/mixer"
    return [
        *shared_rules(config),
        same(f"{theirs}dt_bias", f"{ours}/step_bias"),
        same(f"{theirs}norm.weight", f"{ours}/norm/scale"),
    ]


SYSTEM = System(
    name="mamba2",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    repeated=tied_head,
    other_layouts={"backbone.embedding.weight": ORIGINAL.format("mamba2")},
)
