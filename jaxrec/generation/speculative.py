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
from jaxrec.generation.programs import FlatModel, over_rows
from jaxrec.generation.prompts import check_looped, latents, round_up
from jaxrec.generation.rows import End, RowKeys, Texts
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
    keys = RowKeys.of(len(prompts), config, key, latent_key)
    longest = max(len(prompt) for prompt in prompts)
    static = _Static(
        lookahead=lookahead,
        is_exact=threshold == 1,
        depth=max(depth, draft_depth),
        prompt=round_up(longest),
        tokens=round_up(longest + max_new_tokens + lookahead + 1),
        strategy=strategy,
    )
    shared = _Shared(
        sampling=Sampling.of(config),
        depth=jnp.asarray(depth, jnp.int32),
        draft_depth=jnp.asarray(draft_depth, jnp.int32),
        threshold=jnp.asarray(threshold, jnp.float32),
        end=End.of(stop_tokens, max_new_tokens),
    )
    return _run(model, Texts(prompts, max_new_tokens, stop_tokens), static, shared, keys)


class _Static(NamedTuple):
    """What a program is compiled for."""

    lookahead: int
    is_exact: bool
    depth: int  # loops that the cache has slots for
    prompt: int  # padded length of the prompts
    tokens: int  # capacity of tokens and cache
    strategy: str


class _Shared(NamedTuple):
    """What is the same for all rounds and rows."""

    sampling: Sampling
    depth: Array
    draft_depth: Array
    threshold: Array
    end: End


_NONE: Any = None


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
    model: Huginn, texts: Texts, static: _Static, shared: _Shared, keys: RowKeys
) -> Iterator[SpeculativeStep]:
    flat, steps = FlatModel.of(model), FlatModel.for_decoding(model)
    rows = _begin(flat, static, shared, keys, texts.padded(static.tokens), texts.lengths)
    while True:
        host: Any = jax.device_get(rows._replace(cache=_NONE))
        yield SpeculativeStep(
            texts.new(host.tokens, host.length),
            host.tokens,
            host.length,
            host.accepted,
            host.rounds,
            host.is_done,
        )
        if host.is_done.all():
            return
        rows = _advance(steps, static, shared, keys, rows)


@functools.partial(jax.jit, static_argnums=1)
def _begin(
    flat: FlatModel,
    static: _Static,
    shared: _Shared,
    keys: RowKeys,
    tokens: Array,
    lengths: Array,
) -> _Row:
    """All rows with their prompts read and one token drawn."""
    model: Huginn = flat.module()

    def begin(keys: RowKeys, tokens: Array, length: Array) -> _Row:
        cache = model.init_state(
            1, capacity=static.tokens, depth=static.depth, strategy=static.strategy
        )
        zero = jnp.zeros((), jnp.int32)
        logits, cache = _forward(model, keys, cache, tokens[: static.prompt], zero, shared.depth)
        last = lax.dynamic_slice_in_dim(logits, length - 1, 1, axis=0)
        first = draw_at(last, shared.sampling, keys.draws, zero[None], tokens, length[None])
        tokens = lax.dynamic_update_slice(tokens, first, (length,))
        is_done = shared.end.is_reached(tokens, length, length + 1, length)
        return _Row(cut(cache, length), tokens, length + 1, length, zero, zero, is_done)

    return over_rows(begin, len(lengths))(keys, tokens, lengths)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=4)
def _advance(flat: FlatModel, static: _Static, shared: _Shared, keys: RowKeys, rows: _Row) -> _Row:
    """One round of all rows."""
    each = functools.partial(_round, flat.module(), static, shared)
    return over_rows(each, len(rows.length))(keys, rows)


def _round(model: Huginn, static: _Static, shared: _Shared, keys: RowKeys, row: _Row) -> _Row:
    ahead = jnp.arange(static.lookahead, dtype=jnp.int32)
    begin = row.length - 1  # of the cache

    def draft(carry: tuple[DepthCache, Array], i: Array) -> tuple[tuple[DepthCache, Array], None]:
        cache, tokens = carry
        fed = lax.dynamic_slice_in_dim(tokens, begin + i, 1)
        logits, cache = _forward(model, keys, cache, fed, begin + i, shared.draft_depth)
        known = (row.length + i)[None]
        new = draw_at(logits, shared.sampling, keys.draws, known - row.prompt, tokens, known)
        return (cache, lax.dynamic_update_slice(tokens, new, (row.length + i,))), None

    (cache, tokens), _ = lax.scan(draft, (row.cache, row.tokens), ahead)
    fed = lax.dynamic_slice_in_dim(tokens, begin, static.lookahead)
    logits, cache = _forward(model, keys, cut(cache, begin), fed, begin, shared.depth)
    drafted = lax.dynamic_slice_in_dim(tokens, row.length, static.lookahead)
    known = row.length + ahead
    drawn = draw_at(logits, shared.sampling, keys.draws, known - row.prompt, tokens, known)
    if static.is_exact:
        is_accepted = drawn == drafted
    else:
        p = jax.nn.softmax(logits, axis=1)
        own = jnp.take_along_axis(p, drafted[:, None], axis=1)[:, 0]
        is_accepted = own >= shared.threshold * jnp.max(p, axis=1)
    accepted = jnp.sum(jnp.cumprod(is_accepted.astype(jnp.int32)), dtype=jnp.int32)
    # Behind the accepted drafts comes the token that verification draws; behind all drafts none.
    tokens = lax.dynamic_update_slice(
        tokens, jnp.where(ahead < accepted, drafted, drawn), (row.length,)
    )
    length = row.length + jnp.minimum(accepted + 1, static.lookahead)
    then = row._replace(tokens=tokens, length=length, accepted=accepted, rounds=row.rounds + 1)
    is_done = shared.end.is_reached(tokens, row.length, length, row.prompt)
    then = then._replace(is_done=is_done)
    # What a done row wrote lies behind its length; its cache need not be copied back.
    rest = jax.tree.map(
        lambda old, new: jnp.where(row.is_done, old, new),
        row._replace(cache=_NONE),
        then._replace(cache=_NONE),
    )
    return rest._replace(cache=cut(cache, jnp.where(row.is_done, begin, length - 1)))


def _forward(
    model: Huginn, keys: RowKeys, cache: DepthCache, tokens: Array, start: Array, depth: Array
) -> tuple[Array, DepthCache]:
    """Scores (n vocab) of tokens (n) from position `start` on."""
    latent = model.init_latent(None, 1, len(tokens))
    if keys.latents is not None:
        position = start + jnp.arange(len(tokens), dtype=jnp.int32)
        latent = latents(model, keys.latents[None], position[None])
    logits, after = model(
        tokens[None],
        cache,
        segment_ids=jnp.ones((1, len(tokens)), jnp.int32),
        latent=latent,
        depth=depth,
    )
    assert after is not None, "a cache was given"
    return logits[0], after
