"""Graph layers of the original pLSTM, with gates of nodes or of edges (arXiv:2506.11997)."""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, folded, same, transposed
from jaxrec.errors import UserError
from jaxrec.layers.plstm_graph import PLSTMGraphConfig

CLASSES = ("pLSTMGraphLayer", "pLSTMGraphEdgeLayer")  # gates of nodes, of edges
FIELDS = {
    "mode": "mode",
    "input_dim": "width",
    "num_heads": "heads",
    "qk_head_dim": "key_width",
    "hv_head_dim": "value_width",
    "out": "out",
}
# How the original begins and in which precision it computes, which no tensor depends on, and its
# choice between two forms of the same gradient. Nothing in it reads output_dim.
UNUSED = (
    *("dtype", "param_dtype", "memeff_variant", "output_dim"),
    *("qkvo_bias_init", "qkvo_weight_init"),
    *(
        f"{gate}_{what}_init"
        for gate in ("source", "transition", "mark", "direct")
        for what in ("bias", "weight")
    ),
)
NORM = {"scale": "norm_scale", "bias": "norm_bias", "eps": "norm_epsilon"}
NORM_UNUSED = ("output_dim", "dtype", "param_dtype", "bias_init", "scale_init")


def _read_config(data: Mapping[str, Any]) -> PLSTMGraphConfig:
    required = ["class_name", *FIELDS, "bias", "mhnorm"]
    fields.check_names("plstm_graph", data, ["max_edges", "edge_input_dim", *UNUSED], required)
    if data["class_name"] not in CLASSES:
        raise UserError(
            f"plstm_graph: class_name must be one of {', '.join(CLASSES)}, got"
            f" {data['class_name']!r}."
        )
    of_edges = data["class_name"] == CLASSES[1]
    size = "edge_input_dim" if of_edges else "max_edges"
    fields.check_names("plstm_graph", data, ["max_edges", *UNUSED], [*required, size])
    fields.check_counts("plstm_graph", data, "input_dim", "num_heads", "hv_head_dim", size)
    ours = {ours: data[theirs] for theirs, ours in FIELDS.items()} | _read_norm(data)
    # With gates of edges the original always has biases, and its `bias` only says how they begin.
    ours |= {"bias": of_edges or data["bias"], "ends": "far"}
    ours |= {"edge_width" if of_edges else "max_edges": data[size]}
    return fields.build("plstm_graph", PLSTMGraphConfig, ours)


def _read_norm(data: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of the norm over each head."""
    norm = data["mhnorm"]
    if not isinstance(norm, dict):
        raise UserError(f"plstm_graph: mhnorm must be a mapping of fields, got {norm!r}.")
    wanted = {
        "class_name": "MultiHeadRMSNorm",
        "num_heads": data["num_heads"],
        "input_dim": data["num_heads"] * data["hv_head_dim"],
        "axis": 0,
    }
    fields.check_names("plstm_graph: mhnorm", norm, NORM_UNUSED, [*wanted, *NORM])
    fields.check_values("plstm_graph: mhnorm", norm, wanted)
    return {ours: norm[theirs] for theirs, ours in NORM.items()}


def _write_config(config: PLSTMGraphConfig) -> dict[str, Any]:
    of_edges = config.edge_width is not None
    if config.ends != "far":
        raise UserError(
            "plstm_graph: the original gates edges by their far ends; a layer with ends='near'"
            " would compute something else there."
        )
    if of_edges and not config.bias:
        raise UserError(
            "plstm_graph: the original always has biases where edges have gates; this layer has"
            " none."
        )
    inner = config.heads * config.value_width
    return {
        "class_name": CLASSES[of_edges],
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
        "output_dim": config.width,
        "bias": config.bias,
        **({"edge_input_dim": config.edge_width} if of_edges else {"max_edges": config.max_edges}),
        "mhnorm": {
            "class_name": "MultiHeadRMSNorm",
            "num_heads": config.heads,
            "input_dim": inner,
            "output_dim": inner,
            "axis": 0,
            **{theirs: getattr(config, ours) for theirs, ours in NORM.items()},
        },
    }


def _of_heads(source: str, target: str, heads: int) -> Rule:
    """A vector kept flat, stored (head, channel)."""
    return Rule(
        source,
        (target,),
        lambda x, shapes: (x.reshape(shapes[0]),),
        lambda xs: xs[0].reshape(heads, -1),
    )


def _rules(config: PLSTMGraphConfig) -> list[Rule]:
    rules = []
    for theirs, ours in (("query", "query"), ("key", "key"), ("value_", "value")):
        rules.append(transposed(f"{theirs}.weight", f"{ours}/kernel"))
        if config.bias:
            rules.append(folded(f"{theirs}.bias", f"{ours}/bias"))
    for gate in ("source", "transition", "mark", "direct"):
        rules.append(transposed(f"{gate}.weight", f"gates/{gate}/kernel"))
        rules.append(folded(f"{gate}.bias", f"gates/{gate}/bias"))
    for name, has in (("scale", config.norm_scale), ("bias", config.norm_bias)):
        if has:
            rules.append(_of_heads(f"mhnorm.{name}", f"norm/{name}", config.heads))
    if config.out:
        rules.append(transposed("out.weight", "out/kernel"))
        if config.bias:
            rules.append(same("out.bias", "out/bias"))
    return rules


SYSTEM = System(
    name="plstm_graph", read_config=_read_config, write_config=_write_config, rules=_rules
)
