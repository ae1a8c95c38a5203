"""What `jaxrec check` runs: every op, at small sizes, by each of its methods."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.ops import attention
from jaxrec.ops.conv import causal_conv
from jaxrec.ops.depth import iterate, remat_scan
from jaxrec.ops.depth.halting import Rule, adaptive_loop
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
    dense_scan,
    fft_conv,
    grid_scan,
    linear_scan,
    mark_scan,
    matrix_scan,
    mlstm_scan,
    running_max,
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
from jaxrec.ops.time.running_max import Method as MaxMethod
from jaxrec.ops.time.scan import Method as LinearMethod
from jaxrec.ops.time.selective import Method as SelectiveMethod

BATCH, TIME, CHUNK = 2, 48, 8
ALONE = "one device"
"""How the definition is called where other methods have their names over devices too."""
SETTLED = 0.4
"""An element of a loop that changes less is done: one of two, after four loops of seven."""
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

    rng = _rng("dense")
    dense = _normal("dense", u=(TIME, 3), state=(3, 4))
    dense |= {"a_bar": 0.4 * rng.normal(size=(3, 4, 4)), "b_bar": rng.normal(size=(3, 4))}
    dense |= {"c": rng.normal(size=(3, 2, 4))}

    def scan(**options: Any) -> Callable[..., Any]:
        return lambda method, **x: linear_scan(**x, method=method, **options)

    def densely(method: Any, **x: Any) -> Any:
        if method == "op":
            return dense_scan(**x, reset=jnp.asarray(_resets()))
        state, outputs = x["state"], []
        for t in range(TIME):
            state = jnp.where(_resets()[:, t, None, None], 0, state)
            state = jnp.einsum("dij,bdj->bdi", x["a_bar"], state)
            state += x["b_bar"][None] * x["u"][:, t, :, None]
            outputs.append(jnp.einsum("dmn,bdn->bdm", x["c"], state))
        return jnp.stack(outputs, axis=1), state

    return [
        Case("linear_scan", "real", methods, x, scan()),
        Case("linear_scan", "complex", methods, turned, scan()),
        Case("linear_scan", "reverse", methods, x, scan(reverse=True)),
        Case("linear_scan", "resets", methods, x, scan(reset=_resets())),
        Case("block_scan", "", methods, blocks, lambda method, **x: block_scan(**x, method=method)),
        Case("dense_scan", "resets", ("loop", "op"), dense, densely),
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


def _gated_memory() -> Inputs:
    qkv = {"q": (TIME, 2, 4), "k": (TIME, 2, 4), "v": (TIME, 2, 3)}
    x = _normal("mlstm", **qkv, input_gate=(TIME, 2), log_forget=(TIME, 2))
    return x | {"log_forget": -np.log1p(np.exp(-x["log_forget"]))}


def _weighted_mean() -> Inputs:
    x = _normal("wkv", k=(TIME, 3), v=(TIME, 3))
    return x | {"rate": _rng("rate").uniform(0.1, 2, 3), "bonus": _rng("bonus").normal(size=3)}


def _direct_mean(k: Array, v: Array, rate: Array, bonus: Array) -> Array:
    """The mean of `wkv` with all its weights side by side."""
    ago = jnp.arange(TIME)[:, None] - jnp.arange(TIME)[None]
    steps = (ago - 1).astype(k.dtype)[None, ..., None]
    past = k[:, None] - steps * rate[None, None, None]
    present = k[:, None] + bonus[None, None, None]
    weights = jnp.where((ago > 0)[None, ..., None], past, -jnp.inf)
    weights = jnp.where((ago == 0)[None, ..., None], present, weights)
    return jnp.einsum("btse,bse->bte", jax.nn.softmax(weights, axis=2), v)


def _stabilised() -> list[Case]:
    """Exponential gates, whose scale is taken out."""
    memory = _gated_memory()
    maximum = _normal("maximum", log_decay=(TIME, 3), x=(TIME, 3), m0=(3,))
    maximum["log_decay"] = -np.abs(maximum["log_decay"])
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
        Case(
            "running_max",
            "resets",
            _methods(MaxMethod),
            maximum,
            lambda method, **x: running_max(**x, reset=jnp.asarray(_resets()), method=method),
        ),
        Case(
            "wkv",
            "",
            ("direct", "op"),
            _weighted_mean(),
            lambda method, **x: _direct_mean(**x) if method == "direct" else wkv(**x)[0],
        ),
        Case("slstm", "", ("sequential", "newton"), scalar, slstm),
    ]


STRUCTURES = {"diagonal": 1, "block": 2, "dense": 4}
"""How many of the four numbers of the tanh cell mix: none, pairs or all."""


def _cell(structure: str) -> Inputs:
    size = STRUCTURES[structure]
    x = _normal(structure, x=(TIME, size, 4 // size), h0=(size, 4 // size))
    return x | {"params": 0.5 * _rng("mix").normal(size=(size, size, 4 // size))}


def _cell_scan(structure: str, **options: Any) -> Callable[..., Any]:
    def step(params: Array, h: Array, x: Array) -> Array:
        return jnp.tanh(x + jnp.einsum("ijn,bjn->bin", params, h))

    def scan(method: Any, params: Array, x: Array, h0: Array) -> Any:
        how: dict[str, Any] = {"jacobian": structure, "method": method, "check": False} | options
        if method == ALONE:
            how |= {"method": "sequential", "axis": None}
        return newton_scan(step, params, x, h0, **how)[0]

    return scan


def _nonlinear() -> list[Case]:
    methods = _methods(NewtonMethod)
    without_kernel = tuple(method for method in methods if method != "pallas")
    of = {"diagonal": methods, "block": methods, "dense": without_kernel}
    found = [
        Case("newton_scan", structure, of[structure], _cell(structure), _cell_scan(structure))
        for structure in STRUCTURES
    ]
    windows = _cell_scan("block", window=CHUNK + 3)  # the last window is a part of one
    return [*found, Case("newton_scan", "block, windows", methods, _cell("block"), windows)]


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

    def settles(new: Array, old: Array) -> Array:
        return jnp.max(jnp.abs(new - old), axis=-1) < SETTLED

    def halted(method: str, w: Array, z: Array) -> Any:
        def step(z: Array) -> Array:
            return jnp.tanh(z @ w)

        if method == "sequential":
            is_done = jnp.zeros(z.shape[0], bool)
            for _ in range(loops):
                new = step(z)
                z, is_done = jnp.where(is_done[:, None], z, new), is_done | settles(new, z)
            return z
        n = jnp.int32(loops) if method == "traced" else loops
        graded = iterate(step, z, n, until=settles, grad_steps=loops)[0]
        if method != "ends early":
            return graded
        return _graded_by(iterate(step, *lax.stop_gradient((z, n)), until=settles)[0], graded)

    x = _normal("loop", z=(4,)) | {"w": _rng("step").normal(size=(4, 4)) * 0.5}
    return [
        Case("iterate", "", ("sequential", "static", "traced"), x, loop),
        Case(
            "iterate", "until settled", ("sequential", "static", "traced", "ends early"), x, halted
        ),
        Case("remat_scan", "", ("sequential", *REMAT_POLICIES), x, loop),
        *(_adaptive(rule) for rule in get_args(Rule)),
    ]


def _graded_by(value: Array, other: Array) -> Array:
    """A value that has no gradient, with that of another form of it."""
    return lax.stop_gradient(value) + (other - lax.stop_gradient(other))


def _adaptive(rule: Any) -> Case:
    """Adaptive computation time, with at most five loops."""
    loops, enough = 5, 0.99

    def loop(method: str, state: Array, w: Array, halt: Array) -> Any:
        def prepare(state: Array, t: Any) -> Array:
            return state + 0.1 * jnp.asarray(t, state.dtype)

        def probability(x: Array) -> Array:
            return jax.nn.sigmoid(x @ halt)

        def run(is_differentiable: bool) -> tuple[Array, Array]:
            end = adaptive_loop(
                lambda x, t, memory: (jnp.tanh(x @ w), memory),
                probability,
                prepare,
                state,
                loops,
                rule=rule,
                differentiable=is_differentiable,
            )
            return end.halting.output, end.ponder

        if method == "scan":
            return run(True)
        if method == "ends early":
            return jax.tree.map(_graded_by, run(False), run(True))
        halted = remainder = updates = jnp.zeros(state.shape[:2], state.dtype)
        output = jnp.zeros_like(state)
        for t in range(loops):
            x = prepare(state, t)
            p, new, is_running = probability(x), jnp.tanh(x @ w), halted < 1
            ends = is_running & (halted + p > enough)
            weight = jnp.where(is_running, jnp.where(ends, 1 - halted, p), 0)
            remainder += jnp.where(ends, 1 - halted, 0)
            updates += jnp.where(is_running, 1.0, 0.0)
            halted = jnp.where(ends, 1, halted + weight)
            kept = 1 - weight if rule == "interpolate" else jnp.ones_like(weight)
            output = kept[..., None] * output + weight[..., None] * new
            stays = (rule == "copy-halted") & ~is_running
            state = jnp.where(stays[..., None], state, new)
        return output, updates + remainder

    x = _normal("adaptive", state=(6, 4)) | {"w": _rng("loops").normal(size=(4, 4)) * 0.5}
    x |= {"halt": _rng("halt").normal(size=4)}
    return Case("adaptive_loop", rule, ("loop", "scan", "ends early"), x, loop)


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

    def quotient(x: Array) -> Array:
        s = jnp.where(x >= 0, x + 1, 1 / (1 - jnp.minimum(x, 0)))
        return jnp.log(s / jnp.sum(s, axis=-1, keepdims=True))

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
            ("quotient", "op"),
            _normal("logits", x=(TIME,)),
            lambda method, x: quotient(x) if method == "quotient" else log_stablemax(x),
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

    def mean(method: Any, **x: Any) -> Any:
        return _direct_mean(**x) if method == "direct" else wkv(**x, axis="seq")[0]

    def memory(method: Any, **x: Any) -> Any:
        if method == ALONE:
            return mlstm_scan(**x, method="sequential")[0]
        return mlstm_scan(**x, axis="seq")[0]

    methods = ("sequential", *EXCHANGES)
    newton = (ALONE, "sequential", "auto", "newton", "quasi_newton")  # filters are not spread
    return [
        Case("linear_scan", "over devices", methods, _decays(), linear, True),
        Case("selective_scan", "over devices", methods, _selective(), selective, True),
        *(
            Case("matrix_scan", f"{rule}, over devices", methods, x, matrix(rule), True)
            for rule, x in ((rule, _matrix(rule, "key")) for rule in ("gated", "delta"))
        ),
        Case("wkv", "over devices", ("direct", "op"), _weighted_mean(), mean, True),
        Case("mlstm_scan", "over devices", (ALONE, "op"), _gated_memory(), memory, True),
        *(
            Case("newton_scan", f"{structure}, over devices", newton, _cell(structure), scan, True)
            for structure in STRUCTURES
            for scan in (_cell_scan(structure, axis="seq"),)
        ),
    ]
