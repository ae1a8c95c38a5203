"""RWKV-4 checkpoints of the Hugging Face layout, `model_type` rwkv (arXiv:2305.13048).

With `rescale_every` the original's inference halves the stream after every so many layers, and
divides the weights that write to it likewise; its training does neither. The norms undo it but for
their epsilon, which then weighs four times as much each time. Here it is a field of the model, for
training too, and the weights are those of the file, undivided: set it to 0 to go on training as
the original would.
"""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, same, transposed
from jaxrec.errors import UserError
from jaxrec.models.rwkv import RWKVConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "attention_hidden_size": "inner_width",
    "intermediate_size": "mlp_width",
    "layer_norm_epsilon": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
    "context_length": "context",
    "rescale_every": "rescale_every",
}
DEFAULTS: dict[str, Any] = {  # what the original takes for a field that its file leaves out
    "vocab_size": 50277,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "attention_hidden_size": None,
    "intermediate_size": None,
    "rescale_every": 6,
}

ORIGINAL = (
    "It is a checkpoint of the original program (BlinkDL/RWKV-LM), whose tensors have other names."
    " Convert it to the Hugging Face layout first, with the script convert_rwkv_checkpoint_to_hf.py"
    " of the transformers repository."
)


def _read_config(data: Mapping[str, Any]) -> RWKVConfig:
    known = [*FIELDS, *DEFAULTS, "max_position_embeddings", "model_type"]
    fields.check_names("rwkv", data, known, ())
    fields.check_values("rwkv", data, {"model_type": "rwkv"})
    data = DEFAULTS | dict(data)
    fields.check_counts("rwkv", data, "hidden_size")
    every = data["rescale_every"]
    if not isinstance(every, int):
        raise UserError(f"rwkv: rescale_every must be a number of layers, got {every!r}.")
    data["rescale_every"] = max(every, 0)  # to the original, below 0 is never too
    if data["attention_hidden_size"] is None:
        data["attention_hidden_size"] = data["hidden_size"]
    if data["intermediate_size"] is None:
        data["intermediate_size"] = 4 * data["hidden_size"]
    if "max_position_embeddings" in data:  # another name of it
        data.setdefault("context_length", data["max_position_embeddings"])
        said = {"max_position_embeddings": data["context_length"]}
        fields.check_values("rwkv", data, said)
    ours = {field: data[name] for name, field in FIELDS.items() if name in data}
    return fields.build("rwkv", RWKVConfig, ours)


def _write_config(config: RWKVConfig) -> dict[str, Any]:
    return {name: getattr(config, ours) for name, ours in FIELDS.items()} | {
        "model_type": "rwkv",
        "architectures": ["RwkvForCausalLM"],
    }


def _rules(config: RWKVConfig) -> list[Rule]:
    block = "rwkv.blocks.{i}."
    time, channels = f"{block}attention.", f"{block}feed_forward."
    rules = [
        same("rwkv.embeddings.weight", "embedding/table"),
        *_norm("rwkv.blocks.0.pre_ln", "embedding_norm"),
        *_norm(f"{block}ln1", "blocks/time_norm"),
        *_norm(f"{block}ln2", "blocks/channels_norm"),
        *_norm("rwkv.ln_out", "norm"),
        same(f"{time}time_decay", "blocks/time/log_rate"),
        same(f"{time}time_first", "blocks/time/bonus"),
        _blend(f"{time}time_mix_key", "blocks/time/mix_key"),
        _blend(f"{time}time_mix_value", "blocks/time/mix_value"),
        _blend(f"{time}time_mix_receptance", "blocks/time/mix_receptance"),
        transposed(f"{time}key.weight", "blocks/time/key/kernel"),
        transposed(f"{time}value.weight", "blocks/time/value/kernel"),
        transposed(f"{time}receptance.weight", "blocks/time/receptance/kernel"),
        transposed(f"{time}output.weight", "blocks/time/out/kernel"),
        _blend(f"{channels}time_mix_key", "blocks/channels/mix_key"),
        _blend(f"{channels}time_mix_receptance", "blocks/channels/mix_receptance"),
        transposed(f"{channels}key.weight", "blocks/channels/key/kernel"),
        transposed(f"{channels}receptance.weight", "blocks/channels/receptance/kernel"),
        transposed(f"{channels}value.weight", "blocks/channels/value/kernel"),
    ]
    if not config.tie_embeddings:
        rules.append(same("head.weight", "head/table"))
    return rules


def _norm(source: str, target: str) -> tuple[Rule, Rule]:
    return same(f"{source}.weight", f"{target}/scale"), same(f"{source}.bias", f"{target}/bias")


def _blend(source: str, target: str) -> Rule:
    """A blend stored (1, 1, d), kept (d)."""

    def load(x: Any, shapes: Any) -> tuple[Any]:
        if x.shape[:-1] != (1, 1):
            raise ValueError(f"{x.shape} is not (1, 1, d)")
        return (x[0, 0],)

    return Rule(source, (target,), load, lambda xs: xs[0][None, None])


SYSTEM = System(
    name="rwkv",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    repeated=lambda config: (
        {"head.weight": "rwkv.embeddings.weight"} if config.tie_embeddings else {}
    ),
    other_layouts={"emb.weight": ORIGINAL, "blocks.0.att.key.weight": ORIGINAL},
)
