# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Recurrences in depth
#
# $$z^{k+1} = g(z^k, e)$$
#
# A block of weights, applied again and again. How often is not a property of the model: it is
# chosen when the model is used, for every token anew.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrec.analysis.depth_use import latent_changes
from jaxrec.generation import (
    DiffusionForcing,
    Exit,
    SamplingConfig,
    complete,
    generate_adaptive,
    generate_diffusion,
)
from jaxrec.models.huginn import HuginnConfig
from jaxrec.ops.depth import iterate
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data import Batches, load_data
from jaxrec.training.losses import cross_entropy
from jaxrec.training.tasks import train_task

# %% [markdown]
# ## The loop
#
# `iterate` runs any step n times, n known or traced: one compiled program serves every depth. The
# gradient may pass through the last few steps only, and elements may halt one by one. Here the step
# is Heron's, whose fixed point is a square root.

# %%
roots = jnp.array([2.0, 1e6])
heron = jax.jit(lambda n: iterate(lambda z: 0.5 * (z + roots / z), roots, n)[0])
for n in (1, 3, 6):
    print(f"{n} steps: {heron(jnp.int32(n))}")
assert heron._cache_size() == 1
z, info = iterate(
    lambda z: 0.5 * (z + roots / z),
    roots,
    50,
    until=lambda new, old: jnp.abs(new - old) < 1e-3,
)
print(f"each until it stands still: {z} after {info.steps} steps")
assert jnp.allclose(z, jnp.sqrt(roots))

# %% [markdown]
# ## A looped language model
#
# Huginn (Geiping et al. 2025) reads tokens with a few blocks, loops a core over a latent state, and
# answers with a few blocks more. It is trained at depths that are drawn anew in every step, here
# 4 + 1 in the mean, so that afterwards any depth will do. A tiny one learns the text that ships
# with Python, for as long as one has patience in a notebook.

# %%
data = load_data("python-docs")
config = HuginnConfig(
    vocab_size=data.tokenizer.vocab_size,
    width=64,
    heads=4,
    mlp_width=128,
    prelude_layers=1,
    core_layers=1,
    coda_layers=1,
    context=256,
    mean_depth=4,
    backprop_depth=3,
    qk_bias=False,
)
trained = train_task(
    config,
    Batches(data.train, batch=8, time=96),
    steps=300,
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=30),
)
model, losses = trained
print(f"loss {losses[0]:.2f} at first, {losses[-20:].mean():.2f} in the end")

# %% [markdown]
# ## Depth against loss
#
# Left: one loop is not enough, and beyond what training used nothing gets worse. Right: how far
# each loop still moves the latent states. They come to rest, easy tokens earlier than hard ones.

# %%
valid = Batches(data.valid, batch=32, time=96, shuffle=False, max_windows=32)(0)
depths = (1, 2, 3, 4, 6, 8, 16, 32)


@jax.jit
def loss(model, depth):
    logits, _ = model(valid["inputs"], segment_ids=valid["segment_ids"], depth=depth)
    return cross_entropy(logits, valid["labels"])


by_depth = [float(loss(model, jnp.int32(depth))) for depth in depths]
changes = np.asarray(latent_changes(model, valid["inputs"], depth=16)).reshape(16, -1)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
left.plot(depths, by_depth, marker="o")
left.axvline(config.mean_depth + 1, color="grey", linestyle=":")
left.set(xscale="log", xlabel="loops; dotted: the mean of training", ylabel="nats per byte")
left.set_xticks(depths, map(str, depths))
left.minorticks_off()
for share in (10, 50, 90):
    line = np.percentile(changes, share, axis=1)
    right.semilogy(range(1, 17), line, marker="o", markersize=3, label=f"{share} % of the tokens")
right.axhline(0.03, color="grey", linestyle=":")
right.set(xlabel="loop", ylabel="change of the latent state, at most")
right.legend(frameon=False)
for panel in (left, right):
    panel.grid(alpha=0.2)
plt.show()
assert by_depth[-1] < by_depth[0]

# %% [markdown]
# ## Exits: depth by the token
#
# A loop may end as soon as the latent state stands still. Each token then takes as many loops as it
# needs, whatever its neighbours in the batch do.

# %%
prompt = data.tokenizer.encode("    def __init__(self, ").tolist()
greedy = SamplingConfig(temperature=0.0)
count, depth = 48, 16
plain = complete(model, [prompt], max_new_tokens=count, depth=depth, config=greedy)[0]
exit = Exit(criterion="latent-diff", threshold=0.03)
steps = list(
    generate_adaptive(model, [prompt], max_new_tokens=count, depth=depth, exit=exit, config=greedy)
)
text = [int(step.tokens[0]) for step in steps]
loops = [int(step.loops[0]) for step in steps]
same = np.mean(np.array(text) == np.array(plain))
print(data.tokenizer.decode(np.array(prompt + text)).decode(errors="replace"))
figure, axis = plt.subplots(figsize=(12, 2.5), layout="constrained")
axis.bar(range(count), loops)
axis.set_xticks(range(count), [repr(chr(token))[1:-1] for token in text], fontsize=8)
axis.set(
    ylabel="loops", title=f"{np.mean(loops):.1f} loops a token; {100 * same:.0f} % as at {depth}"
)
plt.show()

# %% [markdown]
# ## The wavefront
#
# Nobody has to wait until a token has settled to begin with the next (Geiping et al. 2025b,
# diffusion forcing): every step runs a window of positions once or twice and appends one more.
# Rows are steps, columns are positions; the colour is how far a step moved a state. Left of the
# line all is frozen: text comes out there, at a pace of its own.

# %%
options = DiffusionForcing(inner_loops=1, threshold=0.1, max_wavefront=16)
waves = list(
    generate_diffusion(
        model, [prompt], max_new_tokens=count, depth=depth, options=options, config=greedy
    )
)
first, last = len(prompt) - 1, len(prompt) + count
change = np.stack([wave.change[0, first:last] for wave in waves[1:]])
frozen = [wave.frozen[0] for wave in waves[1:]]
passes = int(waves[-1].core_passes[0]) - 1 + depth
same = np.mean(waves[-1].tokens[0, len(prompt) : last] == np.array(plain))
figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
image = axis.imshow(
    np.log10(np.maximum(change, 1e-3)),
    extent=(first, last, len(change), 0),
    aspect="auto",
    interpolation="none",
)
axis.step(frozen, range(1, len(frozen) + 1), color="red", where="pre")
axis.set(xlabel="position", ylabel="step")
axis.set_title(
    f"{passes} passes of the core instead of {depth * (count + 1)};"
    f" {100 * same:.0f} % of the text is the same"
)
figure.colorbar(image, label="log10 of the change")
plt.show()
assert passes < depth * (count + 1) / 3
