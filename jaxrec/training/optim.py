"""Optimizers and learning-rate schedules, from optax building blocks.

A schedule is a function of the step alone, so a resumed run meets the learning rates it would have
met.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrec.ops.arctangent import angle
from jaxrec.training.config import OptimizerConfig

Array = jax.Array
Params = Any  # a pytree of arrays
Step = Array | int

NOT_DECAYED = ("bias", "scale", "decay")
"""Last words of parameter names that weight decay leaves alone, whatever their rank."""


def build(
    config: OptimizerConfig, steps: int, params: Params, stacked: Params | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer of a run: gradient clipping, moments, weight decay and learning rate.

    Args:
      config: the rule and its constants.
      steps: length of the run, for the schedule.
      params: the parameters, or their abstract shapes; only names and ranks are read.
      stacked: number of leading axes of each parameter that count layers, as
        `sharding.stacked_axes` reads it from a model; None means no parameter is stacked. What a
        rule does "per tensor" it does per layer.
    """
    stacked = jax.tree.map(lambda _: 0, params) if stacked is None else stacked
    rate = schedule(config, steps)
    mask = decay_mask(params, stacked)
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    if config.name == "adam_atan2":
        return optax.chain(clip, adam_atan2(rate, config, mask=mask, stacked=stacked))
    if config.name == "atan2":
        return optax.chain(
            clip,
            scale_by_atan2(config.beta1, config.beta2),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
    return optax.chain(
        clip,
        scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.identity() if config.name == "adamw" else scale_by_trust(mask, stacked),
        optax.scale_by_learning_rate(rate),
    )


def scale_by_trust(mask: Params, stacked: Params) -> optax.GradientTransformation:
    """LAMB's last part: a step is made as long as its tensor, u <- u |p| / |u|.

    Tensors without weight decay keep theirs, as in the implementation that image classifiers are
    trained with, and so do those of length zero.

    Args:
      mask: boolean per parameter, True where weight decay applies.
      stacked: leading layer axes per parameter; lengths are taken per layer.

    You et al., Large batch optimization for deep learning (2019), arXiv:1904.00962, algorithm 2.
    """

    def scaled(u: Array, p: Array, decays: bool, layer_axes: int) -> Array:
        if not decays:
            return u
        within = tuple(range(layer_axes, u.ndim))
        size, step = (jnp.sqrt(jnp.sum(x * x, axis=within, keepdims=True)) for x in (p, u))
        known = (size > 0) & (step > 0)
        return u * jnp.where(known, size / jnp.where(known, step, 1.0), 1.0)

    def update(updates: Params, params: Params | None) -> Params:
        return jax.tree.map(scaled, updates, params, mask, stacked)

    return optax.stateless(update)


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction, without a learning rate.

    optax raises a float to its int32 step count, which strict dtype promotion would refuse.
    """
    inner = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(grads, state, params)

    return optax.GradientTransformation(inner.init, update)


def schedule(config: OptimizerConfig, steps: int) -> Callable[[Step], Array]:
    """Returns the learning rate as a function of the number of updates made so far.

    The warm-up ends at the peak and the first update already moves (its rate is peak /
    warmup_steps, not 0); the decrease begins at the peak and would reach final_fraction * peak with
    the update after the last.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decreasing = max(1, steps - warmup)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, decreasing, alpha=config.final_fraction)
    elif config.schedule == "trapezoid" and config.cooldown_steps:
        flat = max(0, decreasing - config.cooldown_steps)
        end = peak * config.final_fraction
        main = optax.linear_schedule(peak, end, config.cooldown_steps, transition_begin=flat)
    else:
        main = optax.constant_schedule(peak)

    def rate(step: Step) -> Array:
        now = jnp.asarray(step).astype(jnp.float32)  # exact up to 16 million steps
        grown = (now + 1) * (peak / max(1, warmup))
        return jnp.where(now < warmup, grown, main(jnp.maximum(now - warmup, 0)))

    return rate


def decay_mask(params: Params, stacked: Params) -> Params:
    """Returns a boolean per parameter: True where weight decay applies.

    It applies to matrices (rank 2 and more, not counting the layer axes), except when the last word
    of the parameter's name is one of NOT_DECAYED, such as `qk_bias`.
    """

    def decays(path: Any, leaf: Array, layer_axes: int) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim - layer_axes >= 2 and name.split("_")[-1] not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params, stacked)


class AdamAtan2State(NamedTuple):
    """State of `adam_atan2`."""

    step: Array  # updates made so far, int32
    mu: Params  # first moment, like the parameters
    nu: Params  # second moment, like the parameters


def adam_atan2(
    rate: Callable[[Step], Array], config: OptimizerConfig, *, mask: Params, stacked: Params
) -> optax.GradientTransformation:
    """Adam with a bounded, scale-free update: the rule Huginn was trained with.

    With gradient g at update t = 1, 2, ... and m_0 = g_1, v_0 = g_1^2 (the moments begin at the
    first gradient and are bias-corrected all the same):

        m_t = b1 m_{t-1} + (1 - b1) g           v_t = max(b2 v_{t-1} + (1 - b2) g^2, epsilon^2)
        c_t = max(1, sqrt(mean(g^2 / v_t)))
        p  <- (1 - lr_t / lr_peak * weight_decay) p
        p  <- p - lr_t / (c_t (1 - b1^t)) * atan2(m_t, sqrt(v_t / (1 - b2^t)))

    c_t is per tensor and tames spikes; the decay does not depend on the peak rate.

    Args:
      rate: learning rate as a function of the updates made so far.
      config: learning_rate (the peak), beta1, beta2, epsilon, weight_decay.
      mask: boolean per parameter, True where weight decay applies.
      stacked: leading layer axes per parameter; the mean in c_t is taken per layer.

    Geiping et al., Scaling up test-time compute with latent reasoning (2025), arXiv:2502.05171;
    atan2: Everett et al. (2024), arXiv:2407.05872; update clipping: Shazeer & Stern (2018),
    arXiv:1804.04235.
    """
    beta1, beta2 = config.beta1, config.beta2
    least = config.epsilon**2

    def init(params: Params) -> AdamAtan2State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamAtan2State(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: Params, state: AdamAtan2State, params: Params | None = None
    ) -> tuple[Params, AdamAtan2State]:
        if params is None:
            raise ValueError("adam_atan2: update needs params, because weight decay acts on them.")
        first = state.step == 0
        lr = rate(state.step)
        t = (state.step + 1).astype(jnp.float32)
        step_size = lr / (1 - beta1**t)
        root_correction = jnp.sqrt(1 - beta2**t)

        def moment(old: Array, new: Array, beta: float) -> Array:
            return jnp.where(first, new, beta * old + (1 - beta) * new)

        def move(g: Array, m: Array, v: Array, p: Array, decays: bool, layer_axes: int) -> Array:
            within = tuple(range(layer_axes, g.ndim))
            clip = jnp.maximum(1.0, jnp.sqrt(jnp.mean(g * g / v, axis=within, keepdims=True)))
            shrink = lr / config.learning_rate * config.weight_decay if decays else 0.0
            return -shrink * p - step_size / clip * angle(m, jnp.sqrt(v) / root_correction)

        mu = jax.tree.map(lambda old, g: moment(old, g, beta1), state.mu, grads)
        nu = jax.tree.map(
            lambda old, g: jnp.maximum(moment(old, g * g, beta2), least), state.nu, grads
        )
        updates = jax.tree.map(move, grads, mu, nu, params, mask, stacked)
        return updates, AdamAtan2State(optax.safe_increment(state.step), mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_atan2(beta1: float, beta2: float) -> optax.GradientTransformation:
    """Adam's direction without an epsilon, atan2(m, sqrt(v)) for m / sqrt(v), of moments that are
    corrected for their beginning at zero.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        atan2(m, sqrt(v / (1 - b2^t))) / (1 - b1^t)

    The correction of m stands outside of atan2, as in the optimizer that HRM was trained with.

    Everett et al., Scaling exponents across parameterizations and optimizers (2024),
    arXiv:2407.05872, section 4.3.
    """

    def init(params: Params) -> AdamAtan2State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamAtan2State(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: Params, state: AdamAtan2State, params: Params | None = None
    ) -> tuple[Params, AdamAtan2State]:
        t = (state.step + 1).astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, grads)
        root = jnp.sqrt(1 - beta2**t)
        moves = jax.tree.map(lambda m, v: angle(m, jnp.sqrt(v) / root) / (1 - beta1**t), mu, nu)
        return moves, AdamAtan2State(optax.safe_increment(state.step), mu, nu)

    return optax.GradientTransformation(init, update)


def sign_sgd_rows(
    table: Array, rows: Array, gradient: Array, *, rate: float | Array, weight_decay: float
) -> Array:
    """Moves the rows of a table that a batch has read: p <- p (1 - lr wd) - lr sign(g).

    Args:
      table: (n d).
      rows: int (b), which row each example has read; the gradients of a row read twice are added.
      gradient: (b d), of what was read.
      rate: lr, >= 0.
      weight_decay: wd, >= 0.

    Returns:
      The table; rows that were not read are as before.

    Wang et al., Hierarchical reasoning model (2025), arXiv:2506.21734.
    """
    # As many distinct rows as there may be; a number beyond the table stands for none.
    read, place = jnp.unique(
        rows, size=rows.shape[0], fill_value=table.shape[0], return_inverse=True
    )
    total = jnp.zeros_like(gradient).at[place].add(gradient)
    old = table.at[read].get(mode="fill", fill_value=0)
    return table.at[read].set(old * (1 - rate * weight_decay) - rate * jnp.sign(total), mode="drop")


def all_finite(tree: Any) -> Array:
    """Whether no number of any array is infinite or NaN, bool ()."""
    finite = jnp.ones((), jnp.bool_)
    for leaf in jax.tree.leaves(tree):
        finite &= jnp.all(jnp.isfinite(leaf))
    return finite


def ema_update(ema: Params, params: Params, decay: float) -> Params:
    """Returns decay * ema + (1 - decay) * params, leaf by leaf; decay in (0, 1) per step."""
    return jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, ema, params)
