# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A checkpoint of somebody else
#
# Published weights are a folder: a `config.json`, safetensors files and a tokenizer. A table of
# conversion says for every tensor of such a folder which parameter it becomes, and for every field
# of the file what it means; whatever the table does not say is an error that names it. The same
# table is read backwards to write a folder.
#
# Nothing is downloaded here: this notebook makes a small folder in the layout of Huginn, in
# bfloat16 and in several files, as the 3.5 B model is published.

# %%
import contextlib
import dataclasses
import io
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from jaxrec import convert
from jaxrec.cli.main import main as jaxrec
from jaxrec.models import huginn
from jaxrec.training.data import Batches, load_data
from jaxrec.training.losses import token_losses
from jaxrec.training.runs import load_model

# %% [markdown]
# ## The folder

# %%
work = Path(tempfile.mkdtemp())
published, run, back = work / "published", work / "huginn", work / "back"
config = dataclasses.replace(
    huginn.TINY, vocab_size=257, width=64, heads=4, mlp_width=128, core_layers=1, context=256
)
theirs = jax.jit(lambda: config.build(rngs=nnx.Rngs(0)))()
convert.export(theirs, published, dtype="bfloat16", shard_bytes=100_000)
print(*sorted(file.name for file in published.iterdir()), sep="\n")
print(json.dumps(json.loads((published / "config.json").read_text()))[:300], "...")
index = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
tensors = {name: load_file(published / file)[name] for name, file in index.items()}
for name in ("transformer.wte.weight", "transformer.core_block.0.attn.Wqkv.weight"):
    print(f"{name}: {tensors[name].shape}, {tensors[name].dtype}")

# %% [markdown]
# ## In
#
# In Python, `convert.load` gives the model. Numbers are moved, never computed: bfloat16 arrives as
# the same numbers in float32. On the command line, `jaxrec convert` writes a run, which all other
# commands take.

# %%
model = convert.load("huginn", published)
table = np.asarray(model.embedding.table[...])
assert np.array_equal(table, tensors["transformer.wte.weight"].astype(np.float32))
assert jaxrec(["convert", "huginn", str(published), str(run)]) == 0

# %% [markdown]
# Nobody has trained these weights, so what they write is noise. That is the point: they are theirs,
# not ours.

# %%
writes = ["generate", str(run), "--prompt", "def read(self", "--tokens", "48", "--depth", "4"]
with contextlib.redirect_stdout(io.StringIO()) as said:
    assert jaxrec(writes) == 0
print(said.getvalue())

# %% [markdown]
# ## On
#
# Training goes on from a run, whoever made it. The end of what it says:

# %%
steps = ["--data", "python-docs", "--runs", str(work), "--name", "on", "--steps", "150"]
sizes = ["--batch", "8", "--time", "96", "--eval-every", "0", "--eval-batches", "4"]
rate = ["--optimizer.learning-rate", "6e-3", "--optimizer.warmup-steps", "20"]
with contextlib.redirect_stdout(io.StringIO()) as said:
    assert jaxrec(["train", str(run), *steps, *sizes, *rate, "--eval-depths", "1", "4"]) == 0
print(said.getvalue().partition("Validation ")[2].partition("Curves:")[0])
writes[1] = str(work / "on")
with contextlib.redirect_stdout(io.StringIO()) as said:
    assert jaxrec(writes) == 0
print(said.getvalue())

# %% [markdown]
# ## Out
#
# `--export` writes the folder that the original's code reads. Read again, in float32 it is the same
# model bit for bit; in bfloat16 it is half as large, and every number is rounded.

# %%
assert jaxrec(["convert", "huginn", str(work / "on"), str(back), "--export"]) == 0
half = work / "half"
assert (
    jaxrec(["convert", "huginn", str(work / "on"), str(half), "--export", "--dtype", "bfloat16"])
    == 0
)
trained = load_model(work / "on").model
again, rounded = convert.load("huginn", back), convert.load("huginn", half)
for ours, theirs_again in zip(jax.tree.leaves(trained), jax.tree.leaves(again), strict=True):
    assert np.array_equal(ours, theirs_again)
for folder in (back, half):
    print(f"{folder.name}: {(folder / 'model.safetensors').stat().st_size:,} bytes")

# %% [markdown]
# What rounding costs, byte by byte of held-out text: left the loss before and after training, by
# depth; right how far bfloat16 moves the loss of each byte, against that loss.

# %%
data = load_data("python-docs")
batch = Batches(data.valid, batch=32, time=96, shuffle=False, max_windows=32)(0)
depths = (1, 2, 3, 4, 8, 16)


@jax.jit
def losses(model, depth):
    logits, _ = model(batch["inputs"], segment_ids=batch["segment_ids"], depth=depth)
    return token_losses(logits, batch["labels"])[0]


found = {
    name: np.stack([losses(which, jnp.int32(depth)) for depth in depths])
    for name, which in (("as published", model), ("trained on", again), ("bfloat16", rounded))
}
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
for name, each in found.items():
    style = ":" if name == "bfloat16" else "-"
    left.plot(depths, each.mean(axis=(1, 2)), marker="o", linestyle=style, label=name)
left.set(xscale="log", xlabel="loops", ylabel="nats per byte")
left.set_xticks(depths, map(str, depths))
left.minorticks_off()
left.legend(frameon=False)
kept, lost = found["trained on"][3].ravel(), found["bfloat16"][3].ravel()
right.plot(kept, 1000 * (lost - kept), ".", markersize=2, alpha=0.5)
right.axhline(1000 * (lost - kept).mean(), color="red", linewidth=1, label="mean")
right.set(xlabel="nats of a byte", ylabel="moved by bfloat16, in thousandths")
right.legend(frameon=False)
for panel in (left, right):
    panel.grid(alpha=0.2)
plt.show()
assert found["trained on"].mean() < found["as published"].mean() - 1
assert abs(lost.mean() - kept.mean()) < 0.02
