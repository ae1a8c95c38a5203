"""ParaRNN: cells with the names of the original's modules, and language models with those of a
third party's training code around them (arXiv:2510.21450).

Of both only what the equations need is kept: how weights began and how many Newton iterations were
made is the original's business; here the solver stops by its residual.
"""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, depthwise, same, transposed
from jaxrec.errors import UserError, nearest
from jaxrec.layers.activations import Activation
from jaxrec.layers.pararnn import ParaRNNConfig
from jaxrec.models.pararnn import ParaRNNLMConfig

NONLINEARITIES: dict[str, Activation] = {
    "identity": "identity",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "silu": "silu",
    "gelu": "gelu_tanh",
    "selu": "selu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "half_sigmoid": "half_sigmoid",
    "exp": "exp",
    "softplus": "softplus",
    "elu": "elu",
}
CELLS = {"GRUDiagMH": "gru", "LSTMCIFGDiagMH": "lstm"}
ROLES = {  # their field, and what it is if left out
    "gru": {"nonlin_update": "sigmoid", "nonlin_reset": "sigmoid", "nonlin_state": "tanh"},
    "lstm": {
        "nonlin_f": "sigmoid",
        "nonlin_o": "sigmoid",
        "nonlin_c": "tanh",
        "nonlin_state": "tanh",
    },
}
CELL_FIELDS = {"input_dim": "inputs", "state_dim": "width", "num_heads": "heads"}
CELL_UNUSED = (  # where the weights began, how Newton's method was run, and on what
    *("a_init_fn", "b_init_fn", "w_init_fn", "c_init_fn", "A_std", "seed"),
    *("batch", "seq_length", "omega_sor", "newton_iterates_stored", "max_its"),
)
LM_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "width",
    "n_layers": "layers",
    "n_heads": "heads",
}
LM_UNUSED = ("newton", "z_loss_coeff", "seed")
ARCHITECTURES = {"paragru": "gru", "paralstm": "lstm"}
MLP_MULTIPLE = 256


def _read_config(data: Mapping[str, Any]) -> ParaRNNConfig | ParaRNNLMConfig:
    return _read_lm(data) if "model" in data else _read_cell(data)


def _known(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    if value not in known:
        raise UserError(
            f"pararnn: {name} must be one of {', '.join(known)}, got {value!r}."
            f"{nearest(str(value), known)}"
        )
    return known[value]


def _read_cell(data: Mapping[str, Any]) -> ParaRNNConfig:
    cell = _known("cell", data.get("cell"), CELLS)
    roles = ROLES[cell]
    fields.check_names("pararnn", data, [*roles, *CELL_UNUSED, "cell"], CELL_FIELDS)
    names = [
        _known(role, data.get(role, default), NONLINEARITIES) for role, default in roles.items()
    ]
    ours = {field: data[name] for name, field in CELL_FIELDS.items()}
    return fields.build("pararnn", ParaRNNConfig, ours | {"cell": cell, "nonlinearities": names})


def _read_lm(data: Mapping[str, Any]) -> ParaRNNLMConfig:
    known = [*LM_UNUSED, "rms_eps", "conv_kernel_size"]
    fields.check_names("pararnn", data, known, ["model"])
    model = data["model"]
    if not isinstance(model, Mapping):
        raise UserError(f"pararnn: model must be a mapping of fields, got {model!r}.")
    fields.check_names("pararnn", model, (), [*LM_FIELDS, "arch"])
    fields.check_counts("pararnn", model, "d_model")
    ours = {field: model[name] for name, field in LM_FIELDS.items()} | {
        "cell": _known("arch", model["arch"], ARCHITECTURES),
        "mlp_width": _mlp_width(model["d_model"]),
        "mlp_residual": False,
        "recurrent_limit": None,
    }
    for name, field in (("rms_eps", "norm_epsilon"), ("conv_kernel_size", "conv_width")):
        if name in data:
            ours[field] = data[name]
    return fields.build("pararnn", ParaRNNLMConfig, ours)


def _mlp_width(width: int) -> int:
    return -(-int(8 * width / 3) // MLP_MULTIPLE) * MLP_MULTIPLE


def _write_config(config: ParaRNNConfig | ParaRNNLMConfig) -> dict[str, Any]:
    if config.recurrent_limit is not None:
        raise UserError(
            f"pararnn: the original has no recurrent_limit, got {config.recurrent_limit}; cut the"
            " weights and set it to None."
        )
    if isinstance(config, ParaRNNLMConfig):
        if config.mlp_residual or config.mlp_width != _mlp_width(config.width):
            raise UserError(
                "pararnn: the original's MLP has no residual connection and"
                f" {_mlp_width(config.width)} inner channels, got"
                f" mlp_residual={config.mlp_residual} and mlp_width={config.mlp_width}."
            )
        return {
            "model": {"arch": f"para{config.cell}"}
            | {name: getattr(config, ours) for name, ours in LM_FIELDS.items()},
            "rms_eps": config.norm_epsilon,
            "conv_kernel_size": config.conv_width,
        }
    theirs = {ours: name for name, ours in NONLINEARITIES.items()}
    roles = ROLES[config.cell]
    names = dict(zip(roles, (theirs.get(name) for name in config.nonlinearities), strict=False))
    if None in names.values():
        raise UserError(f"pararnn: the original has not all of {config.nonlinearities}.")
    return (
        {"cell": next(name for name, cell in CELLS.items() if cell == config.cell)}
        | {name: getattr(config, ours) for name, ours in CELL_FIELDS.items()}
        | roles
        | names
    )


def _rules(config: ParaRNNConfig | ParaRNNLMConfig) -> list[Rule]:
    if isinstance(config, ParaRNNConfig):
        return _cell("", "", config.cell)
    mixers, mlps = (tuple(range(first, 2 * config.layers, 2)) for first in (0, 1))
    mixer, mlp = "blocks.{i}.", "blocks.{i}."
    rules = [
        same(f"{mixer}norm.weight", "blocks/norm/scale"),
        transposed(f"{mixer}in_proj.weight", "blocks/input/kernel"),
        depthwise(f"{mixer}conv.conv.weight", "blocks/conv_kernel"),
        same(f"{mixer}conv.conv.bias", "blocks/conv_bias"),
        *_cell(f"{mixer}rnn_cell.", "blocks/cell/", config.cell),
        same(f"{mixer}gate_norm.weight", "blocks/gate_norm/scale"),
        transposed(f"{mixer}out_proj.weight", "blocks/out/kernel"),
        same(f"{mixer}residual_scale", "blocks/residual_scale"),
    ]
    rules = [_numbered(rule, mixers) for rule in rules]
    rules += [
        _numbered(rule, mlps)
        for rule in (
            same(f"{mlp}0.weight", "blocks/mlp_norm/scale"),
            transposed(f"{mlp}1.w1.weight", "blocks/mlp/gate/kernel"),
            transposed(f"{mlp}1.w3.weight", "blocks/mlp/up/kernel"),
            transposed(f"{mlp}1.w2.weight", "blocks/mlp/out/kernel"),
        )
    ]
    return [
        same("embedding.weight", "embedding/table"),
        *rules,
        same("final_norm.weight", "norm/scale"),
    ]


def _cell(source: str, target: str, kind: str) -> list[Rule]:
    """Rows z, r, n of the GRU and f, o, c of the LSTM are in our order too."""
    names = {"A": "recurrent", "B": "kernel", "b": "bias"}
    if kind == "lstm":
        names["C"] = "peephole"
    return [same(f"{source}{theirs}", f"{target}{ours}") for theirs, ours in names.items()]


def _numbered(rule: Rule, numbers: tuple[int, ...]) -> Rule:
    """Mixers and MLPs take turns in one list of blocks."""
    return Rule(rule.source, rule.targets, rule.load, rule.save, numbers)


SYSTEM = System(
    name="pararnn",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    repeated=lambda config: (
        {"lm_head.weight": "embedding.weight"} if isinstance(config, ParaRNNLMConfig) else {}
    ),
)
