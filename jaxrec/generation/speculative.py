"""Text from a looped model that drafts for itself: few loops guess tokens, many check them at once.

    draft    lookahead tokens one by one with draft_depth loops each
    verify   one pass over all of them with depth loops
    accept   drafts up to the first that the pass would not have drawn, and the one that it draws

A row accepts as many as it does, whatever the others do: each has its own length, and its cache is
cut to it. Every draw belongs to (key, row, step), so with the cache strategy "full" and threshold 1
the text is that of `generate` at full depth, greedy or not.

Geiping et al. (2025), arXiv:2502.05171, section 6.4; speculation: Leviathan et al. (2022),
arXiv:2211.17192.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.errors import UserError
from jaxrec.generation.prompts import check_looped, latents, over_rows, round_up, row_keys
from jaxrec.generation.sampling import Sampling, SamplingConfig, draw_at
from jaxrec.models.huginn import Huginn
from jaxrec.ops.depth.cache import DepthCache, cut


class SpeculativeStep(NamedTuple):
    """How all rows stand after one round."""

    new_tokens: list[list[int]]  # of this round, without stop tokens and what is beyond the limit
    tokens: np.ndarray  # int32 (b t)
    length: np.ndarray  # int32 (b): how many of these there are
    accepted: np.ndarray  # int32 (b): drafts that were accepted in this round
    rounds: np.ndarray  # int32 (b)
    is_done: np.ndarray  # bool (b)


def generate_speculative(
    model: Huginn,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    draft_depth: int = 4,
    lookahead: int = 8,
    depth: int | None = None,
    threshold: float = 1.0,
    strategy: str = "full",
    config: SamplingConfig | None = None,
    key: Array | None = None,
    latent_key: Array | None = None,
    stop_tokens: Sequence[int] = (),
) -> Iterator[SpeculativeStep]:
    """Continues prompts; yields what every round has accepted.

    Args:
      model: a looped model.
      prompts: token ids of each row, of any lengths >= 1.
      max_new_tokens: number of tokens after the prompt, >= 1.
      draft_depth: loops of a drafted token, >= 1; well below `depth`, or nothing is saved.
      lookahead: drafted tokens per round, >= 1.
      depth: loops of prefill and verification; the trained mean if None.
      threshold: 1 accepts what verification draws itself; below, drafts with at least so many
        times the probability of the best token.
      strategy: which keys and values are stored and read, see `ops.depth.cache`.
      config: how tokens are drawn; `SamplingConfig()` if None.
      key: randomness of the draws; not needed at temperature 0.
      latent_key: randomness of the initial latent states; None begins at zero.
      stop_tokens: a row ends before any of these.

    Raises:
      UserError: as for `generate_adaptive`, or an option is out of range. Raised by the call, not
        by the first `next`.
    """
    config = config or SamplingConfig()
    depth = model.config.mean_depth if depth is None else depth
    for each in (depth, draft_depth):
        check_looped(model, prompts, max_new_tokens, each, strategy)
    if lookahead < 1:
        raise UserError(f"generate: lookahead must be >= 1, got {lookahead}.")
    if not 0 < threshold <= 1:
        raise UserError(
            f"generate: the threshold of acceptance must be in (0, 1], got {threshold}."
        )
    if key is None and not config.is_greedy:
        raise UserError("generate: drawing tokens needs a key. Pass key=jax.random.key(seed).")
    rows = len(prompts)
    longest = max(len(prompt) for prompt in prompts)
    static = _Static(
        lookahead=lookahead,
        is_exact=threshold == 1,
        depth=max(depth, draft_depth),
        prompt=round_up(longest),
        tokens=round_up(longest + max_new_tokens + lookahead + 1),
        strategy=strategy,
    )
    source = _Source(
        sampling=Sampling.of(config),
        keys=None if config.is_greedy else row_keys(key, rows),
        latent_keys=None if latent_key is None else row_keys(latent_key, rows),
        depth=jnp.asarray(depth, jnp.int32),
        draft_depth=jnp.asarray(draft_depth, jnp.int32),
        threshold=jnp.asarray(threshold, jnp.float32),
        stop_tokens=jnp.asarray(list(stop_tokens), jnp.int32),
        max_new_tokens=jnp.asarray(max_new_tokens, jnp.int32),
    )
    return _run(model, prompts, static, source)


class _Static(NamedTuple):
    """What a program is compiled for."""

    lookahead: int
    is_exact: bool
    depth: int  # loops that the cache has slots for
    prompt: int  # padded length of the prompts
    tokens: int  # capacity of tokens and cache
    strategy: str


class _Source(NamedTuple):
    """What stays the same from round to round; keys are (b) outside and () for one row."""

    sampling: Sampling
    keys: Array | None
    latent_keys: Array | None
    depth: Array
    draft_depth: Array
    threshold: Array
    stop_tokens: Array
    max_new_tokens: Array


_NONE: Any = None
_ROWS: Any = 0
_SOURCE_AXES = _Source(_NONE, _ROWS, _ROWS, _NONE, _NONE, _NONE, _NONE, _NONE)


class _Row(NamedTuple):
    """One row between two rounds. The cache lacks the last token only."""

    cache: DepthCache
    tokens: Array  # int32 (t)
    length: Array  # int32 ()
    prompt: Array  # int32 (): tokens of the prompt
    accepted: Array  # int32 (): drafts accepted in the last round
    rounds: Array  # int32 ()
    is_done: Array  # bool ()


def _run(
    model: Huginn, prompts: Sequence[Sequence[int]], static: _Static, source: _Source
) -> Iterator[SpeculativeStep]:
    weights, structure = jax.tree.flatten(model)
    tokens = np.zeros((len(prompts), static.tokens), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = _begin(structure, static, weights, source, jnp.asarray(tokens), jnp.asarray(lengths))
    shown, limit = lengths.copy(), lengths + int(source.max_new_tokens)
    stops = np.asarray(source.stop_tokens)
    while True:
        host: Any = jax.device_get(rows._replace(cache=_NONE))
        new: list[list[int]] = []
        for row in range(len(prompts)):
            until = min(int(host.length[row]), int(limit[row]))
            part = host.tokens[row, shown[row] : until]
            ends = np.flatnonzero(np.isin(part, stops))
            new.append(part[: ends[0] if len(ends) else None].tolist())
            shown[row] = until
            if len(ends):
                limit[row] = until
        yield SpeculativeStep(
            new, host.tokens, host.length, host.accepted, host.rounds, host.is_done
        )
        if host.is_done.all():
            return
        rows = _advance(structure, static, weights, source, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
    structure: Any,
    static: _Static,
    weights: list[Array],
    source: _Source,
    tokens: Array,
    lengths: Array,
) -> _Row:
    """All rows with their prompts read and one token drawn."""
    model: Huginn = jax.tree.unflatten(structure, weights)

    def begin(source: _Source, tokens: Array, length: Array) -> _Row:
        cache = model.init_state(
            1, capacity=static.tokens, depth=static.depth, strategy=static.strategy
        )
        zero = jnp.zeros((), jnp.int32)
        logits, cache = _forward(model, source, cache, tokens[: static.prompt], zero, source.depth)
        last = lax.dynamic_slice_in_dim(logits, length - 1, 1, axis=0)
        first = draw_at(last, source.sampling, source.keys, zero[None], tokens, length[None])
        tokens = lax.dynamic_update_slice(tokens, first, (length,))
        row = _Row(cut(cache, length), tokens, length + 1, length, zero, zero, jnp.bool_(False))
        return row._replace(is_done=_is_done(source, row, length))

    return over_rows(begin, (_SOURCE_AXES, 0, 0), len(lengths))(source, tokens, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _advance(
    structure: Any, static: _Static, weights: list[Array], source: _Source, rows: _Row
) -> _Row:
    """One round of all rows."""
    model: Huginn = jax.tree.unflatten(structure, weights)
    each = functools.partial(_round, model, static)
    return over_rows(each, (_SOURCE_AXES, 0), len(rows.length))(source, rows)


def _round(model: Huginn, static: _Static, source: _Source, row: _Row) -> _Row:
    ahead = jnp.arange(static.lookahead, dtype=jnp.int32)
    begin = row.length - 1  # of the cache

    def draft(carry: tuple[DepthCache, Array], i: Array) -> tuple[tuple[DepthCache, Array], None]:
        cache, tokens = carry
        fed = lax.dynamic_slice_in_dim(tokens, begin + i, 1)
        logits, cache = _forward(model, source, cache, fed, begin + i, source.draft_depth)
        known = (row.length + i)[None]
        new = draw_at(logits, source.sampling, source.keys, known - row.prompt, tokens, known)
        return (cache, lax.dynamic_update_slice(tokens, new, (row.length + i,))), None

    (cache, tokens), _ = lax.scan(draft, (row.cache, row.tokens), ahead)
    fed = lax.dynamic_slice_in_dim(tokens, begin, static.lookahead)
    logits, cache = _forward(model, source, cut(cache, begin), fed, begin, source.depth)
    drafted = lax.dynamic_slice_in_dim(tokens, row.length, static.lookahead)
    known = row.length + ahead
    drawn = draw_at(logits, source.sampling, source.keys, known - row.prompt, tokens, known)
    if static.is_exact:
        is_accepted = drawn == drafted
    else:
        p = jax.nn.softmax(logits, axis=1)
        own = jnp.take_along_axis(p, drafted[:, None], axis=1)[:, 0]
        is_accepted = own >= source.threshold * jnp.max(p, axis=1)
    accepted = jnp.sum(jnp.cumprod(is_accepted.astype(jnp.int32)), dtype=jnp.int32)
    # Behind the accepted drafts comes the token that verification draws; behind all drafts none.
    tokens = lax.dynamic_update_slice(
        tokens, jnp.where(ahead < accepted, drafted, drawn), (row.length,)
    )
    length = row.length + jnp.minimum(accepted + 1, static.lookahead)
    then = row._replace(tokens=tokens, length=length, accepted=accepted, rounds=row.rounds + 1)
    then = then._replace(is_done=_is_done(source, then, row.length))
    # What a done row wrote lies behind its length; its cache need not be copied back.
    rest = jax.tree.map(
        lambda old, new: jnp.where(row.is_done, old, new),
        row._replace(cache=_NONE),
        then._replace(cache=_NONE),
    )
    return rest._replace(cache=cut(cache, jnp.where(row.is_done, begin, length - 1)))


def _forward(
    model: Huginn, source: _Source, cache: DepthCache, tokens: Array, start: Array, depth: Array
) -> tuple[Array, DepthCache]:
    """Scores (n vocab) of tokens (n) from position `start` on."""
    latent = model.init_latent(None, 1, len(tokens))
    if source.latent_keys is not None:
        position = start + jnp.arange(len(tokens), dtype=jnp.int32)
        latent = latents(model, source.latent_keys[None], position[None])
    logits, after = model(
        tokens[None],
        cache,
        segment_ids=jnp.ones((1, len(tokens)), jnp.int32),
        latent=latent,
        depth=depth,
    )
    assert after is not None, "a cache was given"
    return logits[0], after


def _is_done(source: _Source, row: _Row, begin: Array) -> Array:
    """Whether the tokens from `begin` on end the row."""
    index = jnp.arange(row.tokens.shape[0])
    is_new = (index >= begin) & (index < row.length)
    is_stop = jnp.any(row.tokens[:, None] == source.stop_tokens[None], axis=1)
    is_full = row.length - row.prompt >= source.max_new_tokens
    return is_full | jnp.any(is_stop & is_new)
