"""xLSTM checkpoints of the Hugging Face layout, `model_type` xlstm (arXiv:2503.13427).

The original has a last norm whatever `add_out_norm` says, and a head of its own whatever
`tie_word_embeddings` says; so has this. Here everything is in float32: `autocast_kernel_dtype` and
`inference_state_dtype` say how precisely its kernels for accelerators compute and keep states, and
its plain form, to which the golden cases belong, gives the same numbers whatever they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, same, transposed
from jaxrec.errors import UserError
from jaxrec.models.xlstm import XLSTMConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_blocks": "layers",
    "num_heads": "heads",
    "use_bias": "bias",
    "norm_eps": "norm_epsilon",
    "eps": "epsilon",
    "gate_soft_cap": "gate_soft_cap",
    "output_logit_soft_cap": "logits_soft_cap",
    "weight_mode": "weight_mode",
    "chunk_size": "chunk",
}
DEFAULTS: dict[str, Any] = {  # what the original takes for a field that its file leaves out
    "vocab_size": 50304,
    "num_hidden_layers": 32,
    "num_heads": 8,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64,
}
CAPS = ("gate_soft_cap", "output_logit_soft_cap")  # null: none, and not the default
SIZES = ("embedding_dim", "hidden_size")
WITHOUT_EFFECT = (
    "add_out_norm tie_word_embeddings norm_reduction_force_float32 chunkwise_kernel sequence_kernel"
    " step_kernel mode return_last_states autocast_kernel_dtype inference_state_dtype"
    " max_inference_chunksize"
).split()
"""How the original computes, and what it does not read."""


def _read_config(data: Mapping[str, Any]) -> XLSTMConfig:
    known = [*FIELDS, *DEFAULTS, *SIZES, *WITHOUT_EFFECT, "model_type"]
    fields.check_names("xlstm", data, known, ())
    fields.check_values("xlstm", data, {"model_type": "xlstm"})
    given = {name: value for name, value in data.items() if value is not None or name in CAPS}
    width = given.get("hidden_size", given.get("embedding_dim", 4096))
    fields.check_values("xlstm", given, {"embedding_dim": width})
    data = DEFAULTS | given | {"hidden_size": width}
    data.setdefault("num_blocks", data["num_hidden_layers"])  # with both, that one is not used
    factors = ("qk_dim_factor", "v_dim_factor", "ffn_proj_factor")
    for name in factors:
        if not isinstance(data[name], int | float) or not data[name] > 0:
            raise UserError(f"xlstm: {name} must be a positive number, got {data[name]!r}.")
    fields.check_counts("xlstm", data, "hidden_size", "ffn_round_up_to_multiple_of")
    ours = {field: data[name] for name, field in FIELDS.items() if name in data}
    keys, values, inner = (width * data[name] for name in factors)
    ours["key_width"], ours["value_width"] = int(keys), int(values)
    multiple = data["ffn_round_up_to_multiple_of"]
    ours["mlp_width"] = int((inner + multiple - 1) // multiple * multiple)
    return fields.build("xlstm", XLSTMConfig, ours)


def _write_config(config: XLSTMConfig) -> dict[str, Any]:
    return {name: getattr(config, ours) for name, ours in FIELDS.items()} | {
        "model_type": "xlstm",
        "architectures": ["xLSTMForCausalLM"],
        "embedding_dim": config.width,
        "num_hidden_layers": config.layers,
        "qk_dim_factor": _factor(config.key_width, config.width),
        "v_dim_factor": _factor(config.value_width, config.width),
        "ffn_proj_factor": _factor(config.mlp_width, config.width),
        "ffn_round_up_to_multiple_of": 1,
        "tie_word_embeddings": False,
    }


def _factor(size: int, width: int) -> float:
    """A factor of which the original makes this size, whose fraction it drops."""
    factor = size / width
    return factor if int(width * factor) == size else math.nextafter(factor, math.inf)


def _rules(config: XLSTMConfig) -> list[Rule]:
    block, mixer, mlp = "backbone.blocks.{i}.", "blocks/mixer", "blocks/mlp"
    theirs = f"{block}mlstm_layer."
    rules = [
        same("backbone.embeddings.weight", "embedding/table"),
        same(f"{block}norm_mlstm.weight", "blocks/mixer_norm/scale"),
        same(f"{block}norm_ffn.weight", "blocks/mlp_norm/scale"),
        same(f"{theirs}multihead_norm.weight", f"{mixer}/norm/scale"),
        transposed(f"{theirs}out_proj.weight", f"{mixer}/out/kernel"),
        transposed(f"{block}ffn.proj_down.weight", f"{mlp}/out/kernel"),
        same("backbone.out_norm.weight", "norm/scale"),
        same("lm_head.weight", "head/table"),
    ]
    if config.bias:
        rules += [
            same(f"{block}norm_mlstm.bias", "blocks/mixer_norm/bias"),
            same(f"{block}norm_ffn.bias", "blocks/mlp_norm/bias"),
            same(f"{theirs}multihead_norm.bias", f"{mixer}/norm/bias"),
            same(f"{theirs}out_proj.bias", f"{mixer}/out/bias"),
            same(f"{block}ffn.proj_down.bias", f"{mlp}/out/bias"),
        ]
    ours_of = (_fused if config.weight_mode == "fused" else _single)(theirs, block, mixer, mlp)
    for source, targets, has_bias in ours_of:
        kernels = tuple(f"{target}/kernel" for target in targets)
        biases = tuple(f"{target}/bias" for target in targets)
        rules.append(_parted(f"{source}.weight", kernels, transpose=True))
        if has_bias or config.bias:
            rules.append(_parted(f"{source}.bias", biases, transpose=False))
    return rules


Projections = list[tuple[str, tuple[str, ...], bool]]
"""Theirs, the parts of ours that it holds one after the other, and whether it always has a bias."""


def _single(theirs: str, block: str, mixer: str, mlp: str) -> Projections:
    return [
        (f"{theirs}q", (f"{mixer}/query",), False),
        (f"{theirs}k", (f"{mixer}/key",), False),
        (f"{theirs}v", (f"{mixer}/value",), False),
        (f"{theirs}ogate_preact", (f"{mixer}/output_gate",), False),
        (f"{theirs}igate_preact", (f"{mixer}/input_gate",), True),
        (f"{theirs}fgate_preact", (f"{mixer}/forget_gate",), True),
        (f"{block}ffn.proj_up_gate", (f"{mlp}/gate",), False),
        (f"{block}ffn.proj_up", (f"{mlp}/up",), False),
    ]


def _fused(theirs: str, block: str, mixer: str, mlp: str) -> Projections:
    parts = tuple(f"{mixer}/{name}" for name in ("query", "key", "value", "output_gate"))
    return [
        (f"{theirs}qkv_opreact", parts, False),
        (f"{theirs}ifgate_preact", (f"{mixer}/input_gate", f"{mixer}/forget_gate"), True),
        (f"{block}ffn.proj_up_gate_z", (f"{mlp}/gate", f"{mlp}/up"), False),
    ]


def _parted(source: str, targets: tuple[str, ...], *, transpose: bool) -> Rule:
    """Linear maps stored as one (out, in) below each other, kept (in, out...) each; without
    `transpose` their biases.
    """

    def load(x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Sequence[np.ndarray]:
        sizes = [math.prod(shape[1:] if transpose else shape) for shape in shapes]
        wanted = (sum(sizes), *(shapes[0][:1] if transpose else ()))
        if x.shape != wanted:
            raise ValueError(f"{x.shape} is not {wanted}")
        parts = np.split(x, np.cumsum(sizes)[:-1])
        return [part.T.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def save(xs: Sequence[np.ndarray]) -> np.ndarray:
        flat = [x.reshape(x.shape[0], -1).T if transpose else x.reshape(-1) for x in xs]
        return np.concatenate(flat)

    return Rule(source, targets, load, save)


SYSTEM = System(name="xlstm", read_config=_read_config, write_config=_write_config, rules=_rules)
