"""What the authors' PyTorch code of pLSTM writes into config.json, read into our configurations and
written from them.

How the original initialises and in what precision it computes is not read.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.errors import UserError
from jaxrec.layers.plstm import PLSTMConfig, PLSTMGridConfig
from jaxrec.layers.plstm_block import GridBlockConfig, NormConfig, SequenceBlockConfig
from jaxrec.layers.plstm_gates import (
    GateConfig,
    ProjectionConfig,
    TransitionConfig,
    TransitionLayerConfig,
)
from jaxrec.models.plstm import PLSTMLMConfig
from jaxrec.models.plstm_vision import PLSTMVisionConfig

LayerConfig = PLSTMConfig | PLSTMGridConfig
BlockConfig = SequenceBlockConfig | GridBlockConfig
Config = TransitionLayerConfig | LayerConfig | PLSTMLMConfig | PLSTMVisionConfig
Data = Mapping[str, Any]

GATE = {
    "sub_heads": "sub_heads",
    "weight": "weight",
    "activation": "activation",
    "activation_scale": "activation_scale",
}
TRANSITION = {
    "sub_heads": "sub_heads",
    "weight": "weight",
    "eigenvalue_representation": "eigenvalues",
    "eigenvalue_factor": "eigenvalue_factor",
    "normalization_mode": "normaliser",
    "orthogonalization_factor": "normaliser_factor",
    "orthogonalization_order": "normaliser_order",
    "symmetric": "symmetric",
}
LAYER = {
    "input_dim": "width",
    "num_heads": "heads",
    "DK": "key_width",
    "DV": "value_width",
    **{f"J{letter.upper()}": f"j{letter}" for letter in "kqvto"},
    "tie_query_key": "tie_query_key",
    "convolution_inputs": "conv_inputs",
    "outprojection": "out",
    "outprojection_bias": "out_bias",
    "additional_passthrough": "skip",
}
GATES = {
    "source": ("JT", "JK", "JV"),
    "mark": ("JO", "JQ", "JT"),
    "direct": ("JO", "JQ", "JK", "JV"),
}
PROJECTIONS = {"query": ("DK", "JQ"), "key": ("DK", "JK"), "value": ("DV", "JV")}
LAYER_CLASSES = {
    "pLSTM1D": "pLSTM1DLayer",
    "pLSTM2D": "pLSTM2DLayer",
    "pLSTM2DFused": "pLSTM2DLayerFused",
}
NORMS = {"RMSNorm": "rms", "LayerNorm": "layer"}
GRID_FIELDS = ("mode", "dmode_chirality", "pmode_orientation_scale")
BLOCK_KINDS = {"PostUpProjectionBlock": "post_up", "PreUpProjectionBlock": "pre_up"}
INERT = ("dtype", "param_dtype", "class_name", "_shortname", "_short_name", "output_dim", "levels")
"""How the original computes, and what names the same again."""


# Reading


def _checked(where: str, data: Any, known: Collection[str], required: Collection[str]) -> Data:
    """A mapping whose fields are known; fields of initialisers and of precision always are."""
    if not isinstance(data, Mapping):
        raise UserError(f"plstm: {where} must be a mapping of fields, got {data!r}.")
    inits = [name for name in data if name.endswith("_init")]
    fields.check_names(f"plstm: {where}", data, [*known, *INERT, *inits], required)
    return data


def _picked(data: Data, table: Mapping[str, str]) -> dict[str, Any]:
    """Our fields of theirs that occur."""
    return {ours: data[theirs] for theirs, ours in table.items() if theirs in data}


def read_config(data: Data) -> Config:
    """What config.json describes.

    Raises:
      UserError: a field is missing, unknown or wrong, or describes what is not supported.
    """
    kind = data.get("_shortname") or data.get("_short_name") or data.get("class_name")
    if kind == "pLSTMLM":
        return _read_lm(data)
    if kind == "pLSTMVisionModel":
        return _read_vision(data)
    if kind in LAYER_CLASSES or kind in LAYER_CLASSES.values():
        layer = _read_layer("config.json", data)
        if data.get("class_name") == "pLSTM1DLayer":
            return fields.build("plstm", PLSTMConfig, layer)
        return fields.build("plstm", PLSTMGridConfig, layer)
    if "transition_dim" in data:
        return _read_transition_layer(data)
    raise UserError(
        f"plstm: config.json describes {kind!r}; known are pLSTMLM, pLSTMVisionModel,"
        f" {', '.join(LAYER_CLASSES.values())}, and a long-range transition."
    )


def _read_gate(where: str, data: Any, sizes: Data) -> dict[str, Any]:
    _checked(where, data, [*GATE, *sizes], ())
    fields.check_values(f"plstm: {where}", data, sizes)
    bias = data.get("bias_init") or {}
    start = {"bias_init": bias["value"]} if bias.get("class_name") == "ConstantInit" else {}
    return _picked(data, GATE) | start


def _read_transition(where: str, data: Any, sizes: Data) -> dict[str, Any]:
    _checked(where, data, [*TRANSITION, *sizes], ())
    fields.check_values(f"plstm: {where}", data, sizes)
    return _picked(data, TRANSITION)


def _read_transition_layer(data: Data) -> TransitionLayerConfig:
    sizes = ("input_dim", "num_heads", "transition_dim")
    _checked("config.json", data, TRANSITION, sizes)
    width, heads, tracked = (data[name] for name in sizes)
    ours = {
        "width": width,
        "heads": heads,
        "tracked": tracked,
        "options": _picked(data, TRANSITION),
    }
    return fields.build("plstm", TransitionLayerConfig, ours)


def _read_projection(where: str, data: Any, sizes: Data) -> dict[str, Any]:
    _checked(where, data, ["sub_heads", "bias", "normalization", *sizes], ())
    fields.check_values(f"plstm: {where}", data, sizes)
    normalisation = data.get("normalization", "none")
    if normalisation not in ("none", "l2"):
        raise UserError(f"plstm: {where}: normalization must be none or l2, got {normalisation!r}.")
    return _picked(data, {"sub_heads": "sub_heads", "bias": "bias"}) | {
        "normalised": normalisation == "l2"
    }


def _read_layer(where: str, data: Any) -> dict[str, Any]:
    known = [*LAYER, *GATES, *PROJECTIONS, *GRID_FIELDS, "transition", "sub_heads", "mhnorm"]
    known += ["passthrough", "convolution", "additional_convolution", "orientation_combinations"]
    required = ["class_name", *GATES, "query", "value", "transition", "mhnorm", *LAYER]
    _checked(where, data, known, required)
    cls = data["class_name"]
    if cls not in LAYER_CLASSES.values():
        raise UserError(
            f"plstm: {where}: class_name must be one of {', '.join(LAYER_CLASSES.values())}, got"
            f" {cls!r}."
        )
    on_grid = cls != "pLSTM1DLayer"
    orientations = data.get("orientation_combinations", [0, 1, 2, 3]) if on_grid else [0]
    width, heads = data["input_dim"], data["num_heads"]
    ours = _picked(data, LAYER)
    for name, axes in GATES.items():
        each = heads if name == "direct" else heads * len(orientations)
        sizes = {"num_heads": each, "input_dim": width} | {axis: data[axis] for axis in axes}
        ours[name] = _read_gate(f"{where} {name}", data[name], sizes)
    sizes = {"num_heads": heads * len(orientations), "input_dim": width}
    sizes["transition_dim"] = data["JT"]
    ours["transition"] = _read_transition(f"{where} transition", data["transition"], sizes)
    for name, axes in PROJECTIONS.items():
        if name == "key" and data["tie_query_key"]:
            continue
        sizes = {"num_heads": heads, "input_dim": width} | {axis: data[axis] for axis in axes}
        ours[name] = _read_projection(f"{where} {name}", data.get(name), sizes)
    ours |= _read_head_norm(f"{where} mhnorm", data["mhnorm"], width, heads)
    ours |= _read_conv(f"{where} convolution", data, on_grid=on_grid)
    if on_grid:
        ours |= {
            "mode": data["mode"],
            "chirality": data.get("dmode_chirality", "L"),
            "angle_scale": data.get("pmode_orientation_scale", 0.5),
            "fused": cls == "pLSTM2DLayerFused",
            "orientations": orientations,
            "flips": "corrected" if cls == "pLSTM2DLayerFused" else "original",
        }
    return ours


def _read_head_norm(where: str, data: Any, width: int, heads: int) -> dict[str, Any]:
    _checked(
        where, data, ("num_heads", "input_dim", "eps", "axis", "bias", "scale"), ("class_name",)
    )
    wanted = {"num_heads": heads, "input_dim": width, "axis": 1, "scale": True}
    fields.check_values(f"plstm: {where}", data, wanted)
    kind = _norm_kind(where, data["class_name"].removeprefix("MultiHead"))
    return {"norm": kind} | _picked(data, {"bias": "norm_bias", "eps": "norm_epsilon"})


def _norm_kind(where: str, name: str) -> str:
    if name not in NORMS:
        raise UserError(f"plstm: {where}: class_name must be of {', '.join(NORMS)}, got {name!r}.")
    return NORMS[name]


def _read_conv(where: str, data: Data, *, on_grid: bool) -> dict[str, Any]:
    if not data.get("additional_convolution"):
        return {"conv_width": None}
    names = ("input_dim", "causal", "kernel_size", "pointwise", "bias")
    conv = _checked(where, data.get("convolution"), names, ("kernel_size",))
    # The original is causal and depthwise whatever the other fields say.
    taps = conv["kernel_size"]
    if on_grid and isinstance(taps, int):
        taps = [taps, taps]
    return {"conv_width": taps, "conv_bias": conv.get("bias", True)}


def _read_norm(where: str, data: Any, width: int) -> dict[str, Any]:
    _checked(where, data, ("input_dim", "eps", "bias", "scale"), ("class_name",))
    fields.check_values(f"plstm: {where}", data, {"input_dim": width, "scale": True})
    kind = _norm_kind(where, data["class_name"])
    return {"kind": kind} | _picked(data, {"bias": "bias", "eps": "epsilon"})


def _read_block(where: str, data: Any) -> dict[str, Any]:
    known = "input_dim bias skip projection_scaling projection_round gated gating_function norm"
    known += " drop_path_rate use_scale scale inner_input_dim interaction_module"
    known += " interaction_module_name"
    required = ("class_name", "input_dim", "interaction_module", "norm", "projection_scaling")
    _checked(where, data, known.split(), (*required, "projection_round"))
    if data["class_name"] not in BLOCK_KINDS:
        raise UserError(
            f"plstm: {where}: class_name must be one of {', '.join(BLOCK_KINDS)}, got"
            f" {data['class_name']!r}."
        )
    kind = BLOCK_KINDS[data["class_name"]]
    fields.check_counts(f"plstm: {where}", data, "input_dim", "projection_round")
    width = data["input_dim"]
    inner = _inner(data["projection_scaling"], width, data["projection_round"])
    fields.check_values(f"plstm: {where}", data, {"inner_input_dim": inner})
    return {
        "width": width,
        "kind": kind,
        "inner": inner,
        "gated": data.get("gated", kind == "pre_up"),
        "activation": data.get("gating_function", "silu" if kind == "pre_up" else "gelu"),
        "residual": data.get("skip", True),
        "scaled": data.get("use_scale", False),
        "drop": data.get("drop_path_rate", 0.0),
        "norm": _read_norm(f"{where} norm", data["norm"], width),
        "mixer": _read_layer(f"{where} interaction_module", data["interaction_module"]),
    }


def _inner(scaling: float, width: int, multiple: int) -> int:
    """The inner width that the original makes of a factor, rounded up."""
    return int(round((scaling * width - 1) // multiple) + 1) * multiple


def _read_stack(data: Any, width: int, blocks: int) -> Data:
    """The block of a stack."""
    known = ("input_dim", "block", "scan_blocks", "num_blocks")
    _checked("block_stack", data, known, ("block",))
    wanted = {"input_dim": width, "num_blocks": blocks, "scan_blocks": False}
    fields.check_values("plstm: block_stack", data, wanted)
    return data["block"]


def _read_cap(where: str, data: Any) -> float | None:
    if data is None:
        return None
    _checked(where, data, ("scale",), ("scale",))
    fields.check_values(f"plstm: {where}", data, {"class_name": "SoftCapFunctionLayer"})
    return data["scale"]


def _read_lm(data: Data) -> PLSTMLMConfig:
    known = "vocab_size input_dim context_length embedding_dim num_blocks tie_weights"
    known += " logit_soft_cap block_type block_stack post_blocks_norm"
    required = ("vocab_size", "embedding_dim", "num_blocks", "block_stack", "post_blocks_norm")
    _checked("config.json", data, known.split(), required)
    width = data["embedding_dim"]
    context = data.get("context_length", -1)
    block = _read_stack(data["block_stack"], width, data["num_blocks"])
    cap = data.get("logit_soft_cap")
    ours = {
        "vocab_size": data["vocab_size"],
        "layers": data["num_blocks"],
        "block": _read_block("block", block),
        "tie_embeddings": data.get("tie_weights", False),
        "logits_soft_cap": 10.0 if cap is None else _read_cap("logit_soft_cap", cap),
        "norm": _read_norm("post_blocks_norm", data["post_blocks_norm"], width),
    }
    if isinstance(context, int) and context > 0:
        ours["context"] = context
    return fields.build("plstm", PLSTMLMConfig, ours)


def _read_vision(data: Data) -> PLSTMVisionConfig:
    known = "dim num_channels patch_size num_blocks output_shape mode pooling stride norm_bias"
    known += " num_heads seqlens resolution channels_first input_shape aux head_init_std"
    known += " num_patches norm block_stack patch_embed use_pos_embed pos_embed logit_softcap"
    required = "dim num_channels patch_size num_blocks output_shape norm block_stack resolution"
    _checked("config.json", data, known.split(), required.split())
    width, patch = data["dim"], data["patch_size"]
    # Overlapping patches: the original's own positions do not fit them.
    stride = data.get("stride")
    fields.check_values("plstm", data, {"mode": "classifier", "stride": patch if stride else None})
    if data.get("pooling") == "cls":
        raise UserError(
            "plstm: pooling cls puts a token in front of a row of patches, for which a grid has no"
            " place; the original fails with it too. Known are corners, mean, sum and center."
        )
    embed = data.get("patch_embed") or {}
    known = "dim num_channels resolution channels_first patch_size stride"
    _checked("patch_embed", embed, known.split(), ())
    wanted = {"dim": width, "num_channels": data["num_channels"], "patch_size": patch}
    wanted["channels_first"] = data.get("channels_first", False)
    fields.check_values("plstm: patch_embed", embed, wanted)
    fields.check_counts("plstm", data, "patch_size")
    grid = [side // patch for side in data["resolution"]]
    if data.get("use_pos_embed", True):
        position = data.get("pos_embed") or {}
        known = "seqlens dim allow_interpolation learnable"
        _checked("pos_embed", position, known.split(), ())
        fields.check_values("plstm: pos_embed", position, {"dim": width})
        grid = position.get("seqlens", grid)
    block = _read_stack(data["block_stack"], width, data["num_blocks"])
    known = "input_dim num_heads block_type block_mode orientations0 orientations1 drop_path_rate"
    _checked("block", block, [*known.split(), "block0", "block1"], ("block0", "block1"))
    fields.check_values("plstm: block", block, {"class_name": "pLSTMVisionBlock1"})
    ours = {
        "classes": data["output_shape"][0],
        "layers": data["num_blocks"],
        "first": _read_block("block0", block["block0"]),
        "second": _read_block("block1", block["block1"]),
        "patch": patch,
        "grid": grid,
        "inputs": data["num_channels"],
        "position": data.get("use_pos_embed", True),
        "pooling": data.get("pooling", "corners"),
        "drop": block.get("drop_path_rate", 0.0),
        "norm": _read_norm("norm", data["norm"], width),
        "logits_soft_cap": _read_cap("logit_softcap", data.get("logit_softcap")),
        "channels_first": data.get("channels_first", False),
    }
    return fields.build("plstm", PLSTMVisionConfig, ours)


# Writing


def _named(config: Any, table: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in table.items()}


def write_config(config: Config) -> dict[str, Any]:
    """What the original would read back as `config`.

    Raises:
      UserError: the original has no such model.
    """
    if isinstance(config, PLSTMLMConfig):
        return _write_lm(config)
    if isinstance(config, PLSTMVisionConfig):
        return _write_vision(config)
    if isinstance(config, TransitionLayerConfig):
        return _write_transition(config.options, config.width, config.heads, config.tracked)
    return _write_layer(config)


def _write_gate(gate: GateConfig) -> dict[str, Any]:
    bias = {"class_name": "ConstantInit", "value": gate.bias_init}
    return _named(gate, GATE) | {"bias_init": bias}


def _write_transition(
    options: TransitionConfig, width: int, heads: int, tracked: int
) -> dict[str, Any]:
    sizes = {"num_heads": heads, "transition_dim": tracked, "input_dim": width}
    return sizes | _named(options, TRANSITION)


def _write_projection(projection: ProjectionConfig) -> dict[str, Any]:
    kind = "l2" if projection.normalised else "none"
    return {"sub_heads": projection.sub_heads, "bias": projection.bias, "normalization": kind}


def _write_layer(config: LayerConfig) -> dict[str, Any]:
    data = _named(config, LAYER) | {"output_dim": config.width}
    count = len(config.orientations) if isinstance(config, PLSTMGridConfig) else 1
    width, heads = config.width, config.heads
    for name, axes in GATES.items():
        each = heads if name == "direct" else heads * count
        sizes = {"num_heads": each, "input_dim": width} | {axis: data[axis] for axis in axes}
        data[name] = _write_gate(getattr(config, name)) | sizes
    for name, axes in PROJECTIONS.items():
        sizes = {"num_heads": heads, "input_dim": width} | {axis: data[axis] for axis in axes}
        data[name] = _write_projection(getattr(config, name)) | sizes
    data["transition"] = _write_transition(config.transition, width, heads * count, config.jt)
    norm = {value: key for key, value in NORMS.items()}[config.norm]
    data["mhnorm"] = {
        "class_name": f"MultiHead{norm}",
        "num_heads": heads,
        "input_dim": width,
        "eps": config.norm_epsilon,
        "axis": 1,
        "bias": config.norm_bias,
        "scale": True,
    }
    data["passthrough"] = {"input_dim": width} if config.skip else None
    data["additional_convolution"] = config.conv_width is not None
    data["convolution"] = None
    if config.conv_width is not None:
        conv = {"input_dim": width, "causal": True, "bias": config.conv_bias, "pointwise": True}
        data["convolution"] = conv | {"kernel_size": config.conv_width}
    name = "pLSTM1D"
    if isinstance(config, PLSTMGridConfig):
        name = "pLSTM2DFused" if config.fused else "pLSTM2D"
        data |= {
            "mode": config.mode,
            "dmode_chirality": config.chirality,
            "pmode_orientation_scale": config.angle_scale,
        }
        if not config.fused:  # the original's third bit turns y, not its second
            data["orientation_combinations"] = [o & 1 | (o & 2) << 1 for o in config.directions]
            if config.flips == "original":
                data["orientation_combinations"] = list(config.orientations)
    return data | {"_shortname": name, "class_name": LAYER_CLASSES[name]}


def _write_norm(norm: NormConfig, width: int) -> dict[str, Any]:
    kind = {value: key for key, value in NORMS.items()}[norm.kind]
    data = {"class_name": kind, "input_dim": width, "output_dim": width}
    return data | {"eps": norm.epsilon, "bias": norm.bias, "scale": True}


def _write_block(config: BlockConfig) -> dict[str, Any]:
    width, mixer = config.width, _write_layer(config.mixer)
    scaling = config.inner / width
    if _inner(scaling, width, 1) != config.inner:
        scaling = math.nextafter(scaling, math.inf)
    data = {
        "class_name": {value: key for key, value in BLOCK_KINDS.items()}[config.kind],
        "input_dim": width,
        "output_dim": width,
        "skip": config.residual,
        "projection_scaling": scaling,
        "projection_round": 1,
        "gated": config.gated,
        "gating_function": config.activation,
        "interaction_module_name": mixer["_shortname"],
        "interaction_module": mixer,
        "norm": _write_norm(config.norm, width),
    }
    if config.kind == "pre_up":
        return data | {"inner_input_dim": config.inner}
    scale = {"class_name": "ScaleLayer", "input_dim": width} if config.scaled else None
    return data | {"drop_path_rate": config.drop, "use_scale": config.scaled, "scale": scale}


def _write_stack(block: dict[str, Any], width: int, blocks: int) -> dict[str, Any]:
    stack = {"class_name": "BlockStack", "input_dim": width, "output_dim": width}
    return stack | {"block": block, "num_blocks": blocks, "scan_blocks": False}


def _write_cap(cap: float | None) -> dict[str, Any] | None:
    return None if cap is None else {"class_name": "SoftCapFunctionLayer", "scale": cap}


def _write_lm(config: PLSTMLMConfig) -> dict[str, Any]:
    if config.logits_soft_cap is None:
        raise UserError("plstm: the original has no language model without a soft cap of logits.")
    width = config.width
    return {
        "_shortname": "pLSTMLM",
        "vocab_size": config.vocab_size,
        "embedding_dim": width,
        "context_length": config.context,
        "num_blocks": config.layers,
        "tie_weights": config.tie_embeddings,
        "logit_soft_cap": _write_cap(config.logits_soft_cap),
        "block_type": config.block.kind,
        "block_stack": _write_stack(_write_block(config.block), width, config.layers),
        "post_blocks_norm": _write_norm(config.norm, width),
    }


def _write_vision(config: PLSTMVisionConfig) -> dict[str, Any]:
    width, patch = config.width, config.patch
    resolution = [side * patch for side in config.grid]
    block = {
        "class_name": "pLSTMVisionBlock1",
        "input_dim": width,
        "num_heads": config.first.mixer.heads,
        "block_mode": config.first.mixer.mode + config.second.mixer.mode,
        "block0": _write_block(config.first),
        "block1": _write_block(config.second),
        "drop_path_rate": config.drop,
    }
    embed = {"dim": width, "num_channels": config.inputs, "resolution": resolution}
    embed |= {"channels_first": config.channels_first, "patch_size": patch}
    return {
        "_short_name": "pLSTMVisionModel",
        "dim": width,
        "num_channels": config.inputs,
        "patch_size": patch,
        "num_blocks": config.layers,
        "output_shape": [config.classes],
        "mode": "classifier",
        "pooling": config.pooling,
        "num_heads": config.first.mixer.heads,
        "resolution": resolution,
        "channels_first": config.channels_first,
        "norm": _write_norm(config.norm, width),
        "block_stack": _write_stack(block, width, config.layers),
        "patch_embed": embed,
        "use_pos_embed": config.position,
        "pos_embed": {"seqlens": list(config.grid), "dim": width},
        "logit_softcap": _write_cap(config.logits_soft_cap),
    }
