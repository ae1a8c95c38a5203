"""RecurrentGemma checkpoints of the Hugging Face layout, `model_type` recurrent_gemma
(arXiv:2404.07839).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrec.convert import activations, fields
from jaxrec.convert.engine import Rule, System, depthwise, folded, joined, same, transposed
from jaxrec.errors import UserError
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "attention_window_size": "window",
    "block_types": "pattern",
    "conv1d_width": "conv_width",
    "attention_bias": "attention_bias",
    "logits_soft_cap": "logits_soft_cap",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
}
DEFAULTS: dict[str, Any] = {  # what the original takes for a field that its file leaves out
    "attention_window_size": 2048,
    "lru_width": None,  # the width
    "num_key_value_heads": None,  # as many as heads
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": None,
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
CHECKED = ("model_type", "head_dim", "rope_theta", "partial_rotary_factor", "rope_scaling")
UNUSED = (  # how weights began or were trained
    "w_init_variance_scale final_w_init_variance_scale attention_dropout"
    " embeddings_scale_by_sqrt_dim"
).split()
CONTEXT = 8192  # of the published models; the file does not say


def _read_config(data: Mapping[str, Any]) -> RecurrentGemmaConfig:
    known = [*FIELDS, *DEFAULTS, *CHECKED, *UNUSED]
    fields.check_names("recurrentgemma", data, known, REQUIRED)
    data = DEFAULTS | dict(data)
    fields.check_counts("recurrentgemma", data, *REQUIRED)
    fields.check_most("recurrentgemma", data, "num_hidden_layers")
    wanted = {
        "model_type": "recurrent_gemma",
        "head_dim": data["hidden_size"] // data["num_attention_heads"],
        "rope_scaling": None,
        "embeddings_scale_by_sqrt_dim": True,
    }
    fields.check_values("recurrentgemma", data, wanted)
    if data["intermediate_size"] % 2:
        raise UserError(
            "recurrentgemma: intermediate_size counts both branches of the MLP and must be even,"
            f" got {data['intermediate_size']}."
        )
    ours = {field: data[name] for name, field in FIELDS.items() if name in data}
    ours |= _read_rotation(data)
    ours["recurrent_width"] = data["lru_width"] or data["hidden_size"]
    ours["kv_heads"] = data["num_key_value_heads"] or data["num_attention_heads"]
    ours["mlp_width"] = data["intermediate_size"] // 2
    ours["activation"] = activations.read(
        "recurrentgemma", "hidden_activation", data["hidden_activation"]
    )
    ours["context"] = CONTEXT
    return fields.build("recurrentgemma", RecurrentGemmaConfig, ours)


def _read_rotation(data: Mapping[str, Any]) -> dict[str, Any]:
    """Base and fraction, which newer files keep in a field of their own."""
    rotation = data["rope_parameters"] or {}
    for name in rotation:
        if name not in ("rope_theta", "partial_rotary_factor", "rope_type"):
            raise UserError(f"recurrentgemma: unknown field rope_parameters.{name} in config.json.")
    if rotation.get("rope_type", "default") != "default":
        raise UserError(
            "recurrentgemma: rope_parameters.rope_type must be 'default',"
            f" got {rotation['rope_type']!r}."
        )
    older = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5} | dict(data)
    return {
        "rotary_base": rotation.get("rope_theta", older["rope_theta"]),
        "rotary_fraction": rotation.get("partial_rotary_factor", older["partial_rotary_factor"]),
    }


def _write_config(config: RecurrentGemmaConfig) -> dict[str, Any]:
    data = {name: getattr(config, ours) for name, ours in FIELDS.items()}
    if config.logits_soft_cap is None:
        raise UserError("recurrentgemma: the format has no logits without a soft cap.")
    return data | {
        "model_type": "recurrent_gemma",
        "architectures": ["RecurrentGemmaForCausalLM"],
        "block_types": list(config.pattern),
        "lru_width": config.recurrent_width,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": 2 * config.mlp_width,
        "hidden_activation": activations.write(config.activation),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_fraction,
        },
    }


def _linear(theirs: str, ours: str) -> list[Rule]:
    return [
        transposed(f"{theirs}.weight", f"{ours}/kernel"),
        same(f"{theirs}.bias", f"{ours}/bias"),
    ]


def _recurrent(theirs: str, ours: str) -> list[Rule]:
    return [
        *_linear(f"{theirs}.linear_y", f"{ours}/gate"),
        *_linear(f"{theirs}.linear_x", f"{ours}/input"),
        *_linear(f"{theirs}.linear_out", f"{ours}/out"),
        depthwise(f"{theirs}.conv_1d.weight", f"{ours}/conv_kernel"),
        same(f"{theirs}.conv_1d.bias", f"{ours}/conv_bias"),
        same(f"{theirs}.rg_lru.recurrent_param", f"{ours}/recurrence/decay"),
        same(f"{theirs}.rg_lru.input_gate_weight", f"{ours}/recurrence/input_gate/kernel"),
        same(f"{theirs}.rg_lru.input_gate_bias", f"{ours}/recurrence/input_gate/bias"),
        same(f"{theirs}.rg_lru.recurrent_gate_weight", f"{ours}/recurrence/recurrence_gate/kernel"),
        same(f"{theirs}.rg_lru.recurrent_gate_bias", f"{ours}/recurrence/recurrence_gate/bias"),
    ]


def _attention(theirs: str, ours: str, bias: bool) -> list[Rule]:
    kinds = [("weight", "kernel"), *([("bias", "bias")] if bias else [])]
    rules = _linear(f"{theirs}.o_proj", f"{ours}/out")
    for their_kind, kind in kinds:
        query = transposed if kind == "kernel" else folded
        rules.append(query(f"{theirs}.q_proj.{their_kind}", f"{ours}/query/{kind}"))
        both = (f"{theirs}.k_proj.{their_kind}", f"{theirs}.v_proj.{their_kind}")
        rules.append(joined(both, f"{ours}/key_value/{kind}"))
    return rules


def _rules(config: RecurrentGemmaConfig) -> list[Rule]:
    rules = [
        same("model.embed_tokens.weight", "embedding/table"),
        same("model.final_norm.weight", "norm/scale"),
    ]
    if not config.tie_embeddings:
        rules.append(same("lm_head.weight", "head/table"))
    period = len(config.pattern)
    whole = config.layers // period * period
    places = [
        *((f"groups/blocks/{i}", tuple(range(i, whole, period))) for i in range(period) if whole),
        *((f"tail/blocks/{i - whole}", (i,)) for i in range(whole, config.layers)),
    ]
    for ours, numbers in places:
        theirs = "model.layers.{i}"
        block = [
            same(f"{theirs}.temporal_pre_norm.weight", f"{ours}/mixer_norm/scale"),
            same(f"{theirs}.channel_pre_norm.weight", f"{ours}/mlp_norm/scale"),
            *_linear(f"{theirs}.mlp_block.gate_proj", f"{ours}/mlp/gate"),
            *_linear(f"{theirs}.mlp_block.up_proj", f"{ours}/mlp/up"),
            *_linear(f"{theirs}.mlp_block.down_proj", f"{ours}/mlp/out"),
        ]
        if config.mixers[numbers[0]] == "recurrent":
            block += _recurrent(f"{theirs}.temporal_block", f"{ours}/mixer")
        else:
            block += _attention(f"{theirs}.temporal_block", f"{ours}/mixer", config.attention_bias)
        stacked = ours.startswith("groups")
        rules += [
            dataclasses.replace(rule, numbers=numbers)
            if stacked
            else dataclasses.replace(rule, source=_numbered(rule.source, numbers[0]))
            for rule in block
        ]
    return rules


def _numbered(source: str | tuple[str, ...], number: int) -> str | tuple[str, ...]:
    if isinstance(source, str):
        return source.format(i=number)
    return tuple(name.format(i=number) for name in source)


SYSTEM = System(
    name="recurrentgemma",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    repeated=lambda config: (
        {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}
    ),
)
