"""Prefix linear attention as the parameters of the original's layer (arXiv:2407.05483)."""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, transposed
from jaxrec.errors import UserError
from jaxrec.layers.prefix_linear_attention import PrefixLinearAttentionConfig

FIELDS = {"embed_dim": "width", "num_heads": "heads", "feature_dim": "feature_width"}
OPTIONAL = {"eps": "epsilon"}
# Tokens of the prefix and behind it, which is an argument of a call here.
UNUSED = ("enc_length", "dec_length")
NAMES = {
    "proj_q": "query",
    "proj_k": "key",
    "proj_v": "value",
    "proj_k_enc": "prefix_key",
    "proj_v_enc": "prefix_value",
    "out_proj": "out",
}


def _read_config(data: Mapping[str, Any]) -> PrefixLinearAttentionConfig:
    system = "prefix_linear_attention"
    fields.check_names(system, data, [*OPTIONAL, *UNUSED], FIELDS)
    fields.check_counts(system, data, *FIELDS)
    ours = {field: data[name] for name, field in (FIELDS | OPTIONAL).items() if name in data}
    return fields.build(system, PrefixLinearAttentionConfig, ours)


def _write_config(config: PrefixLinearAttentionConfig) -> dict[str, Any]:
    if config.masks_before_features:
        raise UserError(
            "prefix_linear_attention: the format cannot say masks_before_features; build the layer"
            " with it after loading instead."
        )
    return {name: getattr(config, ours) for name, ours in (FIELDS | OPTIONAL).items()}


def _rules(config: PrefixLinearAttentionConfig) -> list[Rule]:
    return [transposed(f"{theirs}.weight", f"{ours}/kernel") for theirs, ours in NAMES.items()]


SYSTEM = System(
    name="prefix_linear_attention",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
)
