# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Newton: a nonlinear recurrence, solved for all steps at once
#
# $$h_t = f(h_{t-1}, x_t)$$
#
# looks as if step 1000 had to wait for step 999. But guess all states, look at what is wrong with
# each, $r_t = f(h_{t-1}, x_t) - h_t$, and correct them together: to first order the corrections
# follow $d_t = J_t d_{t-1} + r_t$, which is a linear scan. A loop in depth over scans in time.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrec.ops import cells
from jaxrec.ops.newton import newton_scan, stability

rng = np.random.default_rng(0)

# %% [markdown]
# ## Any cell is an argument
#
# A cell is a function of parameters, state and input. Nothing is said here about its derivative:
# whether its numbers mix is found out, and the Jacobian is taken by JAX.


# %%
def leaky(params, h, x):
    return 0.9 * h + 0.1 * jnp.tanh(x + params[None] * h)


params = jnp.asarray(rng.normal(size=8), jnp.float32)
x = jnp.asarray(rng.normal(size=(2, 500, 8)), jnp.float32)
h0 = jnp.zeros((2, 8))
one_by_one, _ = newton_scan(leaky, params, x, h0, method="sequential")
at_once, info = newton_scan(leaky, params, x, h0, method="newton")
print(f"{info.iterations} iterations, residual {info.residual:.1e}, settled: {info.converged}")
assert jnp.max(jnp.abs(at_once - one_by_one)) < 1e-5

# %% [markdown]
# ## Gradients do not pass through the iteration
#
# At the solution the gradient is one linear scan backwards, whatever led there.


# %%
def loss(params, method):
    return jnp.sum(newton_scan(leaky, params, x, h0, jacobian="diagonal", method=method)[0] ** 2)


by_loop = jax.grad(loss)(params, "sequential")
by_newton = jax.grad(loss)(params, "newton")
assert jnp.allclose(by_loop, by_newton, rtol=1e-3)

# %% [markdown]
# ## What decides how many iterations it takes
#
# A ParaGRU whose recurrent entries grow, and a dense GRU of six units whose gain does. `stability`
# measures the largest Lyapunov exponent: by how much a small change of the state grows per step.

# %%
time, width = 512, 32
u = jnp.asarray(rng.normal(size=(1, time, 3, width)), jnp.float32)
entries = jnp.asarray(rng.normal(size=(3, width)), jnp.float32)
start = jnp.zeros((1, width))
exact = jax.jit(
    lambda scale: newton_scan(cells.para_gru, scale * entries, u, start, method="sequential")[0]
)


def errors(scale):
    """The largest error after every iteration, without safeguards."""
    found = []
    for k in range(9):
        options = {"max_iters": k, "safeguard": False, "window": time, "jacobian": "diagonal"}
        h, _ = newton_scan(
            cells.para_gru, scale * entries, u, start, method="newton", check=False, **options
        )
        found.append(float(jnp.max(jnp.abs(h - exact(scale)))))
    return found


curves = {scale: errors(scale) for scale in (0.1, 0.5, 1.0, 2.0)}


@jax.jit
def answer(gain, seed):
    """Iterations and exponent of one dense GRU."""
    keys = jax.random.split(jax.random.key(seed), 2)
    recurrent = gain / 6**0.5 * jax.random.normal(keys[0], (6, 3, 6))
    params = cells.GRUParams(recurrent, jnp.zeros(6))
    u, start = jax.random.normal(keys[1], (1, 90, 3, 6)), jnp.zeros((1, 6))
    h, info = newton_scan(
        cells.gru, params, u, start, jacobian="dense", method="newton", max_iters=90, check=False
    )
    return info.iterations, stability(cells.gru, params, u, start, h, jacobian="dense").exponent


points = [answer(gain, seed) for gain in np.linspace(0.5, 8.0, 16) for seed in range(4)]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
for scale, values in curves.items():
    left.semilogy(values, marker="o", label=f"entries of size {scale}")
left.set(xlabel="iteration", ylabel="largest error", title=f"ParaGRU, {time} steps, no safeguards")
left.legend(frameon=False)
right.plot([float(e) for _, e in points], [int(n) for n, _ in points], "o", markersize=4)
right.axvline(0, color="0.7")
right.set(xlabel="largest Lyapunov exponent", ylabel="iterations", title="dense GRU, 90 steps")
for panel in (left, right):
    panel.grid(alpha=0.2)
plt.show()

# %% [markdown]
# Below zero the past is forgotten and a handful of iterations is enough, at any length. Towards
# zero and beyond it the correction of one step depends on all before it, and the iterations are
# about as many as the steps: parallel evaluation has nothing to give there.
#
# ## Nothing is accepted in silence
#
# Where a window does not settle, it is run step by step, and the call says so.

# %%
for scale in (0.5, 3.0):
    h, info = newton_scan(cells.para_gru, scale * entries, u, start, method="newton", window=128)
    error = jnp.max(jnp.abs(h - exact(scale)))
    print(f"entries of size {scale}: {info.fallbacks} of 4 windows fell back, error {error:.0e}")
    assert error < 1e-4
