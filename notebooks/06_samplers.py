# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Ways to let a looped model write
#
# Written one token after the other at full depth, a text of n tokens waits for n times the depth of
# passes through the core, one after another. Three ways wait for fewer: **adaptive** ends each
# token's loop where it stands still, **speculative** drafts tokens with few loops and checks them
# all at once with many, and **diffusion forcing** begins with the next token before the loop of
# this one has ended. None of them needs any training.

# %%
import time

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxrec.generation import DiffusionForcing, Exit, SamplingConfig, samplers
from jaxrec.models.huginn import HuginnConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data import Batches, load_data
from jaxrec.training.tasks import train_task

# %% [markdown]
# A small Huginn learns the text that ships with Python, at five loops in the mean.

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
model, losses = train_task(
    config,
    Batches(data.train, batch=8, time=96),
    steps=200,
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=30),
)
print(f"loss {losses[0]:.2f} at first, {losses[-20:].mean():.2f} in the end")

# %% [markdown]
# ## The same prompt, four ways
#
# Every sampler tells what it used: passes of the core one after another, those of the prompt
# included, and the loops of each token. Tokens are drawn, and all samplers draw the same token from
# the same scores: each draw has a key of its own, of its row and its place.

# %%
depth, count = 16, 48
prompt = data.tokenizer.encode("    def __init__(self, ").tolist()
shared = {
    "max_new_tokens": count,
    "depth": depth,
    "config": SamplingConfig(temperature=0.8),
    "key": jax.random.key(0),
}
ways = {
    "autoregressive": (samplers.autoregressive, {}),
    "adaptive": (samplers.adaptive, {"exit": Exit(criterion="latent-diff", threshold=0.03)}),
    "speculative": (samplers.speculative, {"draft_depth": 2, "lookahead": 6}),
    "diffusion forcing": (
        samplers.diffusion_forcing,
        {"options": DiffusionForcing(inner_loops=1, threshold=0.1, max_wavefront=16)},
    ),
}
curves, used = {}, {}
for name, (sampler, options) in ways.items():
    for _ in range(2):  # the first time compiles
        usage, points = samplers.used_by([prompt]), [(0, 0)]
        begun = time.perf_counter()
        for _ in sampler(model, [prompt], usage, **shared, **options):
            points.append((usage.core_passes, len(usage.tokens[0])))
        seconds = time.perf_counter() - begun
    curves[name], used[name] = np.array(points), usage
    plain = np.array(used["autoregressive"].tokens[0])
    same = np.mean(np.array(usage.tokens[0]) == plain)
    print(
        f"{name:18s} {usage.core_passes:4d} passes, {np.mean(usage.loops[0]):5.1f} loops a token,"
        f" {count / seconds:4.0f} tokens/s, {100 * same:3.0f} % of the tokens are the same"
    )
print(data.tokenizer.decode(np.array(prompt + plain.tolist())).decode(errors="replace"))
assert used["speculative"].tokens == used["autoregressive"].tokens

# %% [markdown]
# Speculation writes exactly what one token after the other would; the other two trade, and the
# numbers above say what for. On a machine with room, a pass over a window of 16 positions takes as
# long as a pass over one, and then the left picture is time. On two CPU cores it is not.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
for name, points in curves.items():
    left.plot(*points.T, drawstyle="steps-post", label=name)
left.set(xscale="symlog", xlabel="passes of the core, one after another", ylabel="tokens written")
left.legend(frameon=False)
for name in ("adaptive", "diffusion forcing"):
    right.plot(used[name].loops[0], ".-", label=name)
right.axhline(depth, color="grey", linestyle=":", label="autoregressive, speculative")
right.set(xlabel="new token", ylabel="loops", ylim=(0, None))
right.legend(frameon=False)
for panel in (left, right):
    panel.grid(alpha=0.2)
plt.show()
assert used["diffusion forcing"].core_passes < used["autoregressive"].core_passes / 4

# %% [markdown]
# ## What settles a position
#
# A position of the wave is frozen when a step moves its state by less than a threshold. A small one
# gives the text of full depth, a large one saves a little more and writes another. Each point is a
# threshold, for one and for two loops a step.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for inner_loops in (1, 2):
    points = []
    for threshold in (0.03, 0.4, 1.2):
        options = DiffusionForcing(
            inner_loops=inner_loops, threshold=threshold, max_wavefront=16, embedding_ema=0.0
        )
        usage = samplers.used_by([prompt])
        for _ in samplers.diffusion_forcing(model, [prompt], usage, **shared, options=options):
            pass
        points.append((usage.core_passes / count, 100 * np.mean(usage.tokens[0] == plain)))
        axis.annotate(f" {threshold:g}", points[-1], fontsize=8)
    axis.plot(*np.array(points).T, "o-", label=f"{inner_loops} loops a step")
axis.axvline(depth, color="grey", linestyle=":")
axis.set(xscale="log", xlabel="passes a token; dotted: one after the other", ylabel="same tokens %")
axis.set_xticks((1, 2, 4, 8, 16), map(str, (1, 2, 4, 8, 16)))
axis.minorticks_off()
axis.legend(frameon=False)
axis.grid(alpha=0.2)
plt.show()
