"""What `jaxrec check` runs: every op, at small sizes, by each of its methods."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.ops import attention
from jaxrec.ops.conv import causal_conv
from jaxrec.ops.depth import iterate, remat_scan
from jaxrec.ops.depth.remat import REMAT_POLICIES
from jaxrec.ops.newton import newton_scan, slstm_newton_scan
from jaxrec.ops.newton.checks import Method as NewtonMethod
from jaxrec.ops.stablemax import log_stablemax
from jaxrec.ops.time import (
    GridGates,
    block_scan,
    dag,
    dag_batch,
    dag_scan,
    fft_conv,
    grid_scan,
    linear_scan,
    mark_scan,
    matrix_scan,
    mlstm_scan,
    selective_scan,
    sharded_linear_scan,
    sharded_matrix_scan,
    sharded_selective_scan,
    slstm_scan,
    wkv,
)
from jaxrec.ops.time.grid_scan import Method as GridMethod
from jaxrec.ops.time.mark_scan import Method as MarkMethod
from jaxrec.ops.time.matrix_scan import Method as MatrixMethod
from jaxrec.ops.time.scan import Method as LinearMethod
from jaxrec.ops.time.selective import Method as SelectiveMethod

BATCH, TIME, CHUNK = 2, 48, 8
LARGEST_SPREAD = 16
"""Devices over which time is spread at most; it divides the length."""
EXCHANGES = ("all_gather", "ppermute")

Inputs = dict[str, Any]


class Case(NamedTuple):
    """An op at one set of options."""

    op: str
    options: str  # told from others of the op
    methods: tuple[str, ...]  # the first is the definition
    inputs: Inputs  # pytrees of float64 or complex128
    run: Callable[..., Any]  # (method, **inputs) -> arrays
    spread: bool = False  # over the axis seq, but for the definition


def cases() -> list[Case]:
    """All that is checked; what is spread over devices, where there are several."""
    found = [*_diagonal(), *_matrices(), *_marks(), *_stabilised(), *_nonlinear(), *_depth()]
    found += _others()
    return found + (_spread() if spread_over() > 1 else [])


def spread_over() -> int:
    """Over how many devices time is spread: a power of two."""
    return min(2 ** (jax.device_count().bit_length() - 1), LARGEST_SPREAD)


def _rng(seed: str) -> np.random.Generator:
    """Draws that stay the same when other cases come or go."""
    return np.random.default_rng(zlib.crc32(seed.encode()))


def _normal(seed: str, **shapes: tuple[int, ...]) -> Inputs:
    rng = _rng(seed)
    return {name: rng.normal(size=(BATCH, *shape)) for name, shape in shapes.items()}


def _methods(kind: Any, definition: str = "sequential") -> tuple[str, ...]:
    """Those of an op, the definition first."""
    return (definition, *(name for name in get_args(kind) if name != definition))


def _resets() -> np.ndarray:
    return _rng("resets").random((BATCH, TIME)) < 0.2


def _decays() -> Inputs:
    x = _normal("decays", a=(TIME, 3), b=(TIME, 3), h0=(3,))
    return x | {"a": np.tanh(x["a"])}


def _selective() -> Inputs:
    x = _normal("selective", x=(TIME, 4), b=(TIME, 3), c=(TIME, 3), dt=(TIME, 4), state=(4, 3))
    return x | {"dt": np.log1p(np.exp(x["dt"])), "a": -_rng("rates").uniform(0.1, 2, (4, 3))}


def _diagonal() -> list[Case]:
    methods, x = _methods(LinearMethod), _decays()
    phases = {name: np.exp(1j * _rng(name).uniform(0, 6, z.shape)) for name, z in x.items()}
    turned = {name: z * phases[name] for name, z in x.items()}
    blocks = _normal("blocks", a=(TIME, 2, 2, 3), b=(TIME, 2, 3), h0=(2, 3))
    blocks["a"] *= 0.5

    def scan(**options: Any) -> Callable[..., Any]:
        return lambda method, **x: linear_scan(**x, method=method, **options)

    return [
        Case("linear_scan", "real", methods, x, scan()),
        Case("linear_scan", "complex", methods, turned, scan()),
        Case("linear_scan", "reverse", methods, x, scan(reverse=True)),
        Case("linear_scan", "resets", methods, x, scan(reset=_resets())),
        Case("block_scan", "", methods, blocks, lambda method, **x: block_scan(**x, method=method)),
        Case(
            "selective_scan",
            "",
            _methods(SelectiveMethod),
            _selective(),
            lambda method, **x: selective_scan(**x, chunk=CHUNK, method=method),
        ),
    ]


def _matrix(rule: str, decay: str) -> Inputs:
    """Keys of length 1; a decay of each head or key, or none."""
    qkv = {"q": (TIME, 2, 4), "k": (TIME, 2, 4), "v": (TIME, 2, 3)}
    x = _normal("matrix", **qkv, log_decay=(TIME, 2, 4), beta=(TIME, 2), state=(2, 4, 3))
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    x["log_decay"] = -np.abs(x["log_decay"])
    if decay == "head":
        x["log_decay"] = x["log_decay"][..., 0]
    elif decay == "none":
        del x["log_decay"]
    x["beta"] = 1 / (1 + np.exp(-x["beta"]))
    if rule == "gated":
        del x["beta"]
    return x


def _matrices() -> list[Case]:
    def scan(rule: Any) -> Callable[..., Any]:
        return lambda method, **x: matrix_scan(**x, rule=rule, chunk=CHUNK, method=method)

    return [
        Case(
            "matrix_scan",
            f"{rule}, decay: {decay}",
            _methods(MatrixMethod),
            _matrix(rule, decay),
            scan(rule),
        )
        for rule in ("gated", "delta")
        for decay in ("none", "head", "key")
    ]


def _marks() -> list[Case]:
    """Source, transition, mark: on sequences, grids and graphs."""
    qkv = {"q": (TIME, 2, 4, 1), "k": (TIME, 2, 4, 1), "v": (TIME, 2, 3, 1)}
    sizes = {"source": (2, 1, 1), "transition": (2, 2), "mark": (1, 1, 2), "direct": (1, 1, 1, 1)}
    line = _normal("line", **qkv, **{name: (TIME, 2, *size) for name, size in sizes.items()})
    line["transition"] *= 0.4
    nodes = (5, 7, 2)
    grid = _normal("grid", q=(*nodes, 4), k=(*nodes, 4), v=(*nodes, 3), direct=nodes)
    gates = _normal("gates", **dict.fromkeys(GridGates._fields, nodes))
    grid["gates"] = GridGates(
        *(0.4 * np.tanh(x) if name.startswith("transition") else x for name, x in gates.items())
    )
    # Every node passes on to the next two.
    ends = [(i, i + step) for i in range(9) for step in (1, 2) if i + step < 9]
    dags = dag_batch([dag(9, ends)] * BATCH)
    edges, pairs = dags.tails.shape[1], dags.origins.shape[1]
    graph = _normal("graph", q=(9, 2, 4), k=(9, 2, 4), v=(9, 2, 3), direct=(9, 2))
    graph |= _normal("edges", source=(edges, 2), mark=(edges, 2), transition=(pairs, 2))
    graph["transition"] *= 0.4

    def on_grid(method: Any, **x: Any) -> Array:
        if method == "tiles":
            return grid_scan(**x, tile=3)
        return grid_scan(**x, method=method)

    return [
        Case(
            "mark_scan",
            "",
            _methods(MarkMethod),
            line,
            lambda method, **x: mark_scan(**x, chunk=CHUNK, method=method),
        ),
        Case("grid_scan", "", (*_methods(GridMethod), "tiles"), grid, on_grid),
        Case(
            "dag_scan",
            "",
            ("states", "paths", "auto"),
            graph,
            lambda method, **x: dag_scan(**x, dags=dags, method=method),
        ),
    ]


def _stabilised() -> list[Case]:
    """Exponential gates, whose scale is taken out."""
    qkv = {"q": (TIME, 2, 4), "k": (TIME, 2, 4), "v": (TIME, 2, 3)}
    memory = _normal("mlstm", **qkv, input_gate=(TIME, 2), log_forget=(TIME, 2))
    memory["log_forget"] = -np.log1p(np.exp(-memory["log_forget"]))
    mean = _normal("wkv", k=(TIME, 3), v=(TIME, 3))
    mean |= {"rate": _rng("rate").uniform(0.1, 2, 3), "bonus": _rng("bonus").normal(size=3)}
    scalar = _normal("slstm", x=(TIME, 4, 2, 3))
    scalar["recurrent"] = 0.4 * _rng("recurrent").normal(size=(4, 2, 3, 3))

    def slstm(method: Any, **x: Any) -> Array:
        if method == "sequential":
            return slstm_scan(**x)[0]
        return slstm_newton_scan(**x, method=method)[0]

    return [
        Case(
            "mlstm_scan",
            "",
            _methods(MatrixMethod),
            memory,
            lambda method, **x: mlstm_scan(**x, chunk=CHUNK, method=method)[0],
        ),
        Case("wkv", "", ("associative",), mean, lambda method, **x: wkv(**x)[0]),
        Case("slstm", "", ("sequential", "newton"), scalar, slstm),
    ]


def _nonlinear() -> list[Case]:
    """A tanh cell whose four numbers mix in no, in pairs, or all."""

    def step(params: Array, h: Array, x: Array) -> Array:
        return jnp.tanh(x + jnp.einsum("ijn,bjn->bin", params, h))

    found = []
    for structure, size in (("diagonal", 1), ("block", 2), ("dense", 4)):
        x = _normal(structure, x=(TIME, size, 4 // size), h0=(size, 4 // size))
        x["params"] = 0.5 * _rng("mix").normal(size=(size, size, 4 // size))

        def scan(
            method: Any, params: Array, x: Array, h0: Array, structure: Any = structure
        ) -> Any:
            def step(params: Array, h: Array, x: Array) -> Array:
                return jnp.tanh(x + jnp.einsum("ijn,bjn->bin", params, h))

            options = {"jacobian": structure, "method": method, "check": False}
            return newton_scan(step, params, x, h0, **options)[0]

        found.append(Case("newton_scan", structure, _methods(NewtonMethod), x, scan))
    return found


def _depth() -> list[Case]:
    loops = 7

    def loop(method: str, w: Array, z: Array) -> Any:
        def step(z: Array) -> Array:
            return jnp.tanh(z @ w)

        if method == "sequential":
            for _ in range(loops):
                z = step(z)
            return z
        if method == "traced":
            return iterate(step, z, jnp.int32(loops), grad_steps=loops + 2)[0]
        if method in REMAT_POLICIES:
            policy: Any = method
            return remat_scan(lambda z, _: (step(z), None), z, None, length=loops, remat=policy)[0]
        return iterate(step, z, loops)[0]

    x = _normal("loop", z=(4,)) | {"w": _rng("step").normal(size=(4, 4)) * 0.5}
    return [
        Case("iterate", "", ("sequential", "static", "traced"), x, loop),
        Case("remat_scan", "", ("sequential", *REMAT_POLICIES), x, loop),
    ]


def _others() -> list[Case]:
    causal = np.tril(np.ones((TIME, TIME), bool))

    def attend(method: Any, q: Array, k: Array, v: Array) -> Array:
        if method == "softmax":
            k, v = (jnp.repeat(z, 2, axis=2) for z in (k, v))
            scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -jnp.inf))
            return jnp.einsum("bhts,bshk->bthk", weights, v)
        view, _ = attention.open_view(None, (BATCH, TIME))
        return attention.attend(q, k, v, view, method=method)

    def convolved(method: Any, u: Array, kernel: Array) -> Array:
        if method == "fft":
            return fft_conv(u, kernel)
        padded = jnp.pad(u, ((0, 0), (TIME - 1, 0), (0, 0)))
        return sum(
            (
                kernel[s][None, None] * padded[:, TIME - 1 - s : 2 * TIME - 1 - s]
                for s in range(TIME)
            ),
            jnp.zeros((), u.dtype),
        )

    def short(method: Any, x: Array, kernel: Array, bias: Array) -> Array:
        if method == "op":
            nothing = jnp.zeros_like(x, shape=(BATCH, kernel.shape[0] - 1, x.shape[2]))
            return causal_conv(x, kernel, bias, nothing)[0]
        taps = kernel.shape[0]
        padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
        return sum(
            (kernel[i][None, None] * padded[:, i : i + TIME] for i in range(taps)), bias[None, None]
        )

    rng = _rng("kernels")
    taps = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    return [
        Case(
            "attend",
            "causal, grouped heads",
            ("softmax", *get_args(attention.Method)),
            _normal("attend", q=(TIME, 4, 8), k=(TIME, 2, 8), v=(TIME, 2, 8)),
            attend,
        ),
        Case(
            "fft_conv",
            "",
            ("sum", "fft"),
            _normal("fft", u=(TIME, 3)) | {"kernel": rng.normal(size=(TIME, 3))},
            convolved,
        ),
        Case(
            "causal_conv",
            "",
            ("sum", "op"),
            _normal("conv", x=(TIME, 3)) | taps,
            short,
        ),
        Case(
            "log_stablemax",
            "",
            ("op",),
            _normal("logits", x=(TIME,)),
            lambda method, x: log_stablemax(x),
        ),
    ]


def _spread() -> list[Case]:
    """Time over all devices, by both ways of exchanging what each has found."""

    def linear(method: Any, **x: Any) -> Any:
        if method == "sequential":
            return linear_scan(**x, method=method)
        return sharded_linear_scan(**x, axis="seq", exchange=method)

    def selective(method: Any, **x: Any) -> Any:
        if method == "sequential":
            return selective_scan(**x, method=method)
        return sharded_selective_scan(**x, axis="seq", exchange=method)

    def matrix(rule: Any) -> Callable[..., Any]:
        def scan(method: Any, **x: Any) -> Any:
            if method == "sequential":
                return matrix_scan(**x, rule=rule, method=method)
            return sharded_matrix_scan(**x, rule=rule, axis="seq", exchange=method)

        return scan

    methods = ("sequential", *EXCHANGES)
    return [
        Case("linear_scan", "over devices", methods, _decays(), linear, True),
        Case("selective_scan", "over devices", methods, _selective(), selective, True),
        *(
            Case("matrix_scan", f"{rule}, over devices", methods, x, matrix(rule), True)
            for rule, x in ((rule, _matrix(rule, "key")) for rule in ("gated", "delta"))
        ),
    ]
