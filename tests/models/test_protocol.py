"""All models meet what training and generation ask of them."""

import contextlib
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import from_dict, to_dict
from jaxrec.layers.axes import mesh_axes
from jaxrec.models import (
    huginn,
    linear_attention,
    linear_rnn,
    mamba,
    mamba2,
    pararnn,
    plstm,
    prefix_linear,
    recurrentgemma,
    rwkv,
    ssm,
    xlstm,
)
from jaxrec.models.protocol import LanguageModelConfig, loop_inputs

CONFIGS = [
    huginn.TINY,
    huginn.SMALL,
    huginn.HUGINN_3_5B,
    linear_attention.RETNET_TINY,
    linear_attention.GLA_TINY,
    linear_attention.DELTANET_TINY,
    linear_attention.GATED_DELTANET_TINY,
    linear_attention.GLA_1_3B,
    linear_attention.DELTANET_1_3B,
    linear_attention.GATED_DELTANET_1_3B,
    linear_rnn.TINY,
    linear_rnn.SMALL,
    mamba.TINY,
    mamba.SMALL,
    mamba.MAMBA_2_8B,
    mamba2.TINY,
    mamba2.SMALL,
    mamba2.MAMBA2_2_7B,
    pararnn.TINY_GRU,
    pararnn.TINY_LSTM,
    pararnn.SMALL_GRU,
    pararnn.PARAGRU_1B,
    pararnn.PARALSTM_1B,
    plstm.TINY,
    plstm.SMALL,
    prefix_linear.TINY,
    prefix_linear.JRT_360M,
    prefix_linear.JRT_1_3B,
    recurrentgemma.TINY,
    recurrentgemma.SMALL,
    recurrentgemma.RECURRENTGEMMA_2B,
    rwkv.TINY,
    rwkv.SMALL,
    rwkv.RWKV_14B,
    ssm.TINY_S5,
    ssm.TINY_S4D,
    ssm.TINY_LSSL,
    xlstm.TINY,
    xlstm.SMALL,
    xlstm.XLSTM_7B,
]


def named(config):
    kind = [getattr(config, field) for field in ("rule", "gate", "kind") if hasattr(config, field)]
    return " ".join([type(config).__name__, *kind, str(config.width)])


configs = pytest.mark.parametrize("config", CONFIGS, ids=named)


@configs
def test_configs_keep_the_protocol_and_round_trip(config):
    assert isinstance(config, LanguageModelConfig)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@configs
def test_numbers_that_make_no_sense_are_refused(config):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for wrong in (-1, math.nan):
            with pytest.raises(ValueError, match=field.name):
                dataclasses.replace(config, **{field.name: wrong})
        with contextlib.suppress(ValueError):  # nothing else, such as a division by zero
            dataclasses.replace(config, **{field.name: type(value)(0)})


@configs
def test_every_parameter_is_float32_and_names_its_axes(config):
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    for path, leaf in nnx.to_flat_state(nnx.split(model)[1]):
        axes = leaf.get_metadata("axes")
        stacked = path[0] in ("prelude", "core", "coda", "blocks", "groups")
        assert leaf.dtype == jnp.float32, path
        assert len(leaf.shape) == len(axes) + stacked, path
        mesh_axes(axes)


@configs
def test_a_forward_pass_has_the_promised_shapes(config):
    def call(tokens, key):
        model = config.build(rngs=nnx.Rngs(key))
        state = model.init_state(2, capacity=6)
        return model(tokens, state, **loop_inputs(config, jnp.int32(3), key))

    logits, state = jax.eval_shape(
        call, jax.ShapeDtypeStruct((2, 6), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    )
    assert (logits.shape, logits.dtype) == ((2, 6, config.vocab_size), jnp.float32)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)


def test_loop_inputs_are_for_models_with_a_loop():
    assert loop_inputs(huginn.TINY, 3, None) == {"depth": 3, "key": None}
    assert loop_inputs(linear_rnn.TINY, 3, None) == {}
    assert linear_rnn.TINY.sample_depth(np.random.default_rng(0)) is None


@configs
def test_training_costs_at_most_three_forward_passes(config):
    forward = config.flops_per_token(256)
    assert forward < config.flops_per_token(256, training=True) <= 3 * forward


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        huginn.TINY.width = 1
