"""The parallel sampler from outside: prompts in, what has become final out, step by step."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.errors import UserError
from jaxrec.generation.diffusion_forcing.options import DiffusionForcing
from jaxrec.generation.diffusion_forcing.step import Shared, Static, Wave, begin_row, step_row
from jaxrec.generation.programs import FlatModel, over_rows
from jaxrec.generation.prompts import check_looped, round_up
from jaxrec.generation.rows import End, RowKeys, Texts
from jaxrec.generation.sampling import Sampling, SamplingConfig
from jaxrec.models.huginn import Huginn
from jaxrec.ops.depth.cache import DepthCache


class Tape(NamedTuple):
    """Recorded draws of one row in the order in which they are needed, instead of keys."""

    states: Sequence[np.ndarray]  # (n d) each: prompt, first position, then noise and positions
    fillers: Sequence[np.ndarray]  # int (headway - 1) each


class WaveStep(NamedTuple):
    """How all rows stand after some outer steps."""

    new_tokens: list[list[int]]  # that were frozen since the last one, without stop tokens
    tokens: np.ndarray  # int32 (b t): frozen and guessed
    length: np.ndarray  # int32 (b): how many of these there are
    frozen: np.ndarray  # int32 (b): how many of these are frozen
    start: np.ndarray  # int32 (b): position at which the window of the last step began
    change: np.ndarray  # float32 (b t): |change of S| / |S| in the last step; NaN outside
    loops: np.ndarray  # int32 (b t): loops that each position had
    stable: np.ndarray  # int32 (b t): outer steps that left each token as it was
    steps: np.ndarray  # int32 (b): outer steps
    core_passes: np.ndarray  # int32 (b): sequential runs of the core; a prefill counts as one
    position_passes: np.ndarray  # int32 (b): positions that they forwarded, all together
    cache_clears: np.ndarray  # int32 (b): tokens cut from the cache
    standing_waves: np.ndarray  # int32 (b): steps in which the window could not grow
    is_done: np.ndarray  # bool (b)


def generate_diffusion(
    model: Huginn,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    options: DiffusionForcing | None = None,
    depth: int | None = None,
    config: SamplingConfig | None = None,
    key: Array | None = None,
    latent_key: Array | None = None,
    tape: Tape | None = None,
    stop_tokens: Sequence[int] = (),
    stride: int = 1,
) -> Iterator[WaveStep]:
    """Continues prompts; yields what has become final after every `stride` outer steps.

    A row may end with more tokens frozen than were asked for; `new_tokens` leaves them out. Where
    the front of the window passes the end of the context, the row ends early, as in the original,
    and more new tokens may be asked for than fit.

    Args:
      model: a looped model.
      prompts: token ids of each row, of any lengths >= 1.
      max_new_tokens: number of tokens after the prompt, >= 1.
      options: `DiffusionForcing()` if None.
      depth: loops of the prefill, which also delay the rules "fixed" and "token-stability"; the
        trained mean if None.
      config: how tokens are drawn; `SamplingConfig()` if None. The draw of a position is that of
        `generate`, so that texts agree where the scores do.
      key: randomness of the draws and of random guesses; not needed at temperature 0.
      latent_key: randomness of latent states and of noise; None begins at zero.
      tape: recorded draws of a single row instead of `latent_key`.
      stop_tokens: a row ends before any of these, from its first step on; the original looks for
        them only after `depth` outer steps.
      stride: outer steps between two yields.

    Raises:
      UserError: as for `generate_adaptive`, or a prompt that is not run first is longer than the
        window. Raised by the call, not by the first `next`.
    """
    config, options = config or SamplingConfig(), options or DiffusionForcing()
    depth = model.config.mean_depth if depth is None else depth
    core = getattr(model.config, "core_layers", 1)
    options = dataclasses.replace(
        options, strategy=options.strategy or f"latest-m{core}-compress-s{core}"
    )
    assert options.strategy is not None, "it was just set"
    check_looped(model, prompts, max_new_tokens, depth, options.strategy, may_end_early=True)
    keys = RowKeys.of(len(prompts), config, key, latent_key)
    if tape is not None and len(prompts) != 1:
        raise UserError(f"generate: a tape is that of one row, got {len(prompts)} prompts.")
    longest = max(len(prompt) for prompt in prompts)
    context = model.config.context
    window = min(options.max_wavefront or context, context)
    if not options.full_prefill and longest > window:
        raise UserError(
            f"generate: a prompt of {longest} tokens is larger than the window of {window}"
            " positions that it shall begin. Use full_prefill, or a larger max_wavefront."
        )
    bound = min(context, longest + max_new_tokens + window) + options.headway
    static = Static(
        options=options,
        depth=depth,
        window=window,
        context=context,
        prompt=round_up(longest),
        tokens=round_up(bound + window + 1),
    )
    shared = Shared(
        sampling=Sampling.of(config),
        tape=None if tape is None else _padded(tape.states, model.config.width),
        fillers=None if tape is None or not tape.fillers else jnp.asarray(np.stack(tape.fillers)),
        end=End.of(stop_tokens, max_new_tokens),
    )
    return _run(model, Texts(prompts, max_new_tokens, stop_tokens), static, shared, keys, stride)


def _run(
    model: Huginn, texts: Texts, static: Static, shared: Shared, keys: RowKeys, stride: int
) -> Iterator[WaveStep]:
    flat, steps = FlatModel.of(model), FlatModel.for_decoding(model)
    tokens = texts.padded(static.tokens)
    cache, wave = _begin(flat, static, shared, keys, tokens, texts.lengths)
    while True:
        step = _shown(wave, static)
        yield step._replace(new_tokens=texts.new(step.tokens, step.frozen))
        if step.is_done.all():
            return
        cache, wave = _advance(
            steps, static, shared, keys, cache, wave, np.asarray(stride, np.int32)
        )


def _shown(on_device: Wave, static: Static) -> WaveStep:
    fields = ("tokens", "length", "frozen", "start", "loops", "stable", "is_done")
    shown = {name: getattr(on_device, name) for name in fields} | on_device.counts._asdict()
    shown, values = jax.device_get((shown, on_device.change))
    change = np.full(shown["tokens"].shape, np.nan, np.float32)
    for row, start in enumerate(shown["start"]):
        change[row, start : start + static.window] = values[row]
    return WaveStep(new_tokens=[], change=change, **shown)


@functools.partial(jax.jit, static_argnums=1)
def _begin(
    flat: FlatModel,
    static: Static,
    shared: Shared,
    keys: RowKeys,
    tokens: Array,
    lengths: Array,
) -> tuple[DepthCache, Wave]:
    """All rows before the first outer step, the prompts read."""
    each = functools.partial(begin_row, flat.module(), static, shared)
    return over_rows(each, len(lengths))(keys, tokens, lengths)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=(4, 5))
def _advance(
    flat: FlatModel,
    static: Static,
    shared: Shared,
    keys: RowKeys,
    cache: DepthCache,
    wave: Wave,
    stride: Array,
) -> tuple[DepthCache, Wave]:
    """Up to `stride` outer steps of all rows, fewer when all are done."""
    step = functools.partial(step_row, flat.module(), static, shared)
    each = over_rows(step, len(wave.length))

    def busy(carry: tuple[DepthCache, Wave, Array]) -> Array:
        return ~jnp.all(carry[1].is_done) & (carry[2] < stride)

    def advance(carry: tuple[DepthCache, Wave, Array]) -> tuple[DepthCache, Wave, Array]:
        cache, wave = each(keys, carry[0], carry[1])
        return cache, wave, carry[2] + 1

    cache, wave, _ = lax.while_loop(busy, advance, (cache, wave, jnp.zeros((), jnp.int32)))
    return cache, wave


def _padded(states: Sequence[np.ndarray], width: int) -> Array:
    """Recorded states (n d) of unequal n as (calls n d)."""
    longest = max(len(each) for each in states)
    padded = np.zeros((len(states), longest, width), np.float32)
    for call, each in enumerate(states):
        padded[call, : len(each)] = each
    return jnp.asarray(padded)
