"""The RWKV-4 language model: its size, start, options and bad input."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.models import rwkv
from jaxrec.models.rwkv import RWKVConfig
from tests import references
from tests.models import toy
from tests.models.toy import run

SMALLEST = RWKVConfig(vocab_size=13, width=16, layers=3, inner_width=12, mlp_width=24)
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 5e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("RWKV_169M", 169_342_464),
        ("RWKV_430M", 430_397_440),
        ("RWKV_1_5B", 1_515_106_304),
        ("RWKV_3B", 2_984_627_200),
        ("RWKV_7B", 7_392_649_216),
        ("RWKV_14B", 14_148_597_760),
    ],
)
def test_published_numbers_of_parameters(name, parameters):
    """They round to those of table 2 of the paper: 1.693e8, 4.304e8, 1.515e9, 2.985e9, ..."""
    assert toy.parameters(getattr(rwkv, name)) == parameters


def test_number_of_parameters_with_every_option():
    config = dataclasses.replace(SMALLEST, tie_embeddings=True)
    d, e, f = 16, 12, 24
    time, channels = 3 * d + 2 * e + 4 * d * e, 2 * d + 2 * d * f + d * d
    assert toy.parameters(config) == 13 * d + 4 * d + 3 * (4 * d + time + channels)


def test_initialisation():
    model = toy.initialised(rwkv.TINY)
    assert np.max(np.abs(model.embedding.table[...])) <= 1e-4
    assert np.std(model.head.table[...]) == pytest.approx(0.5 * 128**-0.5, rel=0.03)
    time, channels = model.blocks.time, model.blocks.channels
    rate = np.exp(time.log_rate[...])
    np.testing.assert_allclose(rate[:, 0], np.exp(-5), rtol=1e-5)
    np.testing.assert_allclose(rate[:, -1], np.exp(3), rtol=1e-5)
    assert np.all(np.diff(rate, axis=1) > 0)
    assert np.all(np.diff(rate[:, 1:-1], axis=0) < 0)  # deeper layers remember longer
    np.testing.assert_allclose(
        time.bonus[0, :4], np.log(0.3) + np.array([0, 0.5, -0.5, 0]), rtol=1e-6
    )
    for mix in (time.mix_key, channels.mix_key, channels.mix_receptance):
        np.testing.assert_allclose(mix[0], np.arange(128) / 128, rtol=1e-6)
        np.testing.assert_allclose(mix[3, 64], 0.5**0.25, rtol=1e-6)
    np.testing.assert_allclose(time.mix_value[3, 64], 0.5**0.25 + 0.3, rtol=1e-6)
    np.testing.assert_allclose(time.mix_receptance[0, 64], 0.5**0.5, rtol=1e-6)


def test_one_layer_and_one_channel_can_be_built():
    config = dataclasses.replace(SMALLEST, layers=1, inner_width=1)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(toy.initialised(config)))


@pytest.mark.parametrize("every", [0, 1, 2])
def test_every_option_equals_the_loop(every):
    options = {"tie_embeddings": True, "norm_epsilon": 1e-2, "rescale_every": every}
    config = dataclasses.replace(SMALLEST, **options)
    model = toy.drawn(config)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(model)[1]))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    want = references.rwkv(wide, TOKENS, np.zeros(TOKENS.shape, bool), config)
    np.testing.assert_allclose(run(model, TOKENS)[0], want, atol=TOLERANCE)


@pytest.mark.parametrize("field", ["layers", "inner_width", "mlp_width", "context"])
def test_what_does_not_fit_is_named(field):
    with pytest.raises(ValueError, match=f"RWKVConfig: {field} must be >= 1, got 0"):
        dataclasses.replace(SMALLEST, **{field: 0})
