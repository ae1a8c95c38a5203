"""Text from a looped model whose depth is found token by token.

Each token's loop runs until a criterion of `ops.depth.exits` holds, a schedule ends it, or the
depth is reached. Rows of a batch stop each by itself: a row that has ended stores no keys and
values of later loops, so that its text and its counts are those that it has alone.

Geiping et al. (2025), arXiv:2502.05171, sections 6.1 to 6.3.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.errors import UserError
from jaxrec.generation.autoregressive import STOPPED
from jaxrec.generation.programs import FlatModel
from jaxrec.generation.prompts import check_looped, latents, pad, round_up, row_keys, token_keys
from jaxrec.generation.sampling import Sampling, SamplingConfig, draw
from jaxrec.models.huginn import Huginn, Latent
from jaxrec.ops.depth.cache import open_view, set_loops
from jaxrec.ops.depth.exits import Exit
from jaxrec.ops.depth.noise import LatentNoise


class AdaptiveStep(NamedTuple):
    """One more token of every row."""

    tokens: np.ndarray  # int32 (b); STOPPED for rows that have ended
    loops: np.ndarray  # int32 (b): loops that it took; 0 for rows that have ended
    values: np.ndarray  # float32 (b l): the criterion after each loop; NaN where not looked at


def generate_adaptive(
    model: Huginn,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    exit: Exit | None = None,
    depth: int | None = None,
    schedule: Sequence[int] | None = None,
    strategy: str = "latest",
    continuous: bool = False,
    noise: LatentNoise | None = None,
    config: SamplingConfig | None = None,
    key: Array | None = None,
    latent_key: Array | None = None,
    stop_tokens: Sequence[int] = (),
) -> Iterator[AdaptiveStep]:
    """Continues prompts; yields every token with its depth as soon as it is known.

    The first token is that of the whole prompt: its loops are those of all prompt tokens, and a
    criterion of latent states is the mean over them.

    Args:
      model: a looped model.
      prompts: token ids of each row, of any lengths >= 1.
      max_new_tokens: number of tokens after the prompt, >= 1.
      exit: when a token's loop ends before the depth is reached; None: never.
      depth: the largest number of loops; the trained mean if None.
      schedule: the largest number of loops of each new token instead; the last one goes on.
      strategy: which keys and values are stored and read, see `ops.depth.cache`.
      continuous: a token's loop begins where that of the token before has ended: at its latent
        state or, with neither `exit` nor `schedule`, at that state normed for the coda, as the
        original has it.
      noise: put on the latent state before every loop; needs a key.
      config: how tokens are drawn; `SamplingConfig()` if None.
      key: randomness of the draws and of the noise.
      latent_key: randomness of the initial latent state; None begins at zero.
      stop_tokens: a row ends before any of these.

    Raises:
      UserError: as for `generate`, and when the cache strategy is unknown, the model has no such
        loop, or a depth is below one. Raised by the call, not by the first `next`.
    """
    config = config or SamplingConfig()
    depths = [model.config.mean_depth or 0] if depth is None else [depth]
    depths = list(schedule) if schedule is not None else depths
    if not depths:
        raise UserError("generate: the schedule of depths is empty. Give at least one depth.")
    for each in depths:
        check_looped(model, prompts, max_new_tokens, each, strategy)
    if key is None and not (config.is_greedy and noise is None):
        raise UserError(
            "generate: drawing tokens or noise needs a key. Pass key=jax.random.key(seed)."
        )
    rows = len(prompts)
    settings = _Settings(
        sampling=Sampling.of(config),
        keys=None if key is None else row_keys(key, rows),
        latent_keys=None if latent_key is None else row_keys(latent_key, rows),
    )
    carried: Literal["raw", "normed"] | None = None
    if continuous:
        carried = "normed" if exit is None and schedule is None else "raw"
    static = _Static(exit, noise, carried, max(depths))
    return _run(
        model, prompts, max_new_tokens, settings, static, depths, strategy, frozenset(stop_tokens)
    )


class _Static(NamedTuple):
    """What a program is compiled for."""

    exit: Exit | None
    noise: LatentNoise | None
    carried: Literal["raw", "normed"] | None  # how the latent state goes on in the next token
    max_depth: int


class _Settings(NamedTuple):
    sampling: Sampling
    keys: Array | None  # (b) PRNG keys of draws and noise
    latent_keys: Array | None  # (b) PRNG keys of the initial latent states


class _Carry(NamedTuple):
    state: Any  # of the model
    position: Array  # int32 (b): tokens of each row that the model has seen
    step: Array  # int32 (): tokens drawn
    latent: Array | None  # (b d): where a continuous loop goes on
    present: Array | None  # bool (b vocab): tokens of the text, kept for a repetition penalty only


class _Loop(NamedTuple):
    z: Latent
    is_active: Array  # bool (b)
    loops: Array  # int32 (b)
    memory: Any  # of the criterion
    values: Array  # float32 (b l)


def _run(
    model: Huginn,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: _Settings,
    static: _Static,
    depths: list[int],
    strategy: str,
    stop_tokens: frozenset[int],
) -> Iterator[AdaptiveStep]:
    flat = FlatModel.for_decoding(model)
    tokens, lengths = pad(prompts)
    segments = (np.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]).astype(np.int32)
    present = None
    if settings.sampling.repetition_penalty is not None:
        present = jnp.array([np.isin(np.arange(model.config.vocab_size), row) for row in prompts])
    carry = _Carry(
        state=model.init_state(
            len(prompts),
            capacity=round_up(tokens.shape[1] + max_new_tokens),
            depth=static.max_depth,
            strategy=strategy,
        ),
        position=jnp.zeros(len(prompts), jnp.int32),
        step=jnp.zeros((), jnp.int32),
        latent=None,
        present=present,
    )
    running = np.ones(len(prompts), np.bool_)
    for index in range(max_new_tokens):
        new, loops, values, carry = _advance(
            flat,
            static,
            settings,
            carry,
            tokens,  # of NumPy, as is what follows: `jnp.asarray` would cost the host more
            segments,
            running,
            np.asarray(depths[min(index, len(depths) - 1)], np.int32),
        )
        step = np.array(new)
        running &= ~np.isin(step, list(stop_tokens))
        loops = np.where(step == STOPPED, 0, np.asarray(loops))
        yield AdaptiveStep(np.where(running, step, STOPPED), loops, np.asarray(values))
        if not running.any():
            return
        tokens, segments = np.maximum(step, 0)[:, None], np.ones_like(segments[:, :1])


@functools.partial(jax.jit, static_argnums=1, donate_argnums=3)
def _advance(
    flat: FlatModel,
    static: _Static,
    settings: _Settings,
    carry: _Carry,
    tokens: Array,
    segment_ids: Array,
    is_running: Array,
    depth: Array,
) -> tuple[Array, Array, Array, _Carry]:
    """Feeds tokens (b t) and draws the ones that follow, with their loops and criteria."""
    model: Huginn = flat.module()
    batch, time = tokens.shape
    is_token = segment_ids > 0
    position = carry.position[:, None] + jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
    keys = settings.keys
    view, state = open_view(carry.state, (batch, time), segment_ids)
    embedded, state = model.embed(tokens, view, state)
    injected = model.inject(embedded)
    if carry.latent is not None:
        begin = carry.latent[:, None]
    elif settings.latent_keys is None:
        begin = model.init_latent(None, batch, time)
    else:
        begin = latents(model, settings.latent_keys, jnp.maximum(position, 0))
    noise_keys = None
    if static.noise is not None:
        # Keys of draws count steps from 0 on; those of noise lie beyond them.
        noise_keys = token_keys(jnp.asarray(keys), jnp.maximum(position, 0) + jnp.int32(2**30))

    def loop(before: _Loop) -> _Loop:
        z = model.loop(
            before.z,
            injected,
            view,
            keep=before.is_active,
            noise=static.noise,
            noise_keys=noise_keys,
        )
        latent = jnp.where(before.is_active[:, None, None], z.state, before.z.state)
        z = z._replace(state=latent)
        after = before._replace(z=z, loops=before.loops + before.is_active.astype(jnp.int32))
        if static.exit is None:
            return after
        check = functools.partial(_check_exit, static.exit, model, view, is_token)
        is_checked = static.exit.is_checked(z.loop)
        if not static.exit.in_prompt:
            is_checked &= carry.step > 0
        return lax.cond(is_checked, check, lambda loop: loop, after)

    memory = None
    if static.exit is not None:
        memory = static.exit.begin(begin, model.config.vocab_size)
    values = jnp.full((batch, static.max_depth), jnp.nan, jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    start = _Loop(
        Latent(begin, state, zero), is_running, jnp.zeros(batch, jnp.int32), memory, values
    )
    end = lax.while_loop(lambda loop: (loop.z.loop < depth) & jnp.any(loop.is_active), loop, start)
    assert end.z.cache is not None, "a cache was given"
    state = set_loops(end.z.cache, view, end.loops)
    logits, state = model.predict(end.z.state, view, state)
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, carry.step)
    new = draw(logits[:, -1], settings.sampling, keys, carry.present)
    present = carry.present
    if present is not None:
        present = present.at[jnp.arange(batch), new].set(True)
    latent = None
    if static.carried is not None:
        latent = end.z.state[:, -1]
        if static.carried == "normed":
            latent = model.norm(latent).astype(jnp.float32)
    new = jnp.where(is_running, new, STOPPED)
    after = _Carry(state, position[:, -1] + 1, carry.step + 1, latent, present)
    return new, end.loops, end.values, after


def _check_exit(exit: Exit, model: Huginn, view: Any, is_token: Array, loop: _Loop) -> _Loop:
    """Ends the loops of rows for which the criterion holds."""
    z, memory = loop.z, loop.memory
    if exit.reads_output:
        # What the coda stores here is dropped: it is run once more when all loops have ended.
        logits, _ = model.predict(z.state, view, z.cache)
        value, memory = exit.of_logits(logits[:, -1], memory)
    else:
        value, memory = exit.of_latents(z.state, memory, is_token), z.state
    shown = jnp.where(loop.is_active, value, jnp.nan)[:, None]
    return loop._replace(
        is_active=loop.is_active & ~exit.holds(value),
        memory=memory,
        values=lax.dynamic_update_slice(loop.values, shown, (0, z.loop - 1)),
    )
