# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Recurrences in time
#
# $$h_t = a_t \, h_{t-1} + b_t$$
#
# One line, and most of the field: state-space layers, gated linear units, selective scans differ in
# where $a$ and $b$ come from. `linear_scan` runs it, with a gradient that is the same line run
# backwards.

# %%
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["PJRT_NPROC"] = "64"  # threads: each device may wait in several collectives

import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from jaxrec.layers.rglru import RGLRU
from jaxrec.ops import hippo
from jaxrec.ops.discretize import discretize_diagonal
from jaxrec.ops.time import linear_scan, sharded_linear_scan
from jaxrec.ops.time.lti import diagonal_kernel, fft_conv

rng = np.random.default_rng(0)

# %% [markdown]
# ## One recurrence, three ways to compute it
#
# The loop takes t steps. The associative form takes about log t rounds and the chunked one about
# twice the root of t, for more work: which of them is fastest depends on the machine. All give the
# same numbers.

# %%
lengths = [2**k for k in range(6, 15)]
methods = ("sequential", "chunked", "associative")
seconds = {method: [] for method in methods}
for length in lengths:
    a = jnp.asarray(rng.uniform(0.9, 1.0, (1, length, 64)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(1, length, 64)), jnp.float32)
    results = {}
    for method in methods:
        run = jax.jit(lambda a, b, method=method: linear_scan(a, b, method=method)[0])
        results[method] = run(a, b).block_until_ready()
        spent = []
        for _ in range(5):
            begin = time.perf_counter()
            run(a, b).block_until_ready()
            spent.append(time.perf_counter() - begin)
        seconds[method].append(min(spent))
    scale = np.max(np.abs(results["sequential"]))
    for method in methods:
        assert np.max(np.abs(results[method] - results["sequential"])) < 1e-5 * scale

# %% [markdown]
# ## What a state remembers
#
# A state-space layer sees its past through the impulse response of its states. Left: the kernels
# that S4D's two initialisations begin with, summed over their states. Middle: how long the channels
# of a fresh RG-LRU remember when their gate is open, closed, and in between.

# %%
steps = 400
kernels = {}
for name, eigenvalues in {"S4D-Lin": hippo.s4d_lin(64), "S4D-Inv": hippo.s4d_inv(64)}.items():
    values = jnp.asarray(eigenvalues[None], jnp.complex64)
    decay, gain = discretize_diagonal(values, jnp.full((1, 1), 0.01))
    kernels[name] = (jnp.log(decay), gain, 2 * diagonal_kernel(jnp.log(decay), gain, steps).real)

layer = RGLRU(256, 1, rngs=nnx.Rngs(0))
half_lives = {
    f"r = {r}": np.log(2) / (8 * r * np.log1p(np.exp(layer.decay[...]))) for r in (1.0, 0.5, 0.1)
}

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
for name, (_, _, kernel) in kernels.items():
    left.plot(kernel[:, 0] / np.max(np.abs(kernel)), label=name)
left.set(xlabel="steps ago", ylabel="weight of that input", title="impulse responses, dt = 0.01")
for name, values in half_lives.items():
    middle.plot(np.sort(values), label=name)
middle.set(xlabel="channel, sorted", ylabel="half-life in steps", title="memory of a fresh RG-LRU")
middle.set_yscale("log")
for method, values in seconds.items():
    right.loglog(lengths, 1e3 * np.array(values), marker="o", markersize=3, label=method)
right.set(xlabel="t", ylabel="ms", title="the scan on this machine")
for panel in (left, middle, right):
    panel.legend(frameon=False)
    panel.grid(alpha=0.2)
plt.show()

# %% [markdown]
# ## Two views of one system
#
# Because S4D's $a$ does not depend on the input, the recurrence is also a convolution with the
# kernel on the left, which an FFT computes at once. The recurrence can stream.

# %%
log_decay, gain, kernel = kernels["S4D-Lin"]
u = jnp.asarray(rng.normal(size=(1, steps, 1)), jnp.float32)
convolved = fft_conv(u, kernel)
inputs = gain[None, None] * u[..., None].astype(jnp.complex64)
states, _ = linear_scan(jnp.exp(log_decay)[None, None], inputs)
scanned = 2 * jnp.sum(states, axis=-1).real
print("largest difference:", float(jnp.max(jnp.abs(convolved - scanned))))
assert jnp.allclose(convolved, scanned, atol=1e-4)

# %% [markdown]
# ## State is a value
#
# A sequence may be cut anywhere: the last state of one part is the first of the next. Where a
# document begins, `reset` lets nothing through.

# %%
a = jnp.asarray(rng.uniform(0.9, 1.0, (2, 100, 8)), jnp.float32)
b = jnp.asarray(rng.normal(size=(2, 100, 8)), jnp.float32)
whole, last = linear_scan(a, b)
first, state = linear_scan(a[:, :37], b[:, :37])
second, end = linear_scan(a[:, 37:], b[:, 37:], state)
assert jnp.array_equal(whole, jnp.concatenate([first, second], axis=1))
assert jnp.array_equal(last, end)

reset = jnp.zeros((2, 100), bool).at[:, 50].set(True)
packed, _ = linear_scan(a, b, reset=reset)
alone, _ = linear_scan(a[:, 50:], b[:, 50:])
assert jnp.array_equal(packed[:, 50:], alone)

# %% [markdown]
# ## Time over devices
#
# Eight devices hold an eighth of the sequence each. Their steps are affine maps of the state, so
# they exchange one map each and nothing else: a single gather of carries in the compiled program.

# %%
mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
with jax.set_mesh(mesh):
    place = jax.NamedSharding(mesh, jax.P(None, "seq"))
    a = jax.device_put(jnp.asarray(rng.uniform(0.9, 1.0, (1, 4096, 16)), jnp.float32), place)
    b = jax.device_put(jnp.asarray(rng.normal(size=(1, 4096, 16)), jnp.float32), place)
    program = jax.jit(lambda a, b: sharded_linear_scan(a, b, axis="seq")).lower(a, b).compile()
    spread, _ = program(a, b)
gathers = [line for line in program.as_text().splitlines() if " all-gather(" in line]
print(len(gathers), "all-gather, of shape", gathers[0].split(" = ")[1].split("{")[0])
alone, _ = linear_scan(jax.device_get(a), jax.device_get(b))
assert np.allclose(jax.device_get(spread), alone, atol=1e-4)
