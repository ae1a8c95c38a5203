"""Huginn's size, start, depths, packing, cache and training; its values are in golden cases."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxrec
from jaxrec.models.huginn import HUGINN_3_5B, TINY, HuginnConfig, Latent
from jaxrec.ops import attention
from jaxrec.ops.depth.noise import LatentNoise
from tests.laws import equations
from tests.models import toy
from tests.models.toy import run

SMALLEST = HuginnConfig(
    vocab_size=13,
    width=16,
    heads=2,
    mlp_width=24,
    prelude_layers=1,
    core_layers=2,
    coda_layers=1,
    context=32,
    mean_depth=3,
    backprop_depth=2,
)
TOLERANCE = 5e-6  # ten times the gap between the plain loop in float32 and in float64, 4.8e-7
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)
LATENT = np.random.default_rng(1).normal(size=(2, 9, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return toy.drawn(SMALLEST)


# Size and start


def count(module):
    """The number of parameters under an abstract module."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.split(module)[1]))


def test_published_number_of_parameters():
    """The published total leaves out the adapter (2 d^2) and the norms of eight blocks (4 d each).

    Both are parameters of the published checkpoint too; ours counts every number that is learned.
    """
    model = nnx.eval_shape(lambda: HUGINN_3_5B.build(rngs=nnx.Rngs(0)))
    d = HUGINN_3_5B.width
    adapter, block_norms = 2 * d**2, 8 * 4 * d
    assert (adapter, block_norms) == (55_756_800, 168_960)
    assert count(model) == 3_564_976_800
    assert count(model) - adapter - block_norms == 3_509_051_040
    assert count(model.adapter_latent) + count(model.adapter_input) == adapter


def test_takase_initialisation():
    """Inputs begin with sqrt(2/5d); what writes to the stream also over sqrt(2 executed blocks)."""
    config = dataclasses.replace(TINY, tie_embeddings=False, qk_bias=True)
    model = toy.initialised(config)
    wide = (2 / (5 * 128)) ** 0.5
    narrow = wide / (2 * (1 + 1 + 2 * 4)) ** 0.5
    cut = 0.9866  # what the cut at three deviations leaves of the deviation
    for block in (model.prelude, model.core, model.coda):
        attend, mlp = block.attention, block.mlp
        for std, layers in (
            (wide, (attend.query, attend.key_value, mlp.gate)),
            (narrow, (attend.out, mlp.up, mlp.out)),
        ):
            for layer in layers:
                # At least 16,384 draws: the deviation is known to 0.6 %.
                assert np.std(layer.kernel[...]) == pytest.approx(std * cut, rel=0.03)
                assert np.max(np.abs(layer.kernel[...])) <= 3 * std * 1.0001
        assert not np.any(attend.query_bias[...]) and not np.any(attend.key_bias[...])
        assert np.all(np.asarray(block.attention_norm.scale[...]) == 1)
    for table in (model.embedding.table, model.head.table):
        assert np.std(table[...]) == pytest.approx(wide * cut, rel=0.03)
    for adapter in (model.adapter_latent, model.adapter_input):
        assert np.std(adapter.kernel[...]) == pytest.approx(wide * cut, rel=0.03)
    first, second = np.asarray(model.core.mlp.gate.kernel[...])
    assert np.any(first != second)


def test_the_latent_state_begins_with_the_square_root_of_two_fifths(model):
    draw = jax.jit(lambda model, key: model.init_latent(key, 64, 64))
    latent = np.asarray(draw(model, jax.random.key(0)))
    assert np.std(latent) == pytest.approx(0.4**0.5 * 0.9866, rel=0.02)
    assert np.max(np.abs(latent)) <= 3 * 0.4**0.5 * 1.0001
    assert not np.any(jax.jit(lambda model: model.init_latent(None, 2, 3))(model))


def test_keys_and_latents_are_two_ways_to_say_the_same(model):
    key = jax.random.key(3)
    latent = jax.jit(lambda model: model.init_latent(key, 2, 9))(model)
    with_key, _ = run(model, TOKENS, key=key)
    np.testing.assert_allclose(with_key, run(model, TOKENS, latent=latent)[0], atol=TOLERANCE)
    assert np.any(with_key != run(model, TOKENS, key=jax.random.key(4))[0])


# Depth


def test_depths_are_drawn_with_the_published_mean():
    """Poisson(rate) + 1, log-normal rate of mean m: mean m + 1, variance m + m^2 (e^(1/4) - 1)."""
    rng = np.random.default_rng(0)
    depths = np.array([HUGINN_3_5B.sample_depth(rng) for _ in range(20_000)])
    variance = 32 + 32**2 * (np.exp(0.25) - 1)
    assert np.mean(depths) == pytest.approx(33, abs=5 * (variance / 20_000) ** 0.5)
    assert np.var(depths) == pytest.approx(variance, rel=0.1)
    assert np.min(depths) >= 1
    assert np.median(depths) < np.mean(depths)


def test_one_compilation_serves_all_depths(model):
    traces = []

    @jax.jit
    def forward(model, depth):
        traces.append(1)
        return model(TOKENS, depth=depth, latent=LATENT)[0]

    deep = [np.asarray(forward(model, np.int32(depth))) for depth in (0, 1, 2, 5)]
    assert len(traces) == 1
    assert all(np.any(a != b) for a, b in itertools.pairwise(deep))
    default, _ = run(model, TOKENS, latent=LATENT)
    np.testing.assert_allclose(
        default, forward(model, np.int32(SMALLEST.mean_depth)), atol=TOLERANCE
    )


def test_the_trace_does_not_grow_with_depth(model):
    def trace(depth):
        def loss(model):
            logits, _ = model(TOKENS, depth=depth, latent=LATENT, grad_steps=depth)
            return jnp.sum(logits)

        return equations(jax.make_jaxpr(jax.grad(loss))(model).jaxpr)

    assert trace(2) == trace(16) == trace(128)


def test_depth_may_be_continued_from_a_latent_state(model):
    """Three loops are one loop and two more."""

    @jax.jit
    def both(model):
        view, _ = attention.open_view(None, TOKENS.shape)
        embedded, _ = model.embed(TOKENS, view)
        once, _, info = model.refine(LATENT, embedded, 1, view)
        thrice, _, _ = model.refine(once, embedded, 2, view)
        return model.predict(thrice, view)[0], model(TOKENS, depth=3, latent=LATENT)[0], info.steps

    continued, whole, steps = both(model)
    assert steps == 1
    np.testing.assert_allclose(continued, whole, atol=TOLERANCE)


def test_noise_comes_before_the_adapter_and_is_normed_as_the_core_norms_its_last_sum(model):
    """A loop with noise is one without, from N4((1 - w) s + w g), w = level sqrt(2/5) / (i + 1)."""
    level, loop = 0.7, 2
    view, _ = attention.open_view(None, TOKENS.shape)
    keys = jax.vmap(jax.random.split, in_axes=(0, None))(jax.random.split(jax.random.key(5)), 9)

    @jax.jit
    def after(model, latent, noise_keys):
        injected = model.inject(model.embed(TOKENS, view)[0])
        z = Latent(latent, None, jnp.int32(loop))
        noise = None if noise_keys is None else LatentNoise(level, "geom")
        return model.loop(z, injected, view, noise=noise, noise_keys=noise_keys).state

    drawn = np.zeros_like(LATENT)
    for row, t in np.ndindex(*TOKENS.shape):
        key = jax.random.split(jax.random.fold_in(keys[row, t], loop))[1]
        drawn[row, t] = jax.random.normal(key, (16,))
    weight = level * np.sqrt(2 / 5) / (loop + 1)
    mixed = (1 - weight) * LATENT.astype(np.float64) + weight * drawn
    rms = np.sqrt(np.mean(mixed**2, axis=-1, keepdims=True) + SMALLEST.norm_epsilon)
    noisy = mixed / rms * np.asarray(model.core.mlp_out_norm.scale[...])[-1]
    got, plain = after(model, LATENT, keys), after(model, noisy.astype(np.float32), None)
    np.testing.assert_allclose(got, plain, atol=TOLERANCE)
    assert np.max(np.abs(got - after(model, LATENT, None))) > 0.01


def test_the_gradient_passes_through_the_last_loops_only(model):
    """A depth is split into ungraded and graded loops; behind an ungraded one s^0 gets nothing."""

    @jax.jit
    def slope(model, depth):
        def loss(latent):
            return jnp.sum(model(TOKENS, depth=depth, latent=latent)[0] ** 2)

        return jax.grad(loss)(LATENT)

    assert np.any(slope(model, np.int32(2)))
    assert not np.any(slope(model, np.int32(3)))


# Packing and cache


def test_packed_documents_equal_separate_ones(model):
    packed = np.concatenate([TOKENS[:1, :5], TOKENS[1:, :4]], axis=1)
    latent = np.concatenate([LATENT[:1, :5], LATENT[1:, :4]], axis=1)
    ids = np.array([[1] * 5 + [2] * 4], np.int32)
    logits, _ = run(model, packed, latent=latent, segment_ids=ids)
    for row, begin, end in ((0, 0, 5), (1, 5, 9)):
        part = slice(0, end - begin)
        alone, _ = run(model, TOKENS[row : row + 1, part], latent=LATENT[row : row + 1, part])
        np.testing.assert_allclose(logits[:, begin:end], alone, atol=TOLERANCE)


@pytest.mark.parametrize("depth", [1, 4])
def test_cached_decoding_equals_the_full_pass(model, depth):
    whole, _ = run(model, TOKENS, latent=LATENT, depth=np.int32(depth))
    cache = model.init_state(2, capacity=9, depth=4)
    parts, begin = [], 0
    for size in (6, 1, 1, 1):
        part = slice(begin, begin + size)
        new, cache = run(
            model, TOKENS[:, part], cache, latent=LATENT[:, part], depth=np.int32(depth)
        )
        parts.append(new)
        begin += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=TOLERANCE)
    assert cache.kv.length == 9


def test_left_padded_prompts_equal_unpadded_ones(model):
    """Four pads, then five tokens; then one more token for every row."""
    padded, latent = TOKENS.copy(), LATENT.copy()
    ids = np.ones((2, 8), np.int32)
    ids[0, :4] = 0
    cache = model.init_state(2, capacity=9)
    logits, cache = run(model, padded[:, :8], cache, latent=latent[:, :8], segment_ids=ids)
    last, _ = run(model, padded[:, 8:], cache, latent=latent[:, 8:])
    alone, _ = run(model, padded[:1, 4:], latent=latent[:1, 4:])
    np.testing.assert_allclose(logits[:1, 4:], alone[:, :4], atol=TOLERANCE)
    np.testing.assert_allclose(last[:1], alone[:, 4:], atol=TOLERANCE)
    full, _ = run(model, TOKENS, latent=LATENT)
    np.testing.assert_allclose(last[1:], full[1:, 8:], atol=TOLERANCE)


def test_the_cache_has_a_slot_for_every_executed_block(model):
    assert model.init_state(2, capacity=9, depth=5).kv.v.shape == (1 + 5 * 2 + 1, 2, 2, 9, 8)
    assert model.init_state(2, capacity=9).kv.k.shape[0] == 1 + 3 * 2 + 1


def test_the_memory_of_each_strategy_is_what_the_documentation_says():
    text = (Path(jaxrec.__file__).parent.parent / "docs" / "choosing.md").read_text()
    rows = re.findall(r"^\| (`(?:full|latest).*`) \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    model = nnx.eval_shape(lambda: HUGINN_3_5B.build(rngs=nnx.Rngs(0)))
    for names, slots, gib in rows:
        for strategy in re.findall(r"`([^`]+)`", names):
            found = jax.eval_shape(
                lambda model, strategy=strategy: model.init_state(
                    1, capacity=4096, depth=32, strategy=strategy
                ),
                model,
            )
            assert found.kv.v.shape[0] == int(slots)
            assert found.nbytes / 2 / 2**30 == pytest.approx(float(gib), abs=0.005)  # half: float32


# Precision, memory, training


def test_bfloat16_weights_keep_a_float32_latent(model):
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)

    @jax.jit
    def forward(model):
        view, _ = attention.open_view(None, TOKENS.shape)
        embedded, _ = model.embed(TOKENS, view)
        latent, _, _ = model.refine(LATENT, embedded, jnp.int32(3), view)
        return embedded, latent, model.predict(latent, view)[0]

    embedded, latent, logits = forward(small)
    assert (embedded.dtype, latent.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    want = forward(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small))[2]
    # Measured: 2.3 epsilon of the largest logit.
    np.testing.assert_allclose(logits, want, atol=3 * 2.0**-7 * np.max(np.abs(want)))


def test_remat_changes_no_gradient(model):
    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(model, remat):
        def loss(model):
            logits, _ = model(TOKENS, depth=5, latent=LATENT, grad_steps=4, remat=remat)
            return jnp.mean(logits**2)

        return jax.grad(loss)(model)

    want = jax.tree.leaves(gradient(model, "none"))
    for remat in ("block", "sqrt"):
        for left, right in zip(jax.tree.leaves(gradient(model, remat)), want, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5 * np.max(np.abs(right)))


def test_twenty_steps_lower_the_loss():
    values = toy.losses(toy.initialised(SMALLEST), toy.counting(13), key=jax.random.key(2))
    assert values[0] == pytest.approx(np.log(13), rel=0.2)
    assert values[-1] < 0.6 * values[0]


def test_flops_grow_with_depth_as_the_core_does():
    flops = [SMALLEST.flops_per_token(32, depth) for depth in (0, 1, 2)]
    block = 2 * (4 * 16**2 + 3 * 16 * 24) + 2 * 16 * 32
    assert flops[1] - flops[0] == flops[2] - flops[1] == 2 * block + 2 * 16**2
    assert flops[0] == 2 * block + 2 * 16**2 + 2 * 16 * 13
    training = SMALLEST.flops_per_token(32, 5, training=True)
    assert training == SMALLEST.flops_per_token(32, 5) + 2 * flops[2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3}, r"width must be a multiple of heads .*got width 16 and heads 3"),
        ({"heads": 16}, r"with an even quotient, got width 16 and heads 16"),
        ({"core_layers": 0}, r"core_layers must be >= 1, got 0"),
        ({"vocab_size": 0}, r"vocab_size must be >= 1, got 0"),
        ({"backprop_depth": 0}, r"backprop_depth must be >= 1, got 0"),
        ({"prelude_layers": -1}, r"prelude_layers must be >= 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=f"^HuginnConfig: .*{message}"):
        dataclasses.replace(SMALLEST, **change)


@pytest.mark.parametrize("layers", [{"prelude_layers": 0}, {"coda_layers": 0}])
def test_prelude_and_coda_may_be_missing(layers):
    config = dataclasses.replace(SMALLEST, **layers)

    def both(tokens):
        model = config.build(rngs=nnx.Rngs(0))
        return model(tokens)[0], model(tokens, model.init_state(2, capacity=9))[0]

    for logits in jax.eval_shape(both, TOKENS):
        assert logits.shape == (2, 9, 13)
