"""Samplers of a looped language model: speed and sequential passes, with the quality of the text.

Greedy continuations of validation text by a run of `make train` (trained first where there is
none), one prompt at a time and in a batch of eight. Quality is what the model itself says of a text
at full depth: nats per token, and the share of tokens that are those of the autoregressive sampler
at full depth. Writes results.json, samplers.png and the tables of README.md; with --smoke, a tiny
model writes a few tokens and no file is written.
"""

import argparse
import contextlib
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

from jaxrec.cli import bench_tables, timing
from jaxrec.cli import main as jaxrec
from jaxrec.generation import DiffusionForcing, Exit, SamplingConfig, samplers
from jaxrec.training.data import load_data
from jaxrec.training.losses import token_losses
from jaxrec.training.runs import load_model

HERE = Path(__file__).parent
MARK = "<!-- Below this line everything is written by run.py. -->"
TRAIN = "jaxrec.models.huginn:TINY --data python-docs --steps 220 --optimizer.learning-rate 4e-3"
TINY = "--steps 2 --batch 2 --time 32 --eval-batches 1 --model.width 16 --model.heads 2"
PROMPT = 48  # tokens
COLOURS = {
    "autoregressive": "black",
    "adaptive": "tab:green",
    "speculative": "tab:blue",
    "diffusion-forcing": "tab:red",
}


class Setting(NamedTuple):
    """One way to produce text."""

    sampler: str
    name: str
    options: dict[str, Any]


def settings(depth: int) -> list[Setting]:
    """All that are tried; the first is what the others are measured against."""
    found = [Setting("autoregressive", f"depth {depth}", {"depth": depth})]
    for less in (8, 4, 2, 1):
        if less < depth:
            found.append(Setting("autoregressive", f"depth {less}", {"depth": less}))
    for criterion, threshold in (("latent-diff", 0.03), ("kl", 1e-3)):
        exit = Exit(criterion=criterion, threshold=threshold)
        found.append(Setting("adaptive", f"{criterion} {threshold:g}", {"exit": exit}))
    for draft, ahead in ((1, 4), (2, 8)):
        options = {"draft_depth": draft, "lookahead": ahead}
        found.append(Setting("speculative", f"draft {draft}, ahead {ahead}", options))
    waves = [(inner, limit, 16, 1) for inner in (1, 2, 4) for limit in (0.1, 0.3)]
    waves += [(4, 0.03, 16, 1), (2, 0.1, 32, 1), (1, 0.3, 16, 2)]
    for inner, limit, window, headway in waves:
        options = DiffusionForcing(
            inner_loops=inner, threshold=limit, max_wavefront=window, headway=headway
        )
        name = f"loops {inner}, below {limit:g}, window {window}, headway {headway}"
        found.append(Setting("diffusion-forcing", name, {"options": options, "stride": 4}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/huginn-tiny"))
    parser.add_argument("--depth", type=int, default=16, help="full depth, in loops")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each text")
    parser.add_argument("--rounds", type=int, default=2, help="of timing, in turns")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    if options.smoke:
        ways = settings(4)
        ways = [ways[0], *{way.sampler: way for way in ways}.values()]
        with tempfile.TemporaryDirectory() as folder:
            results = compare(Path(folder) / "tiny", 4, 8, 1, ways, ((2, 1), (2, 2)), TINY)
    else:
        ways, sizes = settings(options.depth), ((4, 1), (8, 8))
        results = compare(options.run, options.depth, options.tokens, options.rounds, ways, sizes)
    print(json.dumps(results, indent=2))
    if not options.smoke:
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        plot(results, HERE / "samplers.png")
        readme = HERE / "README.md"
        readme.write_text(f"{readme.read_text().partition(MARK)[0]}{MARK}\n\n{tables(results)}")


def compare(
    run: Path, depth: int, tokens: int, rounds: int, ways: list[Setting], sizes: Any, less: str = ""
) -> dict[str, Any]:
    """Every way at every (number of texts, batch)."""
    if not (run / "run.json").exists():
        words = f"train {TRAIN} --name {run.name} --runs {run.parent} {less}".split()
        with contextlib.redirect_stdout(sys.stderr):
            status = jaxrec.main(words)
        assert status == 0, f"training ended with status {status}"
    machine = timing.machine()
    model, tokenizer, trained, _ = load_model(run)
    data = load_data(trained.config.data.source, tokenizer.name, trained.config.data.valid_fraction)
    places = np.linspace(0, len(data.valid.tokens) - PROMPT, max(n for n, _ in sizes), dtype=int)
    prompts = [data.valid.tokens[i : i + PROMPT].tolist() for i in places]
    records = []
    for texts, batch in sizes:
        parts = [prompts[i : i + batch] for i in range(0, texts, batch)]
        records += measure(model, parts, depth, tokens, rounds, ways)
    return {
        "depth": depth,
        "mean_loops": model.config.mean_depth + 1,
        "tokens": tokens,
        "rounds": rounds,
        "machine": machine | {"load_average_after": timing.load_average()},
        "results": records,
    }


def measure(
    model: Any, parts: Any, depth: int, tokens: int, rounds: int, ways: list[Setting]
) -> list[dict[str, Any]]:
    """Cost and quality of every way on the same prompts, timed in turns."""
    shared = {"max_new_tokens": tokens, "config": SamplingConfig(temperature=0.0)}

    def write(way: Setting) -> tuple[list[list[int]], int]:
        """The texts of all prompts, and the passes of the core, one after another."""
        texts: list[list[int]] = []
        passes = 0
        for prompts in parts:
            usage = samplers.used_by(prompts)
            sample = getattr(samplers, way.sampler.replace("-", "_"))
            for _ in sample(model, prompts, usage, **{"depth": depth} | shared | way.options):
                pass
            texts += usage.tokens
            passes += usage.core_passes
        return texts, passes

    written, seconds = {}, {way.name: [] for way in ways}
    for way in ways:  # compiles
        written[way.name] = write(way)
        timing.say(f"batch {len(parts[0])}: {way.sampler}, {way.name}")
    for _ in range(rounds):
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
            {
                "batch": len(parts[0]),
                "sampler": way.sampler,
                "setting": way.name,
                "tokens_per_s": round(sum(map(len, texts)) / took, 1),
                "faster": round(plain_seconds / took, 2),
                "passes_per_token": round(passes / len(parts) / tokens, 2),
                "fewer_passes": round(plain_passes / passes, 2),
                "same_tokens": round(float(np.mean(np.array(texts) == np.array(plain))), 4),
                "nats_per_token": round(nats(model, prompts, texts, depth), 4),
            }
        )
    return records


def nats(model: Any, prompts: list[list[int]], texts: list[list[int]], depth: int) -> float:
    """Mean loss of the texts after their prompts at full depth."""
    whole = np.concatenate([np.array(prompts), np.array(texts)], axis=1).astype(np.int32)
    logits = forward(model, whole[:, :-1], jnp.int32(depth))
    losses, _ = token_losses(logits, jnp.asarray(whole[:, 1:]))
    return float(np.mean(np.asarray(losses)[:, len(prompts[0]) - 1 :]))


@jax.jit
def forward(model: Any, tokens: Any, depth: Any) -> Any:
    return model(tokens, depth=depth)[0]


def tables(results: dict[str, Any]) -> str:
    """What README.md says in numbers."""
    lines = [
        f"Full depth {results['depth']}, trained at {results['mean_loops']} loops in the mean;"
        f" {results['tokens']} tokens a text. {bench_tables.machine(results)}.",
        "",
    ]
    for batch in dict.fromkeys(x["batch"] for x in results["results"]):
        lines += [
            f"| batch {batch}: sampler | setting | tokens/s | faster | passes per token"
            " | fewer passes | same tokens % | nats per token |",
            "|---" * 8 + "|",
        ]
        for x in results["results"]:
            if x["batch"] == batch:
                lines.append(
                    f"| {x['sampler']} | {x['setting']} | {x['tokens_per_s']:,.0f} |"
                    f" {x['faster']:.2f} | {x['passes_per_token']:.2f} | {x['fewer_passes']:.2f} |"
                    f" {100 * x['same_tokens']:.0f} | {x['nats_per_token']:.3f} |"
                )
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Quality against speed and against passes, by batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = list(dict.fromkeys(x["batch"] for x in results["results"]))
    figure, panels = plt.subplots(2, len(batches), figsize=(10, 7), layout="constrained")
    for column, batch in zip(panels.T, batches, strict=True):
        for axis, measure in zip(column, ("faster", "fewer_passes"), strict=True):
            for sampler, colour in COLOURS.items():
                rows = [
                    x for x in results["results"] if (x["batch"], x["sampler"]) == (batch, sampler)
                ]
                values = [[x[measure] for x in rows], [100 * x["same_tokens"] for x in rows]]
                axis.plot(*values, "o", color=colour, alpha=0.7, label=sampler)
            what = {"faster": "times as fast", "fewer_passes": "times fewer sequential passes"}
            axis.set(
                xscale="log",
                xlabel=f"{what[measure]} as at depth {results['depth']}",
                ylabel="same tokens %",
                title=f"batch {batch}",
            )
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
