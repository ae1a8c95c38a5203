# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Train a looped model over several devices
#
# A run is a function of its configuration: data order, depths and initial latent states come from
# the seed and the step. So a run on eight devices is the run on one device, and a run may stop on
# one mesh and go on on another.
#
# This notebook pretends that the CPU is eight devices, which is how the tests do it too.

# %%
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"  # compiles quickly; the models below are tiny
)
os.environ["PJRT_NPROC"] = "64"  # threads: each device may wait in several collectives

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrec.models import huginn
from jaxrec.training import OptimizerConfig, TrainConfig, sharding, train
from jaxrec.training.losses import cross_entropy
from jaxrec.training.metrics import read

# %% [markdown]
# A small Huginn, and a run of it. `mesh` is the only thing that changes below.

# %%
model = dataclasses.replace(huginn.TINY, width=32, heads=2, mlp_width=64)
config = TrainConfig(
    steps=30,
    batch=8,
    time=32,
    log_every=1,
    eval_every=10,
    eval_batches=1,
    eval_depths=(1, 2, 4, 8),
    save_every=15,
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=5, schedule="constant"),
)
runs = Path(tempfile.mkdtemp())
run = functools.partial(train, "jaxrec.models.huginn:TINY", model, runs=runs)

one = run(dataclasses.replace(config, name="one device", mesh="data=1"))

# %% [markdown]
# Eight devices: two copies of the batch's halves, parameters split in two over `fsdp`, widths split
# in two over `model`.

# %%
eight = run(dataclasses.replace(config, name="eight devices", mesh="data=2,fsdp=2,model=2"))
kernel = eight.state["params"]["core"]["mlp"]["gate"]["kernel"]
print(kernel.shape, kernel.sharding.spec)
jax.debug.visualize_array_sharding(kernel[0])

# %% [markdown]
# Losses differ only by the order in which floats are summed. To the right: bits per byte of text
# that was kept apart, by the number of loops at test time. The model was trained with about four
# loops.

# %%
lines = {name: read(runs / name / "metrics.jsonl") for name in ("one device", "eight devices")}
losses = {name: [x["loss"] for x in rows if x["kind"] == "train"] for name, rows in lines.items()}
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for name, values in losses.items():
    left.plot(values, label=name, linestyle="-" if name == "one device" else "--")
left.set(xlabel="step", ylabel="loss, nats per byte", title="the same run twice")
left.legend(frameon=False)
difference = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
middle.semilogy([max(value, 1e-9) for value in difference], color="tab:red")
middle.set(xlabel="step", ylabel="|difference|", title="one device against eight")
for row in lines["one device"]:
    if row["kind"] == "valid":
        depths = [int(depth) for depth in row["bits_per_byte"]]
        right.plot(depths, row["bits_per_byte"].values(), marker="o", label=f"step {row['step']}")
right.set(xlabel="loops", ylabel="validation bits per byte", title="depth is chosen at test time")
right.set_xscale("log", base=2)
right.legend(frameon=False)
plt.show()

# %% [markdown]
# And the run that changes horses: fifteen steps on one device, fifteen on eight.

# %%
run(dataclasses.replace(config, name="both", mesh="data=1", steps=15))
run(dataclasses.replace(config, name="both", mesh="data=4,fsdp=2"))
print("loss at step 30:", {name: values[-1] for name, values in losses.items()})
print("resumed on another mesh:", read(runs / "both" / "metrics.jsonl")[-2]["loss"])
assert max(difference) < 1e-3

# %% [markdown]
# ## What `pmap` used to be
#
# `jax.pmap` maps a function over a leading axis of its arguments, one entry per device: parameters
# are copied, the batch is reshaped to (devices, rows, ...), and the mean of the gradient is written
# out. `data=8` on a mesh is the same program, said by where the arrays lie: no reshaping, and the
# sum over devices follows from the mean over the batch. Below one step of gradient descent both
# ways, on the first model trained above.

# %%
graph, params = nnx.split(one.model)
params = jax.device_get(params)
tokens = np.random.default_rng(0).integers(0, 256, (8, 33), dtype=np.int32)


def loss(params, tokens):
    logits, _ = nnx.merge(graph, params)(tokens[:, :-1], depth=4)
    return cross_entropy(logits, tokens[:, 1:])


def descend(params, gradient):
    return jax.tree.map(lambda x, slope: x - 0.1 * slope, params, gradient)


def step_of_one_device(params, tokens):
    value, gradient = jax.value_and_grad(loss)(params, tokens)
    gradient = jax.lax.pmean(gradient, "devices")
    return descend(params, gradient), jax.lax.pmean(value, "devices")


def step_of_the_batch(params, tokens):
    value, gradient = jax.value_and_grad(loss)(params, tokens)
    return descend(params, gradient), value


copies = jax.tree.map(lambda x: np.broadcast_to(x[None], (8, *x.shape)), params)
mapped, values = jax.pmap(step_of_one_device, axis_name="devices")(copies, tokens[:, None])
jax.block_until_ready(mapped)

mesh = sharding.build_mesh("data=8")
everywhere = NamedSharding(mesh, PartitionSpec())
with jax.set_mesh(mesh):
    spread, value = jax.jit(step_of_the_batch)(
        jax.device_put(params, everywhere), jax.device_put(tokens, sharding.batch_sharding(mesh))
    )
    jax.block_until_ready(spread)

print(f"loss by pmap {values[0]:.6f}, on the mesh {value:.6f}")
pairs = zip(jax.tree.leaves(mapped), jax.tree.leaves(spread), strict=True)
gap = max(float(jnp.max(jnp.abs(a[0] - b))) for a, b in jax.device_get(list(pairs)))
print(f"largest difference of a parameter after the step: {gap:.1e}")
assert abs(values[0] - value) < 1e-5 and gap < 1e-5
