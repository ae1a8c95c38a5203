"""Huginn checkpoints of the Hugging Face layout, `model_type` huginn_raven (arXiv:2502.05171)."""

from collections.abc import Mapping
from typing import Any

from jaxrec.convert import fields
from jaxrec.convert.engine import Rule, System, arrays, fused, same, transposed
from jaxrec.models.huginn import HuginnConfig

FIELDS = {
    "n_embd": "width",
    "n_heads": "heads",
    "intermediate_size": "mlp_width",
    "n_layers_in_prelude": "prelude_layers",
    "n_layers_in_recurrent_block": "core_layers",
    "n_layers_in_coda": "coda_layers",
    "block_size": "context",
    "mean_recurrence": "mean_depth",
    "mean_backprop_depth": "backprop_depth",
    "rope_base": "rotary_base",
    "qk_bias": "qk_bias",
    "bias": "adapter_bias",
    "tie_embeddings": "tie_embeddings",
    "norm_eps": "norm_epsilon",
}
FIXED = {  # architectures that the original code knows and this model is not
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "model_type": "huginn_raven",
}
END_TEXT, END_TURN = 65505, 65508
"""Tokens of the published vocabulary at which the original stops, besides that which begins one."""
LATENT = {"state_init": "like-init", "test_time_noise": 0}
"""How the latent state begins and moves in generation, where a file says it."""
UNUSED = (  # how the weights began and were trained
    "n_layers head_dim padding_multiple tie_word_embeddings architecture_class_name init_strategy"
    " init_orthogonal init_values sampling_scheme activation_checkpoint_impl"
    " effective_expected_depth test_time_noise_type"
).split()


def _read_config(data: Mapping[str, Any]) -> HuginnConfig:
    heads = {name: data.get("n_heads") for name in ("num_attention_heads", "num_key_value_heads")}
    known = [*FIXED, *LATENT, *heads, *UNUSED, "padded_vocab_size"]
    fields.check_names("huginn", data, known, [*FIELDS, "vocab_size"])
    fields.check_values("huginn", data, FIXED | LATENT | heads)
    # The original sizes its tables by padded_vocab_size, which is vocab_size unless a file says
    # otherwise; padding_multiple only tells how that number was once chosen.
    ours = {field: data[name] for name, field in FIELDS.items()}
    ours["vocab_size"] = data.get("padded_vocab_size", data["vocab_size"])
    return fields.build("huginn", HuginnConfig, ours)


def _write_config(config: HuginnConfig) -> dict[str, Any]:
    data = {name: getattr(config, ours) for name, ours in FIELDS.items()}
    data |= FIXED
    data["vocab_size"] = config.vocab_size
    data["padding_multiple"] = 1
    data["n_layers"] = config.prelude_layers + config.core_layers + config.coda_layers
    data["num_attention_heads"] = data["num_key_value_heads"] = config.heads
    return data


def _block(theirs: str, ours: str, config: HuginnConfig) -> list[Rule]:
    theirs = f"transformer.{theirs}.{{i}}."
    rules = [
        same(f"{theirs}norm_1.weight", f"{ours}/attention_norm/scale"),
        same(f"{theirs}norm_2.weight", f"{ours}/attention_out_norm/scale"),
        same(f"{theirs}norm_3.weight", f"{ours}/mlp_norm/scale"),
        same(f"{theirs}norm_4.weight", f"{ours}/mlp_out_norm/scale"),
        fused(
            f"{theirs}attn.Wqkv.weight",
            f"{ours}/attention/query/kernel",
            f"{ours}/attention/key_value/kernel",
        ),
        transposed(f"{theirs}attn.proj.weight", f"{ours}/attention/out/kernel"),
        fused(f"{theirs}mlp.fc.weight", f"{ours}/mlp/gate/kernel", f"{ours}/mlp/up/kernel"),
        transposed(f"{theirs}mlp.proj.weight", f"{ours}/mlp/out/kernel"),
    ]
    if config.qk_bias:
        rules.append(
            Rule(
                f"{theirs}attn.qk_bias",  # (2, 1, h, k)
                (f"{ours}/attention/query_bias", f"{ours}/attention/key_bias"),
                lambda x, _: (x[0, 0], x[1, 0]),
                lambda xs: arrays(xs[0]).stack(xs)[:, None],
            )
        )
    return rules


def _rules(config: HuginnConfig) -> list[Rule]:
    rules = [
        same("transformer.wte.weight", "embedding/table"),
        Rule(  # columns: first those that read the latent state, then those that read the input
            "transformer.adapter.weight",
            ("adapter_latent/kernel", "adapter_input/kernel"),
            lambda x, _: arrays(x).split(x.T, 2),
            lambda xs: arrays(xs[0]).concatenate(xs).T,
        ),
        same("transformer.ln_f.weight", "norm/scale"),
    ]
    for theirs, ours, layers in (
        ("prelude", "prelude", config.prelude_layers),
        ("core_block", "core", config.core_layers),
        ("coda", "coda", config.coda_layers),
    ):
        rules += _block(theirs, ours, config) if layers else []
    if config.adapter_bias:
        rules.append(same("transformer.adapter.bias", "adapter_latent/bias"))
    if not config.tie_embeddings:
        rules.append(same("lm_head.weight", "head/table"))
    return rules


SYSTEM = System(
    name="huginn",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    ignored=("freqs_cis",),  # cosines and sines, recomputed
    repeated=lambda config: (
        {"lm_head.weight": "transformer.wte.weight"} if config.tie_embeddings else {}
    ),
    stop_tokens=lambda config: [i for i in (END_TEXT, END_TURN) if i < config.vocab_size],
)
