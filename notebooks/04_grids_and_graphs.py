# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Recurrences on grids and graphs
#
# Time is a path. The same linear recurrence runs on anything without cycles, when its states live
# on the edges: a node adds to the states that leave it (source), turns what comes in into what goes
# out (transition) and reads what comes in (mark). That is pLSTM
# ([arXiv:2506.11997](https://arxiv.org/abs/2506.11997)).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from jaxrec.analysis.impulse import impulse_figure, impulse_response, propagation
from jaxrec.models.plstm_vision import vision_config
from jaxrec.ops.time import GridGates, dag, dag_batch, dag_scan, gating_tensor, grid_scan
from jaxrec.training.data.arrows import ArrowsConfig, pictures
from jaxrec.training.data.graphs import made_graphs

rng = np.random.default_rng(0)

# %% [markdown]
# ## Two ways not to explode
#
# Between two nodes of a grid lie many paths, and what is sent along all of them adds up. Mode P
# splits what comes in between the ways out, so that nothing is lost or made: it travels in a
# direction, which is an angle. Mode D lets states turn only one way, so that there is a single
# path to each node: it spreads. Brighter is more; the circle is the node that sends.

# %%
impulse_figure(figure=plt.figure(figsize=(15, 3), layout="constrained"))
plt.show()

# %% [markdown]
# ## The direction can be learned
#
# How much arrives at a node is differentiable in the angle. Gradient ascent turns the beam until
# it points at the star.

# %%
side, source, target = 24, (2, 2), (21, 9)
node = jnp.ones((1, side, side, 1, 1))
sent = jnp.zeros_like(node).at[0, source[0], source[1]].set(1.0)


@jax.jit
@jax.value_and_grad
def arrived(logit):
    one = jnp.ones(node.shape[:-1])
    a = jax.nn.sigmoid(logit) * one
    gates = GridGates(a, 1 - a, a, 1 - a, 1 - a, a, one, one)
    y = grid_scan(node, node, sent, gates, 0 * one)
    return jnp.log(y[0, target[0], target[1], 0, 0])


logit, angles = jnp.zeros(()), []
for _ in range(40):
    angles.append(float(jax.nn.sigmoid(logit)))
    logit = logit + 0.1 * arrived(logit)[1]

# %%
figure, panels = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
for panel, step in zip(panels, (0, 5, 39), strict=False):
    response = impulse_response(propagation(angles[step]), (side, side), source, orientations=(0,))
    panel.imshow(np.sqrt(response).T, cmap="magma")
    panel.plot(*target, "w*", markersize=10)
    panel.set(title=f"step {step}: a = {angles[step]:.2f}", xticks=[], yticks=[])
panels[3].plot(angles)
steps = np.subtract(target, source)
panels[3].axhline(steps[0] / steps.sum(), color="0.6")
panels[3].set(title="the angle, and the star's", xlabel="step")
plt.show()
assert abs(angles[-1] - steps[0] / steps.sum()) < 0.03

# %% [markdown]
# ## Any size, one tensor
#
# Neighbours are merged into larger nodes until one is left: no loop over nodes, and nothing has to
# be a power of two. What comes out is how every node weighs every other one, the gating tensor,
# which is what attention would have to learn. Below: the loop over anti-diagonals of nodes and the
# merged form agree on a 9 x 13 grid with random gates, in all four orientations; and one row of
# the tensor, what the node in the circle reads.

# %%
x, y, heads, width = 9, 13, 2, 4


def drawn(*shape, low=0.0):
    return jnp.asarray(rng.uniform(low, 1.0, (1, x, y, *shape)), jnp.float32)


q, k, v = (drawn(heads, width, low=-1.0) for _ in range(3))
angle, mark = drawn(4, heads), drawn(4, heads)
gates = GridGates(angle, 1 - angle, angle, 1 - angle, 1 - angle, angle, mark, mark)
orientations, direct = (0, 1, 2, 3), jnp.zeros((1, x, y, heads))
results = []
for method in ("sequential", "parallel"):
    run = jax.jit(lambda *x, m=method: grid_scan(*x, orientation=orientations, method=m))
    results.append(run(q, k, v, gates, direct))
print("largest difference:", float(jnp.max(jnp.abs(results[0] - results[1]))))
assert jnp.allclose(*results, atol=1e-4)
tensor = gating_tensor(gates, direct, orientation=orientations)
print("the gating tensor:", tensor.shape)
reads = np.asarray(tensor)[0, 0, 4, 7, 0, :, :, 0]
plt.figure(figsize=(5, 3))
plt.imshow(np.sqrt(reads), cmap="magma")
plt.plot(7, 4, "wo", markerfacecolor="none")
plt.title("what one node reads")
plt.axis("off")
plt.show()

# %% [markdown]
# ## Arrows
#
# The task that the authors made for it: does the arrow point at the disc? What matters lies between
# two objects, and a larger picture moves them apart. A model takes any size that its patches
# divide; `experiments/plstm_arrow` trains it.

# %%
config = ArrowsConfig(image_size=(96, 96), boundary_padding=16, min_radius=8, max_radius=14)
shown = pictures(config, 0, 6)
figure, panels = plt.subplots(1, 6, figsize=(14, 2.6), layout="constrained")
for panel, image, label in zip(panels, shown.images, shown.labels, strict=True):
    panel.imshow(image)
    panel.set(title="hits" if label else "misses", xticks=[], yticks=[])
plt.show()

small = vision_config(width=16, heads=2, layers=1, patch=16, grid=(6, 6), classes=2)
model = nnx.eval_shape(lambda: small.build(rngs=nnx.Rngs(0)))
for size in (96, 160):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    logits = jax.eval_shape(lambda model, x: model(x), model, images)
    print(size, "x", size, "->", logits.shape)

# %% [markdown]
# ## Graphs
#
# The same on any acyclic graph. With all gates 1 a state that starts at a node arrives once for
# every path, so that the recurrence counts paths: what $(I - A)^{-1}$ does, without a matrix. In
# mode D turns are left out until no edge reaches another one by two paths. Many graphs of different
# sizes are one call.

# %%
graphs = made_graphs("longest-path", 3, seed=5, nodes=(9, 12))
room = max(len(graph.features) for graph in graphs)
counts = {}
for mode in ("P", "D"):
    batch = dag_batch([dag(len(graph.features), graph.edges, mode=mode) for graph in graphs])
    ones = jnp.ones((len(graphs), room, 1, 1))
    marked = jnp.broadcast_to(jnp.eye(room)[None, :, None], (len(graphs), room, 1, room))
    edge, pair = (jnp.ones((*index.shape, 1)) for index in (batch.heads, batch.origins))
    counts[mode] = jax.jit(dag_scan)(ones, ones, marked, edge, pair, edge, 0 * ones[..., 0], batch)
for i, graph in enumerate(graphs):
    size = len(graph.features)
    adjacency = np.zeros((size, size))
    tails, heads = np.sort(graph.edges, axis=1).T
    adjacency[heads, tails] = 1
    paths = np.linalg.inv(np.eye(size) - adjacency) - np.eye(size)
    np.testing.assert_allclose(counts["P"][i, :size, 0, :size], paths, atol=1e-4)
assert np.all(counts["D"] <= counts["P"])
print("most paths between two nodes:", {mode: int(count.max()) for mode, count in counts.items()})

# %%
figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
graph, size = graphs[0], len(graphs[0].features)
angle = 2 * np.pi * np.arange(size) / size
at = np.stack([np.cos(angle), np.sin(angle)], axis=1)
for a, b in graph.edges:
    panels[0].plot(*at[[a, b]].T, color="0.6", zorder=1)
panels[0].scatter(*at.T, s=180, zorder=2)
for node, place in enumerate(at):
    panels[0].text(*place, str(node), color="w", ha="center", va="center")
panels[0].set(title="edges run from lower to higher numbers", xticks=[], yticks=[])
for panel, mode in zip(panels[1:], ("P", "D"), strict=True):
    image = panel.imshow(np.asarray(counts[mode][0, :size, 0, :size]), cmap="viridis", vmin=0)
    panel.set(title=f"paths that {mode} takes", xlabel="from node", ylabel="to node")
    figure.colorbar(image, ax=panel)
plt.show()
