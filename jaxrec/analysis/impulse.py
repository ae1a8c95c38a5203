"""What one node of a grid sends to all others: the impulse response of a pLSTM on a grid.

With constant gates, q = k = 1, D = 0, and v = 1 at one node alone, the output y of every node is
what reaches it. In mode P with an angle a,

    S_r = a,  S_d = 1 - a;   T_rl = T_ru = a t,   T_du = T_dl = 1 - a t;   M_l = M_u = 1,

what starts as 1 is split and never lost: it sums to 1 over every anti-diagonal and travels along
the slope (1 - a t) / (a t). In mode D every node is reached by one path, and for |t| = 1 alike.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 4.3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.ops.time import GridGates, grid_scan

ORIENTATIONS: tuple[int, ...] = (0, 1, 2, 3)


def propagation(angle: float, transition: float = 1.0) -> GridGates:
    """Gates of mode P, the same at all nodes: scalars.

    Args:
      angle: a, the share that leaves for the next x, in [0, 1].
      transition: t, in [-1, 1].

    Raises:
      ValueError: one of them lies outside.
    """
    if not 0 <= angle <= 1 or not abs(transition) <= 1:
        raise ValueError(
            "propagation: angle must lie in [0, 1] and transition in [-1, 1], got"
            f" {angle} and {transition}."
        )
    forward, one = angle * transition, jnp.ones(())
    return GridGates(
        source_r=jnp.float32(angle),
        source_d=jnp.float32(1 - angle),
        transition_rl=jnp.float32(forward),
        transition_du=jnp.float32(1 - forward),
        transition_dl=jnp.float32(1 - forward),
        transition_ru=jnp.float32(forward),
        mark_l=one,
        mark_u=one,
    )


def diffusion(transition: float = 1.0, turn: float = 1.0) -> GridGates:
    """Gates of mode D, the same at all nodes: scalars, the turn from y to x.

    Args:
      transition: t along x and along y, in [-1, 1].
      turn: of the state that turns, in [-1, 1].

    Raises:
      ValueError: one of them lies outside.
    """
    if not max(abs(transition), abs(turn)) <= 1:
        raise ValueError(
            f"diffusion: transition and turn must lie in [-1, 1], got {transition} and {turn}."
        )
    one, along = jnp.ones(()), jnp.float32(transition)
    return GridGates(
        source_r=one,
        source_d=one,
        transition_rl=along,
        transition_du=along,
        transition_dl=None,
        transition_ru=jnp.float32(turn),
        mark_l=one,
        mark_u=one,
    )


def impulse_response(
    gates: GridGates,
    shape: tuple[int, int],
    source: tuple[int, int],
    *,
    orientations: tuple[int, ...] = ORIENTATIONS,
) -> np.ndarray:
    """What reaches every node from one.

    Args:
      gates: scalars, as `propagation` and `diffusion` give them.
      shape: nodes along x and y.
      source: the node that sends 1.
      orientations: the corners from which the recurrence runs, as in `grid_scan`; their responses
        add up.

    Returns:
      float32 (x y); zero at the source, which reads only what comes in.

    Raises:
      ValueError: the source lies outside of the grid.
    """
    if not all(0 <= at < size for at, size in zip(source, shape, strict=True)):
        raise ValueError(f"impulse_response: source {source} lies outside of the grid {shape}.")
    sent = jnp.zeros(shape).at[source].set(1.0)
    return np.asarray(_received(gates, sent, orientations))


@functools.partial(jax.jit, static_argnames="orientations")
def _received(gates: GridGates, sent: Array, orientations: tuple[int, ...]) -> Array:
    nodes = (1, *sent.shape)
    wide = jax.tree.map(lambda gate: jnp.full((*nodes, len(orientations), 1), gate), gates)
    ones, direct = jnp.ones((*nodes, 1, 1)), jnp.zeros((*nodes, 1))
    y = grid_scan(ones, ones, sent.reshape(ones.shape), wide, direct, orientation=orientations)
    return y[0, :, :, 0, 0]


def impulse_figure(
    side: int = 33, *, angles: tuple[float, ...] = (0.25, 0.5, 0.75), figure: Any = None
) -> Any:
    """Draws mode P along several directions, from all corners, and mode D without and with decay.

    Args:
      side: nodes along each axis, >= 8.
      angles: a of the first panels, in [0, 1].
      figure: an empty `matplotlib.figure.Figure` to draw on, such as that of a notebook; None makes
        one that can be saved.

    Returns:
      The figure.

    Raises:
      ValueError: the grid is smaller.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if side < 8:
        raise ValueError(f"impulse_figure: side must be >= 8, got {side}.")
    corner, middle = (side // 8, side // 8), (side // 2, side // 2)
    panels = [
        (f"P, a = {angle:g}", propagation(angle), corner, ORIENTATIONS[:1]) for angle in angles
    ]
    panels += [
        ("P, all orientations", propagation(angles[0]), middle, ORIENTATIONS),
        ("D, t = 1", diffusion(), corner, ORIENTATIONS[:1]),
        ("D, t = 0.9, all orientations", diffusion(0.9, 0.9), middle, ORIENTATIONS),
    ]
    if figure is None:
        figure = Figure(figsize=(2.4 * len(panels), 2.9), layout="constrained")
        FigureCanvasAgg(figure)
    for axes, (title, gates, source, orientations) in zip(
        figure.subplots(1, len(panels), sharey=True), panels, strict=True
    ):
        response = impulse_response(gates, (side, side), source, orientations=orientations)
        # What spreads over many nodes is small at each: shades follow the root.
        shade = np.sqrt(np.abs(response) / np.max(np.abs(response)))
        axes.imshow(shade.T, origin="upper", cmap="magma", vmin=0, vmax=1)
        axes.plot(*source, "wo", markersize=4, markerfacecolor="none")
        axes.set(title=title, xlabel="x", xticks=[], yticks=[])
    figure.axes[0].set_ylabel("y")
    return figure
