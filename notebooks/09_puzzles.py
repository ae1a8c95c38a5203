# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Puzzles: an answer that is refined until it is right
#
# $$z_L \leftarrow f_L(z_L + z_H + x) \;\; L \text{ times}, \qquad z_H \leftarrow f_H(z_H + z_L)
# \;\; H \text{ times}$$
#
# Two stacks of blocks at two speeds make a *segment* of thinking. The answer is read from $z_H$
# after each segment and supervised there; the gradient passes through the last call of each stack
# only; and a head learns when to stop. That is HRM
# ([arXiv:2506.21734](https://arxiv.org/abs/2506.21734)).

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

from jaxrec.models.hrm import SUDOKU_4X4
from jaxrec.training.config import PuzzleConfig, PuzzleDataConfig
from jaxrec.training.data import mazes, sudoku
from jaxrec.training.data.puzzle_sources import load_puzzles
from jaxrec.training.metrics import read
from jaxrec.training.puzzle_report import LEGEND, animation, drawn, solving, table
from jaxrec.training.puzzles import train_puzzles

# %% [markdown]
# ## Puzzles with one solution
#
# Sudoku by a solver that counts its wrong guesses; mazes in which one shortest path leads to the
# goal. A puzzle is a function of the seed and its number.

# %%
hard = max((sudoku.make(9, seed=0, index=i) for i in range(8)), key=lambda x: x.backtracks)
maze = mazes.make(15, 15, seed=1)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for (x, y), digit in np.ndenumerate(hard.question):
    left.text(y, x, str(digit or ""), ha="center", va="center")
left.set(xlim=(-0.5, 8.5), ylim=(8.5, -0.5), title=f"9 x 9, {hard.backtracks} wrong guesses")
for line in range(10):
    width = 2 if line % 3 == 0 else 0.5
    left.axhline(line - 0.5, color="k", linewidth=width)
    left.axvline(line - 0.5, color="k", linewidth=width)
middle.imshow(maze.question, cmap="cividis", vmax=5)
middle.set_title("15 x 15")
right.imshow(maze.answer, cmap="cividis", vmax=5)
right.set_title(f"a path of {maze.length} steps")
for axis in (left, middle, right):
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Training
#
# What `jaxrec train jaxrec.models.hrm:SUDOKU_4X4 --data sudoku-4x4` does, but shorter and on
# puzzles with more clues. No puzzle that is held out is in the training set, symmetric copies
# included. In so few steps a third of them is solved; the full run takes some minutes.

# %%
data = PuzzleDataConfig(source="sudoku-4x4", puzzles=300, held_out=100, clues=(11, 12))
config = PuzzleConfig(name="run", steps=400, eval_every=100, log_every=20, save_every=0, data=data)
with tempfile.TemporaryDirectory() as runs:
    outcome = train_puzzles("SUDOKU_4X4", SUDOKU_4X4, config, runs=Path(runs))
    lines = read(outcome.run.folder / "metrics.jsonl")
print(table(outcome.evaluation))

# %%
training = [line for line in lines if line["kind"] == "train" and "segments" in line]
held_out = [line for line in lines if line["kind"] == "valid"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for segment in range(SUDOKU_4X4.max_segments):
    left.plot(
        [line["step"] for line in held_out],
        [line["exact"][segment] for line in held_out],
        marker="o",
        markersize=3,
        label=f"after segment {segment + 1}",
    )
left.set(xlabel="step", ylabel="held-out puzzles solved", ylim=(0, 1.03))
left.legend(frameon=False)
right.plot([line["step"] for line in training], [line["segments"] for line in training])
right.set(xlabel="step", ylabel="segments until it halts", ylim=(0, SUDOKU_4X4.max_segments + 0.2))
plt.show()

# %% [markdown]
# ## Watching it think
#
# Black is given, blue is right, red is wrong; yellow has changed in this segment. The puzzle is the
# one whose answer changes most between the first segment and the last.

# %%
puzzles = load_puzzles(data)
watched = [solving(outcome.model, puzzles, index) for index in range(40)]
moving = max(watched, key=lambda x: int(np.sum(x.answers[0] != x.answers[-1])))
film = animation(moving, puzzles.look)
display(HTML(film.to_jshtml(default_mode="loop")))
print(LEGEND, "\n")
print(drawn(moving, puzzles.look))
