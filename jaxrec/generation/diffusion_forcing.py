"""Text from a looped model, many positions at a time: loops and tokens on one moving wavefront.

Every outer step runs a few loops on a window of positions that are not settled yet, in one pass,
guesses the token after each, and appends new positions behind:

    E = (1 - m) embed(window) + m E_before          guesses are embedded anew in every step
    S = core(S, E), inner_loops times               with the keys of all tokens before the window
    guesses = head(coda(S));   window = window + headway new positions
    positions up to the last settled one are frozen: their tokens, keys and values stay as they are

The window is a buffer of fixed capacity, the cache an array of slots whose cut is a shorter length,
so that all steps are one compiled program. Rows of a batch are that program mapped over rows.

Geiping, Yang & Su, Efficient parallel samplers for recurrent-depth models and their connection to
diffusion language models (2025), arXiv:2510.14961, section 3.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.errors import UserError
from jaxrec.generation.prompts import check_looped, over_rows, round_up, row_keys
from jaxrec.generation.sampling import Sampling, SamplingConfig, draw_at
from jaxrec.models.huginn import Huginn, Latent
from jaxrec.ops.depth.cache import DepthCache, cut, open_view, set_loops
from jaxrec.ops.depth.exits import relative_change

Freeze = Literal[
    "latent-diff", "latent-acceleration-1", "latent-acceleration-2", "token-stability", "fixed"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionForcing:
    """Options of the sampler; those of the paper's table of results are the default."""

    inner_loops: int = 4  # loops per outer step
    freeze: Freeze = "latent-diff"  # when a position is settled
    threshold: float = 0.03  # of the latent rules: largest |change of S| / |S| that is settled
    embedding_ema: float = 0.1  # part of the embeddings before that is kept; in [0, 1)
    noise: float = 0.0  # part of the latent states that becomes noise before each outer step
    dampened: bool = True  # noise / (1 + loops that the position had)
    sqrt_mixer: bool = False  # sqrt(1 - b) S + sqrt(b) z instead of (1 - b) S + b z
    headway: int = 1  # new positions per outer step; guesses of all but the first are random
    continuous: bool = False  # new positions begin at the last latent states
    max_wavefront: int = 128  # largest window in positions; 0: the context
    full_prefill: bool = True  # prompts run at full depth first; otherwise they begin the window
    latent_scale: float = 1.0  # multiplies initial latent states; 0 begins at zero
    max_steps: int = 4096  # outer steps after which a row ends anyway
    strategy: str | None = None  # of the cache; None: the last loop only
    may_rewrite_prompt: bool = False  # unfinished prompts may settle from the left, as in the
    # original; otherwise a prompt stays what it is

    def __post_init__(self) -> None:
        if self.freeze not in get_args(Freeze):
            raise ValueError(
                f"freeze must be one of {', '.join(get_args(Freeze))}, got {self.freeze!r}."
            )
        for name, least in (("inner_loops", 1), ("headway", 1), ("max_wavefront", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}.")
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"The freeze threshold must be > 0 and finite, got {self.threshold}.")
        if not 0 <= self.embedding_ema < 1:
            raise ValueError(f"embedding_ema must be in [0, 1), got {self.embedding_ema}.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be in [0, 1], got {self.noise}.")
        if 0 < self.max_wavefront < self.headway:
            raise ValueError(
                f"A window of max_wavefront {self.max_wavefront} positions cannot hold the"
                f" {self.headway} new ones of a step. Lower headway."
            )


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
    the front of the window reaches the end of the context, the row ends early.

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
      stop_tokens: a row ends before any of these.
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
    check_looped(model, prompts, max_new_tokens, depth, options.strategy)
    if key is None and not config.is_greedy:
        raise UserError("generate: drawing tokens needs a key. Pass key=jax.random.key(seed).")
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
    rows = len(prompts)
    bound = min(context, longest + max_new_tokens + window) + options.headway
    static = _Static(
        options=options,
        depth=depth,
        window=window,
        context=context,
        prompt=round_up(longest),
        tokens=round_up(bound + window + 1),
    )
    source = _Source(
        sampling=Sampling.of(config),
        keys=None if config.is_greedy else row_keys(key, rows),
        latent_keys=None if latent_key is None else row_keys(latent_key, rows),
        filler_keys=row_keys(jax.random.key(0) if key is None else key, rows),
        tape=None if tape is None else _padded(tape.states, model.config.width),
        fillers=None if tape is None or not tape.fillers else jnp.asarray(np.stack(tape.fillers)),
        stop_tokens=jnp.asarray(list(stop_tokens), jnp.int32),
        max_new_tokens=jnp.asarray(max_new_tokens, jnp.int32),
    )
    return _run(model, prompts, static, source, stride)


class _Static(NamedTuple):
    """What a program is compiled for."""

    options: DiffusionForcing
    depth: int
    window: int  # capacity in positions
    context: int
    prompt: int  # padded length of the prompts
    tokens: int  # capacity of tokens and cache; a window fits behind every position


class _Source(NamedTuple):
    """What stays the same from step to step; keys are (b) outside and () for one row."""

    sampling: Sampling
    keys: Array | None
    latent_keys: Array | None
    filler_keys: Array
    tape: Array | None  # (calls n d)
    fillers: Array | None  # int32 (steps headway-1)
    stop_tokens: Array
    max_new_tokens: Array


_NONE: Any = None
_ROWS: Any = 0
_SOURCE_AXES = _Source(_NONE, _ROWS, _ROWS, _ROWS, _NONE, _NONE, _NONE, _NONE)


class _Stretch(NamedTuple):
    """Some rows of numbers (n d), of which the first `size` count, from a position on."""

    rows: Array
    start: Array  # int32 ()
    size: Array  # int32 ()

    def at(self, start: Array, count: int) -> tuple[Array, Array]:
        """The rows from another position on, (count d), and how many of them there are."""
        index = jnp.arange(count, dtype=jnp.int32) + (start - self.start)
        rows = jnp.take(self.rows, index, axis=0, mode="clip")
        return rows, jnp.maximum(self.size - (start - self.start), 0)


class _Counts(NamedTuple):
    steps: Array
    core_passes: Array
    position_passes: Array
    cache_clears: Array
    standing_waves: Array


class _Wave(NamedTuple):
    """One row between two outer steps; all counts int32 ()."""

    tokens: Array  # int32 (t): frozen, then guessed
    length: Array  # tokens that there are
    frozen: Array  # tokens that are frozen
    prompt: Array  # tokens of the prompt
    latent: Array  # S (window+headway d)
    size: Array  # positions in the window
    loops: Array  # int32 (t)
    stable: Array  # int32 (t)
    before: _Stretch  # S one step ago
    twice_before: _Stretch | None  # S two steps ago
    delta: _Stretch | None  # the last change of S
    embedded: _Stretch | None  # E one step ago
    draws: Array  # of latent states so far
    start: Array  # where the last window began
    change: Array  # (window): of each position in the last step
    counts: _Counts
    is_done: Array  # bool ()


def _run(
    model: Huginn,
    prompts: Sequence[Sequence[int]],
    static: _Static,
    source: _Source,
    stride: int,
) -> Iterator[WaveStep]:
    weights, structure = jax.tree.flatten(model)
    tokens = np.zeros((len(prompts), static.tokens), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    cache, wave = _begin(structure, static, weights, source, jnp.asarray(tokens), lengths)
    shown = lengths.copy()
    limit = lengths + int(source.max_new_tokens)
    stops = np.asarray(source.stop_tokens)
    while True:
        step = _shown(wave, static)
        new: list[list[int]] = []
        for row in range(len(prompts)):
            until = min(int(step.frozen[row]), int(limit[row]))
            part = step.tokens[row, shown[row] : until]
            ends = np.flatnonzero(np.isin(part, stops))
            new.append(part[: ends[0] if len(ends) else None].tolist())
            shown[row] = max(until, shown[row])
            if len(ends):
                limit[row] = shown[row]
        yield step._replace(new_tokens=new)
        if step.is_done.all():
            return
        cache, wave = _advance(
            structure, static, weights, source, cache, wave, jnp.asarray(stride, jnp.int32)
        )


def _shown(on_device: _Wave, static: _Static) -> WaveStep:
    fields = ("tokens", "length", "frozen", "start", "loops", "stable", "is_done")
    shown = {name: getattr(on_device, name) for name in fields} | on_device.counts._asdict()
    shown, values = jax.device_get((shown, on_device.change))
    change = np.full(shown["tokens"].shape, np.nan, np.float32)
    for row, start in enumerate(shown["start"]):
        change[row, start : start + static.window] = values[row]
    return WaveStep(new_tokens=[], change=change, **shown)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
    structure: Any,
    static: _Static,
    weights: list[Array],
    source: _Source,
    tokens: Array,
    lengths: Array,
) -> tuple[DepthCache, _Wave]:
    """All rows before the first outer step, the prompts read."""
    model: Huginn = jax.tree.unflatten(structure, weights)
    each = functools.partial(_begin_row, model, static)
    return over_rows(each, (_SOURCE_AXES, 0, 0), len(lengths))(source, tokens, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4, 5))
def _advance(
    structure: Any,
    static: _Static,
    weights: list[Array],
    source: _Source,
    cache: DepthCache,
    wave: _Wave,
    stride: Array,
) -> tuple[DepthCache, _Wave]:
    """Up to `stride` outer steps of all rows, fewer when all are done."""
    model: Huginn = jax.tree.unflatten(structure, weights)
    step = functools.partial(_step, model, static)
    each = over_rows(step, (_SOURCE_AXES, 0, 0), len(wave.length))

    def busy(carry: tuple[DepthCache, _Wave, Array]) -> Array:
        return ~jnp.all(carry[1].is_done) & (carry[2] < stride)

    def advance(carry: tuple[DepthCache, _Wave, Array]) -> tuple[DepthCache, _Wave, Array]:
        cache, wave = each(source, carry[0], carry[1])
        return cache, wave, carry[2] + 1

    cache, wave, _ = lax.while_loop(busy, advance, (cache, wave, jnp.zeros((), jnp.int32)))
    return cache, wave


def _begin_row(
    model: Huginn, static: _Static, source: _Source, tokens: Array, length: Array
) -> tuple[DepthCache, _Wave]:
    options = static.options
    room = static.window + options.headway
    zero = jnp.zeros((), jnp.int32)
    cache = model.init_state(
        1,
        capacity=static.tokens,
        depth=max(static.depth, options.inner_loops),
        strategy=options.strategy or "full",
    )
    index = jnp.arange(static.tokens, dtype=jnp.int32)
    loops, size, frozen, start, draws = jnp.zeros_like(index), length, length, zero, zero
    passes = position_passes = zero
    if options.full_prefill:
        latent = _states(model, static, source, draws, zero, static.prompt)
        shape = (1, static.prompt)
        logits, read = model(
            tokens[None, : static.prompt],
            cache,
            segment_ids=jnp.ones(shape, jnp.int32),
            latent=latent[None],
            depth=static.depth,
        )
        assert read is not None, "a cache was given"
        cache = cut(read, length)
        last = lax.dynamic_slice_in_dim(logits[0], length - 1, 1, axis=0)
        first = _draw(source, last, length[None], tokens, length, length)
        tokens = lax.dynamic_update_slice(tokens, first, (length,))
        size, frozen, start, draws = jnp.ones_like(size), length + 1, length, draws + 1
        loops = jnp.where(index <= length, jnp.asarray(static.depth, jnp.int32), 0)
        passes, position_passes = passes + 1, length
    latent = _states(model, static, source, draws, start, room)
    latent = jnp.where(jnp.arange(room)[:, None] < size, latent, 0.0)
    embedded = None
    if options.embedding_ema > 0:
        window = lax.dynamic_slice_in_dim(tokens, start, static.window)[None]
        view, opened = open_view(cache, (1, static.window), jnp.ones_like(window))
        embedded = _Stretch(model.embed(window, view, opened)[0][0], start, size)
    before = _Stretch(latent, zero, size)
    nothing = _Stretch(jnp.zeros_like(latent), zero, size)
    is_stopped = jnp.any(_is_stop(source, tokens) & (index >= length) & (index < frozen))
    wave = _Wave(
        tokens=tokens,
        length=frozen,
        frozen=frozen,
        prompt=length,
        latent=latent,
        size=size,
        loops=loops,
        stable=jnp.zeros_like(index),
        before=before,
        twice_before=nothing if options.freeze == "latent-acceleration-2" else None,
        delta=nothing if options.freeze == "latent-acceleration-1" else None,
        embedded=embedded,
        draws=draws + 1,
        start=start,
        change=jnp.full(static.window, jnp.nan, jnp.float32),
        counts=_Counts(zero, passes, position_passes, zero, zero),
        is_done=is_stopped | (frozen - length >= source.max_new_tokens),
    )
    return cache, wave


def _step(
    model: Huginn, static: _Static, source: _Source, cache: DepthCache, wave: _Wave
) -> tuple[DepthCache, _Wave]:
    """One outer step of one row; nothing but the draft behind its length for one that is done."""
    options, window, headway = static.options, static.window, static.options.headway
    start, size = cache.kv.length, wave.size
    index = jnp.arange(static.tokens, dtype=jnp.int32)
    place = jnp.arange(window, dtype=jnp.int32)
    tokens = lax.dynamic_slice_in_dim(wave.tokens, start, window)[None]
    view, cache_then = open_view(cache, (1, window), jnp.ones_like(tokens))
    embedded_then, cache_then = model.embed(tokens, view, cache_then)
    embedded, wave = _mix_embeddings(static, wave, embedded_then[0], start)

    latent, draws = wave.latent[:window], wave.draws
    begun = latent
    if options.noise > 0:
        noise = _states(model, static, source, draws, start, window, salt=wave.counts.steps + 1)
        had = lax.dynamic_slice_in_dim(wave.loops, start, window)
        latent, draws = _mix_noise(options, latent, noise, had), draws + 1
    injected = model.inject(embedded[None])

    def loop(_: int, z: Latent) -> Latent:
        return model.loop(z, injected, view)

    z = Latent(latent[None], cache_then, jnp.zeros((), jnp.int32))
    z = lax.fori_loop(0, options.inner_loops, loop, z)
    assert z.cache is not None, "a cache was given"
    cache_then = set_loops(z.cache, view, z.loop)
    logits, after = model.predict(z.state, view, cache_then)
    assert after is not None, "a cache was given"
    in_window = (index >= start) & (index < start + size)
    loops = wave.loops + options.inner_loops * in_window.astype(jnp.int32)

    # The row of a position guesses the token after it; what is frozen stays.
    drawn = _draw(source, logits[0], start + 1 + place, wave.tokens, wave.frozen, wave.prompt)
    guessed = lax.dynamic_update_slice(wave.tokens, drawn, (start + 1,))
    guessed = jnp.where(index < wave.frozen, wave.tokens, guessed)
    stays = (index < wave.length) & (guessed == wave.tokens)
    stable = wave.stable + stays.astype(jnp.int32)
    if headway > 1:
        filler = _fillers(model, source, wave.counts.steps, headway - 1)
        guessed = lax.dynamic_update_slice(guessed, filler, (start + size + 1,))
    length = start + size + headway

    # New positions; a window that is full waits for others to be frozen.
    new = _states(model, static, source, draws, start + size, headway)
    goes_on = jnp.asarray(options.continuous) & (size >= headway)
    latent = jnp.concatenate([z.state[0], jnp.zeros((headway, latent.shape[1]))])
    last = lax.dynamic_slice_in_dim(latent, jnp.maximum(size - headway, 0), headway, axis=0)
    latent = lax.dynamic_update_slice(latent, jnp.where(goes_on, last, new), (size, 0))
    draws = draws + jnp.where(goes_on, 0, 1)
    grown = size + headway
    is_standing = jnp.zeros((), jnp.bool_)
    if options.max_wavefront > 0:
        is_standing = grown > options.max_wavefront
        grown = jnp.minimum(grown, options.max_wavefront)
        length = jnp.minimum(length, start + options.max_wavefront)

    moved = wave._replace(
        tokens=guessed, length=length, latent=latent, stable=stable, loops=loops, draws=draws
    )
    settled, delta = _settled(static, moved, start, size, grown)  # tokens to freeze, or 0
    is_frozen = settled > 0
    # All but the last one frozen leave the window: its scores are needed for the token after.
    keeps_last = 0 if options.freeze == "fixed" else 1
    kept = jnp.where(is_frozen, settled - keeps_last, start)
    if options.freeze == "fixed":
        rows = jnp.minimum(headway, start + size + 1 - wave.frozen)
        frozen = wave.frozen + jnp.where(is_frozen, rows, 0)
    else:
        least = jnp.ones_like(wave.prompt) if options.may_rewrite_prompt else wave.frozen
        frozen = jnp.where(is_frozen, jnp.maximum(settled, least), wave.frozen)
    left = _Stretch(latent, start, grown)
    latent, grown = left.at(kept, latent.shape[0])

    steps = wave.counts.steps
    is_late = steps > options.max_steps
    is_stopped = jnp.any(_is_stop(source, guessed) & (index >= wave.frozen) & (index < frozen))
    is_done = (frozen - wave.prompt >= source.max_new_tokens) | (length > static.context)
    then = moved._replace(
        frozen=frozen,
        latent=latent,
        size=grown,
        before=_Stretch(latent, start, grown),
        twice_before=None if wave.twice_before is None else wave.before,
        delta=delta,
        start=start,
        change=jnp.where(place < size, relative_change(z.state[0], begun), jnp.nan),
        counts=_Counts(
            steps=steps + jnp.where(is_late, 0, 1),
            core_passes=wave.counts.core_passes + options.inner_loops,
            position_passes=wave.counts.position_passes + options.inner_loops * size,
            cache_clears=wave.counts.cache_clears + start + size - kept,
            standing_waves=wave.counts.standing_waves + is_standing.astype(jnp.int32),
        ),
        is_done=is_done | is_stopped | is_late,
    )
    # What a done row wrote lies behind its length, where nobody looks.
    kept = jnp.where(wave.is_done, start, kept)
    then = jax.tree.map(lambda old, new: jnp.where(wave.is_done, old, new), wave, then)
    return cut(after, kept), then


def _settled(
    static: _Static, wave: _Wave, start: Array, size: Array, grown: Array
) -> tuple[Array, _Stretch | None]:
    """How many tokens, counted from the first of all, the rule freezes, int32 (), 0 for none; and
    the change of the latent states, which one rule remembers.

    wave: after the window has grown, but with `size` positions before.
    """
    options, latent = static.options, wave.latent
    delay = static.depth // options.inner_loops
    place = jnp.arange(latent.shape[0], dtype=jnp.int32)
    delta = None
    if options.freeze == "fixed":
        commits = jnp.minimum(options.headway, size)
        return jnp.where(wave.counts.steps > delay, start + commits, 0), None
    if options.freeze == "token-stability":
        index = jnp.arange(wave.stable.shape[0], dtype=jnp.int32)
        return jnp.max(jnp.where(wave.stable > delay, index + 1, 0)), None
    before, count = wave.before.at(start, latent.shape[0])
    if options.freeze == "latent-diff":
        measure = relative_change(latent, before)
    elif wave.delta is not None:
        # The original aligns these two by their place in the window, not by position.
        delta = _Stretch(latent - before, start, count)
        measure = _ratio(delta.rows - wave.delta.rows, latent)
        count = jnp.minimum(count, wave.delta.size)
    else:
        assert wave.twice_before is not None, "this rule remembers two steps"
        twice, twice_count = wave.twice_before.at(start, latent.shape[0])
        measure = _ratio(latent - before - (before - twice), latent, 1e-6)
        count = jnp.minimum(jnp.minimum(count, twice_count), grown)
    is_settled = (place < count) & (measure < options.threshold)
    return jnp.max(jnp.where(is_settled, start + place + 1, 0)), delta


def _ratio(x: Array, y: Array, epsilon: float = 0.0) -> Array:
    return jnp.linalg.norm(x, axis=-1) / (jnp.linalg.norm(y, axis=-1) + epsilon)


def _mix_embeddings(
    static: _Static, wave: _Wave, embedded: Array, start: Array
) -> tuple[Array, _Wave]:
    """The moving average of E (window d); a new position has its own part only."""
    if wave.embedded is None:
        return embedded, wave
    ema = static.options.embedding_ema
    before, count = wave.embedded.at(start, static.window)
    is_old = jnp.arange(static.window)[:, None] < count
    embedded = (1 - ema) * embedded + jnp.where(is_old, ema * before, jnp.zeros_like(before))
    return embedded, wave._replace(embedded=_Stretch(embedded, start, wave.size))


def _mix_noise(options: DiffusionForcing, latent: Array, noise: Array, had: Array) -> Array:
    part = jnp.full(had.shape, options.noise)
    if options.dampened:
        part = part / (1 + had.astype(jnp.float32))
    part = part[:, None]
    if options.sqrt_mixer:
        return jnp.sqrt(jax.nn.relu(1 - part)) * latent + jnp.sqrt(part) * noise
    return (1 - part) * latent + part * noise


def _states(
    model: Huginn,
    static: _Static,
    source: _Source,
    draws: Array,
    start: Array,
    count: int,
    salt: Array | None = None,
) -> Array:
    """Initial latent states (count d) of the positions from `start` on; with a salt, noise."""
    scale = static.options.latent_scale
    if source.tape is not None:
        entry = lax.dynamic_index_in_dim(source.tape, draws, keepdims=False)
        missing = max(count - entry.shape[0], 0)
        return jnp.pad(entry, ((0, missing), (0, 0)))[:count]
    if source.latent_keys is None or scale == 0:
        return jnp.zeros((count, model.config.width))
    key = source.latent_keys
    if salt is not None:
        key = jax.random.fold_in(jax.random.fold_in(key, 2**30), salt)
    position = start + jnp.arange(count, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, position)
    return scale * jax.vmap(lambda key: model.init_latent(key, 1, 1)[0, 0])(keys)


def _fillers(model: Huginn, source: _Source, step: Array, count: int) -> Array:
    """Random guesses int32 (count) of a step."""
    if source.fillers is not None:
        return lax.dynamic_index_in_dim(source.fillers, step, keepdims=False).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.fold_in(source.filler_keys, 2**30), step)
    return jax.random.randint(key, (count,), 0, model.config.vocab_size, jnp.int32)


def _draw(
    source: _Source, logits: Array, position: Array, tokens: Array, frozen: Array, prompt: Array
) -> Array:
    """The tokens int32 (n) at some positions (n), from their scores (n vocab)."""
    step = jnp.maximum(position - prompt, 0)
    known = jnp.broadcast_to(frozen, position.shape)
    return draw_at(logits, source.sampling, source.keys, step, tokens, known)


def _is_stop(source: _Source, tokens: Array) -> Array:
    return jnp.any(tokens[:, None] == source.stop_tokens[None], axis=1)


def _padded(states: Sequence[np.ndarray], width: int) -> Array:
    """Recorded states (n d) of unequal n as (calls n d)."""
    longest = max(len(each) for each in states)
    padded = np.zeros((len(states), longest, width), np.float32)
    for call, each in enumerate(states):
        padded[call, : len(each)] = each
    return jnp.asarray(padded)
