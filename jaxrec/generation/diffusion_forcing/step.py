"""One outer step of one row: the window refined once, new positions, and what is frozen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.generation.diffusion_forcing import rules
from jaxrec.generation.diffusion_forcing.options import DiffusionForcing
from jaxrec.generation.diffusion_forcing.rules import Stretch
from jaxrec.generation.rows import End, RowKeys
from jaxrec.generation.sampling import Sampling, draw_at
from jaxrec.models.huginn import Huginn, Latent
from jaxrec.ops.depth.cache import DepthCache, cut, open_view, set_loops
from jaxrec.ops.depth.exits import relative_change


class Static(NamedTuple):
    """What a program is compiled for."""

    options: DiffusionForcing
    depth: int
    window: int  # capacity in positions
    context: int
    prompt: int  # padded length of the prompts
    tokens: int  # capacity of tokens and cache; a window fits behind every position


class Shared(NamedTuple):
    """What is the same for all steps and rows."""

    sampling: Sampling
    tape: Array | None  # (calls n d): recorded latent states and noise of the only row
    fillers: Array | None  # int32 (steps headway-1): its recorded guesses
    end: End


class Counts(NamedTuple):
    """What a row has used; int32 ()."""

    steps: Array
    core_passes: Array
    position_passes: Array
    cache_clears: Array
    standing_waves: Array


class Wave(NamedTuple):
    """One row between two outer steps; all counts int32 ()."""

    tokens: Array  # int32 (t): frozen, then guessed
    length: Array  # tokens that there are
    frozen: Array  # tokens that are frozen
    prompt: Array  # tokens of the prompt
    latent: Array  # S (window+headway d)
    size: Array  # positions in the window
    loops: Array  # int32 (t)
    stable: Array  # int32 (t)
    before: Stretch  # S one step ago
    twice_before: Stretch | None  # S two steps ago
    delta: Stretch | None  # the last change of S
    embedded: Stretch | None  # E one step ago
    draws: Array  # of latent states so far
    start: Array  # where the last window began
    change: Array  # (window): of each position in the last step
    counts: Counts
    is_done: Array  # bool ()


def begin_row(
    model: Huginn, static: Static, shared: Shared, keys: RowKeys, tokens: Array, length: Array
) -> tuple[DepthCache, Wave]:
    """One row before the first outer step: its prompt read, or beginning the window."""
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
        latent = _states(model, static, shared, keys, draws, zero, static.prompt)
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
        first = _draw(shared, keys, last, length[None], tokens, length, length)
        tokens = lax.dynamic_update_slice(tokens, first, (length,))
        size, frozen, start, draws = jnp.ones_like(size), length + 1, length, draws + 1
        loops = jnp.where(index <= length, jnp.asarray(static.depth, jnp.int32), 0)
        passes, position_passes = passes + 1, length
    latent = _states(model, static, shared, keys, draws, start, room)
    latent = jnp.where(jnp.arange(room)[:, None] < size, latent, 0.0)
    embedded = None
    if options.embedding_ema > 0:
        window = lax.dynamic_slice_in_dim(tokens, start, static.window)[None]
        view, opened = open_view(cache, (1, static.window), jnp.ones_like(window))
        embedded = Stretch(model.embed(window, view, opened)[0][0], start, size)
    before = Stretch(latent, zero, size)
    nothing = Stretch(jnp.zeros_like(latent), zero, size)
    wave = Wave(
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
        counts=Counts(zero, passes, position_passes, zero, zero),
        is_done=shared.end.is_reached(tokens, length, frozen, length),
    )
    return cache, wave


def step_row(
    model: Huginn, static: Static, shared: Shared, keys: RowKeys, cache: DepthCache, wave: Wave
) -> tuple[DepthCache, Wave]:
    """One outer step of one row; nothing but the draft behind its length for one that is done."""
    options, window, headway = static.options, static.window, static.options.headway
    start, size = cache.kv.length, wave.size
    index = jnp.arange(static.tokens, dtype=jnp.int32)
    place = jnp.arange(window, dtype=jnp.int32)
    tokens = lax.dynamic_slice_in_dim(wave.tokens, start, window)[None]
    view, cache_then = open_view(cache, (1, window), jnp.ones_like(tokens))
    embedded_then, cache_then = model.embed(tokens, view, cache_then)
    embedded, remembered = embedded_then[0], wave.embedded
    if remembered is not None:
        embedded = rules.mix_embeddings(embedded, remembered, start, options.embedding_ema)
        remembered = Stretch(embedded, start, size)

    latent, draws = wave.latent[:window], wave.draws
    begun = latent
    if options.noise > 0:
        noise = _states(
            model, static, shared, keys, draws, start, window, salt=wave.counts.steps + 1
        )
        had = lax.dynamic_slice_in_dim(wave.loops, start, window)
        part = jnp.full(had.shape, options.noise)
        if options.dampened:
            part = part / (1 + had.astype(jnp.float32))
        latent = rules.mix_noise(latent, noise, part, by_roots=options.sqrt_mixer)
        draws = draws + 1
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
    drawn = _draw(shared, keys, logits[0], start + 1 + place, wave.tokens, wave.frozen, wave.prompt)
    guessed = lax.dynamic_update_slice(wave.tokens, drawn, (start + 1,))
    guessed = jnp.where(index < wave.frozen, wave.tokens, guessed)
    stays = (index < wave.length) & (guessed == wave.tokens)
    stable = wave.stable + stays.astype(jnp.int32)
    if headway > 1:
        filler = _fillers(model, shared, keys, wave.counts.steps, headway - 1)
        guessed = lax.dynamic_update_slice(guessed, filler, (start + size + 1,))
    length = start + size + headway

    # New positions; a window that is full waits for others to be frozen.
    new = _states(model, static, shared, keys, draws, start + size, headway)
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
    left = Stretch(latent, start, grown)
    latent, grown = left.at(kept, latent.shape[0])

    steps = wave.counts.steps
    is_late = steps > options.max_steps
    is_done = shared.end.is_reached(guessed, wave.frozen, frozen, wave.prompt)
    then = moved._replace(
        frozen=frozen,
        latent=latent,
        size=grown,
        before=Stretch(latent, start, grown),
        twice_before=None if wave.twice_before is None else wave.before,
        delta=delta,
        embedded=remembered,
        start=start,
        change=jnp.where(place < size, relative_change(z.state[0], begun), jnp.nan),
        counts=Counts(
            steps=steps + jnp.where(is_late, 0, 1),
            core_passes=wave.counts.core_passes + options.inner_loops,
            position_passes=wave.counts.position_passes + options.inner_loops * size,
            cache_clears=wave.counts.cache_clears + start + size - kept,
            standing_waves=wave.counts.standing_waves + is_standing.astype(jnp.int32),
        ),
        is_done=is_done | is_late | (length > static.context),
    )
    # What a done row wrote lies behind its length, where nobody looks.
    kept = jnp.where(wave.is_done, start, kept)
    then = jax.tree.map(lambda old, new: jnp.where(wave.is_done, old, new), wave, then)
    return cut(after, kept), then


def _settled(
    static: Static, wave: Wave, start: Array, size: Array, grown: Array
) -> tuple[Array, Stretch | None]:
    """How many tokens the rule freezes, 0 for none, and what it remembers of this step.

    wave: after the window has grown, but with `size` positions before.
    """
    options, latent, threshold = static.options, wave.latent, static.options.threshold
    delay = static.depth // options.inner_loops
    match options.freeze:
        case "fixed":
            count = jnp.minimum(options.headway, size)
            return rules.by_schedule(wave.counts.steps, delay, start, count), None
        case "token-stability":
            return rules.by_stability(wave.stable, delay), None
        case "latent-diff":
            return rules.by_change(latent, wave.before, start, threshold), None
        case "latent-acceleration-1":
            assert wave.delta is not None, "this rule remembers the last change"
            return rules.by_acceleration_in_place(latent, wave.before, wave.delta, start, threshold)
        case "latent-acceleration-2":
            assert wave.twice_before is not None, "this rule remembers two steps"
            settled = rules.by_acceleration(
                latent, wave.before, wave.twice_before, start, grown, threshold
            )
            return settled, None


def _states(
    model: Huginn,
    static: Static,
    shared: Shared,
    keys: RowKeys,
    draws: Array,
    start: Array,
    count: int,
    salt: Array | None = None,
) -> Array:
    """Initial latent states (count d) of the positions from `start` on; with a salt, noise."""
    scale = static.options.latent_scale
    if shared.tape is not None:
        entry = lax.dynamic_index_in_dim(shared.tape, draws, keepdims=False)
        missing = max(count - entry.shape[0], 0)
        return jnp.pad(entry, ((0, missing), (0, 0)))[:count]
    if keys.latents is None or scale == 0:
        return jnp.zeros((count, model.config.width))
    key = keys.latents
    if salt is not None:
        key = jax.random.fold_in(jax.random.fold_in(key, 2**30), salt)
    position = start + jnp.arange(count, dtype=jnp.int32)
    each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, position)
    return scale * jax.vmap(lambda key: model.init_latent(key, 1, 1)[0, 0])(each)


def _fillers(model: Huginn, shared: Shared, keys: RowKeys, step: Array, count: int) -> Array:
    """Random guesses int32 (count) of a step."""
    if shared.fillers is not None:
        return lax.dynamic_index_in_dim(shared.fillers, step, keepdims=False).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.fold_in(keys.guesses, 2**30), step)
    return jax.random.randint(key, (count,), 0, model.config.vocab_size, jnp.int32)


def _draw(
    shared: Shared,
    keys: RowKeys,
    logits: Array,
    position: Array,
    tokens: Array,
    frozen: Array,
    prompt: Array,
) -> Array:
    """The tokens int32 (n) at some positions (n), from their scores (n vocab)."""
    step = jnp.maximum(position - prompt, 0)
    known = jnp.broadcast_to(frozen, position.shape)
    return draw_at(logits, shared.sampling, keys.draws, step, tokens, known)
