"""Samplers of a looped language model: speed and sequential passes, with the quality of the text.

Greedy continuations of validation text by a run of `make train` (trained first where there is
none), one prompt at a time and in a batch of eight. Quality is what the model itself says of a text
at full depth: nats per token, and the share of tokens that are those of the autoregressive sampler
at full depth. Writes results.json, samplers.png and the tables of README.md; with --smoke, a tiny
model writes a few tokens and no file is written; with --config FILE, depth, lengths and windows are
those of the file, and the results stay on the screen.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import yaml

from jaxrec.cli import main as jaxrec
from jaxrec.cli import timing
from jaxrec.config import from_dict
from jaxrec.generation import DiffusionForcing, Exit, SamplingConfig, samplers
from jaxrec.training.data import load_data
from jaxrec.training.losses import token_losses
from jaxrec.training.runs import load_model

HERE = Path(__file__).parent
MARK = "<!-- Below this line everything is written by run.py. -->"
TRAIN = "jaxrec.models.huginn:TINY --data python-docs --steps 220 --optimizer.learning-rate 4e-3"
TINY = "--steps 2 --batch 2 --time 32 --eval-batches 1 --model.width 16 --model.heads 2"
PROMPT = 48  # tokens
GREEDY = SamplingConfig(temperature=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is written, and how."""

    depth: int = 32  # full, in loops; the paper's
    tokens: int = 64  # new ones of each text
    rounds: int = 2  # of timing, in turns
    sizes: tuple[tuple[int, int], ...] = ((4, 1), (8, 8))  # texts, and how many at once
    waves: tuple[tuple[int, float, int, int], ...] = (
        *((inner, limit, 16, 1) for inner in (1, 2, 4) for limit in (0.1, 0.3)),
        *((4, 0.03, 16, 1), (2, 0.1, 32, 1), (1, 0.1, 8, 1), (1, 0.3, 16, 2)),
    )  # loops a step, threshold, window, headway


class Setting(NamedTuple):
    """One way to produce text."""

    sampler: str
    name: str
    options: dict[str, Any]


def settings(scale: Scale) -> list[Setting]:
    """All that are tried; the first is what the others are measured against."""
    found = [Setting("autoregressive", f"depth {scale.depth}", {"depth": scale.depth})]
    for less in (16, 8, 4, 2, 1):
        if less < scale.depth:
            found.append(Setting("autoregressive", f"depth {less}", {"depth": less}))
    for criterion, threshold in (("latent-diff", 0.03), ("kl", 1e-3)):
        exit = Exit(criterion=criterion, threshold=threshold)
        found.append(Setting("adaptive", f"{criterion} {threshold:g}", {"exit": exit}))
    for draft, ahead in ((1, 4), (2, 8)):
        options = {"draft_depth": draft, "lookahead": ahead}
        found.append(Setting("speculative", f"draft {draft}, ahead {ahead}", options))
    for inner, limit, window, headway in scale.waves:
        options = DiffusionForcing(
            inner_loops=inner, threshold=limit, max_wavefront=window, headway=headway
        )
        name = f"loops {inner}, below {limit:g}, window {window}, headway {headway}"
        found.append(Setting("diffusion-forcing", name, {"options": options, "stride": 8}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/huginn-tiny"))
    parser.add_argument("--config", type=Path, help="fields of Scale, YAML")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    scale = Scale()
    if options.config is not None:
        scale = from_dict(Scale, yaml.safe_load(options.config.read_text()))
    if options.smoke:
        scale = Scale(depth=4, tokens=8, rounds=1, sizes=((2, 1), (2, 2)))
        ways = settings(scale)
        ways = [ways[0], *{way.sampler: way for way in ways}.values()]
        with tempfile.TemporaryDirectory() as folder:
            results = compare(Path(folder) / "tiny", scale, ways, TINY)
    else:
        results = compare(options.run, scale, settings(scale))
    print(json.dumps(results, indent=2))
    if scale == Scale():
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        report.plot(results, HERE / "samplers.png")
        readme, tables = HERE / "README.md", report.tables(results)
        readme.write_text(f"{readme.read_text().partition(MARK)[0]}{MARK}\n\n{tables}")


def compare(run: Path, scale: Scale, ways: list[Setting], less: str = "") -> dict[str, Any]:
    """Every way at every (number of texts, batch)."""
    if not (run / "run.json").exists():
        words = f"train {TRAIN} --name {run.name} --runs {run.parent} {less}".split()
        with contextlib.redirect_stdout(sys.stderr):
            status = jaxrec.main(words)
        assert status == 0, f"training ended with status {status}"
    machine = timing.machine()
    model, tokenizer, trained, _ = load_model(run)
    data = load_data(trained.config.data.source, tokenizer.name, trained.config.data.valid_fraction)
    most = max(texts for texts, _ in scale.sizes)
    places = np.linspace(0, len(data.valid.tokens) - PROMPT, most, dtype=int)
    prompts = [data.valid.tokens[i : i + PROMPT].tolist() for i in places]
    records = []
    for texts, batch in scale.sizes:
        parts = [prompts[i : i + batch] for i in range(0, texts, batch)]
        records += measure(model, parts, scale, ways)
    return {
        "depth": scale.depth,
        "mean_loops": model.config.mean_depth + 1,
        "tokens": scale.tokens,
        "rounds": scale.rounds,
        "machine": machine | {"load_average_after": timing.load_average()},
        "results": records,
    }


def measure(model: Any, parts: Any, scale: Scale, ways: list[Setting]) -> list[dict[str, Any]]:
    """Cost and quality of every way on the same prompts, timed in turns."""
    shared = {"depth": scale.depth, "max_new_tokens": scale.tokens, "config": GREEDY}

    def write(way: Setting) -> tuple[list[list[int]], int]:
        """The texts of all prompts, and the passes of the core, one after another."""
        texts: list[list[int]] = []
        passes = 0
        for prompts in parts:
            usage = samplers.used_by(prompts)
            sample = getattr(samplers, way.sampler.replace("-", "_"))
            for _ in sample(model, prompts, usage, **shared | way.options):
                pass
            texts += usage.tokens
            passes += usage.core_passes
        return texts, passes

    written, seconds = {}, {way.name: [] for way in ways}
    for way in ways:  # compiles
        written[way.name] = write(way)
        timing.say(f"batch {len(parts[0])}: {way.sampler}, {way.name}")
    for _ in range(scale.rounds):
        for way in ways:
            begun = time.perf_counter()
            write(way)
            seconds[way.name].append(time.perf_counter() - begun)
    prompts = [prompt for part in parts for prompt in part]
    plain, plain_passes = written[ways[0].name]
    plain_seconds = statistics.median(seconds[ways[0].name])
    records = []
    for way in ways:
        texts, passes = written[way.name]
        took = statistics.median(seconds[way.name])
        records.append(
            {"batch": len(parts[0]), "sampler": way.sampler, "setting": way.name}
            | {
                "tokens_per_s": round(sum(map(len, texts)) / took, 1),
                "faster": round(plain_seconds / took, 2),
                "passes_per_token": round(passes / len(parts) / scale.tokens, 2),
                "fewer_passes": round(plain_passes / passes, 2),
                "same_tokens": round(float(np.mean(np.array(texts) == np.array(plain))), 4),
                "nats_per_token": round(nats(model, prompts, texts, scale.depth), 4),
            }
        )
    return records


forward = jax.jit(lambda model, tokens, depth: model(tokens, depth=depth)[0])


def nats(model: Any, prompts: list[list[int]], texts: list[list[int]], depth: int) -> float:
    """Mean loss of the texts after their prompts at full depth."""
    whole = np.concatenate([np.array(prompts), np.array(texts)], axis=1).astype(np.int32)
    logits = forward(model, whole[:, :-1], jnp.int32(depth))
    losses, _ = token_losses(logits, jnp.asarray(whole[:, 1:]))
    return float(np.mean(np.asarray(losses)[:, len(prompts[0]) - 1 :]))


if __name__ == "__main__":
    main()
