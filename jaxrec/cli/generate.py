"""`jaxrec generate RUN`: continues prompts with a trained model, showing the text as it comes."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxrec.errors import UserError


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
    sampler: Literal["autoregressive"] = "autoregressive"
    """How tokens are produced."""
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

    import jax

    from jaxrec import generation
    from jaxrec.training.data import StreamDecoder
    from jaxrec.training.runs import load_model

    model, tokenizer, _, step = load_model(arguments.run, step=arguments.step, ema=arguments.ema)
    key, latent_key = jax.random.split(jax.random.key(arguments.seed))
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    stream = generation.stream_text(
        model,
        [begin + tokenizer.encode(prompt).tolist() for prompt in prompts],
        decoder=lambda: StreamDecoder(tokenizer),
        max_new_tokens=arguments.tokens,
        stop_strings=arguments.stop,
        config=config,
        key=key,
        depth=arguments.depth,
        latent_key=latent_key,
        stop_tokens=begin,  # where the next document would begin
        read_twice=arguments.read_twice,
    )
    show_at_once = len(prompts) == 1 and not arguments.json
    texts = _consume(stream, prompts, show_at_once)
    report = stream.report
    assert report is not None, "the stream has ended"
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
    return 0


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
