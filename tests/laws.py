"""The ten laws that every recurrence obeys, each written once.

What runs over a sequence joins `SUBJECTS` by one line; what runs a step over and over joins
`LOOPS`. The references are the plain loops of `tests/references.py`.

Tolerances are derived, not chosen: the same loop run in float32 differs from the one in float64 by
a gap, and ten times that gap (or ten units in the last place, where the loop happens to be exact)
is allowed. The gradient of a NumPy loop in float32 cannot be had, so the gap of gradients is stated
with each subject as it was measured, and so is the error in bfloat16, rounded up.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrec.layers.attention import Attention
from jaxrec.layers.axes import MESH_AXES
from jaxrec.layers.cells import CellConfig
from jaxrec.layers.gated_conv import GatedConv
from jaxrec.layers.linear_attention import LinearAttention
from jaxrec.layers.lssl import LSSLConfig
from jaxrec.layers.mamba import Mamba
from jaxrec.layers.mamba2 import Mamba2
from jaxrec.layers.mlstm import MLSTM
from jaxrec.layers.pararnn import ParaRNNConfig
from jaxrec.layers.plstm import PLSTMConfig
from jaxrec.layers.plstm_gates import GateConfig, ProjectionConfig
from jaxrec.layers.prefix_linear_attention import PrefixLinearAttention
from jaxrec.layers.rglru import RGLRU, RecurrentBlock
from jaxrec.layers.rwkv import RWKVBlock
from jaxrec.layers.s4d import S4DConfig
from jaxrec.layers.s5 import S5Config
from jaxrec.layers.scan import WHAT_PAYS, Solver
from jaxrec.models.huginn import HuginnConfig
from jaxrec.models.linear_attention import LinearAttentionConfig
from jaxrec.models.linear_rnn import LinearRNNConfig
from jaxrec.models.mamba import MambaConfig
from jaxrec.models.mamba2 import Mamba2Config
from jaxrec.models.pararnn import ParaRNNLMConfig
from jaxrec.models.plstm import lm_config
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from jaxrec.models.rnn import RNNConfig
from jaxrec.models.rwkv import RWKVConfig
from jaxrec.models.universal_transformer import UniversalTransformerConfig
from jaxrec.models.xlstm import XLSTMConfig
from jaxrec.ops.conv import causal_conv
from jaxrec.ops.depth import iterate
from jaxrec.ops.newton import newton_scan, slstm_newton_scan
from jaxrec.ops.time import (
    GridGates,
    MLSTMState,
    SLSTMState,
    WKVState,
    block_scan,
    dag,
    dag_batch,
    dag_scan,
    dense_scan,
    grid_scan,
    linear_scan,
    mark_scan,
    matrix_scan,
    mlstm_scan,
    running_max,
    selective_scan,
    slstm_scan,
    wkv,
)
from tests import references

EPSILON = {jnp.float32: 2.0**-23, jnp.bfloat16: 2.0**-7}
INIT = jax.nn.initializers.normal()
VOCAB = 11


# What a law needs to know


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """Something that maps a sequence x and a state to outputs y and the next state.

    inputs: rng, b, t -> params, x; the leaves of x are (b t ...).
    start: params, b, t -> the state before the first of t steps; None keeps none.
    run: params, x, state, reset (b t) or None -> y (b t ...), state.
    loop: the same in NumPy; its state may be None.
    gradient_gap: between gradients in float32 and float64, relative to the norm of each.
    bf16: error of all outputs together relative to their norm, in units of bfloat16's epsilon, 2^-7
      (that of the worst output varies fivefold between draws); None: there are no such inputs.
    log_trace: the trace may grow with log t.
    trained: has parameters, and keeps no cache: worth the compilation of a sharded gradient.
    keeps_state: False: start gives None.
    composed: a whole model, whose layers are subjects too: most laws are slow tests for it.
    graded: has a gradient; False: no gradient passes, which its own tests check.
    """

    name: str
    inputs: Callable[[np.random.Generator, int, int], Any]
    start: Callable[[Any, int, int], Any]
    run: Callable[[Any, Any, Any, Any], Any]
    loop: Callable[[Any, Any, Any, Any], Any]
    gradient_gap: float = 4e-7
    bf16: float | None = 1.0
    log_trace: bool = False
    trained: bool = False
    keeps_state: bool = True
    composed: bool = False
    graded: bool = True

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def jit(self) -> Callable[..., Any]:
        """`run` on and to NumPy arrays, compiled once per shape for all laws."""
        run = jax.jit(self.run)
        return lambda *case: jax.device_get(run(*case))

    def case(self, batch: int, time: int, reset: bool = False) -> tuple[Any, Any, Any, Any]:
        """Random params, x, state and reset; the state is not the one that things begin from."""
        rng = np.random.default_rng(time)
        params, x = self.inputs(rng, batch, time)
        state = jax.tree.map(
            lambda leaf: leaf + draw(rng, leaf.shape, leaf.dtype) if inexact(leaf) else leaf,
            jax.tree.map(np.asarray, self.start(params, batch, time)),
        )
        return params, x, state, rng.random((batch, time)) < 0.2 if reset else None

    def exact(self, params: Any, x: Any, state: Any, reset: Any) -> tuple[Any, Any, float]:
        """y and state of the float64 loop, and the relative gap between it and the float32 loop."""
        reset = np.zeros(jax.tree.leaves(x)[0].shape[:2], bool) if reset is None else reset
        y, last = self.loop(*widened((params, x, state)), reset)
        assert inexact(y) and y.dtype in (np.float64, np.complex128)
        rough, _ = self.loop(params, x, state, reset)
        assert rough.dtype in (np.float32, np.complex64), "the loop must keep the dtype it is given"
        return y, last, float(np.max(np.abs(rough - y)) / np.max(np.abs(y)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Something that applies one step n times to z (b d).

    run: step, z, n -> z, info.
    traced: n is an int32 array instead of an int.
    graded: how many of the last steps the gradient passes through; None: all.
    """

    name: str
    run: Callable[..., Any]
    traced: bool = False
    graded: int | None = None

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def jit(self) -> Callable[..., Any]:
        """params, z, n -> z, compiled once if n is traced."""
        if self.traced:
            run = jax.jit(self.call)
            return lambda params, z, n: jax.device_get(run(params, z, np.int32(n)))
        run = jax.jit(self.call, static_argnums=2)
        return lambda *case: jax.device_get(run(*case))

    def call(self, params: Any, z: Any, n: Any) -> Any:
        z, _ = self.run(lambda z: jnp.tanh(z @ params["w"] + params["u"][None]), z, n)
        return z

    def loop(self, params: Any, z: Any, n: int) -> Any:
        for _ in range(n):
            z = np.tanh(z @ params["w"] + params["u"])
        return z

    def case(self, batch: int) -> tuple[Any, Any]:
        """Params of a step that neither contracts nor explodes, and z."""
        rng = np.random.default_rng(0)
        params = {"w": draw(rng, (4, 4)) * np.float32(0.7), "u": draw(rng, (4,))}
        return params, draw(rng, (batch, 4))


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Standard normal; complex numbers have unit variance too."""
    if np.issubdtype(dtype, np.complexfloating):
        x = rng.normal(size=shape) + 1j * rng.normal(size=shape)
        return (x / 2**0.5).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


def inexact(leaf: Any) -> bool:
    """Whether a leaf holds real or complex numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def widened(tree: Any) -> Any:
    """The tree in double precision."""

    def widen(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if not inexact(leaf):
            return leaf
        return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)

    return jax.tree.map(widen, tree)


def part(x: Any, begin: int, end: int | None = None) -> Any:
    """Steps from `begin` to `end` of every leaf (b t ...)."""
    return jax.tree.map(lambda leaf: leaf[:, begin:end], x)


def disturbed(x: Any, where: Any) -> Any:
    """x with every leaf changed at an index: numbers by 1e6, tokens to others."""

    def disturb(leaf: np.ndarray) -> np.ndarray:
        leaf = leaf.copy()
        leaf[where] = (
            leaf[where] + leaf.dtype.type(1e6) if inexact(leaf) else (leaf[where] + 5) % VOCAB
        )
        return leaf

    return jax.tree.map(disturb, x)


def assert_close(got: Any, want: Any, gap: float) -> None:
    """Every leaf within ten gaps of the largest number it should hold; integers exactly."""
    allowed = 10 * max(gap, EPSILON[jnp.float32])
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.shape == right.shape
        if not inexact(left):
            np.testing.assert_array_equal(left, right)
            continue
        error, scale = np.max(np.abs(left - right), initial=0), np.max(np.abs(right), initial=0)
        assert error <= allowed * scale, f"error {error:.2e} of {scale:.2e}, allowed {allowed:.2e}"


# Those who join


def scan(method: str, dtype: Any = np.float32, *, reverse: bool = False) -> Subject:
    """`linear_scan`; in reverse, its mirror image is the same recurrence."""

    def mirrored(x: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.flip(leaf, 1), x) if reverse else x

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        shape = (batch, time, 3)
        a = rng.uniform(0.5, 1.0, shape) * np.sign(draw(rng, shape))
        if dtype == np.complex64:
            a = a * np.exp(1j * rng.uniform(0, 2 * np.pi, shape))
        return {}, {"a": a.astype(dtype), "b": draw(rng, shape, dtype)}

    def run(params: Any, x: Any, h: Any, reset: Any) -> Any:
        x, reset = mirrored(x), mirrored(reset)
        y, last = linear_scan(x["a"], x["b"], h, reverse=reverse, reset=reset, method=method)
        return mirrored(y), last

    return Subject(
        name=f"linear_scan {method} {np.dtype(dtype).name}{' reverse' if reverse else ''}",
        inputs=inputs,
        start=lambda params, batch, time: np.zeros((batch, 3), dtype),
        run=run,
        loop=lambda params, x, h, reset: references.linear_scan(x["a"], x["b"], h, reset),
        bf16=None if dtype == np.complex64 else 1.0,
        log_trace=method == "associative",
    )


def blocks(method: str, size: int, *, reverse: bool = False) -> Subject:
    """`block_scan` of `size` numbers in each of two channels; matrices of norm around 0.7."""

    def mirrored(x: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.flip(leaf, 1), x) if reverse else x

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        a = draw(rng, (batch, time, size, size, 2)) * np.float32(0.35 * (2 / size) ** 0.5)
        return {}, {"a": a, "b": draw(rng, (batch, time, size, 2))}

    def run(params: Any, x: Any, h: Any, reset: Any) -> Any:
        x, reset = mirrored(x), mirrored(reset)
        y, last = block_scan(x["a"], x["b"], h, reverse=reverse, reset=reset, method=method)
        return mirrored(y), last

    return Subject(
        name=f"block_scan {size} {method}{' reverse' if reverse else ''}",
        inputs=inputs,
        start=lambda params, batch, time: np.zeros((batch, size, 2), np.float32),
        run=run,
        loop=lambda params, x, h, reset: references.block_scan(x["a"], x["b"], h, reset),
        log_trace=method == "associative",
    )


def newton(structure: str, method: str, **options: Any) -> Subject:
    """`newton_scan` of a tanh cell whose 4 numbers mix in no, in pairs, or all; windows of 8."""
    size = {"diagonal": 1, "block": 2, "dense": 4}[structure]

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        matrices = draw(rng, (size, size, 4 // size)) * np.float32(0.6 / size**0.5)
        return matrices, draw(rng, (batch, time, size, 4 // size))

    def step(matrices: Any, h: Any, x: Any) -> Any:
        mixed = jnp.einsum("ijn,bjn->bin", matrices.astype(h.dtype), h)
        return jnp.tanh(x.astype(h.dtype) + mixed)

    def run(matrices: Any, x: Any, h: Any, reset: Any) -> Any:
        y, _ = newton_scan(
            step,
            matrices,
            x,
            h,
            jacobian=structure,
            method=method,
            reset=reset,
            **({"window": 8} | options),
        )
        return y, y[:, -1]

    return Subject(
        name=f"newton_scan {structure} {method}",
        inputs=inputs,
        start=lambda params, batch, time: np.zeros((batch, size, 4 // size), np.float32),
        run=run,
        loop=references.elman,
        log_trace=method == "pallas",
    )


def maximum(method: str) -> Subject:
    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        log_decay, x = -np.abs(draw(rng, (batch, time, 3))), draw(rng, (batch, time, 3))
        return {}, {"log_decay": log_decay, "x": x}

    return Subject(
        name=f"running_max {method}",
        inputs=inputs,
        start=lambda params, batch, time: np.full((batch, 3), -1e3, np.float32),
        run=lambda params, x, m, reset: running_max(
            x["log_decay"], x["x"], m, reset=reset, method=method
        ),
        loop=lambda params, x, m, reset: references.running_max(x["log_decay"], x["x"], m, reset),
        log_trace=True,
        graded=False,
    )


def weighted_mean() -> Subject:
    """`wkv` from and to sums that are not scaled; the square root keeps the weights positive."""

    def run(params: Any, x: Any, state: Any, reset: Any) -> Any:
        a, b = state["a"], jnp.square(state["root_b"])
        start = WKVState(a, b, jnp.zeros_like(a))
        y, last = wkv(x["k"], x["v"], params["rate"], params["bonus"], start, reset=reset)
        scale = jnp.exp(last.maximum)
        return y, {"a": last.numerator * scale, "root_b": jnp.sqrt(last.denominator * scale)}

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        start = state["a"], state["root_b"] ** 2
        y, a, b = references.wkv(x["k"], x["v"], params["rate"], params["bonus"], *start, reset)
        return y, {"a": a, "root_b": np.sqrt(b)}

    return Subject(
        name="wkv",
        inputs=lambda rng, batch, time: (
            {"rate": rng.uniform(0.1, 2.0, 3).astype(np.float32), "bonus": draw(rng, (3,))},
            {"k": draw(rng, (batch, time, 3)), "v": draw(rng, (batch, time, 3))},
        ),
        start=lambda params, batch, time: {
            name: np.zeros((batch, 3), np.float32) for name in ("a", "root_b")
        },
        run=run,
        loop=loop,
        log_trace=True,
    )


def gated_memory(method: str) -> Subject:
    """`mlstm_scan` from and to memories that are not scaled, on which no result depends."""

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        q, k, v = (draw(rng, (batch, time, 2, width)) for width in (3, 3, 4))
        i, f = draw(rng, (2, batch, time, 2))
        return {}, (q, k, v, i, -np.log1p(np.exp(-f)))

    def scaled(state: Any, last_m: Any, exp: Any) -> Any:
        memory, normaliser = state
        return memory * exp(last_m)[..., None, None], normaliser * exp(last_m)[..., None]

    def run(params: Any, x: Any, state: Any, reset: Any) -> Any:
        start = MLSTMState(*state, jnp.zeros_like(state[1][..., 0]))
        y, last = mlstm_scan(*x, start, reset=reset, chunk=4, eps=0.0, method=method)
        return y, scaled(last[:2], last.maximum, jnp.exp)

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        start = (*state, np.zeros_like(state[1][..., 0]))
        y, *last, m = references.mlstm(*x, *start, reset, 0.0)
        return y, scaled(last, m, np.exp)

    return Subject(
        name=f"mlstm_scan {method}",
        inputs=inputs,
        start=lambda params, batch, time: (
            np.zeros((batch, 2, 3, 4), np.float32),
            np.zeros((batch, 2, 3), np.float32),
        ),
        run=run,
        loop=loop,
        log_trace=True,
    )


def scalar_memory() -> Subject:
    """`slstm_scan` from and to sums that are not scaled; see `weighted_mean`."""

    def run(params: Any, x: Any, state: Any, reset: Any) -> Any:
        h, c, root_n = state
        start = SLSTMState(h, c, jnp.square(root_n), jnp.zeros_like(c))
        y, last = slstm_scan(x, params, start, reset=reset)
        scale = jnp.exp(last.maximum)
        return y, (last.hidden, last.cell * scale, jnp.sqrt(last.normaliser * scale))

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        h, c, root_n = state
        y, h, c, n = references.slstm(x, params, h, c, root_n**2, reset)
        return y, (h, c, np.sqrt(n))

    return scalar_memory_subject("slstm_scan", run, loop)


def scalar_memory_by_newton() -> Subject:
    """`slstm_newton_scan` from and to the mean c / n, which no state has far above 1, and the root
    of n."""

    def run(params: Any, x: Any, state: Any, reset: Any) -> Any:
        h, mean, root_n = state
        n = jnp.square(root_n)
        start = SLSTMState(h, mean * n, n, jnp.zeros_like(n))
        y, last, _ = slstm_newton_scan(x, params, start, reset=reset, method="newton", window=8)
        root_n = jnp.sqrt(last.normaliser * jnp.exp(last.maximum))
        return y, (last.hidden, last.cell / last.normaliser, root_n)

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        h, mean, root_n = state
        y, h, c, n = references.slstm(x, params, h, mean * root_n**2, root_n**2, reset)
        return y, (h, c / n, np.sqrt(n))

    return scalar_memory_subject("slstm_newton_scan", run, loop)


def scalar_memory_subject(name: str, run: Any, loop: Any, **fields: Any) -> Subject:
    return Subject(
        name=name,
        inputs=lambda rng, batch, time: (
            draw(rng, (4, 2, 3, 3)) * np.float32(0.5),
            draw(rng, (batch, time, 4, 2, 3)),
        ),
        start=lambda params, batch, time: tuple(np.zeros((3, batch, 2, 3), np.float32)),
        run=run,
        loop=loop,
        **fields,
    )


def selective(method: str) -> Subject:
    """`selective_scan` in chunks of 4, so that some sequences take several and some end inside."""

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        x, b, c = (draw(rng, (batch, time, width)) for width in (3, 2, 2))
        dt = rng.uniform(0.1, 1.0, x.shape).astype(np.float32)
        a = -rng.uniform(0.1, 2.0, (3, 2)).astype(np.float32)
        return {"a": a}, {"x": x, "dt": dt, "b": b, "c": c}

    return Subject(
        name=f"selective_scan {method}",
        inputs=inputs,
        start=lambda params, batch, time: np.zeros((batch, 3, 2), np.float32),
        run=lambda params, x, h, reset: selective_scan(
            x["x"], x["dt"], params["a"], x["b"], x["c"], h, reset=reset, chunk=4, method=method
        ),
        loop=lambda params, x, h, reset: references.selective_scan(
            x["x"], x["dt"], params["a"], x["b"], x["c"], h, reset
        ),
    )


def matrix(
    rule: str, decay: str | None, method: str, chunk: int = 4, normalise: float | None = None
) -> Subject:
    """`matrix_scan` with a decay of each head, of each key, or none; keys of length 1 for the delta
    rule, and nothing negative where sums of it divide.
    """
    heads, keys, values = 2, 4, 3

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        shape = (batch, time, heads)
        x = {"q": draw(rng, (*shape, keys)), "k": draw(rng, (*shape, keys))}
        x["v"] = draw(rng, (*shape, values))
        if decay is not None:
            x["g"] = draw(rng, shape if decay == "head" else (*shape, keys))
        if rule == "delta":
            x["beta"] = draw(rng, shape)
        return {}, x

    def start(params: Any, batch: int, time: int) -> Any:
        return np.zeros((batch, heads, keys, values + (normalise is not None)), np.float32)

    def prepared(np: Any, x: Any, state: Any) -> tuple[Any, ...]:
        q, k, g, beta = x["q"], x["k"], x.get("g"), x.get("beta")
        if normalise is not None:
            q, k = np.abs(q), np.abs(k)
            state = np.concatenate([state[..., :-1], np.abs(state[..., -1:])], axis=-1)
        if rule == "delta":
            k = k / np.sqrt(np.sum(k * k, axis=-1, keepdims=True))
            beta = 1 / (1 + np.exp(-beta))
        return q, k, x["v"], None if g is None else -np.abs(g), beta, state

    def run(params: Any, x: Any, state: Any, reset: Any) -> Any:
        q, k, v, g, beta, state = prepared(jnp, x, state)
        options = {"rule": rule, "normalise": normalise, "chunk": chunk, "method": method}
        return matrix_scan(q, k, v, g, state, beta=beta, reset=reset, **options)

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        q, k, v, g, beta, state = prepared(np, x, state)
        g = np.zeros_like(v[..., :1]) if g is None else g.reshape(*v.shape[:3], -1)
        return references.matrix_scan(q, k, v, g, beta, state, reset, normalise)

    kind = "no decay" if decay is None else f"decay of each {decay}"
    name = f"matrix_scan {rule} {kind}{' normalised' if normalise else ''} {method}"
    return Subject(name=name, inputs=inputs, start=start, run=run, loop=loop)


def path(method: str) -> Subject:
    """`dag_scan` on graphs that are one path, whose nodes are the steps; a reset cuts the path."""

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        x = {
            name: draw(rng, (batch, time, 2, width))
            for name, width in zip("qkv", (3, 3, 4), strict=True)
        }
        gates = {name: rng.uniform(-1, 1, (batch, time, 2)).astype(np.float32) for name in "stmd"}
        return {}, x | gates

    def graph(time: int) -> Any:
        return dag(time, np.stack([np.arange(time - 1), np.arange(1, time)], axis=1))

    def arguments(x: Any, reset: Any) -> tuple[Any, ...]:
        """An edge has the source of the step it leaves, and all else of the one it enters."""
        enters = 1 if reset is None else 1 - reset[..., None].astype(x["m"].dtype)
        t, m = x["t"] * enters, x["m"] * enters
        return x["q"], x["k"], x["v"], x["s"][:, :-1], t[:, 1:-1], m[:, 1:], x["d"]

    def run(params: Any, x: Any, state: Any, reset: Any) -> Any:
        batch, time = x["s"].shape[:2]
        x = x | {name: x[name].astype(jnp.float32) for name in "stmd"}
        dags = dag_batch([graph(time)] * batch)
        return dag_scan(*arguments(x, reset), dags, method=method), None

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        ends = graph(x["s"].shape[1])[1:3]
        pairs = np.arange(max(len(ends[0]) - 1, 0)) + np.arange(2)[:, None]
        rows = zip(*arguments(x, reset), strict=True)
        return np.stack([references.dag_scan(*row, *ends, *pairs) for row in rows]), None

    return Subject(
        name=f"dag_scan {method}",
        inputs=inputs,
        start=lambda params, batch, time: None,
        run=run,
        loop=loop,
        keeps_state=False,
    )


MARK_AXES = {"source": "tkv", "transition": "tt", "mark": "oqt", "direct": "oqkv"}


def mark(method: str, **sizes: int) -> Subject:
    """`mark_scan` in chunks of 4; `sizes` are those of state tracking, j*."""
    tracked = dict.fromkeys("tkvoq", 1) | sizes

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        shape = (batch, time, 2)
        x = {
            "q": draw(rng, (*shape, 4, tracked["q"])),
            "k": draw(rng, (*shape, 4, tracked["k"])),
            "v": draw(rng, (*shape, 3, tracked["v"])),
        }
        for name, axes in MARK_AXES.items():
            x[name] = draw(rng, shape + tuple(tracked[axis] for axis in axes))
        x["transition"] *= np.float32(0.7 / tracked["t"])
        return {}, x

    def run(params: Any, x: Any, state: Any, reset: Any) -> Any:
        # Gates are float32 whatever the activations are.
        x = x | {name: x[name].astype(jnp.float32) for name in MARK_AXES}
        return mark_scan(**x, state=state, reset=reset, chunk=4, method=method)

    return Subject(
        name=f"mark_scan {method} {''.join(sizes)}",
        inputs=inputs,
        start=lambda params, batch, time: np.zeros((batch, 2, 4, 3, tracked["t"]), np.float32),
        run=run,
        loop=lambda params, x, state, reset: references.mark_scan(**x, state=state, reset=reset),
    )


def grid(method: str, mode: str, tile: int | None = None, **sizes: int) -> Subject:
    """`grid_scan` with rows as the steps in time, three nodes each, whose states do not come from
    before a reset.

    A tile of 4096 is the whole grid.
    """
    tracked = dict.fromkeys("tkvoq", 1) | sizes
    axes = dict.fromkeys(GridGates._fields[:2], "tkv")
    axes |= dict.fromkeys(GridGates._fields[2:6], "tt") | dict.fromkeys(
        GridGates._fields[6:], "oqt"
    )
    absent = {"P": (), "L": ("transition_dl",), "R": ("transition_ru",)}[mode]
    from_before = ("transition_rl", "transition_dl", "mark_l")

    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        shape = (batch, time, 3, 2)
        x = {
            "q": draw(rng, (*shape, 4, tracked["q"])),
            "k": draw(rng, (*shape, 4, tracked["k"])),
            "v": draw(rng, (*shape, 3, tracked["v"])),
            "direct": draw(rng, shape + tuple(tracked[axis] for axis in "oqkv")),
        }
        for name in axes.keys() - set(absent):
            x[name] = draw(rng, shape + tuple(tracked[axis] for axis in axes[name]))
            if name.startswith("transition"):
                x[name] *= np.float32(0.4 / tracked["t"])
        return {}, x

    def parts(x: Any, reset: Any) -> tuple[Any, Any]:
        gates = {name: x[name] for name in axes if name in x}
        if reset is not None:
            for name in gates.keys() & set(from_before):
                begins = reset.reshape(*reset.shape, *(1 for _ in gates[name].shape[2:]))
                gates[name] = gates[name] * (1 - begins.astype(gates[name].dtype))
        return [x[name] for name in ("q", "k", "v")], gates

    def run(params: Any, x: Any, state: Any, reset: Any) -> Any:
        x = x | {n: x[n].astype(jnp.float32) for n in x.keys() & {*axes, "direct"}}
        qkv, gates = parts(x, reset)
        gates = GridGates(**(dict.fromkeys(absent) | gates))
        return grid_scan(*qkv, gates, x["direct"], tile=tile, method=method), None

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        qkv, gates = parts(x, reset)
        return references.grid_scan(*qkv, gates, x["direct"]), None

    return Subject(
        name=f"grid_scan {method} {mode} {tile} {''.join(sizes)}",
        inputs=inputs,
        start=lambda params, batch, time: None,
        run=run,
        loop=loop,
        keeps_state=False,
        log_trace=tile == 4096,
    )


def convolution() -> Subject:
    return Subject(
        name="causal_conv",
        inputs=lambda rng, batch, time: (
            {"kernel": draw(rng, (4, 3)), "bias": draw(rng, (3,))},
            draw(rng, (batch, time, 3)),
        ),
        start=lambda params, batch, time: np.zeros((batch, 3, 3), np.float32),
        run=lambda params, x, state, reset: causal_conv(
            x, params["kernel"], params["bias"], state, reset
        ),
        loop=lambda params, x, state, reset: references.causal_conv(
            x, params["kernel"], params["bias"], state, reset
        ),
    )


def of_state(module: Any, batch: int, time: int) -> Any:
    """The state that most layers begin from."""
    return module.init_state(batch)


def with_resets(module: Any, x: Any, state: Any, reset: Any) -> Any:
    """How most layers are called."""
    return module(x, state, reset=reset)


def module(
    name: str,
    build: Callable[..., Any],
    *,
    start: Any = of_state,
    call: Any = with_resets,
    **fields: Any,
) -> Subject:
    """A layer or a model; its parameters are drawn anew, so that none is zero or one.

    Args:
      name: of the subject.
      build: rngs -> module.
      start: module, b, t -> state.
      call: module, x, state, reset -> y, state.
      **fields: `x` (rng, b, t -> input), `draws` (last word of a parameter's path -> rng, shape ->
        values, where the usual ones would not do) and further fields of `Subject`.
    """

    @functools.cache  # when the first test asks: collecting all tests builds nothing
    def built() -> tuple[Any, Any]:
        graph, variables = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
        return graph, nnx.to_pure_dict(variables)

    x = fields.pop("x", activations)
    draws = fields.pop("draws", {})

    def parameters(rng: np.random.Generator) -> Any:
        def parameter(path: Any, leaf: Any) -> np.ndarray:
            if path[-1].key in draws:
                return draws[path[-1].key](rng, leaf.shape).astype(np.float32)
            if path[-1].key == "decay":
                return rng.uniform(-5, -2, leaf.shape).astype(np.float32)
            return np.float32(path[-1].key == "scale") + np.float32(0.3) * draw(rng, leaf.shape)

        return jax.tree_util.tree_map_with_path(parameter, built()[1])

    return Subject(
        name=name,
        inputs=lambda rng, batch, time: (parameters(rng), x(rng, batch, time)),
        start=lambda params, b, t: start(nnx.merge(built()[0], params), b, t),
        run=lambda params, x, state, reset: call(nnx.merge(built()[0], params), x, state, reset),
        **fields,
    )


NO_RESET = np.zeros((3, 12), bool)
"""For the laws about state, so that they share programs; those about lengths give none at all."""


def segment_ids(reset: Any) -> Any:
    """Ids of the segments that resets begin; None, which goes on, without resets."""
    return None if reset is None else 1 + jnp.cumsum(reset, axis=1, dtype=jnp.int32)


def activations(rng: np.random.Generator, batch: int, time: int) -> np.ndarray:
    return draw(rng, (batch, time, 8))


def tokens(rng: np.random.Generator, batch: int, time: int) -> np.ndarray:
    return rng.integers(0, VOCAB, (batch, time), dtype=np.int32)


def attention(name: str, *, cached: bool, pairing: str = "half", **options: Any) -> Subject:
    return module(
        name,
        functools.partial(
            Attention, 8, 4, rotary_base=50.0, rotary_pairing=pairing, init=INIT, **options
        ),
        start=lambda layer, b, t: layer.init_state(b, capacity=t) if cached else None,
        keeps_state=cached,
        call=lambda layer, x, cache, reset: layer(x, cache, segment_ids=segment_ids(reset)),
        loop=lambda params, x, cache, reset: (
            references.attention(
                params,
                x,
                reset,
                50.0,
                pairing,
                options.get("window"),
                options.get("rotary_width"),
            ),
            None,
        ),
    )


def rglru() -> Subject:
    return module(
        "RGLRU",
        functools.partial(RGLRU, 8, 2),
        loop=references.rglru,
        trained=True,
    )


def recurrent_block() -> Subject:
    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        y, *state = references.recurrent_block(params, x, *state, reset)
        return y, tuple(state)

    return module(
        "RecurrentBlock",
        functools.partial(RecurrentBlock, 8, 6, 2, init=INIT),
        loop=loop,
    )


def mamba_mixer() -> Subject:
    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        y, *state = references.mamba_mixer(params, x, *state, reset)
        return y, tuple(state)

    return module(
        "Mamba",
        functools.partial(Mamba, 8, 6, 2, 3, bias=True),
        loop=loop,
    )


def mamba() -> Subject:
    config = MambaConfig(
        vocab_size=VOCAB, width=8, layers=2, inner_width=6, step_rank=2, state_size=3
    )

    return language_model("MambaLM", config, references.mamba, trained=True)


# A head reads 3 channels here. Where they nearly cancel, its norm makes roundings of the same
# size again: those of q, k and v alone move the worst output by a quarter of what was measured.
def linear_attention(name: str, *, bf16: float = 1.0, **options: Any) -> Subject:
    config = LinearAttentionConfig(
        vocab_size=VOCAB,
        width=8,
        heads=2,
        key_width=4,
        value_width=3,
        mlp_width=12,
        layers=1,
        chunk=4,
        **options,
    )
    kept = ("rule", "gate", "beta_scale", "conv_width", "rotary_base", "output_gate", "chunk")
    options = {field: getattr(config, field) for field in kept}

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        y, *state = references.linear_attention(params, x, *state, reset, config)
        return y, tuple(state)

    return module(
        name,
        functools.partial(LinearAttention, 8, 2, 4, 3, gate_rank=3, init=INIT, **options),
        loop=loop,
        bf16=bf16,
    )


def linear_attention_lm() -> Subject:
    config = LinearAttentionConfig(
        vocab_size=VOCAB,
        width=8,
        heads=2,
        key_width=4,
        value_width=3,
        mlp_width=12,
        layers=2,
        rule="delta",
        gate="step",
        conv_width=3,
        chunk=4,
        tie_embeddings=False,
    )
    return language_model(
        "LinearAttention LM",
        config,
        references.linear_attention_lm,
        bf16=6.0,
        trained=True,
    )


def language_model(name: str, config: Any, loop: Any, **fields: Any) -> Subject:
    """A language model whose state before the first token is no state at all.

    loop: params, tokens, reset, config -> logits.
    """

    def begun(params: Any, x: Any, state: Any, reset: Any) -> Any:
        reset = reset.copy()
        reset[:, 0] = True
        return loop(params, x, reset, config), None

    return module(
        name,
        config.build,
        x=tokens,
        start=lambda model, b, t: model.init_state(b, capacity=t),
        call=lambda model, x, state, reset: model(x, state, segment_ids=segment_ids(reset)),
        loop=begun,
        composed=True,
        **fields,
    )


def huginn(name: str, *, cached: bool, depth: int = 2, **options: Any) -> Subject:
    config = HuginnConfig(
        vocab_size=VOCAB,
        width=8,
        heads=2,
        mlp_width=12,
        prelude_layers=1,
        core_layers=2,
        coda_layers=1,
        context=128,
        mean_depth=depth,
        backprop_depth=depth,
        rotary_base=50.0,
        **options,
    )
    return module(
        name,
        config.build,
        x=lambda rng, b, t: {"tokens": tokens(rng, b, t), "latent": activations(rng, b, t)},
        start=lambda model, b, t: model.init_state(b, capacity=t, depth=depth) if cached else None,
        call=lambda model, x, cache, reset: model(
            x["tokens"],
            cache,
            latent=x["latent"].astype(jnp.float32),
            depth=depth,
            segment_ids=segment_ids(reset),
        ),
        loop=lambda params, x, cache, reset: (
            references.huginn(params, x["tokens"], x["latent"], reset, config, depth),
            None,
        ),
        gradient_gap=5e-6,  # two loops over normalised streams amplify
        bf16=4.0,
        trained=not cached,
        keeps_state=cached,
        composed=True,
    )


def universal_transformer(name: str, *, cached: bool, **options: Any) -> Subject:
    config = UniversalTransformerConfig(
        vocab_size=VOCAB, width=8, heads=2, mlp_width=12, steps=3, context=128, **options
    )

    def loop(params: Any, tokens: Any, state: Any, reset: Any) -> Any:
        return references.universal_transformer(params, tokens, reset, config)[0], None

    return module(
        name,
        config.build,
        x=tokens,
        start=lambda model, b, t: model.init_state(b, capacity=t) if cached else None,
        call=lambda model, x, state, reset: model(x, state, segment_ids=segment_ids(reset)),
        loop=loop,
        bf16=2.0,
        trained=not cached,
        keeps_state=cached,
        composed=True,
    )


def linear_rnn() -> Subject:
    config = LinearRNNConfig(
        vocab_size=VOCAB,
        width=8,
        recurrent_width=6,
        heads=2,
        mlp_width=12,
        layers=2,
        context=128,
    )

    return language_model(
        "LinearRNN", config, references.linear_rnn, gradient_gap=1.2e-6, bf16=3.0, trained=True
    )


def mamba2_mixer(groups: int) -> Subject:
    config = Mamba2Config(
        vocab_size=VOCAB, width=8, layers=1, heads=4, head_width=3, state_size=2, groups=groups
    )

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        y, *state = references.mamba2_mixer(params, x, *state, reset, config)
        return y, tuple(state)

    return module(
        f"Mamba2 {groups}",
        functools.partial(Mamba2, 8, 4, 3, 2, groups=groups, bias=True),
        loop=loop,
    )


def mamba2() -> Subject:
    config = Mamba2Config(
        vocab_size=VOCAB, width=8, layers=2, heads=2, head_width=4, state_size=3, context=128
    )
    return language_model(
        "Mamba2LM",
        config,
        references.mamba2,
        gradient_gap=1e-6,
        bf16=3.0,
        trained=True,
    )


def gated_conv() -> Subject:
    return module(
        "GatedConv",
        functools.partial(GatedConv, 8, 6, init=INIT),
        loop=references.gated_conv,
    )


def prefix_linear_attention() -> Subject:
    """Without a prefix; with one it is not causal."""
    return module(
        "PrefixLinearAttention",
        functools.partial(PrefixLinearAttention, 8, 2, 3, epsilon=1e-3, init=INIT),
        # As after some tokens: a denominator of random numbers alone might be zero.
        start=lambda layer, b, t: layer.init_state(b).at[:, :, 0, -1].set(30.0),
        loop=lambda params, x, state, reset: references.taylor_attention(
            params, x, state, reset, 1e-3
        ),
    )


def mlstm_mixer() -> Subject:
    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        y, *_ = references.mlstm_mixer(params, x, *state, reset, norm_epsilon=0.1, eps=0.1)
        return y, None  # the state is scaled in another way; `gated_memory` looks at it

    return module(
        "MLSTM",
        functools.partial(
            # Large epsilons: a head's few channels may be almost alike, which amplifies rounding.
            MLSTM,
            8,
            2,
            4,
            6,
            bias=True,
            chunk=4,
            norm_epsilon=0.1,
            epsilon=0.1,
            init=INIT,
        ),
        loop=loop,
        log_trace=True,
    )


def xlstm() -> Subject:
    config = XLSTMConfig(
        vocab_size=VOCAB,
        width=8,
        layers=2,
        heads=2,
        key_width=4,
        value_width=6,
        mlp_width=12,
        norm_epsilon=0.1,
        chunk=4,
    )

    return language_model(
        "xLSTM",
        config,
        references.xlstm,
        gradient_gap=2e-6,
        bf16=2.0,
        log_trace=True,
        trained=True,
    )


def rwkv_block() -> Subject:
    return module(
        "RWKVBlock",
        functools.partial(RWKVBlock, 8, 6, 10),
        # The sums of no weight at all, which is what the state begins with, say nothing.
        loop=lambda params, x, state, reset: (
            references.rwkv_block(params, x, state.time.before, state.channels, reset),
            None,
        ),
        bf16=2.0,
        log_trace=True,
    )


def rwkv() -> Subject:
    config = RWKVConfig(
        vocab_size=VOCAB, width=8, layers=2, inner_width=6, mlp_width=12, norm_epsilon=1e-4
    )

    return language_model("RWKV", config, references.rwkv, bf16=2.0, log_trace=True, trained=True)


def plstm() -> Subject:
    config = PLSTMConfig(
        width=8,
        heads=2,
        key_width=2,
        value_width=2,
        jv=3,
        jt=2,
        jo=2,
        source=GateConfig(sub_heads=2),
        query=ProjectionConfig(sub_heads=4),
        conv_width=3,
        norm_epsilon=0.1,  # a head has four channels, which may be almost nothing
        chunk=4,
    )

    def loop(params: Any, x: Any, state: Any, reset: Any) -> Any:
        y, *state = references.plstm(params, x, *state, reset, config)
        return y, tuple(state)

    return module(
        "PLSTM",
        config.build,
        start=lambda layer, b, t: layer.init_state(b),
        call=lambda layer, x, state, reset: layer(x, state, reset=reset),
        loop=loop,
        bf16=2.0,
    )


def plstm_lm() -> Subject:
    config = lm_config(vocab_size=VOCAB, width=4, layers=2, heads=2)
    mixer = dataclasses.replace(config.block.mixer, norm_epsilon=0.1, chunk=4)
    block = dataclasses.replace(config.block, mixer=mixer)
    config = dataclasses.replace(config, block=block)
    return language_model(
        "pLSTM", config, references.plstm_lm, gradient_gap=2e-6, bf16=2.0, trained=True
    )


STEPS = {"log_step": lambda rng, shape: rng.uniform(-3, -1, shape)}


def dense_system() -> Subject:
    def inputs(rng: np.random.Generator, batch: int, time: int) -> Any:
        params = {
            "a": draw(rng, (3, 4, 4)) * np.float32(0.2),
            "b": draw(rng, (3, 4)),
            "c": draw(rng, (3, 2, 4)),
        }
        return params, draw(rng, (batch, time, 3))

    def run(op: Any) -> Any:
        return lambda params, x, *rest: op(params["a"], params["b"], params["c"], x, *rest)

    return Subject(
        name="dense_scan",
        inputs=inputs,
        start=lambda params, batch, time: np.zeros((batch, 3, 4), np.float32),
        run=run(dense_scan),
        loop=run(references.dense_scan),
    )


SOLVER = Solver(method="newton", window=8)


def recurrent_cell(name: str, config: Any, loop: Any, **fields: Any) -> Subject:
    """ParaRNN cells by Newton's method, the classical ones as `auto` has it, which is tested with
    the op."""
    solver = SOLVER if isinstance(config, ParaRNNConfig) else WHAT_PAYS

    def build(*, rngs: nnx.Rngs) -> Any:
        layer = config.build(rngs=rngs)
        layer.solver = solver
        return layer

    return module(
        name,
        build,
        start=lambda layer, b, t: layer.init_state(b),
        call=lambda layer, x, state, reset: layer(x, state, reset=reset),
        loop=loop,
        **fields,
    )


def pararnn() -> Subject:
    config = ParaRNNLMConfig(
        vocab_size=VOCAB,
        width=8,
        layers=2,
        heads=2,
        mlp_width=12,
        cell="lstm",
        norm_epsilon=0.1,
        solver=SOLVER,
    )
    return language_model("ParaRNN LM", config, references.pararnn, bf16=2.0, trained=True)


def classical_language_model() -> Subject:
    config = RNNConfig(vocab_size=VOCAB, width=8, layers=2, mlp_width=12, norm_epsilon=0.1)
    return language_model("RNN LM", config, references.rnn, bf16=2.0, trained=True)


def state_space(name: str, config: Any, loop: Any, **fields: Any) -> Subject:
    return module(
        name,
        config.build,
        loop=loop,
        **fields,
    )


def lssl(alpha: float) -> Subject:
    """With a matrix that is stable, and not LegS."""
    config = LSSLConfig(
        width=8, state=4, outputs=2, alpha=alpha, train_transition=True, train_step=True
    )
    return state_space(
        f"LSSL alpha {alpha}",
        config,
        lambda params, x, state, reset: references.lssl(params, x, state, reset, alpha),
        draws=STEPS | {"transition": lambda rng, shape: rng.normal(size=shape) - 3 * np.eye(4)},
        trained=alpha == 0.5,
    )


def s4d(method: str) -> Subject:
    return state_space(
        f"S4D {method}",
        S4DConfig(width=8, state=6, discretization=method),
        lambda params, x, state, reset: references.s4d(params, x, state, reset, method),
        draws=STEPS,
        trained=method == "zoh",
    )


def s5(method: str, *, conj_sym: bool) -> Subject:
    return state_space(
        f"S5 {method}",
        S5Config(width=8, state=3, discretization=method, conj_sym=conj_sym, clip_eigs=True),
        lambda params, x, state, reset: references.s5(params, x, state, reset, method, conj_sym),
        draws=STEPS | {"eigenvalue_real": lambda rng, shape: rng.uniform(-2, 0.5, shape)},
        trained=method == "zoh",
    )


def recurrentgemma() -> Subject:
    config = RecurrentGemmaConfig(
        vocab_size=VOCAB,
        width=8,
        recurrent_width=6,
        heads=2,
        mlp_width=12,
        layers=3,
        window=4,
        context=128,
        pattern=("recurrent", "attention"),
    )

    return language_model(
        "RecurrentGemma",
        config,
        references.recurrentgemma,
        gradient_gap=1.2e-6,
        bf16=6.0,
    )


SUBJECTS = [
    *(
        scan(method, dtype, reverse=reverse)
        for method in ("sequential", "associative", "chunked")
        for dtype in (np.float32, np.complex64)
        for reverse in (False, True)
    ),
    *(
        blocks(method, size, reverse=reverse)
        for method, size, reverse in (
            ("sequential", 2, False),
            ("associative", 2, True),
            ("chunked", 2, False),
            ("chunked", 5, True),
        )
    ),
    *(newton(structure, "newton") for structure in ("diagonal", "block", "dense")),
    newton("block", "quasi_newton", tol=2.5e-7),
    newton("dense", "sequential"),
    newton("diagonal", "pallas"),  # one chunk
    newton("block", "pallas", window=64),  # and several, where a sequence is long enough
    *(maximum(method) for method in ("sequential", "associative")),
    weighted_mean(),
    *(gated_memory(method) for method in ("sequential", "chunkwise")),
    scalar_memory(),
    scalar_memory_by_newton(),
    *(selective(method) for method in ("sequential", "chunked")),
    *(matrix("gated", decay, "chunkwise") for decay in (None, "head")),
    *(matrix("delta", decay, "chunkwise") for decay in (None, "head", "key")),
    matrix("gated", "key", "chunkwise", chunk=16),
    matrix("gated", "head", "chunkwise", normalise=0.1),
    matrix("gated", "key", "sequential"),
    matrix("delta", "head", "sequential"),
    *(path(method) for method in ("states", "paths")),
    mark("sequential"),
    mark("chunkwise"),
    mark("chunkwise", t=2, k=2, v=3, o=2, q=2),
    grid("sequential", "P"),
    grid("rows", "P"),
    grid("rows", "L", t=2, k=2, v=3, o=2, q=2),
    grid("parallel", "P", tile=4096),
    grid("parallel", "L", tile=4096, t=2, k=2, v=3, o=2, q=2),
    grid("parallel", "R", tile=2),
    convolution(),
    attention("Attention", cached=False),
    attention("Attention grouped", cached=True, pairing="interleaved", kv_heads=2, qk_bias=True),
    attention("Attention local", cached=False, window=4, head_width=4, rotary_width=2, bias=True),
    attention("Attention ring", cached=True, window=4, head_width=4, kv_heads=1, out_bias=True),
    rglru(),
    recurrent_block(),
    dense_system(),
    lssl(0.0),
    lssl(0.5),
    lssl(1.0),
    s4d("zoh"),
    s4d("bilinear"),
    s5("zoh", conj_sym=True),
    s5("bilinear", conj_sym=False),
    huginn("Huginn", cached=False, tie_embeddings=False, adapter_bias=True),
    huginn("Huginn cached", cached=True),
    universal_transformer("Universal Transformer", cached=False, halting="position"),
    universal_transformer(
        "Universal Transformer cached",
        cached=True,
        block_layers=2,
        layers_before=1,
        layers_after=1,
        transition="conv",
        step_coordinates="sinusoid",
        join="concat",
        start="step",
        order="post",
        halting="position",
        rule="accumulate",
        tie_embeddings=False,
    ),
    linear_rnn(),
    mamba_mixer(),
    mamba(),
    *(mamba2_mixer(groups) for groups in (1, 2)),
    mamba2(),
    *(
        recurrent_cell(
            f"ParaRNN {cell}",
            ParaRNNConfig(cell=cell, inputs=8, width=6, heads=2),
            references.para_cell,
        )
        for cell in ("gru", "lstm")
    ),
    *(
        recurrent_cell(
            f"Cell {kind}",
            CellConfig(kind=kind, inputs=8, width=4),
            references.classical_cell,
        )
        for kind in ("elman", "gru", "lstm")
    ),
    pararnn(),
    classical_language_model(),
    gated_conv(),
    prefix_linear_attention(),
    recurrentgemma(),
    rwkv_block(),
    rwkv(),
    mlstm_mixer(),
    xlstm(),
    plstm(),
    plstm_lm(),
    linear_attention("RetNet", gate="constant", rotary_base=50.0, bf16=2.0),
    linear_attention("GLA", gate="logistic"),
    linear_attention(
        "KDA",
        rule="delta",
        gate="key_step",
        conv_width=3,
        beta_scale=2.0,
        output_gate=False,
        bf16=2.0,
    ),
    linear_attention_lm(),
]

LOOPS = [
    Loop(name="iterate", run=iterate),
    Loop(name="iterate truncated", run=functools.partial(iterate, grad_steps=3), graded=3),
    Loop(
        name="iterate traced",
        run=functools.partial(iterate, grad_steps=3),
        traced=True,
        graded=3,
    ),
    Loop(name="iterate block remat", run=functools.partial(iterate, remat="block")),
    Loop(name="iterate sqrt remat", run=functools.partial(iterate, remat="sqrt")),
]


def each(of: list[Subject]) -> pytest.MarkDecorator:
    """Every subject; whole models as slow tests."""
    return pytest.mark.parametrize(
        "subject",
        [pytest.param(s, id=str(s), marks=pytest.mark.slow if s.composed else ()) for s in of],
    )


subjects = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
smaller_subjects = each(SUBJECTS)
KEEPING_STATE = [s for s in SUBJECTS if s.keeps_state]
keeping_state = each(KEEPING_STATE)
loops = pytest.mark.parametrize("loop", LOOPS, ids=str)


def for_each(
    name: str, values: list[int], of: list[Subject], quick: tuple[int, ...]
) -> pytest.MarkDecorator:
    """Every subject with every value; all but `quick` are slow tests, as each is a program to
    compile, and for whole models all but the last of these.
    """

    def is_slow(subject: Subject, value: int) -> bool:
        return value not in (quick[-1:] if subject.composed else quick)

    return pytest.mark.parametrize(
        ("subject", name),
        [
            pytest.param(
                subject,
                value,
                id=f"{value}-{subject}",
                marks=pytest.mark.slow if is_slow(subject, value) else (),
            )
            for subject in of
            for value in values
        ],
    )


# 1. It equals the plain float64 loop


def check_equals_the_loop(subject: Subject, got: Any, case: Any) -> None:
    y, last = got
    want_y, want_last, gap = subject.exact(*case)
    assert_close(y, want_y, gap)
    if want_last is not None:
        assert_close(last, want_last, gap)


@subjects
def test_equals_the_float64_loop(subject):
    case = subject.case(3, 12, reset=True)
    check_equals_the_loop(subject, subject.jit(*case), case)


@loops
def test_a_loop_equals_the_float64_loop(loop):
    params, z = loop.case(3)
    want = loop.loop(*widened((params, z)), 7)
    gap = np.max(np.abs(loop.loop(params, z, 7) - want)) / np.max(np.abs(want))
    assert_close(loop.jit(params, z, 7), want, gap)


# 2. Every gradient equals the loop's: its finite differences in float64


def check_gradient(
    got: list, loss: Callable[[list], float], at: list[np.ndarray], gap: float
) -> None:
    """Along every axis if the leaves are small, otherwise along random directions of each leaf."""
    rng = np.random.default_rng(0)
    every_axis = sum(leaf.size for leaf in at) <= 128
    step = 1e-5  # leaves errors of about step^2 and float64's epsilon / step: 1e-10
    for i, leaf in enumerate(at):
        scale = float(np.linalg.norm(got[i]))
        if every_axis:
            directions = np.eye(leaf.size).reshape(-1, *leaf.shape)
        else:
            directions = rng.normal(size=(2, *leaf.shape)) / leaf.size**0.5
        units = [1.0, 1.0j] if np.iscomplexobj(leaf) else [1.0]
        for direction in (unit * one for one in directions for unit in units):
            ends = [
                loss([x + sign * step * direction if j == i else x for j, x in enumerate(at)])
                for sign in (1, -1)
            ]
            slope = (ends[0] - ends[1]) / (2 * step)
            error = abs(np.sum(np.asarray(got[i]) * direction).real - slope)
            assert error <= 10 * gap * scale + 1e-9, (
                f"leaf {i} {leaf.shape}: error {error:.2e} of {scale:.2e}"
            )


def loss_of(run: Callable[..., Any], with_state: bool) -> Callable[..., Any]:
    """A weighted sum of all outputs and, `with_state`, of the float leaves of the state."""

    def loss(*case: Any) -> Any:
        y, state = run(*case)
        total = 0.0
        for leaf in (y, *(leaf for leaf in jax.tree.leaves(state) if with_state and inexact(leaf))):
            weights = draw(np.random.default_rng(leaf.size), leaf.shape, leaf.dtype)
            total = total + (weights * leaf).real.sum()
        return total

    return loss


def split(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The float leaves, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if inexact(leaf)]

    def join(floats: list[Any]) -> Any:
        whole = list(leaves)
        for i, leaf in zip(where, floats, strict=True):
            whole[i] = leaf
        return jax.tree.unflatten(structure, whole)

    return [leaves[i] for i in where], join


def gradient_of(
    subject: Subject, case: Any, with_state: bool
) -> tuple[Callable[..., Any], list[Any]]:
    """The gradient to all floats of params, x and state, as a function of them."""
    floats, join = split(case[:3])
    loss = loss_of(subject.run, with_state)
    return jax.grad(lambda floats: loss(*join(floats), case[3])), floats


@each([s for s in SUBJECTS if s.graded])
def test_every_gradient_equals_the_loops(subject):
    case = subject.case(2, 5, reset=True)
    with_state = subject.exact(*case)[1] is not None
    gradient, floats = gradient_of(subject, case, with_state)
    loss = loss_of(subject.loop, with_state)
    _, join = split(case[:3])
    check_gradient(
        jax.jit(gradient)(floats),
        lambda at: loss(*join(at), case[3]),
        widened(floats),
        subject.gradient_gap,
    )


@loops
@pytest.mark.parametrize("n", [0, 2, 7])
def test_every_gradient_of_a_loop_equals_the_loops(loop, n):
    params, z = loop.case(2)
    weights = draw(np.random.default_rng(1), z.shape)
    gradient = jax.grad(
        lambda case: jnp.sum(weights * loop.call(*case, jnp.int32(n) if loop.traced else n))
    )
    floats, join = split((params, z))
    free = 0 if loop.graded is None else max(n - loop.graded, 0)
    fixed = loop.loop(*widened((params, z)), free)  # what the ungraded steps make, a constant

    def loss(at: list[np.ndarray]) -> float:
        params, z = join(at)
        return np.sum(weights * loop.loop(params, fixed if free else z, n - free))

    got = jax.tree.leaves(jax.jit(gradient)((params, z)))
    check_gradient(got, loss, widened(floats), gap=4e-7)


# 3. A sequence may be cut anywhere and continued from the state


@for_each("cut", [1, 6, 11], KEEPING_STATE, quick=(6,))
def test_a_sequence_may_be_cut_anywhere(subject, cut):
    params, x, state, _ = subject.case(3, 12)
    case = params, x, state, NO_RESET
    whole = subject.jit(*case)
    left, state = subject.jit(params, part(x, 0, cut), state, NO_RESET[:, :cut])
    right, state = subject.jit(params, part(x, cut), state, NO_RESET[:, cut:])
    together = np.concatenate([left, right], axis=1), state
    assert_close(together, whole, subject.exact(*case)[2])


@loops
@pytest.mark.parametrize("cut", [1, 5])
def test_a_loop_may_be_cut_anywhere(loop, cut):
    params, z = loop.case(3)
    again = loop.jit(params, loop.jit(params, z, cut), 7 - cut)
    assert_close(again, loop.jit(params, z, 7), 0)


# 4. A reset equals starting anew


@smaller_subjects
def test_a_reset_equals_starting_anew(subject):
    params, x, state, _ = subject.case(3, 12)
    reset, first = NO_RESET.copy(), NO_RESET[:, 6:].copy()
    reset[1, 6] = True
    first[:, 0] = True
    y, _ = subject.jit(params, x, state, reset)
    anew, _ = subject.jit(params, part(x, 6), subject.start(params, 3, 12), first)
    case = params, x, state, NO_RESET
    _, _, gap = subject.exact(*case)
    assert_close(y[1, 6:], anew[1], gap)
    goes_on, _ = subject.jit(*case)
    assert_close(y[[0, 2]], goes_on[[0, 2]], gap)


@keeping_state
def test_one_element_may_be_reset_between_two_calls(subject):
    params, x, state, _ = subject.case(3, 12)
    case = params, x, state, NO_RESET
    _, middle = subject.jit(params, part(x, 0, 6), state, NO_RESET[:, :6])
    first = NO_RESET[:, 6:].copy()
    first[1, 0] = True
    y, _ = subject.jit(params, part(x, 6), middle, first)
    first[:, 0] = True
    anew, _ = subject.jit(params, part(x, 6), subject.start(params, 3, 12), first)
    whole, _ = subject.jit(*case)
    _, _, gap = subject.exact(*case)
    assert_close(y[1], anew[1], gap)
    assert_close(y[[0, 2]], whole[[0, 2], 6:], gap)


# 5. Batch elements do not talk


@smaller_subjects
def test_batch_elements_do_not_talk(subject):
    params, x, state, reset = subject.case(3, 12, reset=True)
    y, _ = subject.jit(params, x, state, reset)
    other, _ = subject.jit(params, disturbed(x, np.s_[0]), state, reset)
    np.testing.assert_array_equal(other[1:], y[1:])
    assert np.any(other[0] != y[0])


@keeping_state
def test_batch_elements_do_not_talk_through_the_state(subject):
    params, x, state, _ = subject.case(3, 12)
    half = NO_RESET[:, :6]
    after = [
        subject.jit(params, part(x, 6), subject.jit(params, left, state, half)[1], half)[0]
        for left in (part(x, 0, 6), part(disturbed(x, np.s_[0]), 0, 6))
    ]
    np.testing.assert_array_equal(after[1][1:], after[0][1:])


@loops
def test_batch_elements_of_a_loop_do_not_talk(loop):
    params, z = loop.case(3)
    y, other = loop.jit(params, z, 7), loop.jit(params, disturbed(z, np.s_[0]), 7)
    np.testing.assert_array_equal(other[1:], y[1:])


# 6. The past does not see the future


@smaller_subjects
@pytest.mark.parametrize("now", [1, 6, 11])
def test_the_past_does_not_see_the_future(subject, now):
    params, x, state, reset = subject.case(3, 12, reset=True)
    y, _ = subject.jit(params, x, state, reset)
    other, _ = subject.jit(params, disturbed(x, np.s_[:, now:]), state, reset)
    np.testing.assert_array_equal(other[:, :now], y[:, :now])
    assert np.any(other[:, now] != y[:, now])


# 7. Any length


@for_each("time", [1, 2, 63, 100], SUBJECTS, quick=(1, 63))
def test_any_length(subject, time):
    case = subject.case(3, time)
    check_equals_the_loop(subject, subject.jit(*case), case)


@loops
@pytest.mark.parametrize("n", [0, 1, 2, 63, 100])
def test_any_number_of_steps(loop, n):
    params, z = loop.case(3)
    want = loop.loop(*widened((params, z)), n)
    gap = np.max(np.abs(loop.loop(params, z, n) - want)) / np.max(np.abs(want))
    assert_close(loop.jit(params, z, n), want, gap)


# 8. bfloat16 inputs stay finite and close


@each([s for s in SUBJECTS if s.bf16 is not None])
def test_bfloat16_stays_finite_and_close(subject):
    params, x, _, _ = subject.case(3, 100)
    params, x = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if inexact(leaf) else leaf, (params, x)
    )
    y, last = subject.jit(params, x, subject.start(params, 3, 100), None)
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if inexact(leaf) else leaf, (params, x)
    )
    want, _, _ = subject.exact(*rounded, subject.start(rounded[0], 3, 100), None)
    for leaf in jax.tree.leaves((y, last)):
        assert np.all(np.isfinite(np.abs(leaf).astype(jnp.float32)))
    error = np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want)
    assert error <= subject.bf16 * EPSILON[jnp.bfloat16]


# 9. The trace does not grow with the length


def equations(jaxpr: Any) -> int:
    """The number of equations of a trace, those inside loops and branches included."""
    inner = [
        sub
        for equation in jaxpr.eqns
        for value in equation.params.values()
        for sub in (value if isinstance(value, list | tuple) else [value])
    ]
    subs = [getattr(sub, "jaxpr", sub) for sub in inner]
    return len(jaxpr.eqns) + sum(equations(sub) for sub in subs if hasattr(sub, "eqns"))


@smaller_subjects
def test_the_trace_does_not_grow_with_time(subject):
    sizes = []
    for time in (64, 256, 1024) if subject.log_trace else (256, 1024):
        case = subject.case(2, time)
        gradient, floats = gradient_of(subject, case, with_state=True)
        forward, backward = jax.make_jaxpr(subject.run)(*case), jax.make_jaxpr(gradient)(floats)
        sizes.append(np.array([equations(forward.jaxpr), equations(backward.jaxpr)]))
    growth = np.diff(sizes, axis=0)
    if subject.log_trace:
        np.testing.assert_array_equal(growth, growth[::-1])
    else:
        np.testing.assert_array_equal(growth, 0)


@loops
def test_the_trace_does_not_grow_with_the_number_of_steps(loop):
    case = loop.case(2)

    def trace(n: int) -> int:
        gradient = jax.grad(
            lambda case: jnp.sum(loop.call(*case, jnp.int32(n) if loop.traced else n))
        )
        return equations(jax.make_jaxpr(gradient)(case).jaxpr)

    assert trace(16) == trace(64) == trace(256)


# 10. Eight devices give the answer of one


def on_eight_devices(call: Callable[..., Any], replicated: Any, split_over_batch: Any) -> Any:
    """Runs a function of two arguments; the batch axis of the second is split over devices."""
    mesh = jax.make_mesh((8, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        rows = jax.device_put(split_over_batch, NamedSharding(mesh, P("data")))
        return jax.jit(call)(jax.device_put(replicated, NamedSharding(mesh, P())), rows)


@smaller_subjects
def test_eight_devices_give_the_answer_of_one(subject):
    params, x, _, _ = subject.case(8, 5)

    def call(params: Any, x: Any) -> Any:
        return subject.run(params, x, subject.start(params, 8, 5), None)

    y, last = on_eight_devices(call, params, x)
    assert y.sharding.shard_shape(y.shape)[0] == 1
    start = jax.tree.map(np.asarray, subject.start(params, 8, 5))
    check_equals_the_loop(subject, (y, last), (params, x, start, None))


@each([s for s in SUBJECTS if s.trained])
def test_eight_devices_give_the_gradient_of_one(subject):
    params, x, _, _ = subject.case(8, 5)
    floats, join = split(params)

    def gradient(floats: Any, x: Any) -> Any:
        def loss(floats: Any) -> Any:
            params = join(floats)
            return jnp.sum(subject.run(params, x, subject.start(params, 8, 5), None)[0])

        return jax.grad(loss)(floats)

    one = jax.jit(gradient)(floats, x)
    assert_close(on_eight_devices(gradient, floats, x), one, subject.gradient_gap)


@loops
def test_eight_devices_give_the_answer_of_one_for_a_loop(loop):
    params, z = loop.case(8)
    n = jnp.int32(7) if loop.traced else 7
    eight = on_eight_devices(lambda params, z: loop.call(params, z, n), params, z)
    assert eight.sharding.shard_shape(eight.shape) == (1, 4)
    assert_close(eight, loop.jit(params, z, 7), 0)
