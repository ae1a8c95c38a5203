"""What all samplers do with prompts: check and pad them, and give keys to rows and tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.errors import UserError
from jaxrec.models.protocol import LanguageModel

# Prompts and caches are made a multiple of this, so that nearby lengths share one compiled program.
_BLOCK = 64


def token_keys(keys: Array, position: Array) -> Array:
    """One key (b t) for each token, from those of rows (b) and positions in them (b t): what a
    token gets does not depend on padding or on other rows.
    """
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys, position)


def latents(model: Any, keys: Array, position: Array) -> Array:
    """Initial latent states (b t d) of a looped model's tokens at positions (b t) of their rows."""
    each = jax.vmap(jax.vmap(lambda key: model.init_latent(key, 1, 1)[0, 0]))
    return each(token_keys(keys, position))


def row_keys(key: Any, rows: int) -> Array:
    """One key per row, (b), the same for a row whatever the number of rows."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows, dtype=jnp.uint32))


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens aligned at their ends: int32 (b t) with zeros before them, and their lengths (b)."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), round_up(max(1, int(lengths.max())))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, tokens.shape[1] - len(prompt) :] = prompt
    return tokens, lengths


def round_up(count: int) -> int:
    """The next length that programs are compiled for."""
    return -(-count // _BLOCK) * _BLOCK


def check(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    depth: int | None,
    *,
    may_end_early: bool = False,
) -> None:
    """Raises UserError when a prompt or a count does not fit the model.

    may_end_early: the sampler ends by itself where the context does.
    """
    config = model.config
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens must be >= 1, got {max_new_tokens}.")
    if len(prompts) == 0:
        raise UserError("generate: there is no prompt. Give at least one.")
    if depth is not None and config.mean_depth is None:
        raise UserError(
            f"generate: depth is {depth}, but {type(model).__name__} has no loop. Leave depth out."
        )
    if depth is not None and depth < 1:
        raise UserError(
            f"generate: depth must be >= 1, got {depth}. The model's own is {config.mean_depth}."
        )
    for row, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {row}"
        if len(prompt) == 0:
            raise UserError(
                f"generate: {name} has no tokens. Give some text, or begin with the tokenizer's"
                " begin-of-document token."
            )
        ids = np.asarray(prompt)
        unknown = ids[(ids < 0) | (ids >= config.vocab_size)]
        if len(unknown):
            raise UserError(
                f"generate: {name} has the token {unknown[0]}, but the model knows 0 to"
                f" {config.vocab_size - 1}. Use the tokenizer that it was trained with."
            )
        if len(prompt) >= config.context:
            raise UserError(
                f"generate: {name} has {len(prompt)} tokens and is longer than the context:"
                f" the model's is {config.context} tokens, prompt and continuation together."
                f" Shorten it to at most {config.context - 1}."
            )
        if len(prompt) + max_new_tokens > config.context and not may_end_early:
            raise UserError(
                f"generate: {name} with {len(prompt)} tokens and {max_new_tokens} new ones is"
                f" longer than the context of {config.context} tokens. Ask for at most"
                f" {config.context - len(prompt)} new tokens, or shorten the prompt."
            )


def check_looped(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    depth: int | None,
    strategy: str,
    *,
    may_end_early: bool = False,
) -> None:
    """Raises UserError as `check` does, and when the model cannot be looped by hand or the cache
    strategy is none of it.
    """
    check(model, prompts, max_new_tokens, depth, may_end_early=may_end_early)
    if not hasattr(model, "refine"):
        raise UserError(
            f"generate: this sampler loops the core of a model such as Huginn, but"
            f" {type(model).__name__} has none. Use the autoregressive sampler."
        )
    try:
        jax.eval_shape(lambda: model.init_state(1, capacity=1, depth=1, strategy=strategy))
    except ValueError as error:
        raise UserError(f"generate: {error}") from error
