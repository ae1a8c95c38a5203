# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Recall: what a matrix state holds
#
# $$S_t = e^{g_t} S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t$$
#
# Keys write values into a matrix, queries read them back. With other decays and another rule of
# writing, this line is linear attention, RetNet, GLA, Mamba-2, DeltaNet and more: `matrix_scan`.

# %%
import dataclasses
import functools

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrec.models.linear_attention import LinearAttentionConfig
from jaxrec.ops.time import matrix_scan
from jaxrec.training import OptimizerConfig
from jaxrec.training.data.synthetic import associative_recall
from jaxrec.training.tasks import task_accuracy, train_task

rng = np.random.default_rng(0)

# %% [markdown]
# ## How many pairs fit?
#
# Random keys of length one and random values, written one after the other. Then every key is asked
# for. Adding keeps them all and lets them disturb each other; decaying keeps the last ones; the
# delta rule first takes out what the state answers for a key, and then writes.

# %%
width, pairs = 32, 64
keys = rng.normal(size=(1, pairs, 1, width)).astype(np.float32)
keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
values = rng.normal(size=(1, pairs, 1, width)).astype(np.float32)
half_life = np.full((1, pairs, 1), np.log(0.5) / 8, np.float32)
rules = {
    "add": {},
    "add, half-life of 8 steps": {"log_decay": half_life},
    "delta rule": {"rule": "delta"},
}
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, options in rules.items():
    _, state = matrix_scan(keys, keys, values, **options)
    answers = jnp.einsum("bhkv,bthk->bthv", state, keys)
    error = jnp.linalg.norm(answers - values, axis=-1) / jnp.linalg.norm(values, axis=-1)
    axis.plot(pairs - np.arange(pairs), error[0, :, 0], label=name)
axis.set(xlabel="pairs since it was written", ylabel="relative error of the answer", ylim=(0, 2.5))
axis.set_title(f"{pairs} pairs in a state of {width} x {width}")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Chunks
#
# The loop over time is the definition. In chunks the same numbers come from matrix products, and
# only one state per chunk goes from one to the next.

# %%
q, k, v = (rng.normal(size=(1, 500, 2, 16)).astype(np.float32) for _ in range(3))
k /= np.linalg.norm(k, axis=-1, keepdims=True)
g = -rng.exponential(size=(1, 500, 2)).astype(np.float32)
loop, _ = matrix_scan(q, k, v, g, rule="delta", method="sequential")
for chunk in (8, 64, 1000):
    chunks, _ = matrix_scan(q, k, v, g, rule="delta", method="chunkwise", chunk=chunk)
    difference = float(jnp.max(jnp.abs(chunks - loop)) / jnp.max(jnp.abs(loop)))
    print(f"chunks of {chunk:4d}: largest difference {difference:.1e}")
    assert difference < 1e-5

# %% [markdown]
# ## Learning to recall
#
# Four pairs of tokens, and then each key once more among fillers: what was its value? Three tiny
# models of one layer differ in nothing but the rule of their state.

# %%
shared = LinearAttentionConfig(
    vocab_size=32,
    width=32,
    heads=2,
    key_width=8,
    value_width=16,
    mlp_width=64,
    layers=1,
    conv_width=4,
    chunk=32,
)
systems = {
    "linear attention": {},
    "GLA": {"gate": "logistic"},
    "Gated DeltaNet": {"rule": "delta", "gate": "step"},
}
task = functools.partial(associative_recall, pairs=4, time=32, vocab=32)
train = functools.partial(
    train_task,
    batch=lambda step: task(64, seed=step).batch(),
    steps=250,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=20, weight_decay=0.0),
)
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, options in systems.items():
    results = train(dataclasses.replace(shared, **options))
    accuracy = task_accuracy(results.model, task(500, seed=10**6).batch())
    smooth = np.convolve(results.losses, np.ones(10) / 10, mode="valid")
    axis.plot(smooth, label=f"{name}: {100 * accuracy:.0f} % right")
axis.set(xlabel="step", ylabel="loss, nats per answer", title="a value for a key")
axis.legend(frameon=False)
plt.show()
