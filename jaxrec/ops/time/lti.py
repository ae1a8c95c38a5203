"""The two views of a linear time-invariant system: a recurrence, and a convolution with its kernel.

    x_t = A_bar x_{t-1} + B_bar u_t,  y_t = C x_t      recurrent: streams, carries a state
    y = K * u,  K_j = C A_bar^j B_bar                  convolutional: parallel over time, by FFT

Each channel of u has a system of its own, dense or diagonal. The recurrence of a diagonal one is
`linear_scan`; its states and kernel may be complex, and what of them is real is the caller's.

Gu et al., Combining recurrent, convolutional, and continuous-time models with linear state-space
layers (2021), arXiv:2110.13985, section 3; Gu et al., On the parameterization and initialization of
diagonal state space models (2022), arXiv:2206.11893, section 3.2.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jaxrec.ops.time.sharded import from_all, on_devices

# Accelerators multiply float32 with fewer digits unless told; powers would gather that error.
EXACT = lax.Precision.HIGHEST


def fft_conv(u: Array, kernel: Array) -> Array:
    """Causal convolution y_t = sum_j kernel_j u_{t-j}, over the whole past.

    Computed in float32 whatever comes in: the transform mixes all steps, and in bfloat16 the small
    ones drown. Its length, the power of two from t + s - 1 on, leaves no wrap-around.

    Args:
      u: input (b t ...).
      kernel: (s ...); the further axes broadcast with those of u, and as many.

    Returns:
      float32 (b t ...).

    Raises:
      ValueError: shapes do not fit.
    """
    if u.ndim < 2 or kernel.ndim != u.ndim - 1:
        raise ValueError(
            f"fft_conv: u must be (b t ...) and kernel (s ...), got {u.shape} and {kernel.shape}."
        )
    time = u.shape[1]
    kernel = kernel[:time]
    length = 2 ** math.ceil(math.log2(max(1, time + kernel.shape[0] - 1)))
    spectrum = jnp.fft.rfft(u.astype(jnp.float32), length, axis=1)
    response = jnp.fft.rfft(kernel.astype(jnp.float32), length, axis=0)
    return jnp.fft.irfft(spectrum * response[None], length, axis=1)[:, :time]


def krylov(a_bar: Array, b_bar: Array, length: int) -> Array:
    """B_bar, A_bar B_bar, A_bar^2 B_bar, ... by doubling: log2(length) products of matrices.

    In float32 the powers of a matrix far from normal, such as LegS, lose digits with the length.

    Args:
      a_bar: (d n n).
      b_bar: (d n).
      length: number of columns, >= 1.

    Returns:
      (d n length).
    """
    columns, power = b_bar[..., None], a_bar
    while columns.shape[-1] < length:
        more = jnp.matmul(power, columns, precision=EXACT)
        columns = jnp.concatenate([columns, more], axis=-1)
        if columns.shape[-1] < length:
            power = jnp.matmul(power, power, precision=EXACT)
    return columns[..., :length]


def dense_conv(a_bar: Array, b_bar: Array, c: Array, u: Array) -> tuple[Array, Array]:
    """The convolutional view of dense systems that begin at zero.

    Args:
      a_bar: (d n n).
      b_bar: (d n).
      c: m outputs for each channel (d m n).
      u: input (b t d), float32.

    Returns:
      y (b t d m), and the state after the last step (b d n).
    """
    columns = krylov(a_bar, b_bar, u.shape[1])
    y = fft_conv(u[..., None], jnp.einsum("dmn,dnt->tdm", c, columns))
    return y, jnp.einsum("dnt,btd->bdn", columns[..., ::-1], u)


def sharded_dense_conv(
    a_bar: Array, b_bar: Array, c: Array, u: Array, *, axis: str
) -> tuple[Array, Array]:
    """`dense_conv` over the devices of one axis of the current mesh, whose size divides t.

    Every device convolves its own steps as if it began at zero. The states in which they end are
    sent to all, (b d n) each; what enters a device is a sum of them, and adds C A_bar^(j+1) x to
    its output. Arguments and results are those of `dense_conv`, time spread over the axis.
    """

    def run(a_bar: Array, b_bar: Array, c: Array, u: Array) -> tuple[Array, Array]:
        time = u.shape[1]
        y, alone = dense_conv(a_bar, b_bar, c, u)
        # C, C A_bar, C A_bar^2 ... are the columns of the transposed system.
        transposed = jnp.swapaxes(a_bar, -1, -2)
        rows = jax.vmap(lambda row: krylov(transposed, row, time + 1), in_axes=1, out_axes=1)(c)
        with jax.default_matmul_precision("highest"):
            power = jnp.linalg.matrix_power(a_bar, time)

        def step(x: Array, one: Array) -> tuple[Array, Array]:
            return jnp.einsum("dnk,bdk->bdn", power, x, precision=EXACT) + one, x

        every = from_all(alone, axis)
        last, entering = lax.scan(step, jnp.zeros_like(alone), every)
        enters = lax.dynamic_index_in_dim(entering, lax.axis_index(axis), keepdims=False)
        return y + jnp.einsum("dmnt,bdn->btdm", rows[..., 1:], enters, precision=EXACT), last

    over_time, everywhere = PartitionSpec(None, axis), PartitionSpec()
    places = (everywhere, everywhere, everywhere, over_time)
    return on_devices(run, axis, places, (over_time, everywhere))(a_bar, b_bar, c, u)


def dense_scan(
    a_bar: Array,
    b_bar: Array,
    c: Array,
    u: Array,
    state: Array,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """The recurrent view of dense systems, one step after another, in the dtype of the state.

    Args:
      a_bar: (d n n).
      b_bar: (d n).
      c: m outputs for each channel (d m n).
      u: input (b t d).
      state: x before the first step (b d n).
      reset: bool (b t), True = the state that enters this step is zero.

    Returns:
      y (b t d m) in the dtype of the state, and the last state.
    """
    a_bar, b_bar, c = (x.astype(state.dtype) for x in (a_bar, b_bar, c))
    if reset is None:
        reset = jnp.zeros(u.shape[:2], jnp.bool_)

    def step(x: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        u_t, reset_t = inputs
        x = jnp.where(reset_t[:, None, None], jnp.zeros((), x.dtype), x)
        driven = b_bar[None] * u_t[..., None].astype(x.dtype)
        x = jnp.einsum("dnk,bdk->bdn", a_bar, x, precision=EXACT) + driven
        return x, jnp.einsum("dmn,bdn->bdm", c, x, precision=EXACT)

    last, y = lax.scan(step, state, (jnp.swapaxes(u, 0, 1), jnp.swapaxes(reset, 0, 1)))
    return jnp.swapaxes(y, 0, 1), last


def diagonal_kernel(log_decay: Array, weight: Array, length: int) -> Array:
    """K_j = sum_n weight_n exp(j log_decay_n), a Vandermonde product.

    The power j is split as q c + r, and K is a product of one matrix with the powers q c and one
    with the powers r: about 2 sqrt(length) exponentials for each state instead of `length`, which
    are never all in memory. Nothing underflows before its true value does.

    Args:
      log_decay: log A_bar (d n), real part <= 0 keeps K bounded; dt lambda under zero-order hold.
      weight: C B_bar (d n).
      length: number of taps, >= 1.

    Returns:
      (length d), real or complex as its arguments.
    """
    rows, chunk = _split(length)
    coarse, fine = _powers(log_decay, chunk, rows), _powers(log_decay, 1, chunk)
    kernel = jnp.einsum("qdn,rdn->qrd", weight[None] * coarse, fine, precision=EXACT)
    return kernel.reshape(rows * chunk, -1)[:length]


def diagonal_last_state(log_decay: Array, gain: Array, u: Array) -> Array:
    """The state in which a diagonal system that began at zero ends, without its recurrence.

    x_T = sum_t exp((T - t) log_decay) gain u_t, with the powers split as in `diagonal_kernel`: what
    lets a stream go on after its beginning was convolved.

    Args:
      log_decay: log A_bar (d n).
      gain: B_bar (d n).
      u: input (b t d).

    Returns:
      (b d n) in the dtype of log_decay.
    """
    rows, chunk = _split(u.shape[1])
    backwards = jnp.flip(u, 1).astype(log_decay.dtype)  # the last input has the power 0
    padding = [(0, 0), (0, rows * chunk - u.shape[1]), (0, 0)]
    blocks = jnp.pad(backwards, padding).reshape(u.shape[0], rows, chunk, -1)
    coarse, fine = _powers(log_decay, chunk, rows), _powers(log_decay, 1, chunk)
    ends = jnp.einsum("bqrd,rdn->bqdn", blocks, fine, precision=EXACT)
    return gain[None] * jnp.einsum("bqdn,qdn->bdn", ends, coarse, precision=EXACT)


def _split(length: int) -> tuple[int, int]:
    """Rows and length of the chunks of about the root of a length that cover it."""
    chunk = max(1, math.isqrt(length))
    return -(-length // chunk), chunk


def _powers(log_decay: Array, stride: int, count: int) -> Array:
    """exp(j log_decay) for j = 0, stride, 2 stride, ...: (count d n)."""
    exponents = (stride * jnp.arange(count)).astype(log_decay.dtype)
    return jnp.exp(exponents[:, None, None] * log_decay[None])
