"""Mamba checkpoints of the Hugging Face layout, `model_type` mamba (arXiv:2312.00752)."""

import math
from collections.abc import Mapping
from typing import Any

from jaxrec.convert import activations, fields
from jaxrec.convert.engine import Rule, System, depthwise, folded, same, transposed
from jaxrec.errors import UserError
from jaxrec.models.mamba import MambaConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "state_size": "state_size",
    "layer_norm_epsilon": "norm_epsilon",
    "conv_kernel": "conv_width",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "initializer_range": "init_std",
    "residual_in_fp32": "residual_in_float32",
    "time_step_scale": "step_scale",
    "time_step_min": "step_min",
    "time_step_max": "step_max",
    "time_step_init_scheme": "step_init",
    "time_step_floor": "step_floor",
    "rescale_prenorm_residual": "shrink_output",
    "tie_word_embeddings": "tie_embeddings",
}
DEFAULTS: dict[str, Any] = {  # what the original takes for a field that its file leaves out
    "num_hidden_layers": 32,
    "expand": 2,
    "time_step_rank": "auto",
    "hidden_act": "silu",
}
REQUIRED = ("vocab_size", "hidden_size")
SAID_TWICE = "intermediate_size d_inner d_model n_layer ssm_cfg fused_add_norm rms_norm".split()
UNUSED = "use_mambapy use_associative_scan pad_vocab_size_multiple".split()

ORIGINAL = (
    "It is a checkpoint of the original program (state-spaces/mamba), whose fields and tensors have"
    " other names. Convert it to the Hugging Face layout first, with the script"
    " convert_{}_ssm_checkpoint_to_pytorch.py of the transformers repository."
)


def refuse_original(system: str, data: Mapping[str, Any]) -> None:
    """Refuses a configuration as the original program writes it.

    Raises:
      UserError: it is one.
    """
    if "d_model" in data and "hidden_size" not in data:
        layer = (data.get("ssm_cfg") or {}).get("layer", "Mamba1")
        which = "mamba2" if layer == "Mamba2" else "mamba"
        raise UserError(
            f"{system}: config.json has d_model and no hidden_size; its layers are {layer}."
            f" {ORIGINAL.format(which)}"
        )


def _read_config(data: Mapping[str, Any]) -> MambaConfig:
    refuse_original("mamba", data)
    known = [*FIELDS, *DEFAULTS, *SAID_TWICE, *UNUSED, "model_type"]
    fields.check_names("mamba", data, known, REQUIRED)
    fields.check_values("mamba", data, {"model_type": "mamba"})
    data = DEFAULTS | dict(data)
    ours = {field: data[name] for name, field in FIELDS.items() if name in data}
    sizes = data["expand"], data["hidden_size"]
    if not all(isinstance(size, int | float) and size > 0 for size in sizes):
        raise UserError(f"mamba: expand and hidden_size must be positive numbers, got {sizes}.")
    inner = int(data["expand"] * data["hidden_size"])
    older = {  # as files of the original program say it
        "intermediate_size": inner,
        "d_inner": inner,
        "d_model": data["hidden_size"],
        "n_layer": data["num_hidden_layers"],
        "ssm_cfg": {},
        "fused_add_norm": True,
        "rms_norm": True,
    }
    fields.check_values("mamba", data, older)
    rank = data["time_step_rank"]
    ours["step_rank"] = math.ceil(data["hidden_size"] / 16) if rank == "auto" else rank
    ours["inner_width"] = inner
    ours["activation"] = activations.read("mamba", "hidden_act", data["hidden_act"])
    return fields.build("mamba", MambaConfig, ours)


def _write_config(config: MambaConfig) -> dict[str, Any]:
    data = {name: getattr(config, ours) for name, ours in FIELDS.items()}
    if config.inner_width % config.width:
        raise UserError(
            "mamba: the format has only inner widths that are multiples of the width,"
            f" got {config.inner_width} and {config.width}."
        )
    return data | {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "expand": config.inner_width // config.width,
        "time_step_rank": config.step_rank,
        "hidden_act": activations.write(config.activation),
    }


def shared_rules(config: Any) -> list[Rule]:
    """What Mamba and Mamba-2 have in common."""
    theirs, ours = "backbone.layers.{i}.mixer.", "blocks/mixer"
    rules = [
        same("backbone.embeddings.weight", "embedding/table"),
        same("backbone.norm_f.weight", "norm/scale"),
        same("backbone.layers.{i}.norm.weight", "blocks/mixer_norm/scale"),
        transposed(f"{theirs}in_proj.weight", f"{ours}/input/kernel"),
        depthwise(f"{theirs}conv1d.weight", f"{ours}/conv_kernel"),
        same(f"{theirs}A_log", f"{ours}/log_rate"),
        same(f"{theirs}D", f"{ours}/skip"),
        transposed(f"{theirs}out_proj.weight", f"{ours}/out/kernel"),
    ]
    if config.conv_bias:
        rules.append(same(f"{theirs}conv1d.bias", f"{ours}/conv_bias"))
    if config.bias:
        rules.append(folded(f"{theirs}in_proj.bias", f"{ours}/input/bias"))
        rules.append(same(f"{theirs}out_proj.bias", f"{ours}/out/bias"))
    if not config.tie_embeddings:
        rules.append(same("lm_head.weight", "head/table"))
    return rules


def tied_head(config: Any) -> dict[str, str]:
    """The tensor that a checkpoint with tied embeddings may hold twice."""
    return {"lm_head.weight": "backbone.embeddings.weight"} if config.tie_embeddings else {}


def _rules(config: MambaConfig) -> list[Rule]:
    theirs, ours = "backbone.layers.{i}.mixer.", "blocks/mixer"
    return [
        *shared_rules(config),
        transposed(f"{theirs}x_proj.weight", f"{ours}/select/kernel"),
        transposed(f"{theirs}dt_proj.weight", f"{ours}/step/kernel"),
        same(f"{theirs}dt_proj.bias", f"{ours}/step/bias"),
    ]


SYSTEM = System(
    name="mamba",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    repeated=tied_head,
    other_layouts={"backbone.embedding.weight": ORIGINAL.format("mamba")},
)
