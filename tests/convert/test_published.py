"""Whole config.json files as they are published, with tensors in bfloat16, value by value."""

import json

import jax
import numpy as np
import pytest

from jaxrec import convert
from jaxrec.convert import engine
from jaxrec.models.huginn import HUGINN_3_5B
from jaxrec.models.mamba import MAMBA_130M
from jaxrec.models.recurrentgemma import RECURRENTGEMMA_2B
from tests.convert.folders import in_bfloat16
from tests.models import toy

HUGINN = {
    "activation_checkpoint_impl": "per-iteration",
    "architecture_class_name": "RecurrentGPT",
    "architectures": ["RavenForCausalLM"],
    "auto_map": {"AutoConfig": "raven_config_minimal.RavenConfig"},
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 4096,
    "bos_token_id": 65504,
    "effective_expected_depth": 132,
    "eos_token_id": 65505,
    "head_dim": 96,
    "init_orthogonal": False,
    "init_strategy": "takase",
    "init_values": {"std": 0.0087, "out_proj": 0.00054, "embedding": 0.0087, "embed_scale": 72.66},
    "injection_type": "linear",
    "intermediate_size": 17920,
    "mean_backprop_depth": 8,
    "mean_recurrence": 32,
    "mlp_class_name": "GatedMLP",
    "model_type": "huginn_raven",
    "n_embd": 5280,
    "n_heads": 55,
    "n_layers": 8,
    "n_layers_in_coda": 2,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-06,
    "num_attention_heads": 55,
    "num_key_value_heads": 55,
    "pad_token_id": 65509,
    "padded_vocab_size": 65536,
    "padding_multiple": 4096,
    "qk_bias": True,
    "rope_base": 50000,
    "sampling_scheme": "poisson-lognormal-filling",
    "state_init": "like-init",
    "test_time_noise": 0,
    "test_time_noise_type": "fixed",
    "tie_embeddings": True,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "vocab_size": 65536,
}
GEMMA = {
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_window_size": 2048,
    "block_types": ["recurrent", "recurrent", "attention"],
    "bos_token_id": 2,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "eos_token_id": 1,
    "final_w_init_variance_scale": 0.07692307692307693,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 15360,
    "logits_soft_cap": 30.0,
    "lru_width": 2560,
    "model_type": "recurrent_gemma",
    "num_attention_heads": 10,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.0",
    "use_cache": True,
    "vocab_size": 256000,
    "w_init_variance_scale": 0.01,
}
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "d_inner": 1536,
    "d_model": 768,
    "eos_token_id": 0,
    "expand": 2,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": 768,
    "initializer_range": 0.1,
    "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "n_layer": 24,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": 16,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 48,
    "time_step_scale": 1.0,
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 50280,
}
PUBLISHED = {  # the file, the configuration that it says, and what makes it small
    "huginn": (
        HUGINN,
        HUGINN_3_5B,
        {"n_embd": 8, "n_heads": 2, "head_dim": 4, "intermediate_size": 6}
        | {"num_attention_heads": 2, "num_key_value_heads": 2}
        | {"vocab_size": 12, "padded_vocab_size": 12, "block_size": 16},
    ),
    "recurrentgemma": (
        GEMMA,
        RECURRENTGEMMA_2B,
        {"hidden_size": 8, "lru_width": 8, "head_dim": 4, "num_attention_heads": 2}
        | {"intermediate_size": 12, "num_hidden_layers": 5, "vocab_size": 12},
    ),
    "mamba": (
        MAMBA,
        MAMBA_130M,
        {"hidden_size": 8, "d_model": 8, "d_inner": 16, "intermediate_size": 16, "vocab_size": 12}
        | {"num_hidden_layers": 2, "n_layer": 2, "time_step_rank": 1},
    ),
}


@pytest.mark.parametrize("system", PUBLISHED)
def test_a_published_file_says_the_published_configuration(system):
    file, config, _ = PUBLISHED[system]
    assert engine.find(system).read_config(file) == config


@pytest.mark.parametrize("system", PUBLISHED)
def test_bfloat16_arrives_as_the_same_numbers(system, tmp_path):
    file, _, small = PUBLISHED[system]
    model = toy.drawn(engine.find(system).read_config(file | small))
    convert.export(model, tmp_path, system)
    (tmp_path / "config.json").write_text(json.dumps(file | small))
    tensors = in_bfloat16(tmp_path)
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    loaded = convert.load(system, tmp_path)
    assert loaded.config == model.config
    for got, drawn in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(got, drawn.astype("bfloat16").astype(np.float32))
        assert np.any(got != drawn)
