"""What pLSTM layers make of their input: gates, long-range transitions, queries, keys and values.

    S, M, D = act(b + W x);    T = O diag(f(lambda)) I    with O, I, lambda = b + W x, normalised

all per head, in float32 whatever the activations are: a decay of 0.9999 is 1 in bfloat16. A map may
read, instead of all channels, one of `sub_heads` equal parts of them for each of its heads.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 4 and appendix B.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.config import at_least, one_of
from jaxrec.layers.axes import merge_leading, over_rows
from jaxrec.ops import entries, orthogonal

Activation = Literal["logsigmoid", "tanh", "identity"]
Eigenvalues = Literal["tanh", "logsigmoid", "expexp"]
Normaliser = Literal[
    "exponential_orthogonalization",
    "householder_orthogonalization",
    "qr",
    "eigenvalue_restriction",
    "singularvalue_restriction",
]
NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """A source, a mark or a direct gate."""

    sub_heads: int = 1  # parts of the input, of which a head reads one
    weight: bool = True  # reads the input; else the gate is constant
    activation: Activation = "logsigmoid"
    activation_scale: float = 1.0  # s of sigmoid(z)^s, s tanh(z / s)
    bias_init: float = -4.0

    def __post_init__(self) -> None:
        at_least(self, 1, "sub_heads")
        one_of(self, "activation", get_args(Activation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """A long-range transition."""

    sub_heads: int = 1
    weight: bool = True
    eigenvalues: Eigenvalues = "tanh"
    eigenvalue_factor: float = 5.0
    normaliser: Normaliser = "exponential_orthogonalization"  # of O and I, where jt > 1
    normaliser_factor: float = 1.0  # of the skew matrix in the exponential
    normaliser_order: int = 16  # terms of the exponential, or power iterations
    symmetric: bool = False  # O = I^T

    def __post_init__(self) -> None:
        at_least(self, 1, "sub_heads", "normaliser_order")
        one_of(self, "eigenvalues", get_args(Eigenvalues))
        one_of(self, "normaliser", get_args(Normaliser))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransitionLayerConfig:
    """A long-range transition of its own, with its sizes."""

    width: int
    heads: int
    tracked: int  # jt
    options: TransitionConfig

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "heads", "tracked")

    def build(self, *, rngs: nnx.Rngs) -> "Transition":
        """A freshly initialised transition."""
        return Transition(self, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Queries, keys or values."""

    sub_heads: int = 1
    bias: bool = True
    normalised: bool = False  # divided by the root of their mean square over the axis j

    def __post_init__(self) -> None:
        at_least(self, 1, "sub_heads")


def small_init(inputs: int) -> Initializer:
    """Normal with variance 2 / (5 inputs)."""
    return jax.nn.initializers.normal((2 / (5 * inputs)) ** 0.5)


class HeadMap(nnx.Module):
    """b + W x for every head, (... h sizes), where each head reads its part of the channels.

    Heads are in rows of `sub_heads`: head h*sub_heads + s reads part s.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        sizes: tuple[int, ...],
        *,
        sub_heads: int,
        weight: bool = True,
        reads: bool = True,
        bias: Array,
        weight_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        if width % sub_heads or heads % sub_heads:
            raise ValueError(
                f"HeadMap: sub_heads {sub_heads} must divide the width {width} and the number of"
                f" heads {heads}."
            )
        axes = (None,) * len(sizes)
        self.bias = nnx.Param(jnp.broadcast_to(bias, (heads, *sizes)), axes=("heads", *axes))
        shape = (heads // sub_heads, sub_heads, *sizes, width // sub_heads)
        # Of heads that read parts, a part is a few channels, too few to be split further.
        rows = ("heads", None) if sub_heads == 1 else (None, "heads")
        channels = "embed" if sub_heads == 1 else None
        self.weight = (
            nnx.Param(weight_init(rngs.params(), shape, jnp.float32), axes=(*rows, *axes, channels))
            if weight
            else None
        )
        self.reads = reads

    def __call__(self, x: Array) -> Array:
        """Maps (... d) to (... h sizes), float32."""
        bias = self.bias[...].astype(jnp.float32)
        lead = x.shape[:-1]
        if self.weight is None or not self.reads:
            return jnp.broadcast_to(bias.reshape((1,) * len(lead) + bias.shape), lead + bias.shape)
        weight = self.weight[...]
        groups, sub_heads, *sizes, inputs = weight.shape
        flat = weight.reshape(groups, sub_heads, -1, inputs)
        y = _by_parts("...sd,gsfd->...gsf", x, flat)
        y = y.reshape(*lead, groups * sub_heads, *sizes).astype(jnp.float32)
        return y + bias.reshape((1,) * len(lead) + bias.shape)


def _by_parts(equation: str, x: Array, weight: Array) -> Array:
    """An einsum of weights (. s . d) with the s parts of the channels of x."""
    parts = weight.shape[-3] if equation == "...sd,gsfd->...gsf" else weight.shape[-2]
    lead = x.shape[:-1]
    split = merge_leading(x.astype(weight.dtype), 1)
    split = split.reshape(*split.shape[:-1], parts, -1)
    y = jnp.einsum(equation, split, weight)
    return y.reshape(*lead, *y.shape[split.ndim - 2 :])


class Gate(nnx.Module):
    """act(b + W x), (... h sizes)."""

    def __init__(
        self, config: GateConfig, width: int, heads: int, sizes: tuple[int, ...], *, rngs: nnx.Rngs
    ):
        self.config = config
        self.map = HeadMap(
            width,
            heads,
            sizes,
            sub_heads=config.sub_heads,
            weight=config.weight,
            bias=jnp.float32(config.bias_init),
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        """Maps (... d) to (... h sizes), float32."""
        z, scale = self.map(x), self.config.activation_scale
        if self.config.activation == "identity":
            return z
        if self.config.activation == "tanh":
            return scale * jnp.tanh(z / scale)
        return jnp.exp(scale * jax.nn.log_sigmoid(z))


class Transition(nnx.Module):
    """T = O diag(f(lambda)) I, (... h jt jt); for jt = 1 it is f(lambda) alone.

    f is tanh(factor z), sigmoid(z)^factor or exp(-factor exp(-z)). Weights are there even where
    they are not read, as in the original.
    """

    def __init__(self, config: TransitionLayerConfig, *, rngs: nnx.Rngs):
        self.config = config
        options, tracked = config.options, config.tracked

        def head_map(sizes: tuple[int, ...], bias: Array) -> HeadMap:
            return HeadMap(
                config.width,
                config.heads,
                sizes,
                sub_heads=options.sub_heads,
                reads=options.weight,
                bias=bias,
                rngs=rngs,
            )

        identity = jnp.eye(tracked)[None]
        self.eigenvalues = head_map((tracked,), jnp.float32(1.0))
        self.into = head_map((tracked, tracked), identity) if tracked > 1 else None
        apart = tracked > 1 and not options.symmetric
        self.out = head_map((tracked, tracked), identity) if apart else None

    def __call__(self, x: Array) -> Array:
        """Maps (... d) to (... h jt jt), float32."""
        values = self._activated(self.eigenvalues(x))
        if self.into is None:
            return values[..., None]
        into = self._normalised(self.into(x))
        out = jnp.swapaxes(into, -1, -2) if self.out is None else self._normalised(self.out(x))
        made = entries.product(entries.first(out), entries.first(values[..., :, None] * into))
        return entries.last(made)

    def _activated(self, z: Array) -> Array:
        factor = self.config.options.eigenvalue_factor
        if self.config.options.eigenvalues == "tanh":
            return jnp.tanh(factor * z)
        if self.config.options.eigenvalues == "logsigmoid":
            return jnp.exp(factor * jax.nn.log_sigmoid(z))
        return jnp.exp(-factor * jnp.exp(-z))

    def _normalised(self, z: Array) -> Array:
        options = self.config.options
        order = options.normaliser_order
        with jax.default_matmul_precision("highest"):
            match options.normaliser:
                case "exponential_orthogonalization":
                    # XLA does not split the loops of the series by rows of its own accord.
                    series = functools.partial(
                        orthogonal.exponential, factor=options.normaliser_factor, order=order
                    )
                    return over_rows(series, z)
                case "householder_orthogonalization":
                    return orthogonal.householder(z)
                case "qr":
                    return orthogonal.qr(z)
                case "eigenvalue_restriction":
                    return orthogonal.bounded_eigenvalue(z, order)
                case _:
                    return orthogonal.bounded_singular_value(z, order)


class Projection(nnx.Module):
    """Queries, keys or values, (... h k j), in the activations' dtype.

    With more parts than heads a head's channels are made of several parts, each of its own; with
    fewer, every head reads all parts.
    """

    def __init__(
        self,
        config: ProjectionConfig,
        width: int,
        heads: int,
        keys: int,
        tracked: int,
        *,
        rngs: nnx.Rngs,
    ):
        each = max(1, config.sub_heads // heads)
        made = max(1, heads // config.sub_heads) * config.sub_heads * (keys // each)
        if width % config.sub_heads or keys % each or made != heads * keys:
            raise ValueError(
                f"Projection: {config.sub_heads} sub_heads of {width} channels cannot make {heads}"
                f" heads of {keys}."
            )
        self.config = config
        inputs = width // config.sub_heads
        shape = (max(1, heads // config.sub_heads), keys // each, tracked, config.sub_heads, inputs)
        self.weight = nnx.Param(
            small_init(inputs)(rngs.params(), shape, jnp.float32),
            axes=("heads", None, None, None, "embed")
            if config.sub_heads == 1
            else (None, None, None, "heads", None),  # parts, of which a head makes its channels
        )
        self.bias = (
            nnx.Param(jnp.zeros((heads, keys, tracked)), axes=("heads", None, None))
            if config.bias
            else None
        )
        self.sizes = heads, keys, tracked

    def __call__(self, x: Array) -> Array:
        """Maps (... d) to (... h k j)."""
        y = _by_parts("...sd,gkjsd->...gskj", x, self.weight[...])
        y = y.reshape(*x.shape[:-1], *self.sizes)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype).reshape((1,) * (x.ndim - 1) + self.sizes)
        if not self.config.normalised:
            return y
        wide = y.astype(jnp.float32)
        size = jnp.mean(wide**2, axis=-1, keepdims=True) + NORM_EPSILON
        return (wide * jax.lax.rsqrt(size)).astype(y.dtype)
