"""The tables and the picture of what run.py has measured."""

from pathlib import Path
from typing import Any

from jaxrec.cli import bench_tables

COLOURS = {
    "autoregressive": "black",
    "adaptive": "tab:green",
    "speculative": "tab:blue",
    "diffusion-forcing": "tab:red",
}


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
    from matplotlib.ticker import LogLocator, NullFormatter

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
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=80)
