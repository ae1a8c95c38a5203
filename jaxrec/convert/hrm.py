"""HRM checkpoints (arXiv:2506.21734).

The original saves a pickle of its compiled model, step_N, and all_config.yaml; `SYSTEM.hint` says
what to make of them.
"""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, fused, same, transposed
from jaxrec.errors import UserError
from jaxrec.models.hrm import HRMConfig, Normaliser, Positions

REQUIRED = {
    "seq_len": "length",
    "num_puzzle_identifiers": "puzzles",
    "vocab_size": "vocab_size",
    "H_cycles": "high_cycles",
    "L_cycles": "low_cycles",
    "H_layers": "high_layers",
    "L_layers": "low_layers",
    "hidden_size": "width",
    "expansion": "expansion",
    "num_heads": "heads",
    "halt_max_steps": "max_segments",
    "halt_exploration_prob": "exploration",
}
OPTIONAL = {
    "puzzle_emb_ndim": "puzzle_width",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
}
POSITIONS: dict[str, Positions] = {"rope": "rotary", "learned": "learned"}
LOSSES: dict[str, Normaliser] = {
    "stablemax_cross_entropy": "stablemax",
    "softmax_cross_entropy": "softmax",
}
UNUSED = ("batch_size", "forward_dtype", "name")  # how it was trained


def _chosen(data: Mapping[str, Any], name: str, table: Mapping[str, str]) -> str:
    if not isinstance(data[name], str) or data[name] not in table:
        raise UserError(f"hrm: {name} must be of {', '.join(table)}, got {data[name]!r}.")
    return table[data[name]]


def _flattened(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with those of `loss`, which holds the name of its class and loss_type, among them.

    Raises:
      UserError: it holds something else, or another loss_type than the one beside it.
    """
    data = dict(data)
    loss = data.pop("loss", {})
    if not isinstance(loss, Mapping) or not loss.keys() <= {"name", "loss_type"}:
        raise UserError(f"hrm: loss must hold name and loss_type and nothing else, got {loss!r}.")
    if "loss_type" in loss and data.setdefault("loss_type", loss["loss_type"]) != loss["loss_type"]:
        raise UserError(
            f"hrm: loss_type is {data['loss_type']!r}, but {loss['loss_type']!r} within loss."
        )
    return data


def _read_config(data: Mapping[str, Any]) -> HRMConfig:
    known = [*OPTIONAL, *UNUSED, "loss_type", "loss"]
    fields.check_names("hrm", data, known, [*REQUIRED, "pos_encodings"])
    data = _flattened(data)
    ours = {field: data[name] for name, field in (REQUIRED | OPTIONAL).items() if name in data}
    ours["positions"] = _chosen(data, "pos_encodings", POSITIONS)
    if "loss_type" in data:
        ours["normaliser"] = _chosen(data, "loss_type", LOSSES)
    return fields.build("hrm", HRMConfig, ours)


def _write_config(config: HRMConfig) -> dict[str, Any]:
    if (config.high_backprop, config.low_backprop) != (1, 1):
        raise UserError(
            "hrm: the original's gradient passes through one call of each stack, this model's"
            f" through {config.high_backprop} and {config.low_backprop}."
        )
    data = {name: getattr(config, ours) for name, ours in (REQUIRED | OPTIONAL).items()}
    for name, table, value in (
        ("pos_encodings", POSITIONS, config.positions),
        ("loss_type", LOSSES, config.normaliser),
    ):
        data[name] = next(theirs for theirs, ours in table.items() if ours == value)
    return data


def _rules(config: HRMConfig) -> list[Rule]:
    at = SYSTEM.prefix
    rules = [
        same(f"{at}embed_tokens.embedding_weight", "embedding/table"),
        same(f"{at}lm_head.weight", "head/table"),
        transposed(f"{at}q_head.weight", "halt/kernel"),
        same(f"{at}q_head.bias", "halt/bias"),
        same(f"{at}H_init", "high_start"),
        same(f"{at}L_init", "low_start"),
    ]
    if config.positions == "learned":
        rules.append(same(f"{at}embed_pos.embedding_weight", "position"))
    if config.puzzle_width:
        rules.append(same(f"{at}puzzle_emb.weights", "puzzle_vectors"))
    for theirs, ours in (("H_level", "high"), ("L_level", "low")):
        layer = f"{at}{theirs}.layers.{{i}}."
        rules += [
            fused(
                f"{layer}self_attn.qkv_proj.weight",
                f"{ours}/attention/query/kernel",
                f"{ours}/attention/key_value/kernel",
            ),
            transposed(f"{layer}self_attn.o_proj.weight", f"{ours}/attention/out/kernel"),
            fused(
                f"{layer}mlp.gate_up_proj.weight",
                f"{ours}/mlp/gate/kernel",
                f"{ours}/mlp/up/kernel",
            ),
            transposed(f"{layer}mlp.down_proj.weight", f"{ours}/mlp/out/kernel"),
        ]
    return rules


SYSTEM = System(
    name="hrm",
    hint=(
        "The original saves step_N, a pickle, which could run code and is not read, and"
        " all_config.yaml. Where they came from, write the tensors with"
        " safetensors.torch.save_file(torch.load('step_N', weights_only=True,"
        " map_location='cpu'), 'model.safetensors'), and beside them, as config.json, the fields of"
        " arch with seq_len, vocab_size and num_puzzle_identifiers of the data's dataset.json."
    ),
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    prefix="_orig_mod.model.inner.",
)
