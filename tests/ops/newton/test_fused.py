"""The kernel of `newton_scan`, interpreted on CPU; that it lowers for GPUs and TPUs; what it
refuses. The laws run it too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.cells import ParaLSTMParams, para_gru, para_lstm
from jaxrec.ops.newton import kernel, newton_scan
from jaxrec.ops.newton.channelwise import NotChannelwiseError, channelwise, tiles
from jaxrec.ops.newton.kernel import Tile

BATCH, TIME, WIDTH = 2, 70, 3  # 4 chunks of 18 steps, of which two are nobody's
# Ten times the gap between the loops in float32 and in float64, 1e-7 of numbers around 1.
TOLERANCE = 1e-6


def inputs(cell, scale=1.0, time=TIME):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    u = draw(BATCH, time, 3, WIDTH)
    if cell is para_gru:
        return scale * draw(3, WIDTH), u, draw(BATCH, WIDTH)
    return ParaLSTMParams(scale * draw(3, WIDTH), scale * draw(2, WIDTH)), u, draw(BATCH, 2, WIDTH)


@functools.partial(jax.jit, static_argnames=("step", "method", "options"))
def run(step, params, x, h0, method="pallas", options=(), **arrays):
    return newton_scan(step, params, x, h0, method=method, **dict(options), **arrays)


@functools.partial(jax.jit, static_argnames=("step", "method"))
def graded(step, params, x, h0, weights, method):
    def loss(*args):
        h, info = newton_scan(step, *args, method=method)
        return jnp.sum(h * weights), (h, info)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, h0)


@pytest.mark.parametrize("cell", [para_gru, para_lstm])
def test_it_gives_the_loop_and_its_gradients(cell):
    args = inputs(cell)
    weights = np.random.default_rng(1).normal(size=(BATCH, TIME, *args[2].shape[1:]))
    weights = weights.astype(np.float32)
    got, (h, info) = graded(cell, *args, weights, method="pallas")
    want, (loop, _) = graded(cell, *args, weights, method="sequential")
    np.testing.assert_allclose(h, loop, atol=3 * TOLERANCE)
    assert 1 <= info.iterations <= 4
    assert (bool(info.converged), int(info.fallbacks)) == (True, 0)
    assert info.residual <= 5e-7
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, atol=5e-6 * np.max(np.abs(right)))


def test_resets_windows_and_a_guess():
    args = inputs(para_gru)
    reset = np.random.default_rng(2).random((BATCH, TIME)) < 0.05
    want, _ = run(para_gru, *args, method="sequential", reset=reset)
    h, info = run(para_gru, *args, reset=reset, guess=want)
    np.testing.assert_allclose(h, want, atol=TOLERANCE)
    assert info.iterations == 0
    h, info = run(para_gru, *args, reset=reset, options=(("window", 40),))
    np.testing.assert_allclose(h, want, atol=TOLERANCE)
    assert info.converged


@pytest.mark.parametrize("cell", [para_gru, para_lstm])
def test_one_chunk_is_the_loop(cell):
    args = inputs(cell)
    reset = np.random.default_rng(2).random((BATCH, TIME)) < 0.05
    want, _ = run(cell, *args, method="sequential", reset=reset)
    h, info = run(cell, *args, reset=reset, options=(("chunks", 1), ("window", 40)))
    np.testing.assert_allclose(h, want, atol=TOLERANCE)
    assert (int(info.iterations), float(info.residual), bool(info.converged)) == (0, 0.0, True)


@pytest.mark.parametrize("chunks", [4, 128])  # the latter are more than there are steps
def test_any_number_of_chunks_gives_the_loop(chunks):
    args = inputs(para_gru)
    want, _ = run(para_gru, *args, method="sequential")
    h, info = run(para_gru, *args, options=(("chunks", chunks),))
    np.testing.assert_allclose(h, want, atol=TOLERANCE)
    assert info.converged


def test_chunks_belong_to_the_kernel():
    with pytest.raises(ValueError, match=r'chunks=2 belongs to method="pallas", got .*newton'):
        newton_scan(para_gru, GRU, U, H0, method="newton", chunks=2)


def expansive(params, h, x):
    return jnp.tanh(params[None] * h + x)


@pytest.mark.parametrize("safeguard", [True, False])
def test_what_does_not_settle_is_run_on(safeguard):
    """Of a chaotic cell, where the loop itself is not to be had beyond some steps, the first."""
    _, u, h0 = inputs(para_gru)
    args = (np.full(WIDTH, -2.5, np.float32), u[:, :, 0], h0)
    want, _ = run(expansive, *args, method="sequential")
    options = (("max_iters", 1), ("safeguard", safeguard))
    h, info = run(expansive, *args, options=options, guess=0 * want + 0.9)
    assert not info.converged
    assert info.residual > 1e-3
    assert info.iterations == 1
    assert info.fallbacks == int(safeguard)
    gap = np.max(np.abs(h - want))
    assert (gap <= 1e-5) if safeguard else (gap > 1e-3)


def test_a_cell_that_diverges_is_reported():
    x = np.full((1, 64, 1), 2.0, np.float32)
    h, info = run(lambda params, h, x: h * h + x, (), x, np.zeros((1, 1), np.float32))
    assert not np.isfinite(h[0, -1, 0])
    assert not info.converged


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("cell", "chunks"), [(para_gru, None), (para_lstm, None), (para_gru, 1)])
def test_it_lowers_for_accelerators(cell, chunks, platform):
    """Which says that there is a kernel, and not that it is right there."""
    args = inputs(cell)
    scan = jax.jit(functools.partial(newton_scan, cell, method="pallas", chunks=chunks))
    reset = np.zeros((BATCH, TIME), bool)
    module = jax.export.export(scan, platforms=[platform])(*args, reset=reset).mlir_module()
    assert {"cuda": "mosaic_gpu", "tpu": "tpu_custom_call"}[platform] in module


def test_tiles_fill_a_gpu():
    assert kernel.tile_of("cuda", 16, 2048, 1024) == Tile(1, 128)  # no second chunk
    assert kernel.tile_of("cuda", 1, 2048, 1024) == Tile(128, 1)
    assert kernel.tile_of("cuda", 8, 2048, 1024) == Tile(16, 8)
    assert kernel.tile_of("cuda", 1, 40, 8) == Tile(2, 64)  # chunks of at least 16 steps
    assert kernel.tile_of("tpu", 1, 2048, 1024) == Tile(8, 128)
    assert kernel.tile_of("cuda", 1, 2048, 1024, chunks=4) == Tile(4, 32)
    assert kernel.tile_of("tpu", 1, 2048, 1024, chunks=1) == Tile(1, 128)


def test_a_step_as_arithmetic_between_tiles():
    """Products, slices and stacks of three numbers each, against the same with axes behind."""
    rng = np.random.default_rng(0)
    matrix, h = rng.normal(size=(3, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)

    def step(matrix, h):
        mixed = jax.nn.sigmoid(jnp.einsum("ij,j->i", matrix, h))
        return jnp.sqrt(jnp.stack([jnp.sum(mixed), *mixed[1:]]) + jnp.max(h) ** 2)

    traced = jax.make_jaxpr(step)(matrix, h)
    copies = lambda x: tiles([jnp.full((2, 4), z) for z in x.reshape(-1)], x.shape)  # noqa: E731
    [got] = channelwise(traced.jaxpr, traced.consts)([copies(matrix), copies(h)])
    for tile, want in zip(got, step(matrix, h), strict=True):
        np.testing.assert_allclose(tile, np.full((2, 4), want), rtol=1e-6)
    traced = jax.make_jaxpr(jnp.sort)(h)
    with pytest.raises(NotChannelwiseError, match="operation sort"):
        channelwise(traced.jaxpr, traced.consts)


GRU, U, H0 = inputs(para_gru, time=4)
BIAS = np.arange(WIDTH, dtype=np.float32)


@pytest.mark.parametrize(
    ("step", "arguments", "message"),
    [
        (lambda p, h, x: jnp.tanh(x[:, 0] + h @ p), {"params": GRU}, "got a dense Jacobian"),
        (lambda p, h, x: h, {"x": np.zeros((BATCH, 4), np.int32)}, "floats, got int32"),
        (lambda p, h, x: h + BIAS[None], {}, "runs for one channel alone"),
        (lambda p, h, x: h * jnp.sum(p, axis=-1)[None], {"params": GRU[:1]}, "gives another state"),
        (lambda p, h, x: jax.lax.digamma(h), {}, "it has the operation digamma"),
        (para_gru, {"axis": "seq"}, "no kernel; got axis='seq'"),
        (para_gru, {"chunks": 3}, "chunks must be one of .* got 3"),
    ],
)
def test_what_it_cannot_do_is_named(step, arguments, message):
    arguments = {"params": GRU, "x": U, "h0": H0} | arguments
    with pytest.raises(ValueError, match=message):
        newton_scan(step, **arguments, method="pallas")
