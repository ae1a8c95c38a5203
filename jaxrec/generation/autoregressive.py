"""Text one token at a time from a cached model.

The prompts, but for their last tokens, go through the model in one call whose scores nobody needs;
then one compiled step takes the last tokens, and from there on each drawn token. Rows never see
each other: every draw belongs to (key, row, step) and every initial latent state to (key, row,
position), whatever else is in the batch.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.errors import UserError
from jaxrec.generation.programs import FlatModel
from jaxrec.generation.prompts import check, latents, pad, round_up, row_keys
from jaxrec.generation.sampling import Sampling, SamplingConfig, draw
from jaxrec.models.protocol import LanguageModel, loop_inputs, prefix_inputs

STOPPED = -1
"""What a row gives instead of a token once it has stopped."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    config: SamplingConfig | None = None,
    key: Array | None = None,
    depth: int | None = None,
    latent_key: Array | None = None,
    stop_tokens: Sequence[int] = (),
    read_twice: bool = False,
) -> Iterator[np.ndarray]:
    """Continues prompts; yields the next token of every row as soon as it is known.

    Args:
      model: a language model; its weights are arguments of the compiled step, not constants in it.
      prompts: token ids of each row, of any lengths >= 1.
      max_new_tokens: number of tokens after the prompt, >= 1.
      config: how tokens are drawn; `SamplingConfig()` if None.
      key: randomness of the draws; not needed at temperature 0.
      depth: loops of a looped model, the trained mean if None; None for other models.
      latent_key: randomness of a looped model's initial latent state; None begins at zero.
      stop_tokens: a row ends before any of these.
      read_twice: every prompt is read a second time after itself, so that a model with a fixed
        state knows what will be asked when it reads (Arora et al. 2024, arXiv:2407.05483, section
        3: JRT-Prompt).

    Yields:
      int32 (b), `STOPPED` for rows that have ended. Ends when all have, or after max_new_tokens.

    Raises:
      UserError: a prompt is empty, has unknown tokens or does not fit into the context with what
        shall follow, or a count is below one. Raised by the call, not by the first `next`.
    """
    config = config or SamplingConfig()
    if read_twice:
        prompts = [[*prompt, *prompt] for prompt in prompts]
    check(model, prompts, max_new_tokens, depth)
    if key is None and not config.is_greedy:
        raise UserError(
            f"generate: drawing at temperature {config.temperature:g} needs a key."
            " Pass key=jax.random.key(seed), or temperature 0."
        )
    if model.config.mean_depth is not None and depth is None:
        depth = model.config.mean_depth
    rows = len(prompts)
    # A model whose loop begins at a fixed state has no `init_latent`.
    is_latent_drawn = latent_key is not None and hasattr(model, "init_latent")
    settings = _Settings(
        sampling=Sampling.of(config),
        keys=None if config.is_greedy else row_keys(key, rows),
        loop=_Loop(
            depth=None if depth is None else jnp.asarray(depth, jnp.int32),
            latent_keys=row_keys(latent_key, rows) if is_latent_drawn else None,
        ),
    )
    return _run(model, prompts, max_new_tokens, settings, depth, frozenset(stop_tokens))


def complete(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    config: SamplingConfig | None = None,
    key: Array | None = None,
    depth: int | None = None,
    latent_key: Array | None = None,
    stop_tokens: Sequence[int] = (),
    read_twice: bool = False,
) -> list[list[int]]:
    """All new tokens of every row at once; arguments and errors as for `generate`."""
    steps = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        config=config,
        key=key,
        depth=depth,
        latent_key=latent_key,
        stop_tokens=stop_tokens,
        read_twice=read_twice,
    )
    rows = np.stack(list(steps), axis=1)
    return [row[row != STOPPED].tolist() for row in rows]


class _Loop(NamedTuple):
    """What a looped model needs; None for what is not used."""

    depth: Array | None  # int32 ()
    latent_keys: Array | None  # (b) PRNG keys of the initial latent states


class _Settings(NamedTuple):
    """What stays the same from step to step."""

    sampling: Sampling
    keys: Array | None  # (b) PRNG keys of the draws; None when greedy
    loop: _Loop


class _Carry(NamedTuple):
    """What a step hands to the next; its buffers are reused in place."""

    state: Any  # of the model
    position: Array  # int32 (b): tokens of each row that the model has seen
    step: Array  # int32 (): tokens drawn
    present: Array | None  # bool (b vocab): tokens of the text, kept for a repetition penalty only


def _run(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: _Settings,
    depth: int | None,
    stop_tokens: frozenset[int],
) -> Iterator[np.ndarray]:
    flat, steps = FlatModel.of(model), FlatModel.for_decoding(model)
    tokens, lengths = pad([prompt[:-1] for prompt in prompts])
    present = None
    if settings.sampling.repetition_penalty is not None:
        present = jnp.array([np.isin(np.arange(model.config.vocab_size), row) for row in prompts])
    capacity = round_up(tokens.shape[1] + max_new_tokens)
    state = _prefill(flat, capacity, depth, settings.loop, tokens, lengths)
    carry = _Carry(state, jnp.array(lengths), jnp.zeros((), jnp.int32), present)
    token = jnp.array([prompt[-1] for prompt in prompts], jnp.int32)
    token, carry = _decode(steps, settings, carry, token)
    running = np.ones(len(prompts), np.bool_)
    for index in range(max_new_tokens):
        shown = token
        if index + 1 < max_new_tokens:
            # The next step is under way before this one is looked at.
            token, carry = _decode(steps, settings, carry, token)
        step = np.array(shown)
        if stop_tokens:
            running &= ~np.isin(step, list(stop_tokens))
            step[~running] = STOPPED
        yield step
        if not running.any():
            return


@functools.partial(jax.jit, static_argnums=(1, 2))
def _prefill(
    flat: FlatModel,
    capacity: int,
    max_depth: int | None,
    loop: _Loop,
    tokens: Array,
    lengths: Array,
) -> Any:
    """The state after tokens (b t), of which all but the last `lengths` (b) are padding."""
    model: LanguageModel = flat.module()
    batch, time = tokens.shape
    index = jax.lax.broadcasted_iota(jnp.int32, (batch, time), 1)
    position = index - (time - lengths[:, None])
    # XLA drops the head, as the scores are not used.
    _, state = model(
        tokens,
        model.init_state(batch, capacity=capacity, depth=max_depth),
        segment_ids=(position >= 0).astype(jnp.int32),
        **prefix_inputs(model.config, position >= 0),
        **_loop_inputs(model, loop, jnp.maximum(position, 0)),
    )
    return state


@functools.partial(jax.jit, donate_argnums=2)
def _decode(
    flat: FlatModel, settings: _Settings, carry: _Carry, token: Array
) -> tuple[Array, _Carry]:
    """Feeds tokens (b) and draws the ones that follow, int32 (b)."""
    model: LanguageModel = flat.module()
    logits, state = model(
        token[:, None],
        carry.state,
        # A row whose prompt is this one token has but padding, segment 0, behind it.
        segment_ids=jnp.ones_like(token[:, None]),
        **_loop_inputs(model, settings.loop, carry.position[:, None]),
    )
    keys = settings.keys
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, carry.step)
    new = draw(logits[:, 0], settings.sampling, keys, carry.present)
    present = carry.present
    if present is not None:
        present = present.at[jnp.arange(len(new)), new].set(True)
    return new, _Carry(state, carry.position + 1, carry.step + 1, present)


def _loop_inputs(model: LanguageModel, loop: _Loop, position: Array) -> dict[str, Any]:
    """The loop inputs of a model for the tokens at positions (b t) of their rows."""
    inputs = loop_inputs(model.config, loop.depth, None)
    if loop.latent_keys is not None:
        inputs["latent"] = latents(model, loop.latent_keys, position)
    return inputs
