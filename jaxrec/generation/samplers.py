"""All ways to produce tokens behind one: steps of new tokens for every row, and what they cost."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxrec.generation.adaptive import generate_adaptive
from jaxrec.generation.autoregressive import STOPPED, generate
from jaxrec.generation.diffusion_forcing import DiffusionForcing, WaveStep, generate_diffusion
from jaxrec.generation.prompts import check
from jaxrec.generation.speculative import generate_speculative
from jaxrec.models.protocol import LanguageModel

Steps = Iterator[list[list[int]]]


@dataclasses.dataclass
class Usage:
    """What a generation has used so far."""

    tokens: list[list[int]]  # new ones of each row
    core_passes: int = 0  # runs of a looped core one after another, those of prompts included
    loops: list[list[int]] = dataclasses.field(default_factory=list)  # of each new token, by row
    waves: list[WaveStep] = dataclasses.field(default_factory=list)  # of the parallel sampler

    def saw(self, step: Sequence[Sequence[int]], loops: Sequence[int] | None = None) -> None:
        """Notes the new tokens of every row, and the loops that each of a row took."""
        for row, new in enumerate(step):
            real = [token for token in new if token != STOPPED]
            self.tokens[row] += real
            if loops is not None:
                self.loops[row] += [int(loops[row])] * len(real)


def used_by(prompts: Sequence[Any]) -> Usage:
    """Nothing yet."""
    return Usage(tokens=[[] for _ in prompts], loops=[[] for _ in prompts])


def autoregressive(
    model: LanguageModel, prompts: Sequence[Sequence[int]], usage: Usage, **options: Any
) -> Steps:
    """Steps of `generate`, with its options."""
    depth = options.get("depth") or model.config.mean_depth or 0
    steps = generate(model, prompts, **options)
    usage.core_passes += depth  # all but the last token of the prompts

    def run() -> Steps:
        for tokens in steps:
            step = [[int(token)] for token in tokens]
            usage.core_passes += depth
            usage.saw(step, [depth] * len(prompts))
            yield step

    return run()


def adaptive(model: Any, prompts: Sequence[Sequence[int]], usage: Usage, **options: Any) -> Steps:
    """Steps of `generate_adaptive`, with its options."""
    steps = generate_adaptive(model, prompts, **options)

    def run() -> Steps:
        for step in steps:
            tokens = [[int(token)] for token in step.tokens]
            usage.core_passes += int(step.loops.max())
            usage.saw(tokens, step.loops.tolist())
            yield tokens

    return run()


def speculative(
    model: Any,
    prompts: Sequence[Sequence[int]],
    usage: Usage,
    *,
    max_new_tokens: int,
    draft_depth: int = 4,
    lookahead: int = 8,
    depth: int | None = None,
    **options: Any,
) -> Steps:
    """Steps of `generate_speculative`, with its options."""
    depth = model.config.mean_depth if depth is None else depth
    steps = generate_speculative(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        draft_depth=draft_depth,
        lookahead=lookahead,
        depth=depth,
        **options,
    )

    def run() -> Steps:
        assert depth is not None, "a looped model has a depth"
        for index, step in enumerate(steps):
            usage.core_passes += depth + (index > 0) * lookahead * draft_depth
            usage.saw(step.new_tokens, [depth] * len(prompts))
            yield _ended(step.new_tokens, step.is_done, usage, max_new_tokens)

    return run()


def diffusion_forcing(
    model: Any,
    prompts: Sequence[Sequence[int]],
    usage: Usage,
    *,
    max_new_tokens: int,
    depth: int | None = None,
    options: DiffusionForcing | None = None,
    **others: Any,
) -> Steps:
    """Steps of `generate_diffusion`, with its options."""
    check(model, prompts, max_new_tokens, depth)  # so that all samplers give what is asked for
    depth = model.config.mean_depth if depth is None else depth
    is_prefilled = (options or DiffusionForcing()).full_prefill
    steps = generate_diffusion(
        model, prompts, max_new_tokens=max_new_tokens, depth=depth, options=options, **others
    )

    def run() -> Steps:
        assert depth is not None, "a looped model has a depth"
        for step in steps:
            usage.waves.append(step)
            usage.saw(step.new_tokens)
            # All rows go on together, and the original counts a prefill as one pass.
            usage.core_passes = int(step.core_passes.max()) + is_prefilled * (depth - 1)
            for row, prompt in enumerate(prompts):
                end = len(prompt) + len(usage.tokens[row])
                usage.loops[row] = step.loops[row, len(prompt) : end].tolist()
            is_stopped = step.is_done & (step.length <= model.config.context)
            yield _ended(step.new_tokens, is_stopped, usage, max_new_tokens)

    return run()


def _ended(
    new_tokens: list[list[int]], is_done: np.ndarray, usage: Usage, limit: int
) -> list[list[int]]:
    """The step, with `STOPPED` for rows that are done before the limit."""
    return [
        [*new, STOPPED] if is_done[row] and len(usage.tokens[row]) < limit else new
        for row, new in enumerate(new_tokens)
    ]


def cache_bytes(model: Any, rows: int, tokens: int, depth: int, strategy: str) -> int:
    """Bytes of keys and values of so many tokens; nothing is allocated."""
    return jax.eval_shape(
        lambda: model.init_state(rows, capacity=tokens, depth=depth, strategy=strategy)
    ).nbytes
