"""`jaxrec generate RUN`: continues prompts with a trained model, showing the text as it comes."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxrec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Looped:
    """Options of the samplers of looped models; each says whose it is."""

    cache: str | None = None
    """All: which keys and values are kept, such as latest-m4-compress-s4."""
    continuous: bool = False
    """Adaptive, diffusion-forcing: a token begins at the latent state of the one before."""
    noise: float = 0.0
    """Adaptive: noise on the latent state before each loop, in deviations of the first one.
    Diffusion-forcing: part of it that becomes noise before each step."""
    noise_kind: Literal["fixed", "geom", "sqrt", "line", "chi"] = "fixed"
    """Adaptive: how the noise depends on the loop."""
    exit: Literal[
        "none", "latent-diff", "cosine", "entropy-diff", "kl", "minp-kl", "argmax-stability"
    ] = "latent-diff"
    """Adaptive: when the loop of a token ends."""
    exit_threshold: float | None = None
    """Adaptive: threshold of that criterion; the published one if left out."""
    min_loops: int = 1
    """Adaptive: loops before the criterion is looked at."""
    exit_every: int = 1
    """Adaptive: loops between two looks at the criterion."""
    exit_in_prompt: bool = True
    """Adaptive: the criterion also ends the loop of the prompt; otherwise that has full depth."""
    schedule: tuple[int, ...] | None = None
    """Adaptive: largest depth of each new token; the last one goes on."""
    draft_depth: int = 4
    """Speculative: loops of a drafted token."""
    lookahead: int = 8
    """Speculative: drafted tokens per round."""
    accept: float = 1.0
    """Speculative: below 1, accept drafts with so many times the probability of the best token."""
    inner_loops: int = 4
    """Diffusion-forcing: loops per step."""
    freeze: Literal[
        "latent-diff",
        "latent-acceleration-1",
        "latent-acceleration-2",
        "token-stability",
        "fixed",
    ] = "latent-diff"
    """Diffusion-forcing: when a position is settled."""
    freeze_threshold: float = 0.03
    """Diffusion-forcing: change of the latent state that counts as settled."""
    embedding_ema: float = 0.1
    """Diffusion-forcing: part of the embeddings of the step before that is kept."""
    dampened: bool = True
    """Diffusion-forcing: less noise for positions that had more loops."""
    sqrt_mixer: bool = False
    """Diffusion-forcing: mix noise by the square roots of its part."""
    headway: int = 1
    """Diffusion-forcing: new positions per step."""
    max_wavefront: int | None = None
    """Diffusion-forcing: largest window, at most the context, which 0 stands for; 32 if left out.
    128 suits a large accelerator."""
    full_prefill: bool = True
    """Diffusion-forcing: prompts run at full depth first; otherwise they begin the window."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue prompts with the model of a run."""

    run: tyro.conf.Positional[Path]
    """Run folder, as made by `jaxrec train` or `jaxrec convert`."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; repeat for a batch. Without any, the model begins a document."""
    prompt_file: Path | None = None
    """Text file that is one more prompt."""
    tokens: int = 200
    """Number of new tokens."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float | None = None
    """Draw from the most probable tokens that sum to p only."""
    min_p: float | None = None
    """Draw from the tokens at least p times as probable as the best only."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens that the text already has."""
    read_twice: bool = False
    """Read each prompt twice before going on: a model with a fixed state recalls more of it."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this string; repeat for several."""
    seed: int = 0
    """The same seed gives the same text."""
    depth: int | None = None
    """Loops of a looped model; the trained mean if left out."""
    sampler: Literal["autoregressive", "adaptive", "speculative", "diffusion-forcing"] = (
        "autoregressive"
    )
    """How tokens are produced; all but the first loop the core of a model such as Huginn."""
    looped: Looped = field(default_factory=Looped)
    """Options of the samplers of looped models."""
    compare: bool = True
    """Report speed and text of another sampler beside those of the autoregressive one."""
    trace: Path | None = None
    """Write a picture of the wavefront of diffusion-forcing, position against step, as SVG."""
    step: int | None = None
    """Checkpoint to load; the last one if left out."""
    ema: bool = False
    """Use the moving average of the weights."""
    json: bool = False
    """Print one JSON object per prompt instead of text."""


def run(arguments: Arguments) -> int:
    """Prints the continuations and returns the exit status.

    Raises:
      UserError: the run cannot be loaded, or an argument does not fit it.
    """
    prompts = _prompts(arguments)
    config = _sampling_config(arguments)
    is_wave = arguments.sampler == "diffusion-forcing"
    if arguments.trace is not None and not is_wave:
        raise UserError(
            f"--trace shows the wavefront of --sampler diffusion-forcing, got"
            f" {arguments.sampler}. Leave --trace out, or choose that sampler."
        )

    import jax

    from jaxrec import generation
    from jaxrec.generation.samplers import used_by
    from jaxrec.training.data import StreamDecoder
    from jaxrec.training.runs import load_model, stop_tokens_of

    model, tokenizer, trained, step = load_model(
        arguments.run, step=arguments.step, ema=arguments.ema
    )
    key, latent_key = jax.random.split(jax.random.key(arguments.seed))
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    rows = [begin + tokenizer.encode(prompt).tolist() for prompt in prompts]
    if arguments.read_twice:
        rows = [[*row, *row] for row in rows]
    shared = {
        "max_new_tokens": arguments.tokens,
        "config": config,
        "key": key,
        "depth": arguments.depth,
        "latent_key": latent_key,
        "stop_tokens": stop_tokens_of(trained, tokenizer),
    }
    usage = used_by(rows)
    steps = _steps(arguments, model, rows, usage, shared)
    compared = None
    if arguments.compare and arguments.sampler != "autoregressive":
        # Compiled before anything is timed.
        warm = _steps(arguments, model, rows, used_by(rows), shared)
        next(warm, None), next(warm, None)
    begun = time.perf_counter()
    stream = generation.text_of(
        steps, len(rows), decoder=lambda: StreamDecoder(tokenizer), stop_strings=arguments.stop
    )
    show_at_once = len(prompts) == 1 and not arguments.json
    texts = _consume(stream, prompts, show_at_once)
    seconds = time.perf_counter() - begun
    report = stream.report
    assert report is not None, "the stream has ended"
    if arguments.compare and arguments.sampler != "autoregressive":
        compared = _compare(model, rows, usage, seconds, shared)
    if arguments.trace is not None:
        _write_trace(arguments.trace, usage, len(rows[0]))
    extra = {} if arguments.sampler == "autoregressive" else _cost(arguments, model, rows, usage)
    if arguments.json:
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            record: dict[str, Any] = {
                "prompt": prompt,
                "text": text,
                "tokens": report.tokens[row],
                "finish": report.finish[row],
                "seed": arguments.seed,
                "step": step,
                "first_token_seconds": report.first_token_seconds,
                "tokens_per_second": report.tokens_per_second,
            }
            if extra:
                record |= {"sampler": arguments.sampler, "loops": usage.loops[row]} | extra
            if compared is not None:
                record["autoregressive"] = compared
            print(json.dumps(record, ensure_ascii=False))
    elif not show_at_once:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"--- {prompt}\n{text}\n")
    speed = report.tokens_per_second
    print(
        f"{sum(report.tokens)} tokens"
        + (f", {speed:.1f} tokens/s" if speed else "")
        + f", the first after {report.first_token_seconds:.2f} s",
        file=sys.stderr,
    )
    if extra:
        print(_summary(arguments, usage, extra, compared), file=sys.stderr)
    return 0


def _steps(
    arguments: Arguments, model: Any, rows: list[list[int]], usage: Any, shared: dict[str, Any]
) -> Iterator[list[list[int]]]:
    """The new tokens of every row, step by step."""
    from jaxrec.generation import DiffusionForcing, Exit, LatentNoise, samplers

    looped = arguments.looped
    if arguments.sampler == "autoregressive":
        return samplers.autoregressive(model, rows, usage, **shared)
    try:
        if arguments.sampler == "speculative":
            return samplers.speculative(
                model,
                rows,
                usage,
                **shared,
                draft_depth=looped.draft_depth,
                lookahead=looped.lookahead,
                threshold=looped.accept,
                strategy=looped.cache or "full",
            )
        if arguments.sampler == "adaptive":
            exit = None
            if looped.exit != "none":
                exit = Exit(
                    criterion=looped.exit,
                    threshold=looped.exit_threshold,
                    min_loops=looped.min_loops,
                    every=looped.exit_every,
                    in_prompt=looped.exit_in_prompt,
                )
            return samplers.adaptive(
                model,
                rows,
                usage,
                **shared,
                exit=exit,
                schedule=looped.schedule,
                strategy=looped.cache or "latest",
                continuous=looped.continuous,
                noise=LatentNoise(looped.noise, looped.noise_kind) if looped.noise else None,
            )
        context = model.config.context
        window = looped.max_wavefront
        if window is not None and window > context:
            raise UserError(
                f"--looped.max-wavefront {window} is larger than the context of {context} tokens,"
                f" which no window can leave. Give at most {context}, or 0 for all of it."
            )
        options = DiffusionForcing(
            inner_loops=looped.inner_loops,
            freeze=looped.freeze,
            threshold=looped.freeze_threshold,
            embedding_ema=looped.embedding_ema,
            noise=looped.noise,
            dampened=looped.dampened,
            sqrt_mixer=looped.sqrt_mixer,
            headway=looped.headway,
            continuous=looped.continuous,
            max_wavefront=min(32, context) if window is None else window,
            full_prefill=looped.full_prefill,
            strategy=looped.cache,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    # A picture needs every step; text loses nothing when some are run at once.
    stride = 4 if arguments.trace is None else 1
    return samplers.diffusion_forcing(model, rows, usage, **shared, options=options, stride=stride)


def _compare(
    model: Any, rows: list[list[int]], usage: Any, seconds: float, shared: dict[str, Any]
) -> dict[str, float]:
    """Speed, passes and text of the autoregressive sampler beside those of another."""
    from jaxrec.generation import samplers

    warm = samplers.autoregressive(model, rows, samplers.used_by(rows), **shared)
    next(warm, None), next(warm, None)
    plain = samplers.used_by(rows)
    begun = time.perf_counter()
    for _ in samplers.autoregressive(model, rows, plain, **shared):
        pass
    plain_seconds = time.perf_counter() - begun
    tokens, plain_tokens = (sum(map(len, used.tokens)) for used in (usage, plain))
    pairs = [
        a == b
        for row, other in zip(usage.tokens, plain.tokens, strict=True)
        for a, b in zip(row, other, strict=False)
    ]
    return {
        "core_passes": plain.core_passes,
        "seconds": plain_seconds,
        "speed_up": (tokens / seconds) / (plain_tokens / plain_seconds) if plain_tokens else 0.0,
        "same_tokens": sum(pairs),
    }


def _cost(arguments: Arguments, model: Any, rows: list[list[int]], usage: Any) -> dict[str, Any]:
    """Passes of the core, mean depth of the new tokens, and the memory of the cache."""
    from jaxrec.generation.samplers import cache_bytes

    looped, core = arguments.looped, model.config.core_layers
    depth = arguments.depth or model.config.mean_depth
    if arguments.sampler == "adaptive" and looped.schedule:
        depth = max(looped.schedule)
    if arguments.sampler == "speculative":
        depth = max(depth, looped.draft_depth)
    if arguments.sampler == "diffusion-forcing":
        depth = max(depth, looped.inner_loops)
    default = {"adaptive": "latest", "speculative": "full"}
    strategy = looped.cache or default.get(arguments.sampler, f"latest-m{core}-compress-s{core}")
    loops = [loop for row in usage.loops for loop in row]
    tokens = max(map(len, rows)) + arguments.tokens
    return {
        "core_passes": usage.core_passes,
        "mean_loops": sum(loops) / len(loops) if loops else 0.0,
        "cache": strategy,
        "cache_bytes": cache_bytes(model, len(rows), tokens, depth, strategy),
    }


def _summary(
    arguments: Arguments, usage: Any, extra: dict[str, Any], compared: dict[str, float] | None
) -> str:
    tokens = sum(map(len, usage.tokens))
    longest = max(map(len, usage.tokens), default=0) or 1
    text = (
        f"{arguments.sampler}: {extra['core_passes']} passes of the core,"
        f" {extra['core_passes'] / longest:.1f} per token; mean depth of a token"
        f" {extra['mean_loops']:.1f}; cache {extra['cache']},"
        f" {extra['cache_bytes'] / 2**20:.2f} MiB"
    )
    if compared is not None:
        text += (
            f"\nautoregressive: {compared['core_passes']} passes; {arguments.sampler} is"
            f" {compared['speed_up']:.2f}x as fast; {compared['same_tokens']} of {tokens} tokens"
            " are the same"
        )
    return text


def _write_trace(path: Path, usage: Any, prompt: int) -> None:
    """The wavefront of the first prompt."""
    import numpy as np

    from jaxrec.analysis.wavefront import wavefront_svg

    waves = usage.waves[1:] or usage.waves
    change = np.stack([wave.change[0] for wave in waves])
    frozen = np.array([wave.frozen[0] for wave in waves])
    try:
        path.write_text(wavefront_svg(change, frozen, prompt), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--trace {path}: {error.strerror}. Choose another file.") from error


def _consume(stream: Iterator[tuple[int, str]], prompts: list[str], show: bool) -> list[str]:
    """The text of each row; with `show`, printed after the prompt as it comes."""
    texts = [""] * len(prompts)
    if show:
        print(prompts[0], end="", flush=True)
    for row, piece in stream:
        texts[row] += piece
        if show:
            print(piece, end="", flush=True)
    if show:
        print()
    return texts


def _prompts(arguments: Arguments) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompt_file is not None:
        try:
            prompts.append(arguments.prompt_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(
                f"--prompt-file {arguments.prompt_file}: {reason}. Expected a text file."
            ) from error
    return prompts or [""]


def _sampling_config(arguments: Arguments) -> Any:
    from jaxrec.generation import SamplingConfig

    try:
        return SamplingConfig(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
