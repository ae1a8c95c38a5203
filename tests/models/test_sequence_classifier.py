"""The classifier against a loop for each mixer and activation, padding, dropout, bad
configurations.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.lssl import LSSLConfig
from jaxrec.layers.rglru import RGLRUConfig
from jaxrec.layers.s4d import S4DConfig
from jaxrec.layers.s5 import S5Config
from jaxrec.models.sequence_classifier import (
    LRA_IMAGE,
    LRA_LISTOPS,
    LRA_PATH_X,
    LRA_PATHFINDER,
    LRA_TEXT,
    SPEECH_COMMANDS,
    MambaMixerConfig,
    SequenceClassifierConfig,
)
from jaxrec.testing import assert_close
from tests import references

MIXERS = {
    "s5": S5Config(width=6, state=4, clip_eigs=True),
    "s4d": S4DConfig(width=6, state=4),
    "lssl": LSSLConfig(width=6, state=4, outputs=2, train_transition=True),
    "mamba": MambaMixerConfig(width=6, inner_width=8, step_rank=2, state_size=3),
    "rglru": RGLRUConfig(width=6, heads=2),
}


def config_of(mixer, **options):
    return SequenceClassifierConfig(inputs=2, classes=3, mixer=mixer, layers=2, **options)


def build(config):
    return jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


def signal():
    return np.random.default_rng(0).normal(size=(3, 8, 2)).astype(np.float32)


run = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs))


def mixed(params, x, config):
    batch, reset = x.shape[0], np.zeros(x.shape[:2], bool)
    mixer = config.mixer
    if isinstance(mixer, S5Config):
        zeros = np.zeros((batch, mixer.state), np.complex128)
        return references.s5(params, x, zeros, reset, "zoh", True)[0]
    if isinstance(mixer, S4DConfig):
        zeros = np.zeros((batch, mixer.width, mixer.state // 2), np.complex128)
        return references.s4d(params, x, zeros, reset, "zoh")[0]
    if isinstance(mixer, LSSLConfig):
        zeros = np.zeros((batch, mixer.width, mixer.state))
        y, _ = references.lssl(params, x, zeros, reset, 0.5)
        return y.reshape(*x.shape[:2], -1)
    if isinstance(mixer, MambaMixerConfig):
        window = np.zeros((batch, mixer.conv_width - 1, mixer.inner_width))
        h = np.zeros((batch, mixer.inner_width, mixer.state_size))
        return references.mamba_mixer(params, x, window, h, reset)[0]
    reset[:, 0] = True
    return references.rglru(params, x, np.zeros((batch, mixer.width)), reset)[0]


def activated(params, x, kind):
    g = references.gelu(x)
    value = references.linear(params["value"], g) if "value" in params else g
    if kind == "gelu":
        return value
    gate = references.sigmoid(references.linear(params["gate"], g))
    return {"full_glu": value, "half_glu1": g, "half_glu2": x}[kind] * gate


def classify(params, x, config):
    x = references.linear(params["encoder"], x)
    for i in range(config.layers):
        block = references.layer(params["blocks"], i)

        def norm(x, block=block):
            return references.layer_norm(block["norm"], x, config.norm_epsilon)

        y = mixed(block["mixer"], norm(x) if config.prenorm else x, config)
        x = x + activated(block.get("activation", {}), y, config.activation)
        x = x if config.prenorm else norm(x)
    return references.linear(params["decoder"], x.mean(axis=1))


@pytest.mark.parametrize(
    "name, options",
    [
        ("s5", {}),
        ("s5", {"activation": "gelu", "prenorm": False}),
        ("s5", {"activation": "half_glu2"}),
        ("s4d", {"activation": "gelu"}),
        ("lssl", {"activation": "gelu", "prenorm": False}),
        ("lssl", {"activation": "full_glu"}),
        ("mamba", {"activation": "full_glu"}),
        ("rglru", {}),
    ],
    ids=str,
)
def test_equals_the_loop(name, options):
    config = config_of(MIXERS[name], **options)
    model = build(config)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.split(model)[1])
    )
    want = classify(params, signal().astype(np.float64), config)
    assert_close(run(model, signal()), want, rtol=2e-5)


@pytest.mark.parametrize(
    "mixer",
    [*MIXERS.values(), dataclasses.replace(MIXERS["s5"], bidirectional=True)],
    ids=[*MIXERS, "s5 bidirectional"],
)
def test_what_comes_after_the_end_changes_nothing(mixer):
    model, x, lengths = build(config_of(mixer, activation="gelu")), signal(), np.array([5, 8, 3])
    after = (np.arange(8)[None] >= lengths[:, None])[..., None]
    y = run(model, x, lengths)
    for filler in (0.0, 1e6, np.nan):
        np.testing.assert_array_equal(
            run(model, np.where(after, np.float32(filler), x), lengths), y
        )
    for i, length in enumerate(lengths):
        assert_close(y[i], run(model, x[i : i + 1, :length])[0], rtol=1e-5)


def test_dropout_needs_a_key_and_drops_whole_channels():
    config = config_of(MIXERS["s5"], dropout=0.5)
    model = build(config)
    plain = run(model, signal())
    first, again, other = (run(model, signal(), key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and np.any(first != plain)
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    x = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)
    options = (np.ones((2, 8), bool), 1.0)
    added, plain = (
        np.asarray(run(block, x, *options, key) - x) for key in (jax.random.key(3), None)
    )
    gone = np.all(added == 0, axis=1, keepdims=True)
    assert 0 < gone.mean() < 1
    assert_close(added, np.where(gone, 0, 2 * plain), rtol=1e-5)


@pytest.mark.parametrize("name", ["s5", "s4d", "lssl"])
def test_the_rate_reaches_the_mixer(name):
    model = build(config_of(MIXERS[name], activation="gelu"))
    assert np.any(run(model, signal(), step_rescale=2.0) != run(model, signal()))


@pytest.mark.parametrize(
    "config, layers, h, p, j, init, activation, dropout",
    [
        (LRA_LISTOPS, 8, 128, 16, 8, "lecun_normal", "half_glu2", 0.0),
        (LRA_TEXT, 6, 256, 192, 12, "lecun_normal", "half_glu2", 0.1),
        (LRA_IMAGE, 6, 512, 384, 3, "lecun_normal", "half_glu1", 0.1),
        (LRA_PATHFINDER, 6, 192, 256, 8, "trunc_standard_normal", "half_glu1", 0.05),
        (LRA_PATH_X, 6, 128, 256, 16, "complex_normal", "half_glu1", 0.0),
        (SPEECH_COMMANDS, 6, 96, 128, 16, "lecun_normal", "half_glu1", 0.1),
    ],
)
def test_the_published_sizes(config, layers, h, p, j, init, activation, dropout):
    """H features, P eigenvalues with both of each pair, J blocks: the table of S5's appendix."""
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    assert model.blocks.mixer.input_real.shape == (layers, p // 2, h)
    assert model.blocks.mixer.reverse_output_real.shape == (layers, h, p // 2)
    mixer = config.mixer
    assert (mixer.full_state, mixer.blocks, mixer.output_init) == (p, j, init)
    assert (config.activation, config.dropout) == (activation, dropout)


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'relu'"):
        config_of(MIXERS["s5"], activation="relu")
    with pytest.raises(ValueError, match=r"half_glu1 gates the features .* has 2 outputs for each"):
        config_of(MIXERS["lssl"])
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1\.0"):
        config_of(MIXERS["s5"], dropout=1.0)
    with pytest.raises(ValueError, match=r"classes must be >= 1, got 0"):
        SequenceClassifierConfig(inputs=1, classes=0, mixer=MIXERS["s5"], layers=1)
    with pytest.raises(ValueError, match=r"width must be a multiple of heads, got 6 and 4"):
        RGLRUConfig(width=6, heads=4)
